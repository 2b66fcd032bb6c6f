//! The contract of the exchange, on memory links and on TCP: bitwise equality with a serial sum
//! in tree order, and a named error for every way in which a peer can fail.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use belfry_proto::LaneRange;
use belfry_proto::lanes::{cut, maximal_nodes, root};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use xxhash_rust::xxh3::xxh3_128;

use crate::digest::{SLICE_FLOATS, slice_digests, state_digest};
use crate::endpoint::dial;
use crate::exchange::{LinkFuture, PeerLinks, exchange};
use crate::fold::tree_sum;
use crate::frame::{BoxLink, Header, Kind, encode, encode_bytes, read_frame};
use crate::{CollectiveError, Endpoint, Limits, Member, Reaction, Reduce, Reduced, StateSource};

const RUN: u64 = 0xbe1f;
const BUCKET_LEN: usize = 50;
pub(crate) const DIVIDE_BY: u32 = 3;

pub(crate) fn limits() -> Limits {
    Limits {
        connect_timeout: Duration::from_secs(10),
        silence_timeout: Duration::from_secs(20),
        start_timeout: Duration::from_secs(20),
        // Several frames per bucket.
        frame_bytes_max: 64,
    }
}

fn usual(_: usize) -> Limits {
    limits()
}

/// Only rank 1 is impatient, so that it is the one to notice.
fn impatient(rank: usize) -> Limits {
    let short = Duration::from_millis(300);
    match rank {
        1 => Limits {
            silence_timeout: short,
            start_timeout: short,
            ..limits()
        },
        _ => limits(),
    }
}

fn leaf(lane: u32, len: usize) -> Vec<f32> {
    (0..len)
        .map(|i| 0.1 + ((lane as usize * 7919 + i * 31) % 1000) as f32 * 1.000_1e-3)
        .collect()
}

pub(crate) fn node_sum(node: LaneRange, len: usize) -> Vec<f32> {
    let lanes = node.start..node.end;
    let mut leaves = lanes
        .map(|l| {
            (
                LaneRange {
                    start: l,
                    end: l + 1,
                },
                leaf(l, len),
            )
        })
        .collect();
    tree_sum(node, &mut leaves).expect("all leaves are there")
}

pub(crate) fn serial(lanes: u32, len: usize) -> Vec<f32> {
    node_sum(root(lanes), len)
        .into_iter()
        .map(|x| x / DIVIDE_BY as f32)
        .collect()
}

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

pub(crate) fn digest(values: &[f32]) -> u128 {
    xxh3_128(
        &values
            .iter()
            .flat_map(|x| x.to_le_bytes())
            .collect::<Vec<u8>>(),
    )
}

/// Contiguous ranges, one per member.
pub(crate) fn even(lanes: u32, members: usize) -> Vec<Vec<LaneRange>> {
    let ranges = cut(lanes, &vec![1.0; members], 4).into_iter();
    ranges.map(|r| maximal_nodes(lanes, &r.collect())).collect()
}

/// Lanes dealt out one by one: as scattered as a repair can leave them.
pub(crate) fn scattered(lanes: u32, members: usize) -> Vec<Vec<LaneRange>> {
    let held = |m: usize| {
        (0..lanes)
            .filter(|l| *l as usize * 5 % 7 % members == m)
            .collect()
    };
    (0..members)
        .map(|m| maximal_nodes(lanes, &held(m)))
        .collect()
}

pub(crate) fn requests(
    lanes: u32,
    len: usize,
    nodes: &[Vec<LaneRange>],
    addrs: &[SocketAddr],
) -> Vec<Reduce> {
    let members: Vec<Member> = nodes
        .iter()
        .zip(addrs)
        .map(|(nodes, addr)| Member {
            addr: *addr,
            nodes: nodes.clone(),
        })
        .collect();
    let of = |rank: usize| Reduce {
        generation: 1,
        step: 5,
        lanes,
        rank,
        members: members.clone(),
        partials: nodes[rank]
            .iter()
            .map(|n| (*n, Arc::new(node_sum(*n, len))))
            .collect(),
        len,
        divide_by: DIVIDE_BY,
        bucket_len: BUCKET_LEN,
    };
    (0..nodes.len()).map(of).collect()
}

/// What happens to the bytes of one memory link.
#[derive(Clone, Copy)]
enum Fault {
    Flip(usize),
    Cut(usize),
    Stall(usize),
}

/// A link on whose way `fault` happens.
fn link(fault: Option<Fault>) -> (BoxLink, BoxLink) {
    let (from, far) = tokio::io::duplex(100);
    let Some(fault) = fault else {
        return (Box::new(from), Box::new(far));
    };
    let (mut near, to) = tokio::io::duplex(100);
    let mut far = far;
    tokio::spawn(async move {
        let mut at = 0;
        while let Ok(mut byte) = far.read_u8().await {
            match fault {
                Fault::Flip(n) if n == at => byte ^= 1,
                Fault::Cut(n) if n == at => return,
                Fault::Stall(n) if n == at => std::future::pending().await,
                _ => {}
            }
            at += 1;
            if near.write_u8(byte).await.is_err() {
                return;
            }
        }
    });
    (Box::new(from), Box::new(to))
}

/// All members in one process, on memory links; `faulty` is a link from rank to rank.
async fn in_memory(
    requests: Vec<Reduce>,
    limits: impl Fn(usize) -> Limits,
    faulty: Option<((usize, usize), Fault)>,
) -> Vec<Result<Reduced, CollectiveError>> {
    let members = requests.len();
    let mut ends: BTreeMap<(usize, usize), (BoxLink, BoxLink)> = BTreeMap::new();
    for from in 0..members {
        for to in (0..members).filter(|to| *to != from) {
            let fault = faulty
                .filter(|(pair, _)| *pair == (from, to))
                .map(|(_, f)| f);
            ends.insert((from, to), link(fault));
        }
    }
    let (mut outgoing, mut incoming) = (BTreeMap::new(), BTreeMap::new());
    for (pair, (near, far)) in ends {
        outgoing.insert(pair, near);
        incoming.insert(pair, far);
    }
    let ready = |link: Option<BoxLink>| -> LinkFuture {
        Box::pin(async move { Ok(link.expect("each link is used once")) })
    };
    let mut tasks = Vec::new();
    for (rank, request) in requests.into_iter().enumerate() {
        let peers = (0..members).filter(|peer| *peer != rank);
        let links = peers
            .map(|peer| {
                let outgoing = ready(outgoing.remove(&(rank, peer)));
                let incoming = ready(incoming.remove(&(peer, rank)));
                (peer, PeerLinks { outgoing, incoming })
            })
            .collect();
        let limits = limits(rank);
        tasks.push(tokio::spawn(async move {
            exchange(Arc::new(request), RUN, limits, links)
                .await
                .map(|(reduced, _)| reduced)
        }));
    }
    let mut results = Vec::new();
    for task in tasks {
        results.push(task.await.expect("no panic"));
    }
    results
}

fn nowhere(members: usize) -> Vec<SocketAddr> {
    (0..members)
        .map(|m| SocketAddr::from(([127, 0, 0, 1], 1000 + m as u16)))
        .collect()
}

pub(crate) fn assert_sums(results: Vec<Result<Reduced, CollectiveError>>, lanes: u32, len: usize) {
    let expected = serial(lanes, len);
    let mut parts = None;
    for reduced in results {
        let reduced = reduced.expect("the exchange succeeds");
        assert_eq!(bits(&reduced.sum), bits(&expected));
        assert_eq!(reduced.digest, digest(&expected));
        parts.get_or_insert_with(|| reduced.parts.clone());
        assert_eq!(
            parts.as_ref(),
            Some(&reduced.parts),
            "as all others have them"
        );
        for (node, found) in reduced.node_digests {
            assert_eq!(found, digest(&node_sum(node, len)));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_links_give_the_serial_bits_for_any_number_of_members() {
    for lanes in [16, 7, 64] {
        for members in 1..=9 {
            for len in [0, 3, 150, 613] {
                for nodes in [even(lanes, members), scattered(lanes, members)] {
                    let requests = requests(lanes, len, &nodes, &nowhere(members));
                    assert_sums(in_memory(requests, usual, None).await, lanes, len);
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn newcomers_without_nodes_receive_the_sum() {
    let mut nodes = even(16, 3);
    nodes.insert(1, Vec::new());
    nodes.push(Vec::new());
    assert_sums(
        in_memory(requests(16, 613, &nodes, &nowhere(5)), usual, None).await,
        16,
        613,
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_is_noticed_and_its_sender_named() {
    // Behind the 64 bytes of the sign of life: in the header and in the payload of a slice.
    for at in [64 + 33, 64 + 64 + 5] {
        let requests = requests(16, 613, &even(16, 2), &nowhere(2));
        let results = in_memory(requests, usual, Some(((0, 1), Fault::Flip(at)))).await;
        let error = results[1].as_ref().expect_err("corrupt");
        assert!(
            matches!(error, CollectiveError::Corrupt { rank: 0, .. }),
            "{error}"
        );
        assert_eq!(
            (error.ranks(), error.reaction()),
            (vec![0], Reaction::Quarantine)
        );
        assert!(results[0].is_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_ends_or_stalls_names_its_peer() {
    let run = |fault| {
        let requests = requests(16, 613, &even(16, 2), &nowhere(2));
        in_memory(requests, impatient, Some(((0, 1), fault)))
    };
    for at in [0, 64, 200] {
        let results = run(Fault::Cut(at)).await;
        let error = results[1].as_ref().expect_err("cut");
        assert!(
            matches!(error, CollectiveError::PeerLost { rank: 0, .. }),
            "{error}"
        );
    }
    let results = run(Fault::Stall(200)).await;
    let error = results[1].as_ref().expect_err("stalled");
    assert!(
        matches!(error, CollectiveError::PeerSilent { rank: 0, .. }),
        "{error}"
    );
}

pub(crate) async fn endpoints(members: usize) -> (Vec<Arc<Endpoint>>, Vec<SocketAddr>) {
    let mut endpoints = Vec::new();
    for _ in 0..members {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        endpoints.push(
            Endpoint::bind(any, RUN, limits())
                .await
                .expect("a free port"),
        );
    }
    let addrs = endpoints.iter().map(|e| e.local_addr()).collect();
    (endpoints, addrs)
}

pub(crate) async fn on_tcp(
    endpoints: &[Arc<Endpoint>],
    requests: Vec<Reduce>,
) -> Vec<Result<Reduced, CollectiveError>> {
    let both = endpoints.iter().cloned().zip(requests);
    let start = |(endpoint, request): (Arc<Endpoint>, Reduce)| {
        tokio::spawn(async move { endpoint.all_reduce(request).await })
    };
    let tasks: Vec<_> = both.map(start).collect();
    let mut results = Vec::new();
    for task in tasks {
        results.push(task.await.expect("no panic"));
    }
    results
}

#[tokio::test(flavor = "multi_thread")]
async fn tcp_gives_the_serial_bits_over_steps_and_generations() {
    for members in [1, 2, 3, 5, 9] {
        let (endpoints, addrs) = endpoints(members).await;
        for (generation, step) in [(1, 5), (1, 6), (1, 7), (4, 7), (4, 8)] {
            let mut requests = requests(16, 613, &even(16, members), &addrs);
            for request in &mut requests {
                (request.generation, request.step) = (generation, step);
            }
            assert_sums(on_tcp(&endpoints, requests).await, 16, 613);
        }
        assert!(endpoints.iter().all(|e| e.refused() == 0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_dies_midway_is_named_and_the_repetition_gives_the_same_bits() {
    let (mut endpoints, mut addrs) = endpoints(1).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    addrs.push(listener.local_addr().expect("bound"));
    let requests_1 = requests(16, 613, &even(16, 2), &addrs);
    let mut hello = Header::new(Kind::Hello, RUN, 1, 5);
    hello.bucket = 1;
    let survivor = Arc::clone(&endpoints[0]);
    let request = requests_1[0].clone();
    let reduce = tokio::spawn(async move { survivor.all_reduce(request).await });
    // The other member takes part with half a frame and is gone, its listener with it.
    let mut link = dial(addrs[0], hello, Duration::from_secs(5))
        .await
        .expect("dialled");
    let (mut accepted, _) = listener.accept().await.expect("dialled back");
    read_frame(&mut accepted, 64).await.expect("greeted");
    let mut part = Header::new(Kind::Part, RUN, 1, 5);
    part.node = requests_1[1].members[1].nodes[0];
    link.write_all(&encode(part, &[1.0; 8])[..70])
        .await
        .expect("written");
    drop(listener);
    drop((link, accepted));
    let error = reduce
        .await
        .expect("no panic")
        .expect_err("half an exchange");
    assert!(
        matches!(error, CollectiveError::PeerLost { rank: 1, .. }),
        "{error}"
    );
    assert_eq!(error.reaction(), Reaction::Rejoin);
    // The generation is over here, for this member and for others.
    let again = endpoints[0]
        .all_reduce(requests_1[0].clone())
        .await
        .expect_err("over");
    assert!(
        matches!(again, CollectiveError::GenerationOver { generation: 1, .. }),
        "{again}"
    );

    let newcomer = Endpoint::bind("127.0.0.1:0".parse().expect("an address"), RUN, limits()).await;
    endpoints.push(newcomer.expect("a free port"));
    addrs[1] = endpoints[1].local_addr();
    let mut repeated = requests(16, 613, &scattered(16, 2), &addrs);
    repeated.iter_mut().for_each(|r| r.generation = 2);
    assert_sums(on_tcp(&endpoints, repeated).await, 16, 613);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_exchange_blames_nobody_and_can_be_repeated() {
    let (endpoints, mut addrs) = endpoints(3).await;
    let real = addrs[2];
    // Rank 2 is reachable but never takes part, so nobody can finish.
    let idle = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    addrs[2] = idle.local_addr().expect("bound");
    let all = requests(16, 613, &even(16, 3), &addrs);
    let start = |rank: usize| {
        let (endpoint, request) = (Arc::clone(&endpoints[rank]), all[rank].clone());
        tokio::spawn(async move { endpoint.all_reduce(request).await })
    };
    let dropped = start(1);
    let _begun = idle.accept().await.expect("rank 1 has begun");
    let waits = start(0);
    let _begun_too = idle.accept().await.expect("rank 0 has begun");
    dropped.abort();
    assert!(dropped.await.expect_err("aborted").is_cancelled());
    let error = waits.await.expect("no panic").expect_err("rank 1 is gone");
    assert!(
        error.ranks().is_empty() && error.reaction() == Reaction::Rejoin,
        "{error}"
    );
    addrs[2] = real;
    let mut newer = requests(16, 613, &even(16, 3), &addrs);
    newer.iter_mut().for_each(|r| r.generation = 2);
    assert_sums(on_tcp(&endpoints, newer).await, 16, 613);
}

#[tokio::test(flavor = "multi_thread")]
async fn stale_generations_and_other_runs_are_refused_and_disturb_nobody() {
    let (endpoints, addrs) = endpoints(2).await;
    let mut requests = requests(16, 613, &even(16, 2), &addrs);
    requests.iter_mut().for_each(|r| r.generation = 7);
    assert_sums(on_tcp(&endpoints, requests.clone()).await, 16, 613);
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    for (run, generation) in [(RUN, 6), (RUN + 1, 8)] {
        let stranger = Endpoint::bind(any, run, limits())
            .await
            .expect("a free port");
        let mut stale = requests[0].clone();
        stale.generation = generation;
        let error = stranger.all_reduce(stale).await.expect_err("refused");
        let named = match error {
            CollectiveError::StaleGeneration {
                rank: 1,
                generation: 6,
                held: 7,
                ..
            } => run == RUN,
            CollectiveError::OtherRun {
                rank: 1,
                theirs: RUN,
                ..
            } => run != RUN,
            _ => false,
        };
        assert!(named, "{error}");
    }
    // Counted when the refused connection is closed, which is after the stranger has heard of it.
    let counted = async {
        while endpoints[1].refused() < 2 {
            tokio::task::yield_now().await;
        }
    };
    let counted = tokio::time::timeout(Duration::from_secs(10), counted);
    counted.await.expect("both refusals are counted");
    assert_eq!(endpoints[1].refused(), 2);
    requests.iter_mut().for_each(|r| r.step = 6);
    assert_sums(on_tcp(&endpoints, requests).await, 16, 613);
}

struct State {
    step: u64,
    tensors: Vec<Vec<f32>>,
}

impl StateSource for State {
    fn step(&self) -> u64 {
        self.step
    }
    fn tensors(&self) -> usize {
        self.tensors.len()
    }
    fn tensor(&self, index: usize) -> &[f32] {
        &self.tensors[index]
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_is_copied_from_all_sources_even_if_one_dies() {
    let tensors: Vec<Vec<f32>> = (0..3).map(|t| leaf(t, 1001)).collect();
    for sources in 1..=3 {
        let (endpoints, mut addrs) = endpoints(sources).await;
        for endpoint in &endpoints {
            let state = State {
                step: 9,
                tensors: tensors.clone(),
            };
            endpoint.publish_state(Some(Arc::new(state)));
        }
        // A source that takes a request and dies.
        let dying = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        addrs.insert(0, dying.local_addr().expect("bound"));
        let mut dies = JoinSet::new();
        dies.spawn(async move { drop(dying.accept().await) });
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let newcomer = Endpoint::bind(any, RUN, limits())
            .await
            .expect("a free port");
        let arrived = AtomicU64::new(0);
        let copy = async |addrs: &[SocketAddr], step| {
            newcomer.copy_state(addrs, step, (3, 1001), &arrived).await
        };
        let copied = copy(&addrs, 9).await.expect("copied");
        assert_eq!(copied.tensors, tensors);
        assert!(arrived.load(Ordering::Relaxed) >= 3 * 4 * 1001);
        let all: Vec<&[f32]> = tensors.iter().map(Vec::as_slice).collect();
        let expected = state_digest(9, &slice_digests(&all));
        assert_eq!((copied.digest, copied.liars), (expected, vec![]));
        let gone = copy(&addrs[1..], 8).await.expect_err("gone");
        assert!(
            matches!(gone, CollectiveError::StateGone { step: 8, .. }),
            "{gone}"
        );
        endpoints.iter().for_each(|e| e.publish_state(None));
        let gone = copy(&addrs[1..], 9).await.expect_err("gone");
        assert!(
            matches!(gone, CollectiveError::StateGone { step: 9, .. }),
            "{gone}"
        );
        assert!(copy(&addrs[..1], 9).await.is_err());
        assert!(copy(&[], 9).await.is_err());
    }
}

/// Sources that hold these tensors, some slices each, as of step 9.
async fn holders(states: Vec<Vec<Vec<f32>>>) -> (Vec<Arc<Endpoint>>, Vec<SocketAddr>) {
    let (endpoints, addrs) = endpoints(states.len()).await;
    for (endpoint, tensors) in endpoints.iter().zip(states) {
        endpoint.set_limits(Limits {
            frame_bytes_max: 1 << 20,
            ..limits()
        });
        endpoint.publish_state(Some(Arc::new(State { step: 9, tensors })));
    }
    (endpoints, addrs)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_holds_other_bits_is_named_and_the_copy_is_right() {
    let len = 2 * SLICE_FLOATS + 77;
    let right: Vec<Vec<f32>> = (0..3).map(|t| leaf(t, len)).collect();
    for (tensor, at) in [(0, 5), (1, SLICE_FLOATS + 1), (2, len - 1)] {
        let mut wrong = right.clone();
        wrong[tensor][at] = f32::from_bits(wrong[tensor][at].to_bits() ^ 1);
        let (sources, addrs) = holders(vec![wrong.clone(), right.clone(), right.clone()]).await;
        let arrived = AtomicU64::new(0);
        let copied = sources[1].copy_state(&addrs, 9, (3, len), &arrived).await;
        let copied = copied.expect("two of three are right");
        assert!(copied.tensors == right, "the bits of the majority");
        assert_eq!(copied.liars, [addrs[0]]);
        // Of two nobody knows who is right.
        let error = sources[1]
            .copy_state(&addrs[..2], 9, (3, len), &arrived)
            .await;
        let error = error.expect_err("a draw");
        assert!(
            matches!(error, CollectiveError::Disagree { step: 9, .. }),
            "{error}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changes_on_its_way_is_asked_of_another() {
    let len = SLICE_FLOATS + 10;
    let right: Vec<Vec<f32>> = (0..3).map(|t| leaf(t, len)).collect();
    let (sources, mut addrs) = holders(vec![right.clone(), right.clone()]).await;
    // A source whose memory lies between hashing and sending: it tells what it should hold.
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let honest = addrs[0];
    addrs[0] = listener.local_addr().expect("bound");
    let mut lies = JoinSet::new();
    lies.spawn(async move {
        let mut links = JoinSet::new();
        while let Ok((mut near, _)) = listener.accept().await {
            links.spawn(async move {
                let mut far = tokio::net::TcpStream::connect(honest)
                    .await
                    .expect("is there");
                while let Ok(asked) = read_frame(&mut near, 0).await {
                    let request = encode(asked.header, &[]);
                    far.write_all(&request).await.expect("is there");
                    let Ok(mut answer) = read_frame(&mut far, 1 << 20).await else {
                        return;
                    };
                    if answer.header.kind == Kind::StateChunk {
                        answer.payload[7] ^= 1;
                    }
                    let answer = encode_bytes(answer.header, &answer.payload);
                    if near.write_all(&answer).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    let arrived = AtomicU64::new(0);
    let copied = sources[1].copy_state(&addrs, 9, (3, len), &arrived).await;
    let copied = copied.expect("one source is sound");
    assert!(copied.tensors == right);
    assert_eq!(copied.liars, [addrs[0]]);
}

#[test]
fn scattered_lanes_are_a_tiling() {
    let held: BTreeSet<LaneRange> = scattered(16, 3).into_iter().flatten().collect();
    assert!(belfry_proto::lanes::tiles_exactly(16, held).is_ok());
}
