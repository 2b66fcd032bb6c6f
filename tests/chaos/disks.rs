//! Disks that are full: under a checkpoint, under a worker's shard cache.

use std::net::SocketAddr;

use belfry_proto::v1::Reason;

use crate::Test;
use crate::case::Case;
use crate::cluster::{Setup, data};
use crate::proxy::{Effects, Proxy};
use crate::small_disk::SmallDisk;

pub const TESTS: &[Test] = &[
    ("full_disk_at_a_checkpoint", full_disk_at_a_checkpoint),
    ("full_disk_at_the_cache", full_disk_at_the_cache),
];

/// Entries of the journal and receipts still fit; a checkpoint of ten megabytes does not.
fn full_disk_at_a_checkpoint() {
    let folder = tempfile::tempdir().expect("a folder");
    let disk = SmallDisk::mount(&folder.path().join("root"), 96).expect("root mounts");
    let setup = Setup {
        root: Some(disk.0.display().to_string()),
        ..Setup::new(2, &["run.steps=40"])
    };
    let mut case = Case::start("disk full at a checkpoint", setup);
    case.at(1, 2);
    case.fire(|_| disk.fill(1 << 20));
    let words = [
        Reason::CheckpointDelayed,
        Reason::CheckpointGivenUp,
        Reason::StoreUnavailable,
    ];
    case.see("a word about the checkpoint", |seen| {
        words.contains(&seen.event.reason())
    });
    // It is delayed; training is not.
    case.recover();
    let logs = case.run.log("worker-0") + &case.run.log("worker-1") + &case.run.log("coordinator");
    let refused = logs.to_lowercase().matches("no space left").count();
    assert!(refused > 0, "nobody met the full disk");
    case.fired(format!("{refused} lines \"no space left\""));
    disk.relieve();
    case.run
        .until("a checkpoint", |seen| seen.event.checkpoint > 0);
    let run = case.end();
    assert_eq!(run.restarts, 0);
}

/// Shards come over HTTP, and one worker has no room for them.
fn full_disk_at_the_cache() {
    let server = crate::http_server::serve(data());
    let gate = Proxy::open(Effects::default(), move || Some::<SocketAddr>(server));
    let train = format!("data.train=http://{}/train", gate.address);
    let folder = tempfile::tempdir().expect("a folder");
    let disk = SmallDisk::mount(&folder.path().join("cache"), 16).expect("root mounts");
    disk.fill(4 << 10);
    let setup = Setup {
        caches: vec![(1, disk.0.clone())],
        ..Setup::new(2, &["run.steps=80", &train])
    };
    let mut case = Case::start("disk full at a worker's cache", setup);
    case.fire(|_| ());
    // Its disk is its own trouble: it goes, by name, and the other goes on without it.
    case.see("what worker 1 lacks", |seen| {
        let (event, said) = (&seen.event, &seen.event.notice);
        let named = ["data.cache_dir", "no space left"];
        event.reason() == Reason::WorkerFailed
            && event.worker_id == Some(1)
            && named.iter().all(|part| said.contains(part))
    });
    case.recover();
    case.fired("1: named with worker, key and folder");
    disk.relieve();
    case.run.until("both at work", |seen| {
        seen.event.committed.is_some() && seen.event.workers == 2
    });
    case.end();
}
