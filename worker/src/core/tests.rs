//! The core's rules, one by one, without sockets or devices.

use super::*;

pub(super) fn worker() -> Core {
    Core::new(Identity {
        run_id: "run".into(),
        worker_id: 7,
        incarnation: 1,
        fingerprint: "cpu".into(),
        data_address: "127.0.0.1:1".into(),
        lanes: 4,
        gathers: false,
        device: v1::Device::default(),
        data: Vec::new(),
    })
}

pub(super) fn member(worker_id: u64, now: &[(u32, u32)], next: (u32, u32)) -> v1::Member {
    let node = |&(start, end): &(u32, u32)| v1::Node { start, end };
    v1::Member {
        worker_id,
        data_address: "127.0.0.1:1".into(),
        nodes_now: now.iter().map(node).collect(),
        lanes_start: next.0,
        lanes_end: next.1,
        group: 0,
    }
}

pub(super) fn generation(generation: u64, step: u64, members: Vec<v1::Member>) -> Event {
    Event::Message(down::Body::OpenGeneration(v1::OpenGeneration {
        term: 1,
        generation,
        step,
        members,
        ..Default::default()
    }))
}

pub(super) fn commit(generation: u64, step: u64, digest: u128) -> Event {
    Event::Message(down::Body::Commit(v1::Commit {
        term: 1,
        generation,
        step,
        sum_digest: Digest(digest).to_bytes(),
        receipt: Some(v1::StepRecord {
            step,
            ..Default::default()
        }),
        ..Default::default()
    }))
}

pub(super) fn reduced(generation: u64, step: u64, digest: u128) -> Event {
    Event::Reduced {
        generation,
        step,
        sum: vec![1.0],
        digest: Digest(digest),
        finite: true,
        late: LateReports::default(),
        digests: Digests::default(),
    }
}

pub(super) fn loaded() -> Core {
    let mut core = worker();
    let load = v1::LoadState {
        term: 1,
        step: 0,
        ..Default::default()
    };
    let effects = core.apply(Event::Message(down::Body::LoadState(load)));
    assert!(matches!(effects[..], [Effect::Load { step: 0, .. }]));
    core.apply(Event::StateArrived {
        step: 0,
        digest: Digest(5),
        copied: Copied::default(),
    });
    core
}

/// Answers compute effects until the exchange starts; returns the lanes computed.
pub(super) fn compute_all(core: &mut Core, mut effects: Vec<Effect>) -> Vec<u32> {
    let mut computed = Vec::new();
    while let Some((step, lane)) = effects.iter().find_map(|e| match e {
        Effect::Compute { step, lane, .. } => Some((*step, *lane)),
        _ => None,
    }) {
        computed.push(lane);
        effects = core.apply(Event::LaneDone {
            step,
            report: v1::LaneReport {
                lane,
                ..Default::default()
            },
            gradient: vec![lane as f32].into(),
            seconds: 1.0,
        });
    }
    assert!(
        effects.iter().any(|e| matches!(e, Effect::Reduce(_))),
        "{effects:?}"
    );
    computed
}

#[test]
fn a_step_goes_from_lanes_to_commit_to_the_next_lanes() {
    let mut core = loaded();
    let opened = core.apply(generation(1, 0, vec![member(7, &[(0, 4)], (0, 4))]));
    assert_eq!(compute_all(&mut core, opened), [0, 1, 2, 3]);
    let effects = core.apply(reduced(1, 0, 9));
    let [Effect::Send(up::Body::Ready(ready))] = &effects[..] else {
        panic!("{effects:?}")
    };
    assert_eq!(ready.lanes.len(), 4);
    let effects = core.apply(commit(1, 0, 9));
    assert!(matches!(effects[..], [Effect::Apply { step: 0, .. }]));
    let effects = core.apply(Event::Applied { step: 0 });
    assert_eq!(compute_all(&mut core, effects), [0, 1, 2, 3]);
    assert_eq!(core.heartbeat().step, 1);
}

#[test]
fn stale_generations_terms_and_commits_change_nothing() {
    let mut core = loaded();
    let opened = core.apply(generation(2, 0, vec![member(7, &[(0, 4)], (0, 4))]));
    compute_all(&mut core, opened);
    assert!(
        core.apply(generation(1, 0, vec![member(7, &[(0, 2)], (0, 2))]))
            .is_empty()
    );
    assert!(core.apply(reduced(1, 0, 9)).is_empty());
    assert!(core.apply(commit(2, 0, 9)).is_empty(), "not ready yet");
    core.apply(reduced(2, 0, 9));
    assert!(core.apply(commit(1, 0, 9)).is_empty());
    assert!(core.apply(commit(2, 1, 9)).is_empty());
    assert_eq!(core.apply(commit(2, 0, 9)).len(), 1);
}

#[test]
fn a_survivor_keeps_its_nodes_and_computes_only_lost_lanes() {
    let mut core = loaded();
    let two = vec![member(7, &[(0, 2)], (0, 2)), member(8, &[(2, 4)], (2, 4))];
    let opened = core.apply(generation(1, 0, two));
    assert_eq!(compute_all(&mut core, opened), [0, 1]);
    let trouble = core.apply(Event::ReduceFailed {
        generation: 1,
        step: 0,
        ranks: vec![1],
        detail: "connection reset".into(),
    });
    assert!(matches!(
        trouble[..],
        [Effect::Send(up::Body::PeerTrouble(_))]
    ));
    let alone = vec![member(7, &[(0, 2), (2, 4)], (0, 4))];
    let opened = core.apply(generation(2, 0, alone));
    assert_eq!(compute_all(&mut core, opened), [2, 3]);
}

#[test]
fn a_held_gradient_is_applied_when_its_step_was_committed_elsewhere() {
    let mut core = loaded();
    let opened = core.apply(generation(1, 0, vec![member(7, &[(0, 4)], (0, 4))]));
    compute_all(&mut core, opened);
    core.apply(reduced(1, 0, 9));
    let effects = core.apply(Event::LinkUp);
    let [Effect::Send(up::Body::Hello(hello))] = &effects[..] else {
        panic!("{effects:?}")
    };
    assert_eq!(hello.pending_digest, Digest(9).to_bytes());
    let effects = core.apply(generation(2, 1, vec![member(7, &[(0, 4)], (0, 4))]));
    assert!(matches!(effects[..], [Effect::Apply { step: 0, .. }]));
    let effects = core.apply(Event::Applied { step: 0 });
    assert_eq!(compute_all(&mut core, effects), [0, 1, 2, 3]);
}

#[test]
fn other_bits_for_the_same_lanes_are_reported_and_only_theirs_is_applied() {
    let mut core = loaded();
    let opened = core.apply(generation(1, 0, vec![member(7, &[(0, 4)], (0, 4))]));
    compute_all(&mut core, opened);
    core.apply(reduced(1, 0, 9));
    core.apply(generation(2, 0, vec![member(7, &[(0, 4)], (0, 4))]));
    let effects = core.apply(reduced(2, 0, 10));
    let [Effect::Send(up::Body::Ready(ready))] = &effects[..] else {
        panic!("{effects:?}")
    };
    assert_eq!(ready.sum_digest, Digest(10).to_bytes());
    let effects = core.apply(commit(2, 0, 9));
    let fatal = |e: &Effect| matches!(e, Effect::Send(up::Body::Fatal(_)));
    assert!(effects.iter().any(fatal), "{effects:?}");
}

/// A generation that audits `lane`, computed again by `by`.
fn auditing(number: u64, lane: u32, by: u64, members: Vec<v1::Member>) -> v1::OpenGeneration {
    let Event::Message(down::Body::OpenGeneration(mut open)) = generation(number, 0, members)
    else {
        panic!("a generation")
    };
    open.audit = Some(v1::Audit {
        term: 1,
        generation: number,
        step: 0,
        lane,
        worker_id: by,
    });
    open
}

fn open(open: v1::OpenGeneration) -> Event {
    Event::Message(down::Body::OpenGeneration(open))
}

fn two() -> Vec<v1::Member> {
    vec![member(7, &[(0, 2)], (0, 2)), member(8, &[(2, 4)], (2, 4))]
}

fn lane_done(core: &mut Core, lane: u32) -> Vec<Effect> {
    core.apply(Event::LaneDone {
        step: 0,
        report: v1::LaneReport {
            lane,
            ..Default::default()
        },
        gradient: vec![lane as f32].into(),
        seconds: 1.0,
    })
}

fn attempt(effects: &[Effect]) -> Option<Attempt> {
    effects.iter().find_map(|e| match e {
        Effect::DigestLane { attempt, .. } => Some(*attempt),
        _ => None,
    })
}

fn digested(core: &mut Core, attempt: Attempt) -> Vec<Effect> {
    core.apply(Event::LaneDigest {
        attempt,
        digest: Ok(Digest(3)),
        seconds: 0.1,
    })
}

/// Generation, attempt and whether there is a digest.
fn audited(effects: &[Effect]) -> Vec<(u64, u32, bool)> {
    let told = effects.iter().filter_map(|e| match e {
        Effect::Send(up::Body::LaneAudited(told)) => {
            Some((told.generation, told.attempt, told.error.is_empty()))
        }
        _ => None,
    });
    told.collect()
}

fn computes(effects: &[Effect]) -> Option<u32> {
    effects.iter().find_map(|e| match e {
        Effect::Compute { lane, .. } => Some(*lane),
        _ => None,
    })
}

#[test]
fn the_holder_of_an_audited_lane_has_it_hashed_before_it_is_folded_and_tells_every_generation() {
    let mut core = loaded();
    core.apply(open(auditing(1, 1, 8, two())));
    assert_eq!(attempt(&lane_done(&mut core, 0)), None);
    let effects = lane_done(&mut core, 1);
    let first = attempt(&effects).expect("is hashed");
    assert_eq!((first.lane, first.number), (1, 0));
    assert_eq!(computes(&effects), None, "the other one audits");
    assert_eq!(audited(&digested(&mut core, first)), [(1, 0, true)]);
    let effects = core.apply(open(auditing(2, 1, 8, two())));
    assert_eq!(audited(&effects), [(2, 0, true)]);
    // A generation in which nothing that was computed counts: what was hashed does not either.
    let mut anew = auditing(3, 1, 8, two());
    anew.recompute = true;
    let effects = core.apply(open(anew));
    assert_eq!(audited(&effects), []);
    assert_eq!(computes(&effects), Some(0));
    assert_eq!(audited(&digested(&mut core, first)), [], "of before");

    let mut core = loaded();
    core.apply(generation(1, 0, two()));
    lane_done(&mut core, 0);
    lane_done(&mut core, 1);
    let effects = core.apply(open(auditing(2, 1, 8, two())));
    assert_eq!(audited(&effects), [(2, 0, false)], "it was folded already");
}

#[test]
fn an_auditor_computes_the_lane_behind_its_own_and_drops_it() {
    let mut core = loaded();
    core.apply(open(auditing(1, 3, 7, two())));
    lane_done(&mut core, 0);
    let effects = lane_done(&mut core, 1);
    let own = exchange(&effects).expect("its own lanes are summed");
    assert_eq!(own.partials.len(), 1);
    assert_eq!(computes(&effects), Some(3));
    // Before it is there another generation opens: the lane is computed once.
    assert_eq!(computes(&core.apply(open(auditing(2, 3, 7, two())))), None);
    let effects = lane_done(&mut core, 3);
    let second = attempt(&effects).expect("is hashed");
    assert_eq!(second.number, 1);
    assert_eq!(audited(&digested(&mut core, second)), [(2, 1, true)]);
    assert_eq!(core.partials.nodes().count(), 1, "it enters no sum");
    // Asked to decide, it computes once more; stale words are not heard.
    let ask = |generation| {
        Event::Message(down::Body::Audit(v1::Audit {
            term: 1,
            generation,
            step: 0,
            lane: 3,
            worker_id: 7,
        }))
    };
    assert!(core.apply(ask(1)).is_empty());
    assert_eq!(computes(&core.apply(ask(2))), Some(3));
    assert_eq!(attempt(&lane_done(&mut core, 3)).map(|a| a.number), Some(2));
    // What it cannot read it says, and no shard is put under quarantine for it.
    assert_eq!(
        computes(&core.apply(open(auditing(3, 2, 7, two())))),
        Some(2)
    );
    let effects = core.apply(Event::Unreadable {
        step: 0,
        lane: 2,
        shards: vec![lost(3, 0)],
        detail: "cut".into(),
    });
    assert_eq!(audited(&effects), [(3, 1, false)]);
}

#[test]
fn a_commit_names_the_next_steps_audit_and_a_worker_alone_audits_itself() {
    let mut core = loaded();
    let opened = core.apply(generation(1, 0, vec![member(7, &[(0, 4)], (0, 4))]));
    compute_all(&mut core, opened);
    core.apply(reduced(1, 0, 9));
    let Event::Message(down::Body::Commit(mut first)) = commit(1, 0, 9) else {
        panic!("a commit")
    };
    first.audit = Some(v1::Audit {
        term: 1,
        generation: 1,
        step: 1,
        lane: 0,
        worker_id: 7,
    });
    core.apply(Event::Message(down::Body::Commit(first)));
    let mut effects = core.apply(Event::Applied { step: 0 });
    let mut hashed = Vec::new();
    for _ in 0..5 {
        let lane = computes(&effects).expect("four own lanes and the audited one");
        effects = core.apply(Event::LaneDone {
            step: 1,
            report: v1::LaneReport {
                lane,
                ..Default::default()
            },
            gradient: vec![lane as f32].into(),
            seconds: 1.0,
        });
        hashed.extend(attempt(&effects).map(|a| (a.lane, a.number)));
    }
    assert_eq!(hashed, [(0, 0), (0, 1)]);
}

#[test]
fn the_digest_of_a_state_that_is_gone_is_none() {
    let mut core = loaded();
    let ask = |step| Event::Message(down::Body::DigestState(v1::DigestState { term: 1, step }));
    assert!(matches!(
        core.apply(ask(0))[..],
        [Effect::DigestState { step: 0 }]
    ));
    let effects = core.apply(ask(3));
    let [Effect::Send(up::Body::StateDigest(told))] = &effects[..] else {
        panic!("{effects:?}")
    };
    assert!(told.step == 3 && told.digest.is_empty());
}

#[test]
fn receipts_are_kept_for_the_next_coordinator_until_they_are_durable() {
    let mut core = loaded();
    let mut effects = core.apply(generation(1, 0, vec![member(7, &[(0, 4)], (0, 4))]));
    for step in 0..3 {
        compute_all(&mut core, effects);
        core.apply(reduced(1, step, 9));
        core.apply(commit(1, step, 9));
        effects = core.apply(Event::Applied { step });
    }
    let kept = |core: &mut Core| {
        let effects = core.apply(Event::LinkUp);
        let [Effect::Send(up::Body::Hello(hello))] = &effects[..] else {
            panic!("{effects:?}")
        };
        hello.receipts.iter().map(|r| r.step).collect::<Vec<u64>>()
    };
    assert_eq!(kept(&mut core), [0, 1, 2]);
    compute_all(&mut core, effects);
    core.apply(reduced(1, 3, 9));
    let Event::Message(down::Body::Commit(mut last)) = commit(1, 3, 9) else {
        panic!("a commit")
    };
    last.durable = 2;
    core.apply(Event::Message(down::Body::Commit(last)));
    core.apply(Event::Applied { step: 3 });
    assert_eq!(kept(&mut core), [2, 3]);
}

#[test]
fn a_hello_waits_for_the_update_that_is_being_applied() {
    let mut core = loaded();
    let opened = core.apply(generation(1, 0, vec![member(7, &[(0, 4)], (0, 4))]));
    compute_all(&mut core, opened);
    core.apply(reduced(1, 0, 9));
    core.apply(commit(1, 0, 9));
    assert!(core.apply(Event::LinkUp).is_empty());
    let effects = core.apply(Event::Applied { step: 0 });
    let Some(Effect::Send(up::Body::Hello(hello))) = effects.first() else {
        panic!("{effects:?}")
    };
    assert_eq!((hello.applied, hello.has_state), (1, true));
}

#[test]
fn what_is_asked_of_a_state_that_is_gone_begins_a_new_session() {
    let mut core = loaded();
    let evaluate = down::Body::Evaluate(v1::Evaluate {
        step: 5,
        ..Default::default()
    });
    let effects = core.apply(Event::Message(evaluate));
    assert!(matches!(effects[..], [Effect::Reconnect]), "{effects:?}");
    let mut empty = worker();
    let effects = empty.apply(generation(1, 0, vec![member(7, &[(0, 4)], (0, 4))]));
    assert!(matches!(effects[..], [Effect::Reconnect]), "{effects:?}");
}

fn linked(number: u64, links: v1::Links, groups: &[u32]) -> Event {
    let members = groups.iter().enumerate().map(|(rank, group)| {
        let (start, end) = (rank as u32, rank as u32 + 1);
        let end = if rank + 1 == groups.len() { 4 } else { end };
        v1::Member {
            group: *group,
            ..member(7 + rank as u64, &[(start, end)], (start, end))
        }
    });
    let Event::Message(down::Body::OpenGeneration(mut open)) =
        generation(number, 0, members.collect())
    else {
        panic!("a generation")
    };
    open.links = links.into();
    Event::Message(down::Body::OpenGeneration(open))
}

fn link_id(generation: u64, group: u32, id: &[u8]) -> Event {
    Event::Message(down::Body::LinkId(v1::LinkId {
        term: 1,
        generation,
        group,
        id: id.to_vec(),
        error: String::new(),
    }))
}

/// Computes the only lane; returns what follows.
fn compute_one(core: &mut Core) -> Vec<Effect> {
    core.apply(Event::LaneDone {
        step: 0,
        report: v1::LaneReport::default(),
        gradient: vec![1.0].into(),
        seconds: 1.0,
    })
}

fn exchange(effects: &[Effect]) -> Option<&Exchange> {
    effects.iter().find_map(|e| match e {
        Effect::Reduce(exchange) => Some(exchange),
        _ => None,
    })
}

#[test]
fn an_exchange_over_device_links_waits_for_its_own_generations_id() {
    let mut core = loaded();
    let opened = core.apply(linked(3, v1::Links::Device, &[0, 0]));
    let asked = |e: &Effect| matches!(e, Effect::MakeId { generation: 3 });
    assert!(opened.iter().any(asked), "the first rank makes the id");
    let made = |generation| Event::IdMade {
        generation,
        id: Ok(vec![9]),
    };
    assert!(
        core.apply(made(2)).is_empty(),
        "made for another generation"
    );
    let effects = core.apply(made(3));
    let [Effect::Send(up::Body::LinkId(sent))] = &effects[..] else {
        panic!("{effects:?}")
    };
    assert_eq!(
        (sent.generation, sent.group, &sent.id[..]),
        (3, 0, &[9][..])
    );
    assert!(exchange(&compute_one(&mut core)).is_none());
    assert_eq!(core.heartbeat().phase, "linking");
    for stale in [link_id(2, 0, &[1]), link_id(3, 1, &[2])] {
        assert!(core.apply(stale).is_empty());
    }
    let effects = core.apply(link_id(3, 0, &[9]));
    let links = exchange(&effects).expect("begins").links.as_ref();
    let links = links.expect("over links");
    assert_eq!((&links.id[..], links.ring), (&[9][..], false));
    assert_eq!(links.groups, [[0, 1]]);
    assert!(
        core.apply(link_id(3, 0, &[8])).is_empty(),
        "the first counts"
    );
}

#[test]
fn a_later_rank_makes_no_id_and_a_host_alone_needs_none() {
    let mut alone = loaded();
    let opened = alone.apply(linked(1, v1::Links::Device, &[0, 1, 1]));
    assert!(!opened.iter().any(|e| matches!(e, Effect::MakeId { .. })));
    let effects = compute_one(&mut alone);
    let links = exchange(&effects).expect("begins").links.as_ref();
    let links = links.expect("grouped");
    assert_eq!(links.groups, [vec![0], vec![1, 2]]);
    assert!(links.id.is_empty());
    // A generation over TCP waits for nothing, whatever the one before waited for.
    let mut core = loaded();
    core.apply(linked(1, v1::Links::Device, &[0, 0]));
    compute_one(&mut core);
    let effects = core.apply(linked(2, v1::Links::Tcp, &[0, 0]));
    assert!(exchange(&effects).expect("begins").links.is_none());
}

pub(super) fn lost(shard: u32, from_step: u64) -> v1::Shard {
    v1::Shard {
        shard,
        from_step,
        ..Default::default()
    }
}

pub(super) fn without(number: u64, step: u64, shards: &[v1::Shard]) -> Event {
    let Event::Message(down::Body::OpenGeneration(mut open)) =
        generation(number, step, vec![member(7, &[(0, 4)], (0, 4))])
    else {
        panic!("a generation")
    };
    open.quarantine = shards.to_vec();
    Event::Message(down::Body::OpenGeneration(open))
}

/// Shards that the lane asked for is computed without.
fn computed_without(effects: &[Effect]) -> Vec<u32> {
    let quarantine = effects.iter().find_map(|e| match e {
        Effect::Compute { quarantine, .. } => Some(quarantine),
        _ => None,
    });
    let quarantine = quarantine.unwrap_or_else(|| panic!("{effects:?}"));
    quarantine.iter().map(|s| s.shard).collect()
}

#[test]
fn an_unreadable_shard_is_reported_and_the_step_begins_again_without_it() {
    let mut core = loaded();
    core.apply(without(1, 0, &[]));
    compute_one(&mut core);
    let effects = core.apply(Event::Unreadable {
        step: 0,
        lane: 1,
        shards: vec![lost(3, 0)],
        detail: "cut".into(),
    });
    let [Effect::Send(up::Body::Unreadable(report))] = &effects[..] else {
        panic!("{effects:?}")
    };
    assert_eq!((report.generation, report.step), (1, 0));
    assert_eq!(core.heartbeat().phase, "computing", "it waits");
    // The choice holds for the open step: lane 0 is computed again.
    let opened = core.apply(without(2, 0, &[lost(3, 0), lost(4, 1)]));
    let unstaged = opened.iter().any(|e| matches!(e, Effect::Unstage));
    assert!(unstaged, "{opened:?}");
    assert_eq!(computed_without(&opened), [3]);
    assert_eq!(compute_all(&mut core, opened), [0, 1, 2, 3]);
    // A gradient of other pairs than before is no alarm; the next step does without both.
    core.apply(reduced(2, 0, 9));
    core.apply(commit(2, 0, 9));
    let effects = core.apply(Event::Applied { step: 0 });
    assert_eq!(computed_without(&effects), [3, 4]);
}

#[test]
fn what_was_computed_with_the_shard_is_dropped_also_when_it_arrives_late() {
    let mut core = loaded();
    let opened = core.apply(without(1, 0, &[]));
    compute_all(&mut core, opened);
    core.apply(reduced(1, 0, 9));
    let opened = core.apply(without(2, 0, &[lost(3, 0)]));
    assert_eq!(compute_all(&mut core, opened), [0, 1, 2, 3]);
    let effects = core.apply(reduced(2, 0, 10));
    let ready = |e: &Effect| matches!(e, Effect::Send(up::Body::Ready(_)));
    assert!(effects.iter().any(ready), "other pairs, other bits");

    let mut core = loaded();
    core.apply(without(1, 0, &[]));
    let waiting = core.apply(without(2, 0, &[lost(3, 0)]));
    assert!(!waiting.iter().any(|e| matches!(e, Effect::Compute { .. })));
    // Lane 0 lands, computed with the shard: it is asked for again. So it is if the shard failed it.
    let late = compute_one(&mut core);
    assert_eq!(computed_without(&late), [3]);
    core.apply(without(3, 0, &[lost(3, 0), lost(4, 0)]));
    let failed = core.apply(Event::Unreadable {
        step: 0,
        lane: 0,
        shards: vec![lost(4, 0)],
        detail: "cut".into(),
    });
    assert_eq!(computed_without(&failed), [3, 4]);
    assert_eq!(compute_all(&mut core, failed), [0, 1, 2, 3]);
}

/// The next coordinator may already have another process of this worker.
#[test]
fn a_worker_that_was_asked_to_stop_says_hello_to_nobody_else() {
    for next in [Event::LinkDown, Event::LinkUp] {
        let mut core = loaded();
        core.apply(Event::Shutdown);
        let effects = core.apply(next);
        assert!(
            matches!(effects[..], [Effect::Exit { success: true, .. }]),
            "{effects:?}"
        );
    }
}
