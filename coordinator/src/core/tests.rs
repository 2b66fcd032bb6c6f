//! The core's rules, one by one, that the simulation's honest workers never meet.

use super::*;

mod audit;
mod checkpoint;
mod copies;
mod evaluation;
mod evidence;
mod quarantine;
mod receipt;
mod roster;
mod scale;
mod store;
mod trouble;

fn settings(workers: usize) -> Settings {
    Settings {
        run_id: "run".into(),
        lanes: 4,
        micro_batches: 4,
        pairs_per_lane: 1,
        steps_total: 3,
        min_workers: 1,
        max_workers: 0,
        spares: 2,
        skip_non_finite: false,
        expected_workers: workers,
        timeouts: Timeouts::new(std::time::Duration::from_secs(1)),
        checkpoint: belfry_configs::Checkpoint {
            every_steps: 10,
            parts: 2,
            ..Default::default()
        },
        nodes_max: 4,
        audit_every: 0,
        evaluates: false,
        rhythm: belfry_configs::Rhythm::Never,
        links: LinkPolicy::Tcp,
        quarantine_shards_max: 2,
        horizon_steps: 64,
        term: 1,
    }
}

/// A core that trains with `workers` workers, in sessions 100, 101, ….
fn training(workers: u64, durable: Durable) -> Core {
    training_as(settings(workers as usize), durable)
}

fn training_as(settings: Settings, durable: Durable) -> Core {
    let workers = settings.expected_workers as u64;
    let mut core = Core::new(0, settings, durable);
    for id in 0..workers {
        core.apply(0, Event::Hello(100 + id, hello(id)));
    }
    for id in 0..workers {
        let ready = v1::StateReady {
            digest: Digest(7).to_bytes(),
            request: core.requests,
            ..Default::default()
        };
        core.apply(0, Event::Message(100 + id, up::Body::StateReady(ready)));
    }
    assert_eq!(core.phase, Phase::Training);
    core.apply(0, Event::Journaled { seq: 1 });
    core
}

fn hello(worker_id: u64) -> v1::Hello {
    v1::Hello {
        run_id: "run".into(),
        worker_id,
        incarnation: 1,
        data_address: format!("worker-{worker_id}"),
        ..Default::default()
    }
}

/// The worker's ready for the open step, with its lanes reported.
fn ready(core: &mut Core, id: u64, digest: u128, finite: bool) -> Vec<Effect> {
    let ready = v1::Ready {
        finite,
        ..said(core, id, digest)
    };
    core.apply(10, Event::Message(100 + id, up::Body::Ready(ready)))
}

fn said(core: &Core, id: u64, digest: u128) -> v1::Ready {
    let lanes = core.nodes_now[&id].iter().flat_map(|n| n.start..n.end);
    v1::Ready {
        term: 1,
        generation: core.generation,
        step: core.committed,
        sum_digest: Digest(digest).to_bytes(),
        finite: true,
        lanes: lanes
            .map(|lane| v1::LaneReport {
                lane,
                pairs: 1,
                ..Default::default()
            })
            .collect(),
        compute_seconds: 1.0,
        ..Default::default()
    }
}

fn ended(effects: &[Effect]) -> Option<(bool, &str)> {
    effects.iter().find_map(|e| match e {
        Effect::Finish { success, reason } => Some((*success, reason.as_str())),
        _ => None,
    })
}

/// Everything that is said, to whomever.
fn bodies(effects: &[Effect]) -> impl Iterator<Item = &down::Body> {
    effects.iter().filter_map(|effect| match effect {
        Effect::Send(_, body) => Some(body),
        Effect::SendAll(_, body) => Some(body.as_ref()),
        _ => None,
    })
}

fn sent<'a>(effects: &'a [Effect], session: u64) -> Vec<&'a down::Body> {
    let to = |e: &'a Effect| match e {
        Effect::Send(to, body) if *to == session => Some(body),
        Effect::SendAll(to, body) if to.contains(&session) => Some(&**body),
        _ => None,
    };
    effects.iter().filter_map(to).collect()
}

#[test]
fn a_step_counts_when_all_are_ready_with_the_same_bits() {
    let mut core = training(2, Durable::default());
    assert!(sent(&ready(&mut core, 0, 9, true), 100).is_empty());
    let effects = ready(&mut core, 1, 9, true);
    for session in [100, 101] {
        let [down::Body::Commit(commit)] = sent(&effects, session)[..] else {
            panic!("{effects:?}")
        };
        let receipt = commit.receipt.as_ref().expect("a receipt");
        assert_eq!((commit.step, receipt.pairs), (0, 4));
    }
}

#[test]
fn a_minority_with_other_bits_is_named_and_expelled() {
    let mut core = training(3, Durable::default());
    ready(&mut core, 0, 9, true);
    ready(&mut core, 1, 9, true);
    let effects = ready(&mut core, 2, 10, true);
    let [down::Body::Refused(refused)] = sent(&effects, 102)[..] else {
        panic!("{effects:?}")
    };
    assert!(
        refused
            .reason
            .contains("worker 2 (rank 2) is removed: its copy of the sum")
    );
    assert_eq!(core.members, [0, 1]);
    assert!(ended(&effects).is_none(), "the others go on");

    let mut core = training(2, Durable::default());
    ready(&mut core, 0, 9, true);
    assert!(
        ended(&ready(&mut core, 1, 10, true)).is_none(),
        "tried again"
    );
    ready(&mut core, 0, 9, true);
    let effects = ready(&mut core, 1, 10, true);
    let (success, reason) = ended(&effects).expect("nobody knows who is right");
    assert!(!success && reason.contains("no majority"), "{reason}");
}

#[test]
fn a_gradient_that_is_not_finite_stops_the_run_and_says_what_to_do() {
    let mut core = training(1, Durable::default());
    let effects = ready(&mut core, 0, 9, false);
    let (success, reason) = ended(&effects).expect("ends");
    assert!(
        !success && reason.contains("optim.learning_rate"),
        "{reason}"
    );
}

#[test]
fn a_step_that_comes_out_otherwise_than_its_receipt_is_an_alarm() {
    let receipt = v1::StepRecord {
        step: 0,
        sum_digest: Digest(8).to_string(),
        ..Default::default()
    };
    let durable = Durable {
        receipts: [(0, receipt)].into(),
        ..Durable::default()
    };
    let mut core = training(1, durable);
    let effects = ready(&mut core, 0, 9, true);
    let (success, reason) = ended(&effects).expect("ends");
    assert!(
        !success && reason.contains("differ from the first time"),
        "{reason}"
    );
}

#[test]
fn a_commit_waits_for_a_newcomers_copy_but_not_for_ever() {
    let mut core = training(1, Durable::default());
    let effects = core.apply(10, Event::Hello(101, hello(1)));
    let [down::Body::Welcome(_), down::Body::CopyState(copy)] = sent(&effects, 101)[..] else {
        panic!("{effects:?}")
    };
    assert_eq!(copy.sources, ["worker-0"]);
    assert!(sent(&ready(&mut core, 0, 9, true), 100).is_empty());
    let beat = up::Body::Heartbeat(v1::Heartbeat {
        generation: core.generation,
        phase: "ready".into(),
        ..Default::default()
    });
    core.apply(1011, Event::Message(100, beat));
    let effects = core.apply(1011, Event::Tick);
    assert!(matches!(sent(&effects, 100)[..], [down::Body::Commit(_)]));
}

#[test]
fn the_last_checkpoints_parts_are_asked_of_survivors() {
    let mut core = training(2, Durable::default());
    for _ in 0..3 {
        ready(&mut core, 0, 9, true);
        ready(&mut core, 1, 9, true);
    }
    assert_eq!(core.phase, Phase::Finishing);
    let stored = v1::PartStored {
        step: 3,
        part: 0,
        ..Default::default()
    };
    core.apply(20, Event::Message(100, up::Body::PartStored(stored)));
    core.apply(20, Event::Gone(101));
    // The survivor comes in a new session: what it was told in the old one may be lost.
    let again = v1::Hello {
        has_state: true,
        applied: 3,
        ..hello(0)
    };
    let effects = core.apply(20, Event::Hello(102, again));
    let asked = sent(&effects, 102).into_iter().find_map(|body| match body {
        down::Body::StoreParts(store) => Some(store),
        _ => None,
    });
    let asked = asked.expect("the part that nobody stored");
    assert_eq!((asked.step, &asked.parts[..]), (3, &[1][..]));
}

#[test]
fn a_session_that_was_replaced_is_not_heard() {
    let mut core = training(1, Durable::default());
    core.apply(10, Event::Hello(200, hello(0)));
    let before = core.generation;
    let effects = core.apply(10, Event::Gone(100));
    assert!(effects.is_empty(), "{effects:?}");
    assert_eq!(core.generation, before);
    // A hello that was overtaken by a later one.
    let effects = core.apply(10, Event::Hello(150, hello(0)));
    assert!(matches!(effects[..], [Effect::Close(150)]), "{effects:?}");
}

#[test]
fn another_run_and_another_fingerprint_are_refused() {
    let mut core = training(1, Durable::default());
    let refused = |core: &mut Core, hello: v1::Hello| {
        let effects = core.apply(10, Event::Hello(300, hello));
        let [down::Body::Refused(refused)] = sent(&effects, 300)[..] else {
            panic!("{effects:?}")
        };
        refused.reason.clone()
    };
    let mut other = hello(5);
    other.run_id = "another".into();
    assert!(refused(&mut core, other).contains("another run"));
    let mut other = hello(5);
    other.fingerprint = "another chip".into();
    assert!(refused(&mut core, other).contains("another chip"));
}

/// As [`training`], with links as configured and the workers' devices as given.
fn linked(links: LinkPolicy, devices: &[(&str, &str)]) -> (Core, Vec<Effect>) {
    let mut s = settings(devices.len());
    s.links = links;
    let mut core = Core::new(0, s, Durable::default());
    let mut effects = Vec::new();
    for (id, device) in devices.iter().enumerate() {
        let id = id as u64;
        effects.extend(core.apply(0, Event::Hello(100 + id, hello_from(id, *device))));
    }
    for id in 0..devices.len() as u64 {
        let ready = v1::StateReady {
            digest: Digest(7).to_bytes(),
            request: core.requests,
            ..Default::default()
        };
        effects.extend(core.apply(0, Event::Message(100 + id, up::Body::StateReady(ready))));
    }
    (core, effects)
}

fn hello_from(id: u64, (host, missing): (&str, &str)) -> v1::Hello {
    let device = v1::Device {
        host: host.into(),
        unit: id.to_string(),
        links_missing: missing.into(),
    };
    v1::Hello {
        device: Some(device),
        ..hello(id)
    }
}

fn link_id(core: &mut Core, now: Millis, from: u64, group: u32, id: &[u8]) -> Vec<Effect> {
    let link_id = v1::LinkId {
        term: 1,
        generation: core.generation,
        group,
        id: id.to_vec(),
        error: if id.is_empty() { "no luck" } else { "" }.into(),
    };
    core.apply(now, Event::Message(100 + from, up::Body::LinkId(link_id)))
}

fn notices(effects: &[Effect]) -> Vec<&str> {
    let emitted = effects.iter().filter_map(|effect| match effect {
        Effect::Emit(event) => Some(event.notice.as_str()),
        _ => None,
    });
    emitted.filter(|notice| !notice.is_empty()).collect()
}

const FLAT: LinkPolicy = LinkPolicy::Device {
    hierarchical: false,
};

#[test]
fn an_id_goes_from_its_groups_first_member_to_the_group_and_stale_ones_nowhere() {
    let (mut core, _) = linked(FLAT, &[("a", ""), ("b", "")]);
    assert_eq!(core.links, v1::Links::Device);
    assert!(sent(&link_id(&mut core, 10, 1, 0, &[5]), 100).is_empty());
    let mut stale = v1::LinkId {
        term: 1,
        generation: core.generation - 1,
        id: vec![4],
        ..Default::default()
    };
    let old = core.apply(10, Event::Message(100, up::Body::LinkId(stale.clone())));
    assert!(sent(&old, 100).is_empty(), "of an older generation");
    (stale.term, stale.generation) = (0, core.generation);
    let old = core.apply(10, Event::Message(100, up::Body::LinkId(stale)));
    assert!(sent(&old, 100).is_empty(), "of an older term");
    let effects = link_id(&mut core, 10, 0, 0, &[5]);
    for session in [100, 101] {
        let [down::Body::LinkId(told)] = sent(&effects, session)[..] else {
            panic!("{effects:?}")
        };
        assert_eq!(told.id, [5]);
    }
    // Once is enough.
    assert!(sent(&link_id(&mut core, 10, 0, 0, &[6]), 100).is_empty());

    let hosts = [("a", ""), ("b", ""), ("a", "")];
    let (mut core, _) = linked(LinkPolicy::Device { hierarchical: true }, &hosts);
    assert_eq!(core.groups, [0, 1, 0]);
    let effects = link_id(&mut core, 10, 0, 0, &[5]);
    let got = [100, 101, 102].map(|s| sent(&effects, s).len());
    assert_eq!(got, [1, 0, 1], "b is alone and needs none");
    assert!(core.apply(5_000, Event::Tick).len() < 4, "nobody is late");
}

#[test]
fn a_generation_without_links_on_every_member_sums_over_tcp_and_says_why() {
    let (core, effects) = linked(FLAT, &[("a", ""), ("b", "libnccl.so not found")]);
    assert_eq!(core.links, v1::Links::Tcp);
    let why = "worker 1 on b: libnccl.so not found";
    assert!(notices(&effects).iter().any(|n| n.contains(why)));

    let (mut core, _) = linked(FLAT, &[("a", ""), ("b", "")]);
    let effects = link_id(&mut core, 10, 0, 0, &[]);
    assert!(notices(&effects).iter().any(|n| n.contains("no luck")));
    assert_eq!((core.links, core.generation), (v1::Links::Tcp, 2));
}

#[test]
fn ids_that_do_not_come_and_links_that_break_end_in_tcp_within_bounds() {
    let (mut core, _) = linked(FLAT, &[("a", ""), ("b", "")]);
    let mut now = 0;
    while core.links == v1::Links::Device {
        now += 1_100;
        assert!(now < 10_000, "it goes on for ever");
        for session in [100, 101] {
            let beat = v1::Heartbeat {
                generation: core.generation,
                phase: "linking".into(),
                ..Default::default()
            };
            core.apply(now, Event::Message(session, up::Body::Heartbeat(beat)));
        }
        core.apply(now, Event::Tick);
    }
    assert!(core.generation > 2, "some generations were tried");
    assert_eq!(core.members, [0, 1], "nobody is blamed");

    let (mut core, _) = linked(FLAT, &[("a", ""), ("b", "")]);
    for round in 0..20 {
        if core.links == v1::Links::Tcp {
            break;
        }
        assert!(round < 10, "it goes on for ever");
        link_id(&mut core, round * 200, 0, 0, &[5]);
        let trouble = v1::PeerTrouble {
            generation: core.generation,
            detail: "links broke".into(),
            ..Default::default()
        };
        let trouble = up::Body::PeerTrouble(trouble);
        core.apply(round * 200, Event::Message(100, trouble));
        core.apply(round * 200 + 150, Event::Tick);
    }
    assert_eq!(core.members, [0, 1], "nobody is blamed");
}

#[test]
fn a_ring_says_what_it_gives_up_and_refuses_who_lacks_it() {
    let (mut core, effects) = linked(LinkPolicy::Ring, &[("a", ""), ("b", "")]);
    let said = "bits hold per number of workers only (promise 2 off)";
    assert!(notices(&effects).iter().any(|n| n.contains(said)));
    assert_eq!(core.links, v1::Links::Ring);
    let lacks = hello_from(7, ("c", "libnccl.so not found"));
    let effects = core.apply(10, Event::Hello(300, lacks));
    let [down::Body::Refused(refused)] = sent(&effects, 300)[..] else {
        panic!("{effects:?}")
    };
    let reason = &refused.reason;
    assert!(reason.contains("nccl_ring") && reason.contains("libnccl.so"));
    // A step that comes out otherwise with other members is no alarm; another past is no state.
    link_id(&mut core, 10, 0, 0, &[5]);
    core.apply(10, Event::Journaled { seq: 1 });
    for id in 0..2 {
        ready(&mut core, id, 9, true);
    }
    assert_eq!(core.committed, 1);
    let mut other = hello_from(8, ("c", ""));
    (other.has_state, other.applied) = (true, 1);
    other.receipts = vec![v1::StepRecord {
        sum_digest: Digest(10).to_string(),
        ..Default::default()
    }];
    let effects = core.apply(20, Event::Hello(301, other));
    assert!(ended(&effects).is_none());
    let asked = sent(&effects, 301);
    let copies = |m: &&&down::Body| matches!(m, down::Body::CopyState(_));
    assert!(asked.iter().any(|m| copies(&m)), "{asked:?}");
    assert_eq!(core.members, [0, 1]);
}
