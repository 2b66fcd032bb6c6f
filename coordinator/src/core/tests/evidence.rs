//! Digests that disagree: who is named, who is removed, and what is repeated before anybody is.

use super::*;

fn tell(core: &mut Core, id: u64, ready: v1::Ready) -> Vec<Effect> {
    core.apply(10, Event::Message(100 + id, up::Body::Ready(ready)))
}

fn reasons(effects: &[Effect]) -> Vec<Reason> {
    let emitted = effects.iter().filter_map(|effect| match effect {
        Effect::Emit(event) if !event.notice.is_empty() => Some(event.reason()),
        _ => None,
    });
    emitted.collect()
}

fn opened(effects: &[Effect], session: u64) -> &v1::OpenGeneration {
    let found = sent(effects, session)
        .into_iter()
        .find_map(|body| match body {
            down::Body::OpenGeneration(open) => Some(open),
            _ => None,
        });
    found.unwrap_or_else(|| panic!("{effects:?}"))
}

fn committed(effects: &[Effect]) -> Option<&v1::Commit> {
    bodies(effects).find_map(|body| match body {
        down::Body::Commit(commit) => Some(commit),
        _ => None,
    })
}

#[test]
fn an_odd_copy_of_the_sum_is_named_with_its_buckets_and_the_step_commits() {
    let mut core = training(3, Durable::default());
    for id in 0..2 {
        let mut ready = said(&core, id, 9);
        ready.sum_parts = vec![1, 2, 3];
        tell(&mut core, id, ready);
    }
    // The digest of the whole is right: it was hashed before the bit flipped.
    let mut odd = said(&core, 2, 9);
    odd.sum_parts = vec![1, 7, 3];
    let effects = tell(&mut core, 2, odd);
    let [down::Body::Refused(refused)] = sent(&effects, 102)[..] else {
        panic!("{effects:?}")
    };
    assert!(
        refused.reason.contains("buckets of ranks [1]"),
        "{}",
        refused.reason
    );
    assert_eq!(core.members, [0, 1]);
    let lanes: u32 = opened(&effects, 100)
        .members
        .iter()
        .flat_map(|m| &m.nodes_now)
        .map(|n| n.end - n.start)
        .sum();
    assert_eq!(lanes, 4, "the others compute its lanes");
    assert!(
        ready(&mut core, 0, 9, true)
            .iter()
            .all(|e| !matches!(e, Effect::Finish { .. }))
    );
    assert!(committed(&ready(&mut core, 1, 9, true)).is_some());
}

#[test]
fn of_two_workers_the_one_whose_sum_changes_when_it_is_repeated_is_wrong() {
    let mut core = training(2, Durable::default());
    ready(&mut core, 0, 8, true);
    let effects = ready(&mut core, 1, 9, true);
    assert_eq!(reasons(&effects)[0], Reason::DigestsDiffer);
    assert_eq!(core.members, [0, 1]);
    ready(&mut core, 0, 9, true);
    let effects = ready(&mut core, 1, 9, true);
    assert!(reasons(&effects).contains(&Reason::WorkerExpelled));
    assert_eq!(core.members, [1]);
    assert!(committed(&ready(&mut core, 1, 9, true)).is_some());
}

#[test]
fn an_expelled_process_is_not_let_in_again_and_another_one_is() {
    let mut core = training(3, Durable::default());
    ready(&mut core, 0, 9, true);
    ready(&mut core, 1, 9, true);
    ready(&mut core, 2, 10, true);
    let effects = core.apply(20, Event::Hello(200, hello(2)));
    let [down::Body::Refused(refused)] = sent(&effects, 200)[..] else {
        panic!("{effects:?}")
    };
    assert!(refused.reason.contains("was removed for wrong bits"));
    let fresh = v1::Hello {
        incarnation: 2,
        ..hello(2)
    };
    let effects = core.apply(20, Event::Hello(201, fresh));
    assert!(
        matches!(sent(&effects, 201)[0], down::Body::Welcome(_)),
        "{effects:?}"
    );
}

#[test]
fn a_node_that_changes_between_generations_names_who_holds_it() {
    let mut core = training(3, Durable::default());
    let node = |core: &Core, digest| v1::NodeDigest {
        node: Some(core.nodes_now[&1][0].into()),
        digest,
    };
    let mut first = said(&core, 1, 9);
    first.nodes = vec![node(&core, 5)];
    tell(&mut core, 1, first);
    core.apply(15, Event::Gone(102));
    ready(&mut core, 0, 11, true);
    let mut second = said(&core, 1, 11);
    second.nodes = vec![node(&core, 6)];
    let effects = tell(&mut core, 1, second);
    let told = notices(&effects);
    assert!(
        told[0].contains("worker 1 (rank 1) is removed: the gradient of lanes"),
        "{told:?}"
    );
    assert_eq!(core.members, [0]);
}

#[test]
fn a_sum_that_changes_between_generations_is_computed_again_by_all() {
    let mut core = training(3, Durable::default());
    ready(&mut core, 1, 9, true);
    core.apply(15, Event::Gone(102));
    ready(&mut core, 0, 11, true);
    let effects = ready(&mut core, 1, 11, true);
    assert!(committed(&effects).is_none());
    assert!(opened(&effects, 100).recompute);
    // It comes out as the first time: that was right, and is committed.
    ready(&mut core, 0, 9, true);
    assert!(committed(&ready(&mut core, 1, 9, true)).is_some());

    let mut core = training(3, Durable::default());
    ready(&mut core, 1, 9, true);
    core.apply(15, Event::Gone(102));
    ready(&mut core, 0, 11, true);
    ready(&mut core, 1, 11, true);
    ready(&mut core, 0, 12, true);
    let effects = ready(&mut core, 1, 12, true);
    let (success, reason) = ended(&effects).expect("three ways");
    assert!(!success && reason.contains("three ways"), "{reason}");
}

#[test]
fn a_state_that_differs_removes_its_worker_or_is_loaded_again_by_all() {
    let with = |core: &Core, id, state: u8| v1::Ready {
        state_digest: vec![state; 16],
        ..said(core, id, 9)
    };
    let mut core = training(3, Durable::default());
    for id in 0..2 {
        let ready = with(&core, id, 1);
        tell(&mut core, id, ready);
    }
    let odd = with(&core, 2, 2);
    let effects = tell(&mut core, 2, odd);
    let told = notices(&effects);
    assert!(
        told[0].contains("worker 2 (rank 2) is removed: its state differs"),
        "{told:?}"
    );

    let mut core = training(2, Durable::default());
    for round in 0..=3 {
        let ready = with(&core, 0, 1);
        tell(&mut core, 0, ready);
        let odd = with(&core, 1, 2);
        let effects = tell(&mut core, 1, odd);
        if round == 3 {
            let (success, reason) = ended(&effects).expect("not for ever");
            assert!(
                !success && reason.contains("hold different states"),
                "{reason}"
            );
            return;
        }
        assert_eq!(reasons(&effects)[0], Reason::StateDiffers);
        let effects = core.apply(15, Event::Tick);
        for id in 0..2 {
            let loads = |b: &&down::Body| matches!(b, down::Body::LoadState(_));
            assert!(sent(&effects, 100 + id).iter().any(loads), "{effects:?}");
            let ready = v1::StateReady {
                digest: Digest(7).to_bytes(),
                request: core.requests,
                ..Default::default()
            };
            core.apply(20, Event::Message(100 + id, up::Body::StateReady(ready)));
        }
        assert_eq!((core.phase.clone(), core.committed), (Phase::Training, 0));
    }
}
