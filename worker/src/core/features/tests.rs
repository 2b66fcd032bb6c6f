//! Steps whose gradients need everybody's features.

use super::super::tests::{commit, generation, loaded, lost, member, reduced, without};
use super::*;

fn gathering_worker() -> Core {
    let mut core = loaded();
    core.me.gathers = true;
    core
}

/// Two members with two lanes each; this worker has the first ones.
fn two() -> Vec<v1::Member> {
    vec![member(7, &[(0, 2)], (0, 2)), member(8, &[(2, 4)], (2, 4))]
}

fn alone() -> Vec<v1::Member> {
    vec![member(7, &[(0, 2), (2, 4)], (0, 4))]
}

fn block(lane: u32) -> Bytes {
    Bytes::from(vec![lane as u8; 4])
}

fn asked(effects: &[Effect]) -> Option<(u64, u32)> {
    effects.iter().find_map(|e| match e {
        Effect::ComputeFeatures { step, lane, .. } => Some((*step, *lane)),
        _ => None,
    })
}

fn features_done(core: &mut Core, (step, lane): (u64, u32)) -> Vec<Effect> {
    core.apply(Event::FeaturesDone {
        step,
        lane,
        features: block(lane),
        seconds: 1.0,
    })
}

/// Answers what is asked until the gathering begins; gives the lanes and what begins it.
fn all_features(core: &mut Core, mut effects: Vec<Effect>) -> (Vec<u32>, Vec<Effect>) {
    let mut lanes = Vec::new();
    while let Some(asked) = asked(&effects) {
        lanes.push(asked.1);
        effects = features_done(core, asked);
    }
    (lanes, effects)
}

fn gathering(effects: &[Effect]) -> Option<&Gathering> {
    effects.iter().find_map(|e| match e {
        Effect::Gather(gathering) => Some(gathering),
        _ => None,
    })
}

fn gathered(generation: u64, step: u64) -> Event {
    Event::Gathered {
        generation,
        step,
        features: (0..4).map(|lane| (lane, block(lane))).collect(),
    }
}

/// The lane of the gradient that is asked for, which must come with all features.
fn gradient(effects: &[Effect]) -> Option<u32> {
    effects.iter().find_map(|e| match e {
        Effect::Compute { lane, features, .. } => {
            assert_eq!(features.as_ref().map(|f| f.len()), Some(4), "{effects:?}");
            Some(*lane)
        }
        _ => None,
    })
}

fn lane_done(core: &mut Core, step: u64, lane: u32) -> Vec<Effect> {
    core.apply(Event::LaneDone {
        step,
        report: v1::LaneReport {
            lane,
            ..Default::default()
        },
        gradient: vec![lane as f32].into(),
        seconds: 1.0,
    })
}

#[test]
fn features_are_gathered_before_the_gradients_of_every_step() {
    let mut core = gathering_worker();
    let mut effects = core.apply(generation(1, 0, two()));
    for step in 0..2 {
        let (lanes, begun) = all_features(&mut core, effects);
        assert_eq!(lanes, [0, 1]);
        let begun = gathering(&begun).expect("begins");
        assert_eq!((begun.generation, begun.step, begun.rank), (1, step, 0));
        assert!(begun.features.keys().eq(&[0, 1]));
        assert_eq!(core.heartbeat().phase, "gathering");
        for stale in [gathered(2, step), gathered(1, step + 1)] {
            assert!(core.apply(stale).is_empty());
        }
        let first = core.apply(gathered(1, step));
        assert_eq!(gradient(&first), Some(0));
        assert_eq!(gradient(&lane_done(&mut core, step, 0)), Some(1));
        let last = lane_done(&mut core, step, 1);
        assert!(
            last.iter().any(|e| matches!(e, Effect::Reduce(_))),
            "{last:?}"
        );
        core.apply(reduced(1, step, 9));
        core.apply(commit(1, step, 9));
        effects = core.apply(Event::Applied { step });
    }
    assert_eq!(
        asked(&effects),
        Some((2, 0)),
        "nothing of another step counts"
    );
}

#[test]
fn a_survivor_computes_lost_lanes_features_unless_they_were_gathered_before() {
    // Before the gathering: both of the lost lanes.
    let mut core = gathering_worker();
    let opened = core.apply(generation(1, 0, two()));
    all_features(&mut core, opened);
    let trouble = core.apply(Event::ReduceFailed {
        generation: 1,
        step: 0,
        ranks: vec![1],
        detail: "gone".into(),
    });
    assert!(
        matches!(trouble[..], [Effect::Send(up::Body::PeerTrouble(_))]),
        "{trouble:?}"
    );
    let opened = core.apply(generation(2, 0, alone()));
    assert!(opened.iter().any(|e| matches!(e, Effect::AbortReduce)));
    let (lanes, begun) = all_features(&mut core, opened);
    assert_eq!(lanes, [2, 3]);
    assert_eq!(gathering(&begun).map(|g| g.features.len()), Some(4));

    // Behind it: none, and its own gradient stays.
    let mut core = gathering_worker();
    let opened = core.apply(generation(1, 0, two()));
    all_features(&mut core, opened);
    core.apply(gathered(1, 0));
    lane_done(&mut core, 0, 0);
    let opened = core.apply(generation(2, 0, alone()));
    assert_eq!(gathering(&opened).map(|g| g.features.len()), Some(4));
    // Lane 1 was in flight and lands meanwhile.
    assert!(gradient(&lane_done(&mut core, 0, 1)).is_none());
    assert_eq!(gradient(&core.apply(gathered(2, 0))), Some(2));
}

#[test]
fn what_was_computed_before_a_quarantine_is_dropped() {
    let mut core = gathering_worker();
    let opened = core.apply(without(1, 0, &[]));
    let first = asked(&opened).expect("a lane");
    assert_eq!(features_done(&mut core, first).len(), 1);
    let lost_one = core.apply(Event::Unreadable {
        step: 0,
        lane: 1,
        shards: vec![lost(3, 0)],
        detail: "cut".into(),
    });
    assert!(
        matches!(lost_one[..], [Effect::Send(up::Body::Unreadable(_))]),
        "{lost_one:?}"
    );
    let opened = core.apply(without(2, 0, &[lost(3, 0)]));
    let (lanes, begun) = all_features(&mut core, opened);
    assert_eq!(lanes, [0, 1, 2, 3]);
    assert!(gathering(&begun).is_some());
    // A gradient from features that count no more lands late.
    core.apply(gathered(2, 0));
    core.apply(without(3, 0, &[lost(3, 0), lost(4, 0)]));
    let late = lane_done(&mut core, 0, 0);
    assert_eq!(asked(&late), Some((0, 0)), "{late:?}");
    assert_eq!(core.partials.nodes().count(), 0);
}

#[test]
fn an_audited_lane_is_computed_from_the_same_features() {
    let mut core = gathering_worker();
    let Event::Message(down::Body::OpenGeneration(mut open)) = generation(1, 0, two()) else {
        panic!("a generation")
    };
    open.audit = Some(v1::Audit {
        term: 1,
        generation: 1,
        step: 0,
        lane: 3,
        worker_id: 7,
    });
    let opened = core.apply(Event::Message(down::Body::OpenGeneration(open)));
    all_features(&mut core, opened);
    core.apply(gathered(1, 0));
    lane_done(&mut core, 0, 0);
    assert_eq!(gradient(&lane_done(&mut core, 0, 1)), Some(3));
}
