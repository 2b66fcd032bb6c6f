//! What the core does while the store owes it something.

use super::*;

/// Journal entries among effects: horizon, and whether they are written ahead.
fn entries(effects: &[Effect]) -> Vec<(u64, bool)> {
    let entry = |e: &Effect| match e {
        Effect::Journal { horizon, ahead, .. } => Some((*horizon, *ahead)),
        _ => None,
    };
    effects.iter().filter_map(entry).collect()
}

fn commits(effects: &[Effect]) -> usize {
    let commit = |body: &&down::Body| matches!(body, down::Body::Commit(_));
    sent(effects, 100).into_iter().filter(commit).count()
}

fn short(horizon_steps: u64) -> Core {
    let mut s = settings(1);
    (s.horizon_steps, s.steps_total) = (horizon_steps, 9);
    training_as(s, Durable::default())
}

fn away() -> Event {
    Event::StoreAway {
        what: "journal entry 2".into(),
        error: "503".into(),
    }
}

#[test]
fn the_horizon_moves_on_before_it_is_used_up() {
    let mut core = short(4);
    assert_eq!(entries(&ready(&mut core, 0, 9, true)), []);
    let effects = ready(&mut core, 0, 9, true);
    assert_eq!((commits(&effects), entries(&effects)), (1, vec![]));
    // Level-triggered: the next event asks for more.
    let effects = core.apply(20, Event::Tick);
    assert_eq!(entries(&effects), [(6, true)], "half of it is used up");
    assert_eq!(entries(&core.apply(30, Event::Tick)), [], "one at a time");
    core.apply(40, Event::Journaled { seq: 2 });
    for _ in 0..2 {
        assert_eq!(commits(&ready(&mut core, 0, 9, true)), 1);
    }
}

#[test]
fn a_commit_at_the_durable_horizon_waits_and_says_so() {
    let mut core = short(2);
    assert_eq!(commits(&ready(&mut core, 0, 9, true)), 1);
    let effects = ready(&mut core, 0, 9, true);
    assert_eq!(entries(&effects), [(3, true)]);
    assert_eq!(commits(&effects), 1, "step 1 is below the horizon");
    core.apply(20, away());
    let effects = ready(&mut core, 0, 9, true);
    assert_eq!(commits(&effects), 0, "step 2 is not");
    let waits = core.status().waiting_for;
    let expected = "the store: step 2 may be committed once journal entry 2 is written (503)";
    assert_eq!(waits, expected);
    let effects = core.apply(5020, Event::Journaled { seq: 2 });
    assert_eq!(commits(&effects), 1, "what waited goes on at once");
    assert_eq!(core.status().waiting_for, "");
}

#[test]
fn a_leader_renews_while_nothing_happens_and_owes_one_entry_at_a_time() {
    let mut core = short(4);
    let renewals: Vec<u64> = (0..1_000)
        .step_by(25)
        .filter(|now| {
            let written = !entries(&core.apply(*now, Event::Tick)).is_empty();
            if written {
                core.apply(*now, Event::Journaled { seq: 2 });
            }
            written
        })
        .collect();
    assert_eq!(renewals.len(), 9, "{renewals:?}");
    let owed: usize = (1_000..9_000)
        .step_by(25)
        .map(|now| {
            let beat = v1::Heartbeat {
                generation: core.generation,
                phase: "computing".into(),
                ..Default::default()
            };
            core.apply(now, Event::Message(100, up::Body::Heartbeat(beat)));
            entries(&core.apply(now, Event::Tick)).len()
        })
        .sum();
    assert_eq!(owed, 1, "the store is away");
}

#[test]
fn a_renewal_before_the_first_generation_repeats_what_the_last_term_wrote() {
    let durable = Durable {
        entry: 7,
        generation: 3,
        committed: 5,
        horizon: 12,
        members: vec![4, 5],
        ..Default::default()
    };
    let mut core = Core::new(0, settings(2), durable);
    let effects = core.apply(500, Event::Tick);
    let [
        Effect::Journal {
            generation: 3,
            committed: 5,
            horizon: 12,
            members,
            ahead: true,
            ..
        },
    ] = &effects[..1]
    else {
        panic!("{effects:?}")
    };
    assert_eq!(members[..], [4, 5]);
}

#[test]
fn that_the_store_is_away_is_said_once_and_that_it_is_back_with_how_long() {
    let mut core = short(4);
    let reasons = |effects: &[Effect]| -> Vec<(Reason, String)> {
        let told = effects.iter().filter_map(|e| match e {
            Effect::Emit(e) if !e.notice.is_empty() => Some((e.reason(), e.notice.clone())),
            _ => None,
        });
        told.collect()
    };
    let told = reasons(&core.apply(1_000, away()));
    assert_eq!(told[0].0, Reason::StoreUnavailable);
    assert!(told[0].1.contains("journal entry 2"), "{told:?}");
    let other = Event::StoreAway {
        what: "the ledger".into(),
        error: "503".into(),
    };
    assert_eq!(reasons(&core.apply(1_100, other)), []);
    let back = |what: &str| Event::StoreBack { what: what.into() };
    assert_eq!(reasons(&core.apply(3_000, back("the ledger"))), []);
    let told = reasons(&core.apply(31_000, back("journal entry 2")));
    assert_eq!(told[0].0, Reason::StoreBack);
    assert!(told[0].1.contains("30.0 s"), "{told:?}");
}

#[test]
fn nobody_is_idle_in_a_generation_that_was_not_heard_of() {
    let mut core = training(2, Durable::default());
    core.apply(10, Event::Gone(101));
    core.apply(11, away());
    let waits = core.status().waiting_for;
    assert_eq!(waits, "the store: journal entry 2 is not written yet (503)");
    let beat = |core: &mut Core, now| {
        let beat = v1::Heartbeat {
            generation: 1,
            phase: "ready".into(),
            ..Default::default()
        };
        core.apply(now, Event::Message(100, up::Body::Heartbeat(beat)));
        core.apply(now, Event::Tick)
    };
    for now in (100..60_000).step_by(100) {
        beat(&mut core, now);
    }
    assert_eq!(core.members, [0], "it cannot know better");
    core.apply(60_000, Event::Journaled { seq: 2 });
    assert_eq!(core.status().waiting_for, "");
    for now in (60_000..70_000).step_by(100) {
        beat(&mut core, now);
    }
    assert!(core.members.is_empty(), "now it should");
}

#[test]
fn commits_pause_while_receipts_lag() {
    let mut s = settings(1);
    // So many lanes that a message holds few receipts.
    (s.lanes, s.steps_total) = (1 << 17, 40);
    (s.checkpoint_every, s.horizon_steps) = (100, 100);
    s.nodes_max = 64;
    let mut core = training_as(s, Durable::default());
    let mut committed = 0;
    for _ in 0..10 {
        committed += commits(&ready(&mut core, 0, 9, true));
    }
    let below = 2 * core.receipts_waiting_max();
    assert_eq!(committed, below);
    let waits = core.status().waiting_for;
    assert!(waits.contains("receipts of steps from 0 on"), "{waits}");
    let durable = Event::ReceiptsDurable {
        below: below as u64,
    };
    assert_eq!(commits(&core.apply(20, durable)), 1);
    assert_eq!(core.status().waiting_for, "");
}

#[test]
fn who_hears_of_a_later_leadership_says_nothing_more() {
    let mut core = training(1, Durable::default());
    let mut later = hello(0);
    later.term = 2;
    let effects = core.apply(10, Event::Hello(300, later));
    let [Effect::StepDown { term: 2 }] = &effects[..] else {
        panic!("{effects:?}")
    };
    assert!(core.apply(20, Event::Gone(100)).is_empty());
}

#[test]
fn older_receipts_are_read_when_an_older_checkpoint_is_all_there_is() {
    let receipt = |step: u64| v1::StepRecord {
        step,
        ..Default::default()
    };
    let durable = Durable {
        manifests: [4, 9].into(),
        receipts_from: 7,
        receipts: (7..9).map(|s| (s, receipt(s))).collect(),
        ..Default::default()
    };
    let mut s = settings(1);
    s.steps_total = 20;
    let mut core = Core::new(0, s, durable);
    core.apply(0, Event::Hello(100, hello(0)));
    let failed = v1::StateReady {
        step: 9,
        error: "another hash".into(),
        request: core.requests,
        ..Default::default()
    };
    let effects = core.apply(10, Event::Message(100, up::Body::StateReady(failed)));
    let asked = |effects: &[Effect]| {
        let reads = effects.iter().filter_map(|e| match e {
            Effect::ReadReceipts(steps) => Some(steps.clone()),
            _ => None,
        });
        reads.collect::<Vec<_>>()
    };
    assert!(asked(&effects).iter().eq([&(4..7)]));
    assert!(
        core.status()
            .waiting_for
            .contains("receipts of steps 4 to 6")
    );
    assert_eq!(asked(&core.apply(20, Event::Tick)), [], "once");
    let read = Event::ReceiptsRead {
        from: 4,
        receipts: (4..7).map(|s| (s, receipt(s))).collect(),
    };
    let effects = core.apply(30, read);
    let [down::Body::LoadState(load)] = sent(&effects, 100)[..] else {
        panic!("{effects:?}")
    };
    assert_eq!(load.step, 4);
    assert_eq!(core.durable.receipts.len(), 5);
}
