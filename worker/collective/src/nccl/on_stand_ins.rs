//! The calls to driver and NCCL, made: against stand-ins of both that a test compiles and lays in
//! the loader's way. Not a word about speed, and none about what only a GPU can tell.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use super::tests::{RINGS, by_rank, numbered, ring_sum, run};
use super::{CudaLinks, DeviceEndpoint, Links};
use crate::contract::{assert_sums, bits, endpoints, even, limits, requests, scattered, serial};
use crate::{Endpoint, Floats, Limits, Reduce, SumOrder, Transport};

type Device = Arc<DeviceEndpoint<CudaLinks>>;

const INNER: &str = "nccl::on_stand_ins::inner";

/// Compiles the stand-ins under their originals' names; `None` without a compiler.
fn stand_ins() -> Option<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stand_in/gpu.rs");
    let folder = std::env::temp_dir().join(format!("belfry-stand-ins-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a temporary folder");
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    let compiled = Command::new(rustc)
        .args(["--edition", "2024", "-O", "--crate-type", "cdylib", "-o"])
        .args([&folder.join("libcuda.so"), &source])
        .output()
        .ok()?;
    let told = String::from_utf8_lossy(&compiled.stderr);
    assert!(compiled.status.success(), "{told}");
    Some(folder)
}

/// This test program once more, with only `folder` in the loader's way.
fn again(folder: &Path) -> (bool, String) {
    let output = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", INNER, "--ignored", "--nocapture"])
        .env("LD_LIBRARY_PATH", folder)
        .output()
        .expect("starts");
    let told = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&told).into_owned(),
    )
}

#[test]
fn the_gpus_side_gives_the_serial_bits_on_stand_ins_and_names_what_is_missing() {
    let Some(folder) = stand_ins() else {
        println!("SKIPPED: no rustc to compile the stand-ins");
        return;
    };
    let driver = folder.join("libcuda.so");
    let (well, told) = again(&folder);
    assert!(!well && told.contains("libnccl.so not found in"), "{told}");
    let named = folder.display().to_string();
    assert!(told.contains(&named), "{told}");
    std::fs::copy(&driver, folder.join("libnccl.so")).expect("copied");
    let (well, told) = again(&folder);
    assert!(well && told.contains("1 passed"), "{told}");
    std::fs::remove_dir_all(folder).expect("removed");
}

#[test]
#[ignore = "runs by the test above, with stand-ins in the loader's way"]
fn inner() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(4)
        .enable_all()
        .build();
    runtime.expect("a runtime").block_on(async {
        flat_and_between_hosts().await;
        large().await;
        rings().await;
        lent_floats().await;
        given_up().await;
    });
}

async fn devices(members: usize) -> (Vec<Device>, Vec<std::net::SocketAddr>) {
    let (tcp, addrs) = endpoints(members).await;
    let limits = Limits {
        connect_timeout: Duration::from_millis(500),
        silence_timeout: Duration::from_secs(2),
        ..limits()
    };
    let device = |(gpu, tcp): (usize, Arc<Endpoint>)| {
        let links = CudaLinks::open(gpu as u16).unwrap_or_else(|e| panic!("{e}"));
        tcp.set_limits(limits.clone());
        DeviceEndpoint::new(tcp, links)
    };
    (tcp.into_iter().enumerate().map(device).collect(), addrs)
}

fn everybody(members: usize) -> Vec<Vec<usize>> {
    vec![(0..members).collect()]
}

fn any() -> CudaLinks {
    CudaLinks::open(0).expect("opens")
}

async fn flat_and_between_hosts() {
    for groups in [
        everybody(1),
        everybody(2),
        everybody(7),
        vec![vec![0, 2, 4], vec![1], vec![3, 5, 6]],
    ] {
        let members = groups.iter().map(Vec::len).sum();
        let (devices, addrs) = devices(members).await;
        for (generation, lanes, len) in [(1, 16, 613), (2, 64, 613), (5, 7, 3), (6, 7, 0)] {
            let links = by_rank(&any(), groups.clone(), SumOrder::Tree);
            for nodes in [even(lanes, members), even(lanes, members)] {
                let requests = requests(lanes, len, &nodes, &addrs);
                let results = run(&devices, numbered(requests, generation), &links).await;
                assert_sums(results, lanes, len);
            }
        }
    }
}

/// Longer than a pinned slot, so copies go in pieces.
async fn large() {
    let len = (3 << 20) + 5;
    let (devices, addrs) = devices(2).await;
    let mut requests = numbered(requests(3, len, &scattered(3, 2), &addrs), 1);
    requests.iter_mut().for_each(|r| r.bucket_len = 1 << 20);
    let links = by_rank(&any(), everybody(2), SumOrder::Tree);
    assert_sums(run(&devices, requests, &links).await, 3, len);
}

async fn rings() {
    for (wire, members) in RINGS.into_iter().flat_map(|w| [(w, 1), (w, 3)]) {
        let (devices, addrs) = devices(members).await;
        let nodes = scattered(16, members);
        let ring = numbered(requests(16, 613, &nodes, &addrs), 1);
        let links = by_rank(&any(), everybody(members), SumOrder::Ring(wire));
        for reduced in run(&devices, ring, &links).await {
            let reduced = reduced.expect("succeeds");
            assert_eq!(
                bits(&reduced.sum),
                bits(&ring_sum(&nodes, wire)),
                "{wire:?}"
            );
        }
    }
}

/// The sum that a device keeps is read where it is by the next exchange.
async fn lent_floats() {
    let (devices, addrs) = devices(2).await;
    let links = by_rank(&any(), everybody(2), SumOrder::Tree);
    let first = requests(2, 613, &even(2, 2), &addrs);
    let results = run(&devices, numbered(first.clone(), 1), &links).await;
    let mut second: Vec<Reduce<Floats>> = numbered(first, 1);
    for (request, result) in second.iter_mut().zip(results) {
        let lent = result.expect("succeeds").on_device.expect("kept");
        assert_eq!(lent.owner.to_host().expect("copies"), serial(2, 613));
        let node = request.members[request.rank].nodes[0];
        request.partials.insert(node, Floats::Device(lent));
    }
    let third: Vec<f32> = serial(2, 613).iter().map(|x| (x + x) / 3.0).collect();
    for reduced in run(&devices, second, &links).await {
        let reduced = reduced.expect("succeeds");
        assert_eq!(bits(&reduced.sum), bits(&third));
    }
}

/// A member that never comes is named; its communicator is aborted and a newer one works.
async fn given_up() {
    let (mut devices, mut addrs) = devices(3).await;
    let all = numbered(requests(16, 613, &even(16, 3), &addrs), 1);
    let links = by_rank(&any(), everybody(3), SumOrder::Tree);
    devices.remove(2);
    for result in run(&devices, all[..2].to_vec(), &links).await {
        assert_eq!(result.expect_err("rank 2 never comes").ranks(), [2]);
    }
    addrs.truncate(2);
    let links = by_rank(&any(), everybody(2), SumOrder::Tree);
    let newer = numbered(requests(16, 613, &even(16, 2), &addrs), 2);
    let dropped = Arc::clone(&devices[0]).reduce(newer[0].clone(), Some(links[0].clone()));
    let started = tokio::spawn(dropped);
    tokio::task::yield_now().await;
    started.abort();
    let _ = started.await;
    let links = by_rank(&any(), everybody(2), SumOrder::Tree);
    let newest = numbered(requests(16, 613, &even(16, 2), &addrs), 3);
    assert_sums(run(&devices, newest, &links).await, 16, 613);
    assert!(any().new_id().expect("an id").len() == 128);
}
