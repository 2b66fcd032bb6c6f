//! What seeds have found, each kept with its least faults.

use std::time::Duration;

use belfry_coordinator::core::LinkPolicy;
use belfry_simulator::{Fault, Process, Setup};

use crate::cases::Case;

fn holds(seed: u64, setup: Setup, faults: &[(u64, Fault)]) {
    let faults = faults.to_vec();
    let case = Case {
        seed,
        setup,
        faults,
    };
    if let Err(failure) = case.run() {
        panic!("{}\n{}", failure.why, failure.log.join("\n"));
    }
}

/// The first state was judged, step 0 was committed, and the coordinator died before the store had
/// the evaluation: no later term can judge that state again.
#[test]
fn the_first_evaluation_outlives_a_coordinator_that_dies_at_once() {
    let mut setup = Setup::new(3, 8, 17, Duration::from_secs(1));
    setup.checkpoint_every = 4;
    setup.quarantine_shards_max = 2;
    setup.horizon_steps = 1;
    for after in 0..24 {
        let faults = [
            (400, Fault::StoreSlow(20, 1_500)),
            (
                450 + after * 5,
                Fault::KillMidway(Process::Coordinator(0), 11),
            ),
            (450 + after * 5, Fault::StoreOutage(600)),
        ];
        holds(102 + after, setup.clone(), &faults);
    }
}

/// An old leader's evaluation reached the store after its successor had read what is durable, and
/// the old leader then committed step 0: the successor never knew of the evaluation.
#[test]
fn an_evaluation_that_lands_late_is_not_lost_to_the_next_leader() {
    let device = |hierarchical| LinkPolicy::Device { hierarchical };
    let mut setup = Setup::new(1, 8, 9, Duration::from_secs(1));
    setup.coordinators = 2;
    setup.checkpoint_every = 6;
    setup.parts = 2;
    setup.links = device(false);
    setup.quarantine_shards_max = 1;
    setup.horizon_steps = 2;
    let faults = [
        (283, Fault::Pause(Process::Worker(0), 2_088)),
        (2_465, Fault::StoreSlow(18, 1_396)),
    ];
    for seed in [910, 1, 2, 3] {
        holds(seed, setup.clone(), &faults);
    }
}
