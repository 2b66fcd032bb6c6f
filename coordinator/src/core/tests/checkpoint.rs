//! What the core does about checkpoints that are slow, refused, half stored, old or rotten.

use super::*;

/// Two workers that train `steps` steps with a checkpoint of two parts every two of them.
fn run(steps: u64, keep_last: u32) -> Core {
    training_as(of(steps, keep_last), Durable::default())
}

fn of(steps: u64, keep_last: u32) -> Settings {
    let mut settings = settings(2);
    settings.steps_total = steps;
    settings.checkpoint.every_steps = 2;
    settings.checkpoint.keep_last = keep_last;
    settings
}

/// Commits steps until `committed` are; what was done on the way.
fn commit_until(core: &mut Core, committed: u64) -> Vec<Effect> {
    let mut effects = Vec::new();
    while core.committed < committed {
        for id in core.members.clone() {
            effects.extend(ready(core, id, 9, true));
        }
    }
    effects
}

fn part(step: u64, part: u32) -> v1::PartStored {
    v1::PartStored {
        step,
        part,
        file: format!("{part}"),
        sha256: format!("{part}"),
        bytes: 500_000,
        ..Default::default()
    }
}

fn said(core: &mut Core, id: u64, part: v1::PartStored) -> Vec<Effect> {
    let now = core.last_tick.max(10);
    core.apply(now, Event::Message(100 + id, up::Body::PartStored(part)))
}

fn failing(step: u64, part_number: u32, may_pass: bool) -> v1::PartStored {
    v1::PartStored {
        error: "503".into(),
        tries_again: true,
        may_pass,
        ..part(step, part_number)
    }
}

/// The notices for `reason`.
fn told(effects: &[Effect], reason: Reason) -> Vec<&str> {
    let notices = effects.iter().filter_map(|e| match e {
        Effect::Emit(event) if event.reason() == reason => Some(event.notice.as_str()),
        _ => None,
    });
    notices.collect()
}

/// Whoever is told to take a snapshot, and of which parts.
fn snapshots(effects: &[Effect]) -> Vec<(u64, u64, &[u32])> {
    let commits = effects.iter().filter_map(|e| match e {
        Effect::Send(session, down::Body::Commit(c)) if !c.snapshot_parts.is_empty() => {
            Some((*session, c.step + 1, &c.snapshot_parts[..]))
        }
        _ => None,
    });
    commits.collect()
}

fn manifests(effects: &[Effect]) -> Vec<u64> {
    let steps = effects.iter().filter_map(|e| match e {
        Effect::StoreCheckpoint { step, .. } => Some(*step),
        _ => None,
    });
    steps.collect()
}

/// Stores both parts of `step` and its manifest.
fn make(core: &mut Core, step: u64) -> Vec<Effect> {
    assert!(said(core, 0, part(step, 0)).is_empty());
    assert_eq!(manifests(&said(core, 1, part(step, 1))), [step]);
    core.apply(10, Event::CheckpointDurable { step })
}

#[test]
fn each_part_is_with_two_and_each_begins_with_another() {
    let mut core = run(6, 3);
    let effects = commit_until(&mut core, 2);
    assert_eq!(
        snapshots(&effects),
        [(100, 2, &[0, 1][..]), (101, 2, &[1, 0])]
    );
}

#[test]
fn a_durable_checkpoint_says_what_it_cost_and_frees_the_snapshot() {
    let mut core = run(6, 3);
    commit_until(&mut core, 2);
    said(&mut core, 0, failing(2, 0, true));
    for (id, stall) in [(0, 0.02), (1, 0.03)] {
        let applied = v1::Applied {
            step: 2,
            stall_seconds: Some(stall),
            ..Default::default()
        };
        core.apply(10, Event::Message(100 + id, up::Body::Applied(applied)));
    }
    core.apply(40, Event::Tick);
    let effects = make(&mut core, 2);
    let made = effects.iter().find_map(|e| match e {
        Effect::StoreCost(2, made) => Some(*made),
        _ => None,
    });
    let made = made.expect("its cost");
    assert_eq!(
        (made.bytes, made.stall_seconds, made.retries),
        (1_000_000, Some(0.03), 1)
    );
    let text = "checkpoint of step 2 is durable: 1.0 MB in 0.0 s, training waited 30 ms, 1 writes \
                were tried again";
    assert_eq!(told(&effects, Reason::CheckpointDurable), [text]);
    let late = v1::Applied {
        step: 2,
        stall_seconds: Some(0.04),
        ..Default::default()
    };
    let effects = core.apply(10, Event::Message(100, up::Body::Applied(late)));
    let [Effect::StoreCost(2, made), Effect::Emit(_)] = &effects[..] else {
        panic!("{effects:?}")
    };
    assert_eq!(made.stall_seconds, Some(0.04));
    let effects = commit_until(&mut core, 3);
    let closed = sent(&effects, 100).into_iter().find_map(|body| match body {
        down::Body::Commit(commit) => Some(commit.closed),
        _ => None,
    });
    assert_eq!(closed, Some(2));
}

#[test]
fn a_store_that_refuses_delays_a_checkpoint_and_says_so_once() {
    let mut core = run(6, 3);
    commit_until(&mut core, 2);
    let first = said(&mut core, 0, failing(2, 0, true));
    assert_eq!(told(&first, Reason::CheckpointDelayed).len(), 1);
    assert!(said(&mut core, 1, failing(2, 1, false)).is_empty());
    assert_eq!(core.committed, 2);
    // Nothing of it is stored when the next is due: the newer state takes its place.
    let effects = commit_until(&mut core, 4);
    assert_eq!(told(&effects, Reason::CheckpointGivenUp).len(), 1);
    assert_eq!(snapshots(&effects)[0].1, 4);
    // Half of it is stored when the next is due: the next is left out, but for the last.
    said(&mut core, 0, part(4, 0));
    let mut core = run(8, 3);
    commit_until(&mut core, 2);
    said(&mut core, 0, part(2, 0));
    said(&mut core, 1, failing(2, 1, true));
    let effects = commit_until(&mut core, 6);
    assert_eq!(told(&effects, Reason::CheckpointDelayed).len(), 2);
    assert_eq!(snapshots(&effects), []);
    let effects = commit_until(&mut core, 8);
    assert_eq!(told(&effects, Reason::CheckpointGivenUp).len(), 1);
    assert_eq!(snapshots(&effects)[0].1, 8);
}

#[test]
fn the_last_checkpoint_waits_for_a_store_and_for_people_a_bounded_time() {
    let mut core = run(2, 3);
    commit_until(&mut core, 2);
    assert_eq!(core.phase, Phase::Finishing);
    for minute in 1..60 {
        core.apply(minute * 60_000, Event::Tick);
        for id in [0, 1] {
            let beat = up::Body::Heartbeat(v1::Heartbeat::default());
            core.apply(minute * 60_000, Event::Message(100 + id, beat));
        }
        assert_eq!(ended(&said(&mut core, 0, failing(2, 0, true))), None);
    }
    assert_eq!(ended(&said(&mut core, 0, failing(2, 0, false))), None);
    let now = 59 * 60_000 + millis(core.s.timeouts.gather) + 1;
    for id in [0, 1] {
        let beat = up::Body::Heartbeat(v1::Heartbeat::default());
        core.apply(now, Event::Message(100 + id, beat));
    }
    core.apply(now, Event::Tick);
    let effects = said(&mut core, 0, failing(2, 0, false));
    assert_eq!(ended(&effects), Some((false, "503")));
}

#[test]
fn a_death_leaves_a_checkpoint_to_the_other_copies() {
    let mut core = run(6, 3);
    commit_until(&mut core, 2);
    let effects = core.apply(10, Event::Gone(100));
    assert_eq!(told(&effects, Reason::CheckpointGivenUp), [""; 0]);
    said(&mut core, 1, part(2, 0));
    assert_eq!(manifests(&said(&mut core, 1, part(2, 1))), [2]);
}

#[test]
fn a_new_term_goes_on_with_the_checkpoint_of_the_one_before() {
    let receipts = |core: &Core| core.receipts.values().cloned().collect::<Vec<_>>();
    let mut before = run(6, 3);
    commit_until(&mut before, 3);
    let mut settings = of(6, 3);
    settings.term = 2;
    let mut core = Core::new(0, settings, Durable::default());
    let again = |id: u64| v1::Hello {
        has_state: true,
        applied: 3,
        receipts: receipts(&before),
        ..hello(id)
    };
    core.apply(0, Event::Hello(200, again(0)));
    let held = |parts: Vec<v1::PartStored>| up::Body::SnapshotHeld(v1::SnapshotHeld { parts });
    let on_its_way = v1::PartStored {
        step: 2,
        part: 1,
        ..Default::default()
    };
    core.apply(0, Event::Message(200, held(vec![part(2, 0), on_its_way])));
    core.apply(0, Event::Hello(201, again(1)));
    assert_eq!(core.phase, Phase::Training);
    let stored = up::Body::PartStored(part(2, 1));
    let effects = core.apply(10, Event::Message(200, stored));
    let [
        Effect::StoreCheckpoint {
            step: 2, receipts, ..
        },
    ] = &effects[..]
    else {
        panic!("{effects:?}")
    };
    assert_eq!(receipts.iter().map(|r| r.step).collect::<Vec<_>>(), [0, 1]);
}

#[test]
fn what_is_no_longer_kept_is_deleted_behind_a_durable_manifest() {
    let mut core = run(10, 2);
    let mut deleted = Vec::new();
    for step in [2, 4, 6] {
        commit_until(&mut core, step);
        let effects = make(&mut core, step);
        let durable = effects
            .iter()
            .position(|e| matches!(e, Effect::StoreCost(..)));
        let prune = effects.iter().position(|e| matches!(e, Effect::Prune(_)));
        assert!(prune.is_none_or(|at| durable.is_some_and(|d| d < at)));
        deleted.extend(effects.into_iter().filter_map(|e| match e {
            Effect::Prune(steps) => Some(steps),
            _ => None,
        }));
    }
    assert_eq!(deleted, [[2]]);
    assert_eq!(core.durable.manifests, BTreeSet::from([4, 6]));
}

#[test]
fn a_rotten_checkpoint_neither_counts_nor_begins_a_run() {
    let mut core = run(10, 2);
    for step in [2, 4] {
        commit_until(&mut core, step);
        make(&mut core, step);
    }
    let rotten = Event::CheckpointCorrupt {
        step: 4,
        faults: vec!["a file is wrong".into()],
    };
    let effects = core.apply(20, rotten);
    let [text] = told(&effects, Reason::CheckpointCorrupt)[..] else {
        panic!("{effects:?}")
    };
    assert!(
        text.contains("newest that is right is of step 2: a file is wrong"),
        "{text}"
    );
    commit_until(&mut core, 6);
    let effects = make(&mut core, 6);
    assert!(
        !effects.iter().any(|e| matches!(e, Effect::Prune(_))),
        "2 and 6 are kept"
    );

    let durable = Durable {
        corrupt: BTreeSet::from([4]),
        ..Default::default()
    };
    let mut core = Core::new(0, of(10, 2), durable);
    core.apply(0, Event::Hello(100, hello(0)));
    let effects = core.apply(0, Event::Hello(101, hello(1)));
    let (success, reason) = ended(&effects).expect("it does not start over silently");
    assert!(
        !success && reason.contains("every checkpoint of this run is corrupt"),
        "{reason}"
    );
}
