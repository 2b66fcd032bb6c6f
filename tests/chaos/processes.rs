//! Processes that die, freeze or are asked to go.

use std::time::Instant;

use belfry_proto::v1::Reason;

use crate::Test;
use crate::case::{Case, freeze, kill, signal, state, thaw};
use crate::cluster::Setup;

pub const TESTS: &[Test] = &[
    ("kill_of_a_worker", kill_of_a_worker),
    ("kill_of_the_coordinator", kill_of_the_coordinator),
    ("kill_of_everything", kill_of_everything),
    (
        "freeze_of_a_worker_that_is_short",
        freeze_of_a_worker_that_is_short,
    ),
    (
        "freeze_of_a_worker_that_is_long",
        freeze_of_a_worker_that_is_long,
    ),
    ("freeze_of_the_coordinator", freeze_of_the_coordinator),
    ("term_of_a_worker", term_of_a_worker),
    ("term_of_the_coordinator", term_of_the_coordinator),
];

/// Gone from the coordinator's sight, for whatever reason.
pub const GONE: &[Reason] = &[
    Reason::WorkerLost,
    Reason::WorkerSilent,
    Reason::WorkerStuck,
    Reason::WorkerUnreachable,
];
const STEPS: &str = "run.steps=24";

fn kill_of_a_worker() {
    let mut case = Case::start("SIGKILL of a worker", Setup::new(3, &[STEPS]));
    case.at(4, 3);
    case.fire(|run| kill(run.pid("worker-1")));
    case.fired("1: state Z in /proc");
    case.seen_and_recovered(1, GONE);
    let run = case.end();
    assert_eq!(run.recomputed, 0, "survivors hold every committed step");
}

fn kill_of_the_coordinator() {
    let mut case = Case::start("SIGKILL of the coordinator", Setup::new(2, &[STEPS]));
    case.at(4, 2);
    case.fire(|run| kill(run.pid("coordinator")));
    case.fired("1: state Z in /proc");
    case.see("a coordinator of a higher term", |seen| {
        seen.event.term >= 2
    });
    case.recover();
    let workers = ["worker-0", "worker-1"].map(|name| case.run.pid(name));
    let run = case.end();
    assert_eq!((run.restarts, run.recomputed), (1, 0), "{workers:?} stayed");
}

fn kill_of_everything() {
    let all = ["coordinator", "worker-0", "worker-1", "worker-2"];
    let mut case = Case::start("SIGKILL of everything", Setup::new(3, &[STEPS]));
    case.at(7, 3);
    case.run
        .until("a checkpoint", |seen| seen.event.checkpoint > 0);
    case.fire(|run| {
        let pids = all.map(|name| run.pid(name));
        pids.iter().for_each(|pid| signal(*pid, "KILL"));
        pids.into_iter().for_each(kill);
    });
    case.fired("4: state Z in /proc");
    case.see("a coordinator of a higher term", |seen| {
        seen.event.term >= 2
    });
    case.recover();
    case.end();
}

fn freeze_of_a_worker_that_is_short() {
    let mut case = Case::start("SIGSTOP of a worker, then SIGCONT", Setup::new(3, &[STEPS]));
    case.at(4, 3);
    let before = case.run.pid("worker-1");
    case.fire(|run| freeze(run.pid("worker-1")));
    // Its peers stand still with it: nothing is committed, and nobody is given up so soon.
    let early = case
        .run
        .within(std::time::Duration::from_millis(300), &|seen| {
            GONE.contains(&seen.event.reason())
        });
    assert!(early.is_none(), "given up after 0.3 s: {early:?}");
    let stopped = state(before);
    case.fired(format!("1: state {stopped} in /proc"));
    assert_eq!(stopped, 'T');
    thaw(before);
    case.recover();
    let run = case.end();
    assert_eq!((run.restarts, run.recomputed), (0, 0));
}

fn freeze_of_a_worker_that_is_long() {
    let mut case = Case::start(
        "SIGSTOP of a worker until it is given up",
        Setup::new(3, &[STEPS]),
    );
    case.at(4, 3);
    let frozen = case.run.pid("worker-1");
    case.fire(|run| freeze(run.pid("worker-1")));
    case.seen_and_recovered(1, GONE);
    let stopped = state(frozen);
    case.fired(format!("1: state {stopped} in /proc"));
    assert_eq!(stopped, 'T');
    thaw(frozen);
    case.back(1);
    let run = case.end();
    assert_eq!(
        (run.restarts, run.recomputed),
        (0, 0),
        "the very process came back"
    );
}

fn freeze_of_the_coordinator() {
    let mut case = Case::start(
        "SIGSTOP of the coordinator, then SIGCONT",
        Setup::new(2, &[STEPS]),
    );
    case.at(4, 2);
    let pid = case.run.pid("coordinator");
    case.fire(|run| freeze(run.pid("coordinator")));
    // Longer than any silence that it tolerates itself.
    let nothing = case
        .run
        .within(std::time::Duration::from_secs(3), &|_| false);
    assert!(nothing.is_none());
    let stopped = state(pid);
    assert_eq!(stopped, 'T');
    case.fired(format!("1: state {stopped} in /proc for 3 s"));
    thaw(pid);
    case.recover();
    let run = case.end();
    assert_eq!((run.restarts, run.recomputed), (0, 0));
}

fn term_of_a_worker() {
    let mut case = Case::start("SIGTERM of a worker", Setup::new(3, &[STEPS]));
    case.at(4, 3);
    case.run.tended("worker-1", false);
    case.fire(|run| signal(run.pid("worker-1"), "TERM"));
    let begun = Instant::now();
    let status = case.run.ended("worker-1");
    assert!(status.success(), "it drains and goes well: {status}");
    case.fired(format!(
        "1: exit 0 after {:.1} s",
        begun.elapsed().as_secs_f64()
    ));
    case.recover();
    case.run.spawn("worker-1");
    case.back(1);
    let run = case.end();
    assert_eq!(run.recomputed, 0);
}

fn term_of_the_coordinator() {
    let mut case = Case::start("SIGTERM of the coordinator", Setup::new(2, &[STEPS]));
    case.at(4, 2);
    case.run.tended("coordinator", false);
    case.fire(|run| signal(run.pid("coordinator"), "TERM"));
    let status = case.run.ended("coordinator");
    case.fired(format!("1: {status}"));
    case.run.spawn("coordinator");
    case.see("a coordinator of a higher term", |seen| {
        seen.event.term >= 2
    });
    case.recover();
    let run = case.end();
    assert_eq!((run.restarts, run.recomputed), (0, 0), "no worker left");
}
