//! Two coordinators and one run, on real processes: a standby takes over from a leader that died or
//! froze, one that wakes up changes nothing, and a store that is away stops nobody. Faults are placed
//! by what the run itself reports, never by sleeping.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use belfry_proto::journal::Entry;
use belfry_proto::v1::coordinator_client::CoordinatorClient;
use belfry_proto::v1::{Reason, RunEvent, WatchRequest};
use serde_json::Value;

use crate::system::{Run, alone, kill, outcome, packed};

/// So many that a run goes on for seconds after a failover.
const STEPS: &str = "run.steps=150";
const PATIENCE: Duration = Duration::from_secs(240);
/// Half of `cluster.max_stall_seconds` of configs/tiny.toml.
const LEASE: Duration = Duration::from_millis(2500);

/// What an undisturbed run of so many steps ends with.
fn undisturbed() -> &'static (String, String) {
    static HASHES: OnceLock<(String, String)> = OnceLock::new();
    HASHES.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a folder");
        let run = Run::in_folder(folder.path());
        run.finish(1, &["--set", STEPS]).hashes()
    })
}

fn signal(pid: u32, name: &str) {
    let sent = Command::new("kill").args([name, &pid.to_string()]).status();
    assert!(sent.expect("kill is there").success(), "it did not fire");
}

/// The journal's entries, ascending.
fn entries(root: &Path) -> Vec<Entry> {
    let folder = fs::read_dir(root.join("journal"));
    let files = folder.into_iter().flatten().flatten().map(|e| e.path());
    let mut files: Vec<PathBuf> = files
        .filter(|f| f.extension().is_some_and(|e| e == "json"))
        .collect();
    files.sort();
    // The oldest ones may go while they are read.
    let texts = files.iter().filter_map(|f| fs::read(f).ok());
    texts.filter_map(|t| Entry::parse(&t).ok()).collect()
}

/// Repeats `look` until it finds something.
fn await_some<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The first entry of this term.
fn await_term(root: &Path, term: u64) -> Entry {
    await_some("a term", || {
        entries(root).into_iter().find(|e| e.term == term)
    })
}

/// Follows a coordinator's events until one is wanted.
fn await_event(address: &str, mut wanted: impl FnMut(&RunEvent) -> bool) -> RunEvent {
    let runtime = tokio::runtime::Runtime::new().expect("starts");
    let begun = Instant::now();
    let watched = async {
        while begun.elapsed() < PATIENCE {
            let Ok(mut client) = CoordinatorClient::connect(format!("http://{address}")).await
            else {
                tokio::task::yield_now().await;
                continue;
            };
            let request = WatchRequest { from_step: 0 };
            let Ok(events) = client.watch(request).await else {
                continue;
            };
            let mut events = events.into_inner();
            while let Ok(Some(event)) = events.message().await {
                if wanted(&event) {
                    return event;
                }
            }
        }
        panic!("the event did not come");
    };
    let watched = runtime.block_on(async { tokio::time::timeout(PATIENCE, watched).await });
    watched.expect("the event comes")
}

fn at_step(step: u64) -> impl Fn(&RunEvent) -> bool {
    move |event| event.step >= step
}

/// Coordinators and workers without a launcher; they end with their guard.
struct Cluster {
    root: PathBuf,
    folder: PathBuf,
    children: Vec<Child>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Cluster {
    fn new(folder: &Path) -> Self {
        packed(folder);
        let root = folder.join("run");
        fs::create_dir_all(&root).expect("is made");
        Cluster {
            root,
            folder: folder.to_owned(),
            children: Vec::new(),
        }
    }

    /// Returns its place among the children.
    fn start(&mut self, role: &str, name: &str, more: &[&str]) -> usize {
        let log = File::create(self.log(name)).expect("is made");
        let set =
            |key: &str, folder: &str| format!("data.{key}={}", self.folder.join(folder).display());
        let child = Command::new(env!("CARGO_BIN_EXE_belfry"))
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .args([role, "configs/tiny.toml", "--set", STEPS])
            .args(["--set", &set("train", "data/train")])
            .args(["--set", &set("validation", "data/validation")])
            .arg("--root")
            .arg(&self.root)
            .args(more)
            .env("RAYON_NUM_THREADS", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn();
        self.children.push(child.expect("the binary starts"));
        self.children.len() - 1
    }

    fn log(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.log"))
    }

    fn said(&self, name: &str) -> String {
        fs::read_to_string(self.log(name)).expect("was written")
    }

    /// A leader, a standby that says whom it stands by, and workers that find the leader by the root.
    fn start_pair(&mut self) -> (usize, usize) {
        let leader = self.start("coordinator", "a", &["--name", "a", "--workers", "2"]);
        await_term(&self.root, 1);
        let more = ["--standby", "--name", "b", "--workers", "2"];
        let standby = self.start("coordinator", "b", &more);
        await_some("the standby", || {
            self.said("b").contains("standing by").then_some(())
        });
        let cache = self.folder.join("cache").display().to_string();
        for id in ["0", "1"] {
            let more = ["--id", id, "--cache", &cache];
            self.start("worker", &format!("worker-{id}"), &more);
        }
        (leader, standby)
    }

    fn pid(&self, child: usize) -> u32 {
        self.children[child].id()
    }

    fn ended(&mut self, child: usize) -> ExitStatus {
        let child = &mut self.children[child];
        await_some("an end", || child.try_wait().expect("is ours"))
    }

    fn hashes(&self) -> (String, String) {
        let text = fs::read(self.root.join("result.json")).expect("was written");
        let result: Value = serde_json::from_slice(&text).expect("is JSON");
        let hash = |key: &str| result[key].as_str().expect("a hash").to_owned();
        (hash("parameters_sha256"), hash("optimizer_sha256"))
    }
}

#[test]
fn a_standby_takes_over_from_a_leader_that_died() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let mut cluster = Cluster::new(folder.path());
    let (leader, standby) = cluster.start_pair();
    let first = await_term(&cluster.root, 1);
    await_event(&first.address, at_step(3));
    kill(cluster.pid(leader));
    let died = Instant::now();
    let second = await_term(&cluster.root, 2);
    let led = died.elapsed();
    assert_eq!(second.name, "b");
    await_event(&second.address, |e| e.committed.is_some());
    println!(
        "a leader's death: succeeded after {:.2} s (lease {:.1} s), next commit after {:.2} s",
        led.as_secs_f64(),
        LEASE.as_secs_f64(),
        died.elapsed().as_secs_f64()
    );
    assert!(cluster.ended(standby).success(), "{}", cluster.said("b"));
    assert_eq!(cluster.hashes(), *undisturbed());
    for worker in [2, 3] {
        assert!(cluster.ended(worker).success(), "no worker left its run");
    }
}

#[test]
fn a_leader_that_froze_and_wakes_up_changes_nothing_and_says_why_it_ends() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let mut cluster = Cluster::new(folder.path());
    let (leader, standby) = cluster.start_pair();
    let first = await_term(&cluster.root, 1);
    await_event(&first.address, at_step(3));
    signal(cluster.pid(leader), "-STOP");
    let froze = Instant::now();
    let second = await_term(&cluster.root, 2);
    await_event(&second.address, |e| e.committed.is_some());
    println!(
        "a frozen leader: next commit after {:.2} s",
        froze.elapsed().as_secs_f64()
    );
    signal(cluster.pid(leader), "-CONT");
    let ended = cluster.ended(leader);
    assert_eq!(ended.code(), Some(3), "{}", cluster.said("a"));
    let said = cluster.said("a");
    assert!(said.contains("another coordinator (term 2 at"), "{said}");
    assert!(cluster.ended(standby).success(), "{}", cluster.said("b"));
    assert_eq!(cluster.hashes(), *undisturbed());
    let late = entries(&cluster.root)
        .into_iter()
        .find(|e| e.seq > second.seq && e.term != 2);
    assert_eq!(late, None, "an entry of the old leader");
}

/// The launcher's pair: whoever leads is frozen, the other goes on; both are there at the end.
#[test]
fn a_pair_under_the_launcher_outlives_a_frozen_leader() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run::in_folder(folder.path());
    let mut child = run.start(2, &["--standby", "--set", STEPS]);
    run.await_steps(&mut child, 3);
    let root = folder.path().join("run");
    let leader = entries(&root).pop().expect("somebody leads");
    let pid = run.pid(&leader.name);
    signal(pid, "-STOP");
    await_term(&root, leader.term + 1);
    let steps = |run: &Run| {
        let text = fs::read_to_string(run.local.join("metrics.jsonl"));
        text.expect("is written").lines().count()
    };
    let before = steps(&run);
    run.await_steps(&mut child, before + 1);
    signal(pid, "-CONT");
    let ended = outcome(child.wait_with_output().expect("ends"));
    assert_eq!(ended.hashes(), *undisturbed());
}

/// A coordinator that is started again at once is back at once.
#[test]
fn a_coordinator_that_is_started_again_stalls_the_run_for_a_moment() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run::in_folder(folder.path());
    let mut child = run.start(2, &["--set", STEPS]);
    let root = folder.path().join("run");
    let mut stalls = Vec::new();
    for term in 2..5 {
        let leader = await_term(&root, term - 1);
        await_event(&leader.address, |e| e.committed.is_some());
        kill(run.pid("coordinator"));
        let died = Instant::now();
        let next = await_term(&root, term);
        let led = died.elapsed();
        await_event(&next.address, |e| e.committed.is_some());
        stalls.push(died.elapsed());
        println!(
            "a coordinator's restart: leads after {:.2} s, next commit after {:.2} s",
            led.as_secs_f64(),
            died.elapsed().as_secs_f64()
        );
    }
    let ended = outcome(child.wait_with_output().expect("ends"));
    assert_eq!(ended.hashes(), *undisturbed());
    // Of three the middle one: this machine may be busy with something else.
    stalls.sort();
    assert!(stalls[1] < Duration::from_secs(2), "{stalls:?}");
}

/// No journal entry can be written or read for a while: steps go on, what needs an entry waits and
/// says so, and nothing is given up.
#[test]
fn a_store_that_is_away_delays_what_needs_it_and_stops_nothing() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run::in_folder(folder.path());
    let mut child = run.start(3, &["--set", STEPS]);
    run.await_steps(&mut child, 3);
    let root = folder.path().join("run");
    let address = await_term(&root, 1).address;
    let (journal, aside) = (root.join("journal"), root.join("journal-aside"));
    let mut watched = false;
    let away = await_event(&address, |event| {
        // Only now is nothing missed.
        if !std::mem::replace(&mut watched, true) {
            fs::rename(&journal, &aside).expect("is there");
            fs::write(&journal, "no folder").expect("stands in its place");
        }
        event.reason() == Reason::StoreUnavailable
    });
    assert!(away.notice.contains("journal entry"), "{}", away.notice);
    await_event(&address, at_step(away.step + 5));
    kill(run.pid("worker-1"));
    let waits = await_event(&address, |e| e.waiting_for.contains("the store"));
    assert!(waits.waiting_for.contains("journal entry"), "{waits:?}");
    fs::remove_file(&journal).expect("is there");
    fs::rename(&aside, &journal).expect("is there");
    await_event(&address, at_step(waits.step + 5));
    let ended = outcome(child.wait_with_output().expect("ends"));
    assert_eq!(ended.hashes(), *undisturbed());
    assert_eq!(
        entries(&root).last().map(|e| e.term),
        Some(1),
        "nobody else had to lead"
    );
}
