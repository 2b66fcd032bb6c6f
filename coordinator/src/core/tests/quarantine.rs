//! What the core does about shards that stay unreadable, and about datasets that changed.

use super::*;

fn shard(shard: u32) -> v1::Shard {
    v1::Shard {
        shard,
        file: format!("{shard:06}.tar"),
        ..Default::default()
    }
}

/// Worker `id` cannot read `shards`, in the open generation and step.
fn unreadable(core: &mut Core, id: u64, shards: &[u32]) -> Vec<Effect> {
    let report = v1::Unreadable {
        term: 1,
        generation: core.generation,
        step: core.committed,
        shards: shards.iter().map(|s| shard(*s)).collect(),
        detail: "lane 0: the hash is wrong".into(),
    };
    core.apply(10, Event::Message(100 + id, up::Body::Unreadable(report)))
}

fn commit_a_step(core: &mut Core, digest: u128) -> v1::StepRecord {
    let members = core.members.clone();
    let effects: Vec<Effect> = members
        .into_iter()
        .flat_map(|id| ready(core, id, digest, true))
        .collect();
    let receipt = effects.iter().find_map(|e| match e {
        Effect::Send(_, down::Body::Commit(commit)) => commit.receipt.clone(),
        Effect::SendAll(_, body) => match &**body {
            down::Body::Commit(commit) => commit.receipt.clone(),
            _ => None,
        },
        _ => None,
    });
    receipt.unwrap_or_else(|| panic!("{effects:?}"))
}

#[test]
fn a_quarantine_is_journaled_and_the_open_step_begins_again_for_all() {
    let mut core = training(2, Durable::default());
    assert_eq!(commit_a_step(&mut core, 9).quarantine, []);
    ready(&mut core, 0, 9, true);
    let before = core.generation;
    let effects = unreadable(&mut core, 1, &[3]);
    let place = |wanted: fn(&Effect) -> bool| effects.iter().position(wanted);
    let journaled = place(|e| matches!(e, Effect::Journal { .. })).expect("is written");
    let told = place(|e| matches!(e, Effect::Send(..) | Effect::SendAll(..))).expect("is told");
    assert!(journaled < told, "written before anybody hears of it");
    let lost = v1::Shard {
        from_step: 1,
        ..shard(3)
    };
    let Effect::Journal {
        generation,
        quarantine,
        ..
    } = &effects[journaled]
    else {
        panic!("{effects:?}")
    };
    assert_eq!(*generation, before + 1);
    assert_eq!(quarantine[..], *std::slice::from_ref(&lost));
    for session in [100, 101] {
        let [down::Body::OpenGeneration(open)] = sent(&effects, session)[..] else {
            panic!("{effects:?}")
        };
        assert_eq!(open.step, 1);
        assert_eq!(open.quarantine[..], *std::slice::from_ref(&lost));
    }
    // A report of the generation before is about a choice that has been made.
    let mut late = v1::Unreadable {
        term: 1,
        generation: before,
        step: 1,
        shards: vec![shard(5)],
        ..Default::default()
    };
    let body = up::Body::Unreadable(late.clone());
    assert!(core.apply(10, Event::Message(100, body)).is_empty());
    (late.generation, late.term) = (before + 1, 0);
    let body = up::Body::Unreadable(late);
    assert!(core.apply(10, Event::Message(100, body)).is_empty());
    assert_eq!(commit_a_step(&mut core, 11).quarantine, [lost]);
}

#[test]
fn without_a_quarantine_or_beyond_it_the_run_stops_and_names_the_shards() {
    let mut strict = settings(1);
    strict.quarantine_shards_max = 0;
    let mut core = training_as(strict, Durable::default());
    let effects = unreadable(&mut core, 0, &[3]);
    let (success, reason) = ended(&effects).expect("ends");
    assert!(!success && reason.contains("the hash is wrong"), "{reason}");
    assert!(
        reason.contains("quarantine_shards_max = 0") && reason.contains("--resume"),
        "{reason}"
    );

    let mut core = training(1, Durable::default());
    assert!(ended(&unreadable(&mut core, 0, &[3])).is_none());
    assert!(ended(&unreadable(&mut core, 0, &[4])).is_none());
    let effects = unreadable(&mut core, 0, &[5]);
    let (_, reason) = ended(&effects).expect("ends");
    for part in ["quarantine_shards_max = 2", "000003.tar", "000004.tar"] {
        assert!(reason.contains(part), "{reason}");
    }
    // A worker that reads what it was told not to read would report it for ever.
    let mut core = training(1, Durable::default());
    unreadable(&mut core, 0, &[3]);
    let effects = unreadable(&mut core, 0, &[3]);
    let (_, reason) = ended(&effects).expect("ends");
    assert!(reason.contains("must not be read"), "{reason}");
}

#[test]
fn a_step_that_was_committed_before_is_not_decided_again() {
    // Rolled back to step 0 behind a shard that is out from step 2 on.
    let lost = v1::Shard {
        from_step: 2,
        ..shard(3)
    };
    let durable = Durable {
        committed: 2,
        quarantine: [lost.clone()].into_iter().collect(),
        ..Durable::default()
    };
    let mut core = training(1, durable.clone());
    assert_eq!(commit_a_step(&mut core, 9).quarantine, [], "not yet");
    commit_a_step(&mut core, 9);
    assert_eq!(commit_a_step(&mut core, 9).quarantine, [lost]);
    for lost in [3, 4] {
        let mut core = training(1, durable.clone());
        let effects = unreadable(&mut core, 0, &[lost]);
        let (_, reason) = ended(&effects).expect("ends");
        assert!(reason.contains("steps up to 1 were committed"), "{reason}");
    }
}

/// A commit needs every member's ready: what a last member holds bounds what was committed.
#[test]
fn steps_that_an_earlier_term_may_have_committed_are_not_decided_again() {
    let durable = Durable {
        horizon: 3,
        members: vec![0],
        ..Durable::default()
    };
    let held = |applied_digest: &[u8], pending_digest: &[u8]| v1::Hello {
        has_state: true,
        applied_digest: applied_digest.to_vec(),
        pending_digest: pending_digest.to_vec(),
        ..hello(0)
    };
    let digest = Digest(5).to_bytes();
    for (hello, members, stops) in [
        (held(&digest, &[]), vec![0], false),
        (held(&[], &digest), vec![0], true),
        // It may have loaded its state when all was over.
        (held(&[], &[]), vec![0], true),
        // Others went on without it.
        (held(&digest, &[]), vec![1], true),
    ] {
        let mut before = durable.clone();
        before.members = members;
        let mut s = settings(1);
        s.term = 2;
        let mut core = Core::new(0, s, before);
        core.apply(0, Event::Hello(100, hello));
        assert_eq!(core.phase, Phase::Training);
        let report = v1::Unreadable {
            term: 2,
            generation: core.generation,
            shards: vec![shard(3)],
            ..Default::default()
        };
        let effects = core.apply(10, Event::Message(100, up::Body::Unreadable(report)));
        assert_eq!(ended(&effects).is_some(), stops, "{effects:?}");
    }
}

#[test]
fn a_dataset_that_changed_is_refused_by_name() {
    let dataset = |sha256: &str| v1::Dataset {
        key: "data.train".into(),
        path: "s3://bucket/train".into(),
        manifest_sha256: sha256.into(),
        pairs: 7,
    };
    let with = |id, datasets: &[v1::Dataset]| v1::Hello {
        data: datasets.to_vec(),
        ..hello(id)
    };
    let mut core = Core::new(0, settings(2), Durable::default());
    let effects = core.apply(0, Event::Hello(100, with(0, &[dataset("a")])));
    let written = |e: &Effect| matches!(e, Effect::StoreData(data) if data[..] == [dataset("a")]);
    assert!(written(&effects[0]), "{effects:?}");
    let effects = core.apply(0, Event::Hello(101, with(1, &[dataset("a")])));
    assert!(!effects.iter().any(|e| matches!(e, Effect::StoreData(_))));
    let durable = Durable {
        data: Some(vec![dataset("a")]),
        ..Durable::default()
    };
    for other in [vec![dataset("b")], vec![]] {
        let mut core = Core::new(0, settings(1), durable.clone());
        let effects = core.apply(0, Event::Hello(100, with(0, &other)));
        let [down::Body::Refused(refused)] = sent(&effects, 100)[..] else {
            panic!("{effects:?}")
        };
        let told = &refused.reason;
        assert!(told.contains("the run began with"), "{told}");
        assert_eq!(other.is_empty(), !told.contains("s3://bucket/train"));
    }
}
