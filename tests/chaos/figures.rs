//! The targets as figures, each from one long run with many faults; only with
//! `BELFRY_CHAOS_LONG=M`, which also says how many minutes the run for goodput takes.

use std::time::{Duration, Instant};

use belfry_proto::v1::Reason;

use crate::Test;
use crate::case::{Case, kill, undisturbed};
use crate::cluster::{Cluster, Setup};
use crate::processes::GONE;
use crate::table::say;

pub const TESTS: &[Test] = &[
    ("figures_of_a_hundred_kills", figures_of_a_hundred_kills),
    (
        "figures_of_coordinator_restarts",
        figures_of_coordinator_restarts,
    ),
    ("figures_of_goodput", figures_of_goodput),
];

const KILLS: usize = 100;
/// Silence is taken for death after 0.6 s, so what is seen sooner is seen by the connection.
const STALL_OF_KILLS: &str = "cluster.max_stall_seconds=2";
/// Fewer than five deaths of one worker in twelve times that setting: nobody is put aside.
const BETWEEN_KILLS: Duration = Duration::from_millis(2100);
const RESTARTS: usize = 20;
/// Of the goodput run: one failure in so much time.
const BETWEEN_FAILURES: Duration = Duration::from_secs(60);
/// Steps without a failure by which a step's time is known.
const UNDISTURBED_STEPS: u64 = 40;

/// Minutes of the goodput run, if the long figures were asked for.
pub fn minutes() -> Option<u32> {
    let asked = std::env::var("BELFRY_CHAOS_LONG").ok()?;
    Some(
        asked
            .parse()
            .expect("BELFRY_CHAOS_LONG is a number of minutes"),
    )
}

fn quantile(times: &[Duration], q: f64) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort();
    let place = ((sorted.len() - 1) as f64 * q).ceil() as usize;
    sorted[place].as_secs_f64()
}

fn told(what: &str, times: &[Duration]) -> String {
    let [p50, p99, most] = [0.5, 0.99, 1.0].map(|q| quantile(times, q));
    let count = times.len();
    format!("FIGURE {what}: p50 {p50:.3} s, p99 {p99:.3} s, longest {most:.3} s over {count}")
}

/// The step time of a run that nothing disturbs, by the median of what was heard since `from`.
fn step_time(run: &Cluster, from: Instant) -> f64 {
    quantile(&run.step_times(from), 0.5)
}

fn figures_of_a_hundred_kills() {
    let length = ["run.steps=2000", "checkpoint.every_steps=100"];
    let mut setup = Setup::new(3, &length);
    setup.settings.push(STALL_OF_KILLS.into());
    let settings = setup.settings.clone();
    let mut case = Case::start("SIGKILL of a worker, again and again", setup);
    case.at(4, 3);
    let calm = Instant::now();
    case.run.committed(24);
    let step = step_time(&case.run, calm);
    let (mut seen, mut next) = (Vec::new(), Vec::new());
    for round in 0..KILLS {
        let worker = round as u64 % 3;
        case.at(0, 3);
        let at = Instant::now();
        case.fire(|run| kill(run.pid(&format!("worker-{worker}"))));
        let noticed = case.run.noticed(at, worker, GONE);
        seen.push(noticed - at);
        next.push(case.run.next_commit() - at);
        let joined = [Reason::WorkerJoined];
        case.run.noticed(noticed, worker, &joined);
        let rest = BETWEEN_KILLS.saturating_sub(at.elapsed());
        case.run.within(rest, &|_| false);
    }
    case.fired(format!("{KILLS}: state Z in /proc"));
    say(&told(
        "kill -9 of a worker seen (target p99 < 0.3 s)",
        &seen,
    ));
    say(&told(
        "kill -9 of a worker to the next commit (target one step + 1 s)",
        &next,
    ));
    say(&format!("FIGURE undisturbed step of that run: {step:.3} s"));
    let run = case.end();
    say(&format!(
        "FIGURE steps lost or repeated over {KILLS} kills: {}; bits equal to {}",
        run.recomputed,
        undisturbed(&settings).parameters
    ));
    assert_eq!(run.recomputed, 0);
    assert!(
        quantile(&seen, 0.99) < 0.3,
        "kill -9 is seen in under 0.3 s (p99)"
    );
    assert!(
        quantile(&next, 0.5) < step + 1.0,
        "the next commit within one step + 1 s"
    );
}

fn figures_of_coordinator_restarts() {
    let setup = Setup::new(3, &["run.steps=600", "checkpoint.every_steps=100"]);
    let mut case = Case::start("SIGKILL of the coordinator, again and again", setup);
    case.at(4, 3);
    let mut stalls = Vec::new();
    for round in 0..RESTARTS as u64 {
        case.at(0, 3);
        let last = case.run.next_commit();
        case.fire(|run| kill(run.pid("coordinator")));
        let led =
            move |s: &crate::watch::Seen| s.event.term >= round + 2 && s.event.committed.is_some();
        stalls.push(case.run.until("a commit of the next term", led).at - last);
    }
    case.fired(format!("{RESTARTS}: state Z in /proc"));
    say(&told(
        "stall of a coordinator restart (target < 2 s)",
        &stalls,
    ));
    let run = case.end();
    assert_eq!(run.recomputed, 0);
    assert!(
        quantile(&stalls, 0.5) < 2.0,
        "a coordinator restart stalls for less than 2 s"
    );
}

/// A quickstart-sized run of one-second steps, one failure a minute, workers and coordinator in turn.
fn figures_of_goodput() {
    let failures = minutes().expect("was asked for");
    // 24 pairs of the quickstart take about a second on two cores.
    let batch = ["batch.lanes=6", "batch.global_batch=24"];
    let length = ["run.steps=5000", "checkpoint.every_steps=100"];
    let mut setup = Setup::new(2, &[batch, length].concat());
    setup.config = "configs/quickstart.toml";
    let mut case = Case::start("one failure a minute", setup);
    case.at(4, 2);
    let calm = Instant::now();
    let first = case.run.steps();
    case.run.committed(first + UNDISTURBED_STEPS);
    let (begun, before) = (Instant::now(), case.run.steps());
    let rate = (before - first) as f64 / calm.elapsed().as_secs_f64();
    for failure in 0..failures {
        let until = begun + BETWEEN_FAILURES * (failure + 1) - BETWEEN_FAILURES / 2;
        let wait = until.saturating_duration_since(Instant::now());
        case.run.within(wait, &|_| false);
        let name = ["worker-1", "coordinator", "worker-0"][failure as usize % 3];
        case.fire(|run| kill(run.pid(name)));
    }
    let end = begun + BETWEEN_FAILURES * failures;
    case.run
        .within(end.saturating_duration_since(Instant::now()), &|_| false);
    let steps = case.run.steps() - before;
    let wall = begun.elapsed().as_secs_f64();
    let goodput = steps as f64 / rate / wall;
    case.fired(format!("{failures}: state Z in /proc"));
    say(&format!(
        "FIGURE goodput with one failure a minute (target >= 0.97): {goodput:.3}; {steps} steps in \
         {wall:.0} s, undisturbed {:.3} s a step, {} restarts, {} steps repeated",
        1.0 / rate,
        case.run.restarts,
        case.run.recomputed
    ));
    assert_eq!(case.run.recomputed, 0);
    // The rest of the run is for nobody: what was committed is proved by the ledger so far.
    case.run.audit();
}
