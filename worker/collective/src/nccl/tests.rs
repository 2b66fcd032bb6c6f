//! The contract of the exchange once more, for the device transport on host memory: the bits of
//! TCP and of the serial sum, within one group and between hosts, and named errors.

use std::sync::Arc;
use std::time::Duration;

use belfry_proto::LaneRange;

use super::memory::{Hub, MemoryLinks, bf16};
use super::{DeviceEndpoint, Links};
use crate::contract::{
    DIVIDE_BY, assert_sums, bits, digest, endpoints, even, limits, node_sum, on_tcp, requests,
    scattered, serial,
};
use crate::{
    CollectiveError, DeviceFloats, DeviceLinks, DeviceOwner, Endpoint, Floats, Limits, Reaction,
    Reduce, Reduced, SumOrder, Transport, Wire,
};

type Device = Arc<DeviceEndpoint<MemoryLinks>>;
pub(super) type Results = Vec<Result<Reduced, CollectiveError>>;

pub(super) const RINGS: [Wire; 2] = [Wire::F32, Wire::Bf16];

async fn devices(
    members: usize,
    limits: Limits,
) -> (Vec<Device>, Vec<std::net::SocketAddr>, Arc<Hub>) {
    let (tcp, addrs) = endpoints(members).await;
    let hub = Arc::new(Hub::default());
    let device = |tcp: Arc<Endpoint>| {
        tcp.set_limits(limits.clone());
        DeviceEndpoint::new(tcp, MemoryLinks(Arc::clone(&hub)))
    };
    (tcp.into_iter().map(device).collect(), addrs, hub)
}

fn on_host(request: &Reduce) -> Reduce<Floats> {
    let partials = request.partials.iter();
    request.with(
        partials
            .map(|(n, p)| (*n, Floats::from(Arc::clone(p))))
            .collect(),
    )
}

/// Everybody in one group.
fn flat(hub: &Arc<Hub>, members: usize, order: SumOrder) -> Vec<DeviceLinks> {
    grouped(hub, vec![(0..members).collect()], order)
}

fn grouped(hub: &Arc<Hub>, groups: Vec<Vec<usize>>, order: SumOrder) -> Vec<DeviceLinks> {
    by_rank(&MemoryLinks(Arc::clone(hub)), groups, order)
}

/// Links by rank, under fresh ids.
pub(super) fn by_rank(
    links: &impl Links,
    groups: Vec<Vec<usize>>,
    order: SumOrder,
) -> Vec<DeviceLinks> {
    let id = |_: &Vec<usize>| links.new_id().expect("an id");
    let ids: Vec<Vec<u8>> = groups.iter().map(id).collect();
    let members = groups.iter().map(Vec::len).sum();
    let of = |rank| {
        let own = groups.iter().position(|g| g.contains(&rank));
        DeviceLinks {
            groups: groups.clone(),
            id: ids[own.expect("in a group")].clone(),
            order,
        }
    };
    (0..members).map(of).collect()
}

pub(super) async fn run<L: Links>(
    devices: &[Arc<DeviceEndpoint<L>>],
    requests: Vec<Reduce<Floats>>,
    links: &[DeviceLinks],
) -> Results {
    let mut tasks = Vec::new();
    for (rank, request) in requests.into_iter().enumerate() {
        let (device, links) = (Arc::clone(&devices[rank]), links[rank].clone());
        tasks.push(tokio::spawn(device.reduce(request, Some(links))));
    }
    let mut results = Vec::new();
    for task in tasks {
        results.push(task.await.expect("no panic"));
    }
    results
}

pub(super) fn numbered(requests: Vec<Reduce>, generation: u64) -> Vec<Reduce<Floats>> {
    let numbered = |mut request: Reduce| {
        request.generation = generation;
        on_host(&request)
    };
    requests.into_iter().map(numbered).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn device_links_give_the_serial_bits_for_any_number_of_members() {
    for members in 1..=9 {
        let (devices, addrs, hub) = devices(members, limits()).await;
        let mut generation = 0;
        for lanes in [16, 7, 64] {
            for len in [0, 3, 150, 613] {
                for nodes in [even(lanes, members), scattered(lanes, members)] {
                    generation += 1;
                    let requests = requests(lanes, len, &nodes, &addrs);
                    let requests = numbered(requests, generation);
                    let links = flat(&hub, members, SumOrder::Tree);
                    assert_sums(run(&devices, requests, &links).await, lanes, len);
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_and_tcp_agree_over_steps_and_generations() {
    let (tcp, tcp_addrs) = endpoints(7).await;
    let (devices, addrs, hub) = devices(7, limits()).await;
    let nodes = even(64, 7);
    let over_tcp = on_tcp(&tcp, requests(64, 613, &nodes, &tcp_addrs)).await;
    let over_tcp = over_tcp[0].as_ref().expect("succeeds");
    for generation in [1, 5] {
        let links = flat(&hub, 7, SumOrder::Tree);
        for _step in 0..3 {
            let requests = numbered(requests(64, 613, &nodes, &addrs), generation);
            for reduced in run(&devices, requests, &links).await {
                let reduced = reduced.expect("succeeds");
                assert_eq!(bits(&reduced.sum), bits(&over_tcp.sum));
                assert_eq!(reduced.digest, over_tcp.digest);
                // Slices out and sums out, without headers.
                assert!(reduced.bytes_sent > 0 && reduced.bytes_sent < over_tcp.bytes_sent * 2);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn newcomers_without_nodes_receive_the_sum() {
    let (devices, addrs, hub) = devices(5, limits()).await;
    let mut nodes = even(16, 3);
    nodes.insert(1, Vec::new());
    nodes.push(Vec::new());
    let newcomers = requests(16, 613, &nodes, &addrs);
    let links = flat(&hub, 5, SumOrder::Tree);
    assert_sums(run(&devices, numbered(newcomers, 1), &links).await, 16, 613);
    // Also where a whole host of them arrives.
    let mut nodes = even(16, 3);
    nodes.extend([Vec::new(), Vec::new()]);
    let newcomers = requests(16, 613, &nodes, &addrs);
    let links = grouped(&hub, vec![vec![0, 1, 2], vec![3, 4]], SumOrder::Tree);
    assert_sums(run(&devices, numbered(newcomers, 2), &links).await, 16, 613);
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_are_summed_inside_and_then_between_to_the_same_bits() {
    let groupings: [&[&[usize]]; 7] = [
        &[&[0, 1], &[2, 3]],
        &[&[0, 2], &[1, 3]],
        &[&[0], &[1, 2, 3]],
        &[&[0], &[1], &[2]],
        &[&[1, 4, 6], &[0, 2], &[3, 5]],
        &[&[0, 1, 2], &[3, 4, 5], &[6, 7, 8]],
        &[&[0, 8], &[1, 2, 3, 4, 5, 6, 7]],
    ];
    for groups in groupings {
        let groups: Vec<Vec<usize>> = groups.iter().map(|g| g.to_vec()).collect();
        let members = groups.iter().map(Vec::len).sum();
        let (devices, addrs, hub) = devices(members, limits()).await;
        let mut generation = 0;
        for (lanes, len) in [(16, 613), (7, 150), (64, 613), (16, 3)] {
            for nodes in [even(lanes, members), scattered(lanes, members)] {
                generation += 1;
                let links = grouped(&hub, groups.clone(), SumOrder::Tree);
                // Twice: the second exchange uses the links of the first.
                for _ in 0..2 {
                    let requests = requests(lanes, len, &nodes, &addrs);
                    let results = run(&devices, numbered(requests, generation), &links).await;
                    assert_sums(results, lanes, len);
                }
            }
        }
    }
}

/// Host memory that plays a device's.
#[derive(Debug)]
struct Memory(Vec<f32>);

impl DeviceOwner for Memory {
    fn to_host(&self) -> Result<Vec<f32>, String> {
        Ok(self.0.clone())
    }
}

fn on_device(request: &Reduce) -> Reduce<Floats> {
    let place = |(node, values): (&LaneRange, &Arc<Vec<f32>>)| {
        let floats = DeviceFloats {
            pointer: 0,
            len: values.len(),
            owner: Arc::new(Memory(values.to_vec())),
        };
        (*node, Floats::Device(floats))
    };
    request.with(request.partials.iter().map(place).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn floats_on_a_device_are_summed_where_they_are_and_staged_for_tcp() {
    let (devices, addrs, hub) = devices(3, limits()).await;
    let requests: Vec<_> = requests(16, 613, &even(16, 3), &addrs)
        .iter()
        .map(on_device)
        .collect();
    let links = flat(&hub, 3, SumOrder::Tree);
    for reduced in run(&devices, requests.clone(), &links).await {
        let reduced = reduced.expect("succeeds");
        assert_eq!(bits(&reduced.sum), bits(&serial(16, 613)));
        assert!(reduced.node_digests.is_empty(), "they never came down");
    }
    let mut tasks = Vec::new();
    for (device, mut request) in devices.iter().cloned().zip(requests) {
        request.generation = 2;
        tasks.push(tokio::spawn(device.reduce(request, None)));
    }
    let mut results = Vec::new();
    for task in tasks {
        results.push(task.await.expect("no panic"));
    }
    assert_sums(results, 16, 613);
}

fn impatient() -> Limits {
    Limits {
        connect_timeout: Duration::from_millis(500),
        silence_timeout: Duration::from_millis(300),
        ..limits()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_dies_midway_is_named_and_the_repetition_gives_the_same_bits() {
    let (mut devices, mut addrs, hub) = devices(3, impatient()).await;
    *hub.dies.lock().expect("unlocked") = Some((1, 2));
    let requests_1 = numbered(requests(16, 613, &even(16, 3), &addrs), 1);
    let links = flat(&hub, 3, SumOrder::Tree);
    let mut tasks = Vec::new();
    let dying = devices.remove(1);
    for (device, rank) in [(dying, 1), (devices[0].clone(), 0), (devices[1].clone(), 2)] {
        let (request, links) = (requests_1[rank].clone(), links[rank].clone());
        tasks.push(tokio::spawn(async move {
            let result = Arc::clone(&device).reduce(request, Some(links)).await;
            (rank, result)
        }));
    }
    for task in tasks {
        let (rank, result) = task.await.expect("no panic");
        let error = result.expect_err("half an exchange");
        if rank == 1 {
            assert!(matches!(error, CollectiveError::Device(_)), "{error}");
            continue;
        }
        // Who noticed late may find only that nobody goes on.
        let broke = matches!(error, CollectiveError::LinksBroke { generation: 1, .. });
        assert!(broke && error.reaction() == Reaction::Rejoin, "{error}");
        assert!(error.ranks().is_empty() || error.ranks() == [1], "{error}");
    }
    let over = Arc::clone(&devices[0]);
    let over = over.reduce(requests_1[0].clone(), Some(links[0].clone()));
    let error = over.await.expect_err("over");
    let is_over = matches!(error, CollectiveError::GenerationOver { generation: 1, .. });
    assert!(is_over, "{error}");

    *hub.dies.lock().expect("unlocked") = None;
    addrs.remove(1);
    let repeated = numbered(requests(16, 613, &scattered(16, 2), &addrs), 2);
    let links = flat(&hub, 2, SumOrder::Tree);
    assert_sums(run(&devices, repeated, &links).await, 16, 613);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_is_gone_before_it_joins_is_named() {
    let (mut devices, addrs, hub) = devices(3, impatient()).await;
    let all = numbered(requests(16, 613, &even(16, 3), &addrs), 1);
    let links = flat(&hub, 3, SumOrder::Tree);
    devices.remove(2);
    let results = run(&devices, all[..2].to_vec(), &links).await;
    for result in results {
        let error = result.expect_err("rank 2 never comes");
        assert_eq!(error.ranks(), [2], "{error}");
        assert!(error.to_string().contains("[2]"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_exchange_blames_nobody_and_can_be_repeated() {
    let (devices, addrs, hub) = devices(3, impatient()).await;
    let all = numbered(requests(16, 613, &even(16, 3), &addrs), 1);
    let links = flat(&hub, 3, SumOrder::Tree);
    let mut started: Vec<_> = (0..2)
        .map(|rank| {
            let device: Device = Arc::clone(&devices[rank]);
            tokio::spawn(device.reduce(all[rank].clone(), Some(links[rank].clone())))
        })
        .collect();
    let dropped = started.remove(1);
    dropped.abort();
    let _ = dropped.await;
    // Rank 2 lives but never takes part; rank 0 leaves for a newer generation.
    let waits = started.remove(0);
    let newer = numbered(requests(16, 613, &even(16, 3), &addrs), 2);
    let links = flat(&hub, 3, SumOrder::Tree);
    assert_sums(run(&devices, newer, &links).await, 16, 613);
    let error = waits.await.expect("no panic").expect_err("was overtaken");
    assert!(error.ranks().is_empty(), "{error}");
}

/// What a ring that adds in the order of ranks gives.
pub(super) fn ring_sum(nodes: &[Vec<LaneRange>], wire: Wire) -> Vec<f32> {
    let carried = |x: f32| if wire == Wire::Bf16 { bf16(x) } else { x };
    let held = |nodes: &Vec<LaneRange>| {
        let sums = nodes.iter().map(|n| node_sum(*n, 613));
        let sum = sums.reduce(|a, b| a.iter().zip(b).map(|(a, b)| a + b).collect());
        let sum = sum.expect("every member has nodes").into_iter();
        sum.map(carried).collect::<Vec<f32>>()
    };
    let add = |a: Vec<f32>, b: Vec<f32>| {
        let pairs = a.iter().zip(b);
        pairs.map(|(a, b)| carried(a + b)).collect::<Vec<f32>>()
    };
    let sum = nodes.iter().map(held).reduce(add).expect("members");
    sum.into_iter().map(|x| x / DIVIDE_BY as f32).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ring_gives_all_members_the_same_bits_in_its_own_order() {
    for (wire, members) in RINGS.into_iter().flat_map(|w| [(w, 1), (w, 3), (w, 5)]) {
        let (devices, addrs, hub) = devices(members, limits()).await;
        let nodes = scattered(16, members);
        let ring = numbered(requests(16, 613, &nodes, &addrs), 1);
        let links = flat(&hub, members, SumOrder::Ring(wire));
        let expected = ring_sum(&nodes, wire);
        for reduced in run(&devices, ring, &links).await {
            let reduced = reduced.expect("succeeds");
            assert_eq!(bits(&reduced.sum), bits(&expected), "{wire:?} {members}");
            assert_eq!(reduced.digest, digest(&expected));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn links_that_make_no_sense_are_refused() {
    let (devices, addrs, hub) = devices(2, limits()).await;
    let request = &numbered(requests(16, 613, &even(16, 2), &addrs), 1)[0];
    let refused = async |groups: Vec<Vec<usize>>, order| {
        let links = DeviceLinks {
            groups,
            id: vec![1],
            order,
        };
        let device = Arc::clone(&devices[0]);
        let error = device.reduce(request.clone(), Some(links)).await;
        let error = error.expect_err("refused");
        assert_eq!(error.reaction(), Reaction::Fatal, "{error}");
        error.to_string()
    };
    for groups in [vec![vec![0]], vec![vec![0, 1], vec![1]], vec![vec![1, 0]]] {
        let told = refused(groups, SumOrder::Tree).await;
        assert!(told.contains("each once"), "{told}");
    }
    let ring = SumOrder::Ring(Wire::F32);
    let told = refused(vec![vec![0], vec![1]], ring).await;
    assert!(told.contains("one group"), "{told}");
    // And a process without devices says so instead of waiting.
    let (tcp, addrs) = endpoints(1).await;
    let alone = on_host(&requests(16, 3, &even(16, 1), &addrs)[0]);
    let links = flat(&hub, 1, SumOrder::Tree).remove(0);
    let told = Transport::reduce(Arc::clone(&tcp[0]), alone, Some(links)).await;
    let told = told.expect_err("TCP only").to_string();
    assert!(told.contains("collective.transport"), "{told}");
    assert!(Transport::new_id(&*tcp[0]).is_err());
}
