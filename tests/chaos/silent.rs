//! Memory and arithmetic that lie: one bit flipped in a worker, where `belfry worker --inject` says.
//! Nothing breaks; only comparison finds it.

use belfry_proto::v1::Reason;

use crate::Test;
use crate::case::Case;
use crate::cluster::Setup;

pub const TESTS: &[Test] = &[
    (
        "flipped_bit_in_a_reduced_gradient",
        flipped_bit_in_a_reduced_gradient,
    ),
    ("flipped_bit_in_a_lane", flipped_bit_in_a_lane),
    ("flipped_bit_in_a_state", flipped_bit_in_a_state),
];

/// Worker 1's, who computes beside two others: a majority knows better.
fn flipped(fault: &str, injected: &str, setup: Setup, step: u64, reasons: &[Reason]) {
    let injected = Some((1, format!("{injected}@step={step}")));
    let mut case = Case::start(fault, Setup { injected, ..setup });
    // The bit flips in the step that is open now.
    case.at(step, 3);
    case.fire(|_| ());
    case.see("who has other bits", |seen| {
        reasons.contains(&seen.event.reason())
    });
    case.recover();
    let log = case.run.log("worker-1");
    let flips = log.matches("injected: one bit is flipped").count();
    assert_eq!(flips, 1, "the fault fired once");
    let named = case.run.seen.iter().map(|seen| &seen.event);
    let named = named.filter(|e| reasons.contains(&e.reason()));
    let told: Vec<&String> = named.map(|e| &e.notice).collect();
    assert!(
        told.iter().any(|t| t.contains('1')),
        "worker 1 is named: {told:?}"
    );
    case.fired("1: the worker's own log");
    case.end();
}

fn flipped_bit_in_a_reduced_gradient() {
    let setup = Setup::new(3, &["run.steps=24"]);
    let reasons = [Reason::WorkerExpelled];
    flipped(
        "a bit flipped in a worker's reduced gradient",
        "flip-sum",
        setup,
        4,
        &reasons,
    );
}

/// Every step is audited, workers take turns: in the second step it is worker 1's first lane.
fn flipped_bit_in_a_lane() {
    let setup = Setup::new(3, &["run.steps=24", "cluster.audit_every_steps=1"]);
    let reasons = [Reason::AuditDiffered, Reason::WorkerExpelled];
    flipped(
        "a bit flipped in a lane's gradient (lane audit)",
        "flip-lane",
        setup,
        1,
        &reasons,
    );
}

fn flipped_bit_in_a_state() {
    let setup = Setup::new(3, &["run.steps=24"]);
    let reasons = [Reason::WorkerExpelled];
    flipped(
        "a bit flipped in a worker's state",
        "flip-state",
        setup,
        4,
        &reasons,
    );
}
