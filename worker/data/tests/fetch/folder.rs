//! The cache's folder: bounded at every moment, shared, checked, and cleared of what was left.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use belfry_data::DataError;
use belfry_data::cache::Cache;
use shard_tools::manifest::Manifest;

use crate::dataset;
use crate::fault_proxy::{Fault, FaultProxy};
use crate::http_server;
use crate::skipped::skipped;

/// Set for the process that [`a_worker_of_another_test`] is.
const WORKER: &str = "BELFRY_TEST_WORKER";
const PATIENCE: Duration = Duration::from_secs(60);

/// A dataset behind a proxy, and a folder for its cache.
struct Case {
    served: tempfile::TempDir,
    manifest: Manifest,
    proxy: FaultProxy,
    cache: tempfile::TempDir,
}

impl Case {
    fn with(fault: fn(u64) -> Fault) -> Self {
        let served = tempfile::tempdir().expect("a folder");
        let manifest = dataset::write(served.path());
        let upstream = http_server::serve(served.path()).to_string();
        let is_shard = |path: &str| path.contains(".tar");
        Case {
            served,
            manifest,
            proxy: FaultProxy::start(&upstream, is_shard, Arc::new(fault)),
            cache: tempfile::tempdir().expect("a folder"),
        }
    }

    fn url(&self) -> String {
        format!("http://{}/", self.proxy.address)
    }

    fn worker(&self, bytes_max: u64) -> Cache {
        Cache::open(&self.url(), self.cache.path(), bytes_max).expect("opens")
    }

    /// Another process that fetches shard 3 and then holds it until it is killed.
    fn process(&self) -> Child {
        let own = std::env::current_exe().expect("has a path");
        Command::new(own)
            .args(["--exact", "folder::a_worker_of_another_test", "--ignored"])
            .env(
                WORKER,
                format!("{} {}", self.url(), self.cache.path().display()),
            )
            .stdout(Stdio::null())
            .spawn()
            .expect("starts")
    }

    fn files(&self, ending: &str) -> Vec<std::path::PathBuf> {
        let entries = std::fs::read_dir(self.cache.path()).expect("is there");
        let paths = entries.flatten().map(|entry| entry.path());
        paths
            .filter(|path| path.to_string_lossy().ends_with(ending))
            .collect()
    }

    fn gets(&self) -> u64 {
        self.proxy.requests.load(Ordering::SeqCst)
    }

    /// Ranged GETs that the shard takes.
    fn ranges(&self, shard: usize) -> u64 {
        self.manifest.shards[shard].bytes.div_ceil(8 << 20)
    }

    /// Every member of the shard's first and last sample is that of the dataset.
    fn check(&self, worker: &Cache, shard: usize) {
        let entry = &self.manifest.shards[shard];
        let tar = std::fs::read(self.served.path().join(&entry.file)).expect("is read");
        let (index, opened) = (worker.index(shard).expect("is read"), worker.shard(shard));
        let opened = opened.expect("is read");
        for sample in [0, index.samples() - 1] {
            for member in [index.image(sample, 0), index.text(sample)] {
                let range = member.offset as usize..(member.offset + member.bytes) as usize;
                assert_eq!(opened.member(&member).expect("is read"), tar[range]);
            }
        }
    }
}

fn until(what: &str, mut happened: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !happened() {
        assert!(begun.elapsed() < PATIENCE, "{what}: not in time");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Bytes that the folder's files hold now. One that goes away while they are counted holds none.
fn held(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).expect("is there").flatten();
    entries
        .filter_map(|entry| Some(entry.metadata().ok()?.len()))
        .sum()
}

#[test]
#[ignore = "the process that other tests start"]
fn a_worker_of_another_test() {
    let Ok(given) = std::env::var(WORKER) else {
        return;
    };
    let (url, folder) = given.split_once(' ').expect("has both");
    let cache = Cache::open(url, Path::new(folder), u64::MAX).expect("opens");
    let _shard = cache.shard(3).expect("is read");
    loop {
        std::thread::park();
    }
}

#[test]
fn workers_fetch_once_and_the_bound_holds_at_every_moment() {
    let case = Case::with(|_| Fault::None);
    let sizes: Vec<u64> = case.manifest.shards.iter().map(|s| s.bytes).collect();
    let roomy: Vec<Cache> = (0..4).map(|_| case.worker(1 << 30)).collect();
    std::thread::scope(|scope| {
        for worker in &roomy {
            for shard in (0..4).chain(0..4) {
                let case = &case;
                scope.spawn(move || case.check(worker, shard));
            }
        }
    });
    let once: u64 = (0..4).map(|shard| case.ranges(shard)).sum();
    assert_eq!(case.gets(), once, "four workers fetched every shard once");
    drop(roomy);

    // Room for the largest and one of the others, with the indexes.
    let indexes: u64 = case
        .files(".json")
        .iter()
        .map(|f| f.metadata().expect("is there").len())
        .sum();
    let bound = sizes[3] + sizes[1] + indexes;
    let narrow: Vec<Cache> = (0..3).map(|_| case.worker(bound)).collect();
    assert!(
        held(case.cache.path()) <= bound,
        "a smaller bound holds from the start"
    );
    let over = AtomicBool::new(false);
    let most = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut most = 0;
            while !over.load(Ordering::SeqCst) {
                most = most.max(held(case.cache.path()));
            }
            most
        });
        std::thread::scope(|scope| {
            for (first, worker) in narrow.iter().enumerate() {
                let case = &case;
                scope.spawn(move || {
                    for turn in 0..12 {
                        case.check(worker, (first + turn) % 4);
                    }
                });
            }
        });
        over.store(true, Ordering::SeqCst);
        watcher.join().expect("ends")
    });
    assert!(most <= bound, "held {most} of {bound}");
    assert!(most > sizes[3], "held only {most}");
    assert!(case.files(".part").is_empty());
}

#[test]
fn a_reader_keeps_what_is_removed_under_it_until_it_opens_another() {
    let case = Case::with(|_| Fault::None);
    let reader = case.worker(1 << 30);
    let index = reader.index(0).expect("is read");
    let shard = reader.shard(0).expect("is read");
    let text = index.text(0);
    let before = shard.member(&text).expect("is read");
    let other = case.worker(case.manifest.shards[3].bytes + 1);
    other.shard(3).expect("is read");
    assert_eq!(case.files(".tar").len(), 1, "the first one had to go");
    assert_eq!(shard.member(&text).expect("is still read"), before);
    let gets = case.gets();
    reader.shard(0).expect("is still there");
    assert_eq!(case.gets(), gets);
    reader.shard(1).expect("is read");
    reader
        .shard(0)
        .expect("is fetched again, its room was given back");
    assert_eq!(case.gets(), gets + 2);
}

#[test]
fn a_corrupt_file_is_fetched_again() {
    let case = Case::with(|_| Fault::None);
    case.check(&case.worker(1 << 30), 0);
    let flip = |file: &Path| {
        let mut bytes = std::fs::read(file).expect("is read");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(file, bytes).expect("is written");
    };
    let cut = |file: &Path| {
        let file = std::fs::OpenOptions::new()
            .write(true)
            .open(file)
            .expect("opens");
        file.set_len(100).expect("is cut");
    };
    let spoils: [&dyn Fn(&Path); 2] = [&flip, &cut];
    for (turn, spoil) in spoils.iter().enumerate() {
        for file in case.files(".tar").iter().chain(&case.files(".json")) {
            spoil(file);
        }
        let worker = case.worker(1 << 30);
        case.check(&worker, 0);
        assert_eq!(worker.counts().corrupt.load(Ordering::SeqCst), 2);
        assert_eq!(case.gets(), 2 + turn as u64);
    }
}

#[test]
fn what_a_killed_worker_leaves_is_cleared_and_what_a_living_one_writes_is_waited_for() {
    // The first four answers are for two processes, and slow; the others are not.
    let case = Case::with(|n| match n {
        0 | 1 => Fault::Slow(1_000),
        2 | 3 => Fault::Slow(8_000_000),
        _ => Fault::None,
    });
    let shard = 3;
    assert_eq!(case.ranges(shard), 2);
    let mut killed = case.process();
    until("a part is begun", || {
        case.files(".part").len() == 1 && case.gets() == 2
    });
    killed.kill().expect("is killed");
    killed.wait().expect("ends");
    assert_eq!(case.files(".part").len(), 1, "it leaves its part");

    let mut living = case.process();
    until("the leftover is cleared", || case.gets() == 4);
    let worker = case.worker(1 << 30);
    assert_eq!(case.files(".part").len(), 1, "a living worker's part stays");
    worker.shard(shard).expect("is waited for");
    assert_eq!(case.gets(), 4, "and is not fetched twice");
    assert!(case.files(".part").is_empty());
    case.check(&worker, shard);
    living.kill().expect("is killed");
    living.wait().expect("ends");
}

#[test]
fn a_stopped_worker_is_not_waited_for_for_ever() {
    let case = Case::with(|n| {
        if n < 2 {
            Fault::Slow(1_000)
        } else {
            Fault::None
        }
    });
    let mut stopped = case.process();
    until("a part is begun", || {
        case.files(".part").len() == 1 && case.gets() == 2
    });
    let signal = |name: &str, child: &Child| {
        let sent = Command::new("kill")
            .args([name, &child.id().to_string()])
            .status();
        assert!(sent.is_ok_and(|status| status.success()));
    };
    signal("-STOP", &stopped);
    let worker = case.worker(1 << 30);
    case.check(&worker, 3);
    assert_eq!(case.gets(), 4);
    assert_eq!(
        (case.files(".part").len(), case.files(".tar").len()),
        (0, 1)
    );
    stopped.kill().expect("is killed");
    stopped.wait().expect("ends");
}

#[test]
fn a_cache_without_room_says_so() {
    let case = Case::with(|_| Fault::None);
    let worker = case.worker(case.manifest.shards[3].bytes - 1);
    let small = worker.shard(3).expect_err("does not fit").to_string();
    assert!(small.starts_with("data.cache_bytes_max: "), "{small}");

    let disk = tempfile::tempdir().expect("a folder");
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
        .arg(disk.path())
        .stderr(Stdio::null())
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        return skipped(
            "mounting a small tmpfs needs root; a full disk under the cache is not tested",
        );
    }
    let worker = Cache::open(&case.url(), disk.path(), 1 << 30).expect("opens");
    let full = worker.shard(3).expect_err("the disk is full");
    let text = full.to_string();
    let parts = std::fs::read_dir(disk.path()).expect("is there").flatten();
    let left = parts
        .filter(|entry| entry.path().extension().is_some())
        .count();
    drop(worker);
    let unmounted = Command::new("umount").arg(disk.path()).status();
    assert!(matches!(full, DataError::CacheFull { .. }), "{text}");
    assert!(
        text.contains("no space left") && text.contains("data.cache_bytes_max"),
        "{text}"
    );
    assert_eq!(left, 0, "what was begun is gone");
    assert!(unmounted.is_ok_and(|status| status.success()));
}
