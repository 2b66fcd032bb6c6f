//! Who takes part: minimum and maximum, spares, workers that flap or leave, lanes by speed, draining,
//! and what is said of it all.

use belfry_proto::objective;

use super::*;

fn beat(core: &mut Core, now: Millis, id: u64, phase: &str) -> Vec<Effect> {
    let beat = v1::Heartbeat {
        generation: core.generation,
        step: core.committed,
        phase: phase.into(),
        ..Default::default()
    };
    core.apply(now, Event::Message(100 + id, up::Body::Heartbeat(beat)))
}

/// All members are ready; a lane takes worker `id` so many seconds.
fn step(core: &mut Core, lane_seconds: impl Fn(u64) -> f64) -> Vec<Effect> {
    let members = core.members.clone();
    let mut effects = Vec::new();
    for id in members {
        let lanes: Vec<u32> = core.nodes_now[&id]
            .iter()
            .flat_map(|n| n.start..n.end)
            .collect();
        let ready = v1::Ready {
            term: 1,
            generation: core.generation,
            step: core.committed,
            sum_digest: Digest(9).to_bytes(),
            finite: true,
            compute_seconds: lane_seconds(id) * lanes.len() as f64,
            lanes: lanes
                .into_iter()
                .map(|lane| v1::LaneReport {
                    lane,
                    pairs: 1,
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        };
        effects.extend(core.apply(10, Event::Message(100 + id, up::Body::Ready(ready))));
    }
    effects
}

/// The state that a newcomer was told to copy is there.
fn copied(core: &mut Core, id: u64, effects: &[Effect]) -> Vec<Effect> {
    let copy = sent(effects, 100 + id)
        .into_iter()
        .find_map(|body| match body {
            down::Body::CopyState(copy) => Some(copy.clone()),
            _ => None,
        });
    let copy = copy.unwrap_or_else(|| panic!("worker {id} was told to copy: {effects:?}"));
    let ready = v1::StateReady {
        term: 1,
        step: copy.step,
        digest: Digest(7).to_bytes(),
        request: copy.request,
        ..Default::default()
    };
    let mut effects = core.apply(10, Event::Message(100 + id, up::Body::StateReady(ready)));
    for member in core.members.clone() {
        let told = v1::StateDigest {
            term: 1,
            step: copy.step,
            digest: Digest(7).to_bytes(),
            seconds: 0.1,
        };
        let told = up::Body::StateDigest(told);
        effects.extend(core.apply(10, Event::Message(100 + member, told)));
    }
    effects
}

fn reasons(effects: &[Effect]) -> Vec<Reason> {
    let emitted = effects.iter().filter_map(|effect| match effect {
        Effect::Emit(event) => Some(event.reason()),
        _ => None,
    });
    emitted.filter(|r| *r != Reason::Unspecified).collect()
}

fn lens(core: &Core) -> Vec<usize> {
    core.lanes_next
        .values()
        .map(ExactSizeIterator::len)
        .collect()
}

#[test]
fn below_the_minimum_no_step_is_committed_and_the_run_says_so() {
    let mut s = settings(2);
    s.min_workers = 2;
    let mut core = training_as(s, Durable::default());
    core.apply(10, Event::Gone(101));
    assert_eq!(core.members, [0]);
    let effects = step(&mut core, |_| 1.0);
    assert_eq!(core.committed, 0);
    assert!(
        core.waiting_for.contains("1 of 2 workers"),
        "{}",
        core.waiting_for
    );
    assert!(
        effects.iter().any(|e| matches!(e, Effect::Emit(_))),
        "it is said"
    );
    let effects = core.apply(10, Event::Hello(101, hello(1)));
    copied(&mut core, 1, &effects);
    assert_eq!(core.members, [0, 1]);
    step(&mut core, |_| 1.0);
    assert_eq!((core.committed, core.waiting_for.as_str()), (1, ""));
}

#[test]
fn beyond_the_maximum_workers_are_spares_and_beyond_those_they_stand_by() {
    let mut s = settings(4);
    (s.max_workers, s.spares, s.steps_total) = (2, 1, 9);
    let mut core = Core::new(0, s, Durable::default());
    let mut effects = Vec::new();
    for id in 0..4 {
        effects.extend(core.apply(0, Event::Hello(100 + id, hello(id))));
    }
    for id in 0..3 {
        let ready = v1::StateReady {
            digest: Digest(7).to_bytes(),
            request: core.requests,
            ..Default::default()
        };
        effects.extend(core.apply(0, Event::Message(100 + id, up::Body::StateReady(ready))));
    }
    assert_eq!(
        (&core.members[..], lens(&core)),
        (&[0, 1, 2][..], vec![2, 2, 0])
    );
    effects.extend(core.apply(10, Event::Tick));
    let told = sent(&effects, 103);
    let waits = told
        .iter()
        .any(|body| matches!(body, down::Body::Wait(w) if w.why.contains("stands by")));
    assert!(waits, "{told:?}");
    assert_eq!(core.report().workers[3].role, "standby");
    assert_eq!(core.report().workers[2].role, "spare");
    // The spare takes over at once, and who stood by follows in its place.
    let effects = core.apply(20, Event::Gone(100));
    assert_eq!((&core.members[..], lens(&core)), (&[1, 2][..], vec![2, 2]));
    let taken = &core.nodes_now[&2];
    assert!(!taken.is_empty(), "the spare computes what was lost");
    assert!(
        sent(&effects, 103)
            .iter()
            .any(|b| matches!(b, down::Body::CopyState(_)))
            || {
                let effects = core.apply(21, Event::Tick);
                sent(&effects, 103)
                    .iter()
                    .any(|b| matches!(b, down::Body::CopyState(_)))
            }
    );
}

#[test]
fn a_worker_that_comes_and_goes_is_put_aside_unless_it_is_needed() {
    let mut s = settings(3);
    s.steps_total = 100;
    let mut core = training_as(s.clone(), Durable::default());
    let mut all = Vec::new();
    let mut session = 200;
    for life in 0..5 {
        let old = core.workers[&1].session;
        all.extend(core.apply(20 + life, Event::Gone(old)));
        session += 1;
        let again = v1::Hello {
            incarnation: 2 + life,
            ..hello(1)
        };
        all.extend(core.apply(20 + life, Event::Hello(session, again)));
    }
    assert!(
        reasons(&all).contains(&Reason::WorkerPutAside),
        "{:?}",
        reasons(&all)
    );
    let told = sent(&all, session);
    let wait = told.iter().find_map(|body| match body {
        down::Body::Wait(wait) => Some(wait),
        _ => None,
    });
    assert_eq!(wait.expect("is told").for_ms, 1_000, "{told:?}");
    let copies = |fx: &[Effect]| {
        sent(fx, session)
            .iter()
            .any(|b| matches!(b, down::Body::CopyState(_)))
    };
    assert!(!told.iter().any(|b| matches!(b, down::Body::CopyState(_))));
    assert_eq!(core.report().workers[1].role, "aside");
    // When its time is over it is a newcomer like any other.
    beat(&mut core, 1_020, 0, "computing");
    beat(&mut core, 1_020, 2, "computing");
    let beats = v1::Heartbeat::default();
    core.apply(1_020, Event::Message(session, up::Body::Heartbeat(beats)));
    assert!(copies(&core.apply(1_030, Event::Tick)));

    // Nobody is put aside whom the run needs: one alone would take the state with it.
    s.expected_workers = 2;
    let mut core = training_as(s, Durable::default());
    let mut all = Vec::new();
    for life in 0..9 {
        let old = core.workers[&1].session;
        all.extend(core.apply(20 + life, Event::Gone(old)));
        let again = v1::Hello {
            incarnation: 2 + life,
            ..hello(1)
        };
        all.extend(core.apply(20 + life, Event::Hello(300 + life, again)));
    }
    assert!(!reasons(&all).contains(&Reason::WorkerPutAside));
}

#[test]
fn a_worker_that_leaves_finishes_its_step_and_is_told_that_it_may_go() {
    let mut core = training(2, Durable::default());
    let leaving = up::Body::Leaving(v1::Leaving {
        reason: "asked to stop".into(),
    });
    let effects = core.apply(10, Event::Message(101, leaving));
    assert_eq!(core.members, [0, 1], "it has lanes of the open step");
    assert!(sent(&effects, 101).is_empty());
    let mut effects = step(&mut core, |_| 1.0);
    assert_eq!((core.committed, &core.members[..]), (1, &[0][..]));
    effects.extend(core.apply(11, Event::Tick));
    let told = sent(&effects, 101);
    assert!(
        matches!(told.last(), Some(down::Body::Finished(f)) if f.success),
        "{told:?}"
    );
    assert!(reasons(&effects).contains(&Reason::WorkerLeft));
    assert!(
        core.apply(12, Event::Gone(101)).is_empty(),
        "and is forgotten"
    );
    step(&mut core, |_| 1.0);
    assert_eq!(core.committed, 2);
}

#[test]
fn a_slow_worker_ends_with_half_the_lanes_and_equal_ones_keep_theirs() {
    let mut s = settings(4);
    (s.lanes, s.micro_batches, s.steps_total) = (64, 64, 1_000);
    s.horizon_steps = 1_000;
    let mut core = training_as(s.clone(), Durable::default());
    let mut all = Vec::new();
    for n in 0..100 {
        all.extend(step(&mut core, |id| {
            0.1 * (1.0 + 0.03 * ((n * 7 + id) % 3) as f64)
        }));
    }
    assert_eq!(
        (core.generation, lens(&core)),
        (1, vec![16; 4]),
        "noise moves nothing"
    );

    let mut core = training_as(s, Durable::default());
    let mut all = Vec::new();
    for _ in 0..200 {
        all.extend(step(&mut core, |id| if id == 2 { 0.2 } else { 0.1 }));
    }
    assert_eq!(core.committed, 200);
    let moves = reasons(&all)
        .iter()
        .filter(|r| **r == Reason::LanesMoved)
        .count();
    assert_eq!(moves, 1, "once and for all");
    let lens = lens(&core);
    assert!((8..=10).contains(&lens[2]) && lens[0] > 16, "{lens:?}");
}

#[test]
fn a_gradient_that_is_not_finite_is_skipped_where_that_is_the_policy() {
    let mut s = settings(1);
    s.skip_non_finite = true;
    let mut core = training_as(s, Durable::default());
    let lanes = (0..4).map(|lane| v1::LaneReport {
        lane,
        pairs: 1,
        objectives: vec![objective::sum_of("mlm", f64::NAN)],
        ..Default::default()
    });
    let ready = v1::Ready {
        term: 1,
        generation: core.generation,
        sum_digest: Digest(9).to_bytes(),
        lanes: lanes.collect(),
        ..Default::default()
    };
    let effects = core.apply(10, Event::Message(100, up::Body::Ready(ready)));
    assert_eq!(core.committed, 1);
    assert!(reasons(&effects).contains(&Reason::StepSkipped));
    let receipt = &core.receipts[&0];
    assert!(receipt.skipped && receipt.objectives[0].loss == 0.0);
    let line = crate::ledger::to_line(receipt);
    assert_eq!(
        crate::ledger::from_line(&line).as_ref(),
        Ok(receipt),
        "{line}"
    );
    assert_eq!(core.report().skipped_steps, 1);
}

#[test]
fn draining_finishes_the_step_and_its_checkpoint_before_the_run_ends() {
    let mut s = settings(2);
    s.steps_total = 100;
    let mut core = training_as(s.clone(), Durable::default());
    step(&mut core, |_| 1.0);
    let effects = core.apply(20, Event::Drain);
    assert!(ended(&effects).is_none());
    assert_eq!(core.status().phase, "draining");
    let effects = step(&mut core, |_| 1.0);
    assert_eq!(core.committed, 2);
    let commit = sent(&effects, 100).into_iter().find_map(|body| match body {
        down::Body::Commit(commit) => Some(commit),
        _ => None,
    });
    let commit = commit.expect("the open step counts");
    assert!(commit.last && !commit.snapshot_parts.is_empty());
    assert!(
        core.waiting_for.contains("checkpoint of step 2") || {
            core.apply(21, Event::Tick);
            core.waiting_for.contains("checkpoint of step 2")
        }
    );
    let effects = core.apply(30, Event::CheckpointDurable { step: 2 });
    let (success, reason) = ended(&effects).expect("ends");
    assert!(
        !success && reason.contains("step 2") && reason.contains("--resume"),
        "{reason}"
    );
    assert!(matches!(sent(&effects, 100).last(), Some(down::Body::Finished(f)) if f.success));
    assert!(core.has_drained());
    // With nobody here there is nothing to finish.
    let mut core = Core::new(0, s, Durable::default());
    let effects = core.apply(5, Event::Drain);
    assert!(ended(&effects).is_some_and(|(_, why)| why.contains("no checkpoint")));
}

#[test]
fn a_step_that_hangs_names_whom_it_waits_for_once() {
    let mut core = training(2, Durable::default());
    step(&mut core, |_| 1.0);
    ready(&mut core, 0, 9, true);
    let mut said = Vec::new();
    for now in (0..4_000).step_by(50) {
        beat(&mut core, now, 0, "ready");
        let beat = v1::Heartbeat {
            generation: core.generation,
            step: core.committed,
            lanes_done: 1,
            phase: "computing".into(),
            ..Default::default()
        };
        core.apply(now, Event::Message(101, up::Body::Heartbeat(beat)));
        let effects = core.apply(now + 20, Event::Tick);
        said.extend(notices(&effects).into_iter().map(str::to_owned));
    }
    let [said] = &said[..] else {
        panic!("{said:?}")
    };
    for part in [
        "step 1",
        "rank 1",
        "worker 1 on worker-1",
        "[2,4)",
        "computing",
        "1 of 2 lanes",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(said.contains("last message heartbeat 0.0 s ago"), "{said}");
    let last = core.report().decisions.pop().expect("decisions");
    assert_eq!(
        (last.reason(), last.worker_id),
        (Reason::StepHangs, Some(1))
    );
}

#[test]
fn every_time_is_reported_with_what_was_measured() {
    let mut core = training(1, Durable::default());
    for _ in 0..8 {
        let beat = v1::Heartbeat {
            number: 5,
            round_trip_us: 40_000,
            ..Default::default()
        };
        let effects = core.apply(5, Event::Message(100, up::Body::Heartbeat(beat)));
        assert!(matches!(
            sent(&effects, 100)[..],
            [down::Body::Echo(v1::Echo { number: 5 })]
        ));
    }
    let effects = core.apply(6, Event::Tick);
    let told = sent(&effects, 100);
    assert!(
        matches!(told[..], [down::Body::Welcome(w)] if w.round_trip_us == 40_000),
        "{told:?}"
    );
    let report = core.report();
    let silence = report
        .timeouts
        .iter()
        .find(|t| t.name == "silence")
        .expect("is listed");
    assert_eq!((silence.derived_us, silence.now_us), (300_000, 800_000));
    assert_eq!(report.workers[0].round_trip_us, 40_000);
}
