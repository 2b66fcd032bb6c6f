//! Evaluations in a rhythm: when one is asked for, of whom, and what waits for it.

use super::*;

/// Two workers that train six steps and evaluate after every second.
fn rhythmic() -> Settings {
    let mut s = settings(2);
    s.steps_total = 6;
    s.evaluates = true;
    s.rhythm = belfry_configs::Rhythm::Steps(2);
    s
}

/// What a worker is asked to judge: the step, and of so many shares which one, or the figures.
fn asked(effects: &[Effect], id: u64) -> Vec<(u64, u32, Option<u32>)> {
    let bodies = sent(effects, 100 + id).into_iter();
    let asked = bodies.filter_map(|body| match body {
        down::Body::Evaluate(ask) => Some((ask.step, ask.shares, ask.share)),
        _ => None,
    });
    asked.collect()
}

/// A worker has found what its share says.
fn found(core: &mut Core, id: u64, share: u32) -> Vec<Effect> {
    let found = v1::ShareEvaluated {
        step: 2,
        shares: 2,
        share,
        error: String::new(),
    };
    core.apply(
        20,
        Event::Message(100 + id, up::Body::ShareEvaluated(found)),
    )
}

fn commits(effects: &[Effect]) -> usize {
    let commits = bodies(effects).filter(|body| matches!(body, down::Body::Commit(_)));
    commits.count()
}

fn evaluated(core: &mut Core, id: u64, step: u64) -> Vec<Effect> {
    let evaluated = v1::Evaluated {
        step,
        ..Default::default()
    };
    core.apply(20, Event::Message(100 + id, up::Body::Evaluated(evaluated)))
}

fn all_ready(core: &mut Core) -> Vec<Effect> {
    let members = core.members.clone();
    let ready = members.into_iter().map(|id| ready(core, id, 9, true));
    ready.flatten().collect()
}

/// A core in the step after the first due evaluation, and what was said on the way.
fn until_due() -> (Core, Vec<Effect>) {
    let first = v1::Evaluated::default();
    let durable = Durable {
        evaluations: [(0, first)].into(),
        ..Durable::default()
    };
    let mut core = training_as(rhythmic(), durable);
    let mut effects = all_ready(&mut core);
    effects.extend(all_ready(&mut core));
    assert_eq!(core.committed, 2);
    (core, effects)
}

#[test]
fn a_due_state_is_judged_before_the_next_step_is_committed() {
    let (mut core, _) = until_due();
    let mut effects = all_ready(&mut core);
    let found_one = found(&mut core, 1, 1);
    assert!(asked(&found_one, 1).is_empty(), "{found_one:?}");
    let found_all = found(&mut core, 0, 0);
    assert_eq!(asked(&found_all, 0), [(2, 2, None)], "{found_all:?}");
    effects.extend(found_all);
    assert_eq!(commits(&effects), 0, "{effects:?}");
    let effects = evaluated(&mut core, 0, 2);
    let kept = |e: &Effect| matches!(e, Effect::StoreEvaluation(kept) if kept.step == 2);
    let entry = |e: &Effect| matches!(e, Effect::Journal { ahead: false, .. });
    let commit = |e: &Effect| matches!(e, Effect::SendAll(_, body) if matches!(**body, down::Body::Commit(_)));
    let place = |of: &dyn Fn(&Effect) -> bool| effects.iter().position(of);
    assert!(place(&kept) < place(&entry), "{effects:?}");
    if let Some(commit) = place(&commit) {
        assert!(place(&entry) < Some(commit), "{effects:?}");
    }
    core.apply(30, Event::Journaled { seq: 2 });
    core.apply(30, Event::Tick);
    assert_eq!(core.committed, 3);
    assert!(asked(&all_ready(&mut core), 0).is_empty() && core.committed == 4);
}

/// Both have a share; one dies with its own, and then would have made the figures.
#[test]
fn a_share_that_dies_with_its_worker_is_asked_of_another() {
    let (mut core, effects) = until_due();
    let later = core.apply(10, Event::Tick);
    let all = [effects, later].concat();
    assert_eq!(asked(&all, 0), [(2, 2, Some(0))]);
    assert_eq!(asked(&all, 1), [(2, 2, Some(1))]);
    let effects = core.apply(20, Event::Gone(100));
    let later = found(&mut core, 1, 1);
    let all = [effects, later].concat();
    assert_eq!(asked(&all, 1), [(2, 2, Some(0))], "{all:?}");
    // Another share, of another cut, says nothing about this one.
    let other = v1::ShareEvaluated {
        step: 2,
        shares: 3,
        ..Default::default()
    };
    core.apply(20, Event::Message(101, up::Body::ShareEvaluated(other)));
    let effects = found(&mut core, 1, 0);
    assert_eq!(asked(&effects, 1), [(2, 2, None)], "{effects:?}");
    assert!(!core.durable.evaluations.contains_key(&2));
    evaluated(&mut core, 1, 2);
    assert!(core.durable.evaluations.contains_key(&2));
}

/// There is nobody to share with: it is asked for the figures at once.
#[test]
fn one_worker_judges_the_whole() {
    let mut s = settings(1);
    s.evaluates = true;
    let mut core = training_as(s, Durable::default());
    assert!(ready(&mut core, 0, 9, true).is_empty() && core.committed == 0);
    evaluated(&mut core, 0, 0);
    assert!(core.durable.evaluations.contains_key(&0));
}

#[test]
fn what_was_judged_in_an_earlier_term_is_not_judged_again() {
    let durable = Durable {
        evaluations: [0, 2].map(|step| (step, v1::Evaluated::default())).into(),
        ..Durable::default()
    };
    let mut core = training_as(rhythmic(), durable);
    for _ in 0..3 {
        assert!(asked(&all_ready(&mut core), 0).is_empty());
    }
    assert_eq!(core.committed, 3);
}

#[test]
fn what_is_judged_is_made_a_checkpoint_where_the_best_are_kept() {
    let parts = |best: bool| -> Vec<u64> {
        let mut s = rhythmic();
        s.checkpoint.every_steps = 100;
        s.checkpoint.keep_best = best.then(|| belfry_configs::KeepBest {
            count: 1,
            metric: "itm_loss".into(),
        });
        let durable = Durable {
            evaluations: [0, 2].map(|step| (step, v1::Evaluated::default())).into(),
            ..Durable::default()
        };
        let mut core = training_as(s, durable);
        let effects: Vec<Effect> = (0..3).flat_map(|_| all_ready(&mut core)).collect();
        let commits = sent(&effects, 100)
            .into_iter()
            .filter_map(|body| match body {
                down::Body::Commit(commit) if !commit.snapshot_parts.is_empty() => {
                    Some(commit.step + 1)
                }
                _ => None,
            });
        commits.collect()
    };
    assert_eq!(parts(true), [2]);
    assert!(parts(false).is_empty());
}
