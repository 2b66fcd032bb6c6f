//! The lane audit: who computes what again, who is wrong, and that it stops no sound run.

use super::*;

/// Trains with `workers` workers and audits every step.
fn audited(workers: usize) -> Core {
    training_as(
        Settings {
            audit_every: 1,
            ..settings(workers)
        },
        Durable::default(),
    )
}

/// What the open step's audit asks for: lane, holder, auditor.
fn plan(effects: &[Effect], core: &Core) -> (u32, u64, u64) {
    let asked = bodies(effects).find_map(|body| match body {
        down::Body::OpenGeneration(open) => open.audit,
        down::Body::Commit(commit) => commit.audit,
        _ => None,
    });
    let asked = asked.expect("an audited step");
    assert_eq!(
        (asked.generation, asked.step),
        (core.generation, core.committed)
    );
    let holds = |(_, nodes): &(&u64, &Vec<LaneRange>)| {
        nodes.iter().any(|n| (n.start..n.end).contains(&asked.lane))
    };
    let holder = core
        .nodes_now
        .iter()
        .find(holds)
        .expect("somebody holds it");
    (asked.lane, *holder.0, asked.worker_id)
}

fn of(core: &Core) -> (u32, u64, u64) {
    let open = core.audits.open.as_ref().expect("an audited step");
    (open.lane, open.holder, open.auditor)
}

fn tell(core: &mut Core, now: Millis, id: u64, attempt: u32, digest: u128) -> Vec<Effect> {
    let told = v1::LaneAudited {
        term: 1,
        generation: core.generation,
        step: core.committed,
        lane: of(core).0,
        attempt,
        digest: Digest(digest).to_bytes(),
        seconds: 0.5,
        error: String::new(),
    };
    core.apply(now, Event::Message(100 + id, up::Body::LaneAudited(told)))
}

fn commits(effects: &[Effect]) -> bool {
    bodies(effects).any(|body| matches!(body, down::Body::Commit(_)))
}

fn asked(effects: &[Effect]) -> Vec<u64> {
    let asked = effects.iter().filter_map(|e| match e {
        Effect::Send(session, down::Body::Audit(audit)) => {
            assert_eq!(*session, 100 + audit.worker_id);
            Some(audit.worker_id)
        }
        _ => None,
    });
    asked.collect()
}

#[test]
fn equal_bits_are_committed_and_the_next_step_audits_another_worker() {
    let mut core = audited(3);
    let (_, holder, auditor) = of(&core);
    assert_ne!(holder, auditor);
    for id in 0..3 {
        assert!(
            !commits(&ready(&mut core, id, 9, true)),
            "waits for the audit"
        );
    }
    assert!(!commits(&tell(&mut core, 10, holder, 0, 5)));
    let effects = tell(&mut core, 10, auditor, 1, 5);
    assert!(commits(&effects));
    let told = notices(&effects);
    assert!(
        told.iter()
            .any(|n| n.contains("gives the same bits; cost 0.500 s")),
        "{told:?}"
    );
    assert_eq!(
        core.status().audits.map(|a| (a.agreed, a.differed)),
        Some((1, 0))
    );
    let (_, next, _) = plan(&effects, &core);
    assert_ne!(next, holder, "workers take turns");
}

#[test]
fn of_three_workers_the_third_decides() {
    for wrong_holder in [true, false] {
        let mut core = audited(3);
        let (_, holder, auditor) = of(&core);
        let third = 3 - holder - auditor;
        tell(&mut core, 10, holder, 0, 5);
        tell(&mut core, 10, auditor, 1, 6);
        let mut effects = Vec::new();
        for id in 0..3 {
            effects = ready(&mut core, id, 9, true);
        }
        assert_eq!(asked(&effects), [third]);
        let (wrong, right) = if wrong_holder {
            (holder, 6)
        } else {
            (auditor, 5)
        };
        let effects = tell(&mut core, 10, third, 2, right);
        assert!(!core.members.contains(&wrong), "{effects:?}");
        let sums = if wrong_holder { 10 } else { 9 };
        let left = core.members.clone();
        assert_eq!(left.len(), 2);
        assert!(!commits(&ready(&mut core, left[0], sums, true)));
        assert!(
            commits(&ready(&mut core, left[1], sums, true)),
            "with the right bits"
        );
    }
}

#[test]
fn of_two_workers_the_one_that_contradicts_itself_is_wrong() {
    let differ = || {
        let mut core = audited(2);
        let (_, holder, auditor) = of(&core);
        tell(&mut core, 10, holder, 0, 5);
        tell(&mut core, 10, auditor, 1, 6);
        ready(&mut core, 0, 9, true);
        assert_eq!(asked(&ready(&mut core, 1, 9, true)), [holder, auditor]);
        (core, holder, auditor)
    };
    let (mut core, holder, auditor) = differ();
    tell(&mut core, 10, holder, 2, 6);
    tell(&mut core, 10, auditor, 2, 6);
    assert_eq!(core.members, [auditor]);
    assert!(commits(&ready(&mut core, auditor, 10, true)));

    let (mut core, holder, auditor) = differ();
    tell(&mut core, 10, holder, 2, 5);
    let effects = tell(&mut core, 10, auditor, 2, 6);
    let (success, reason) = ended(&effects).expect("nobody knows who is right");
    assert!(
        !success && reason.contains("a third computation"),
        "{reason}"
    );
}

#[test]
fn a_worker_alone_computes_the_lane_twice_and_a_slip_costs_one_step() {
    let mut core = audited(1);
    tell(&mut core, 10, 0, 0, 5);
    tell(&mut core, 10, 0, 1, 6);
    assert_eq!(asked(&ready(&mut core, 0, 9, true)), [0]);
    let effects = tell(&mut core, 10, 0, 2, 6);
    let again = bodies(&effects).any(|body| match body {
        down::Body::OpenGeneration(open) => open.recompute,
        _ => false,
    });
    assert!(again, "{effects:?}");
    assert!(commits(&ready(&mut core, 0, 10, true)));
}

#[test]
fn an_audit_that_does_not_come_or_cannot_be_is_dropped_and_counted() {
    let mut core = audited(2);
    let (_, holder, _) = of(&core);
    tell(&mut core, 10, holder, 0, 5);
    ready(&mut core, 0, 9, true);
    ready(&mut core, 1, 9, true);
    let beat = |core: &mut Core, now| {
        let beat = up::Body::Heartbeat(v1::Heartbeat {
            generation: core.generation,
            phase: "ready".into(),
            ..Default::default()
        });
        let mut effects = core.apply(now, Event::Message(101, beat.clone()));
        effects.extend(core.apply(now, Event::Message(100, beat)));
        effects.extend(core.apply(now, Event::Tick));
        effects
    };
    let waited = (1..60).find(|tenth| commits(&beat(&mut core, 10 + tenth * 100)));
    assert!(waited.is_some_and(|t| t > 10), "{waited:?}");
    assert_eq!(core.status().audits.map(|a| a.dropped), Some(1));

    let mut core = audited(2);
    let (lane, holder, auditor) = of(&core);
    tell(&mut core, 10, auditor, 1, 5);
    let told = v1::LaneAudited {
        term: 1,
        generation: core.generation,
        lane,
        error: "it was folded already".into(),
        ..Default::default()
    };
    core.apply(
        10,
        Event::Message(100 + holder, up::Body::LaneAudited(told)),
    );
    ready(&mut core, 0, 9, true);
    assert!(commits(&ready(&mut core, 1, 9, true)));
}

#[test]
fn who_dies_in_an_audit_is_replaced_and_a_doubt_is_not_forgotten() {
    let mut core = audited(3);
    let (lane, _, auditor) = of(&core);
    let effects = core.apply(15, Event::Gone(100 + auditor));
    let (again, holder, other) = plan(&effects, &core);
    assert_eq!(again, lane);
    assert!(other != auditor && other != holder);

    let mut core = audited(3);
    let (lane, holder, auditor) = of(&core);
    let third = 3 - holder - auditor;
    tell(&mut core, 10, holder, 0, 5);
    tell(&mut core, 10, auditor, 1, 6);
    let effects = core.apply(15, Event::Gone(100 + third));
    assert_eq!(plan(&effects, &core).0, lane);
    let again = bodies(&effects).any(|body| match body {
        down::Body::OpenGeneration(open) => open.recompute,
        _ => false,
    });
    assert!(again, "its lanes are not believed: {effects:?}");
}
