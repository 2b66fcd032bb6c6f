//! One fault on one run: start, fire, watch, end, compare. It also knows how to send a signal and
//! how to be sure that it arrived.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use belfry_proto::v1::Reason;

use crate::apart::must;
use crate::cluster::{Cluster, Hashes, Setup};
use crate::table::{self, Line};

/// A signal acts at once; this is for a machine that does not.
const SIGNAL_PATIENCE: Duration = Duration::from_secs(10);

/// What an undisturbed run with one worker ends with; one per set of overrides that changes bits.
pub fn undisturbed(settings: &[String]) -> Hashes {
    static KNOWN: Mutex<BTreeMap<Vec<String>, Hashes>> = Mutex::new(BTreeMap::new());
    // These change when something happens or where it lies, never what is computed.
    let when = ["cluster.", "checkpoint.", "data.train"];
    let changes = |s: &&String| !when.iter().any(|key| s.starts_with(key));
    let key: Vec<String> = settings.iter().filter(changes).cloned().collect();
    let known = KNOWN.lock().expect("no panic inside").get(&key).cloned();
    known.unwrap_or_else(|| {
        let mut run = Cluster::start(Setup {
            settings: key.clone(),
            ..Setup::new(1, &[])
        });
        let hashes = run.finish();
        run.audit();
        let mut all = KNOWN.lock().expect("no panic inside");
        all.insert(key, hashes.clone());
        hashes
    })
}

/// A fault and the run that it meets.
pub struct Case {
    fault: String,
    settings: Vec<String>,
    pub run: Cluster,
    fired: String,
    at: Option<Instant>,
    generation: u64,
    seen: Option<Duration>,
    recovered: Option<Duration>,
}

impl Case {
    pub fn start(fault: &str, setup: Setup) -> Self {
        Case {
            fault: fault.to_owned(),
            settings: setup.settings.clone(),
            run: Cluster::start(setup),
            fired: String::new(),
            at: None,
            generation: 0,
            seen: None,
            recovered: None,
        }
    }

    /// Waits until `steps` are committed by `workers` at once.
    pub fn at(&mut self, steps: u64, workers: u32) {
        self.run
            .until(&format!("step {steps} with {workers} workers"), |seen| {
                let event = &seen.event;
                event.committed.is_some() && event.step >= steps && event.workers >= workers
            });
    }

    /// Fires the fault; the clock of detection and recovery starts just before, the first time.
    pub fn fire<T>(&mut self, act: impl FnOnce(&mut Cluster) -> T) -> T {
        let at = Instant::now();
        if self.at.is_none() {
            self.generation = self.run.generation();
            self.at = Some(at);
        }
        let done = act(&mut self.run);
        assert!(at.elapsed() < SIGNAL_PATIENCE, "the fault took its time");
        done
    }

    /// What proves that the fault really happened.
    pub fn fired(&mut self, proof: impl Into<String>) {
        self.fired = proof.into();
    }

    /// Since the fault.
    pub fn since(&self, at: Instant) -> Duration {
        at - self.at.expect("was fired")
    }

    /// Waits for the coordinator's word about `worker`, then for the next commit.
    pub fn seen_and_recovered(&mut self, worker: u64, reasons: &[Reason]) {
        let fault = self.at.expect("was fired");
        let seen = self.run.noticed(fault, worker, reasons);
        self.seen = Some(self.since(seen));
        self.recover();
    }

    /// Waits until `worker` is here again; its word may have come already.
    pub fn back(&mut self, worker: u64) {
        let fault = self.at.expect("was fired");
        let here = [Reason::WorkerJoined, Reason::WorkerReturned];
        self.run.noticed(fault, worker, &here);
    }

    /// What of the coordinator's events says that it sees the fault.
    pub fn see(&mut self, what: &str, wanted: impl Fn(&crate::watch::Seen) -> bool) {
        let seen = self.run.until(what, wanted).at;
        self.seen = Some(self.since(seen));
    }

    /// Waits for the next commit.
    pub fn recover(&mut self) {
        let commit = self.run.next_commit();
        self.recovered = Some(self.since(commit));
    }

    /// From the fault until the coordinator saw it.
    pub fn seen(&self) -> Option<Duration> {
        self.seen
    }

    /// The end of the run: the bits of an undisturbed one, and a ledger that proves it.
    pub fn end(mut self) -> Cluster {
        let hashes = self.run.finish();
        assert_eq!(hashes, undisturbed(&self.settings), "{}", self.fault);
        self.run.audit();
        assert!(
            !self.fired.is_empty(),
            "{}: nothing proves that it fired",
            self.fault
        );
        table::add(Line {
            fault: self.fault,
            fired: self.fired,
            seen: self.seen,
            recovered: self.recovered,
            generations: self.run.generation() - self.generation,
            restarts: self.run.restarts,
            recomputed: self.run.recomputed,
        });
        self.run
    }
}

/// Sends a signal to a process that must be there.
pub fn signal(pid: u32, name: &str) {
    must(Command::new("kill").args(["-s", name, &pid.to_string()]));
}

/// The state letter of a process: `T` is stopped, `Z` dead and not yet asked for.
pub fn state(pid: u32) -> char {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let behind_name = stat.rsplit(") ").next().unwrap_or_default();
    behind_name.chars().next().unwrap_or('Z')
}

/// Kills without a word.
pub fn kill(pid: u32) {
    signal(pid, "KILL");
    await_state(pid, 'Z');
}

/// Stops every thread of it.
pub fn freeze(pid: u32) {
    signal(pid, "STOP");
    await_state(pid, 'T');
}

/// Lets it go on.
pub fn thaw(pid: u32) {
    signal(pid, "CONT");
}

fn await_state(pid: u32, wanted: char) {
    let begun = Instant::now();
    while state(pid) != wanted {
        assert!(
            begun.elapsed() < SIGNAL_PATIENCE,
            "{pid} is not in state {wanted}"
        );
        std::thread::yield_now();
    }
}
