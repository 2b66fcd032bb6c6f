//! Workers that cannot reach each other, and workers that fail.

use super::*;

/// Says that `id` could not reach `others`, and lets a heartbeat pass.
fn cut(core: &mut Core, now: &mut Millis, pairs: &[(u64, u64)]) {
    for (id, other) in pairs {
        let rank = core.members.binary_search(other).expect("is a member");
        let trouble = v1::PeerTrouble {
            generation: core.generation,
            step: core.committed,
            ranks: vec![rank as u32],
            detail: format!("worker {other} does not answer"),
        };
        let trouble = up::Body::PeerTrouble(trouble);
        core.apply(*now, Event::Message(100 + id, trouble));
    }
    *now += 200;
    for id in core.members.clone() {
        let beat = up::Body::Heartbeat(v1::Heartbeat::default());
        core.apply(*now, Event::Message(100 + id, beat));
    }
    core.apply(*now, Event::Tick);
}

#[test]
fn one_of_two_that_cannot_talk_goes_and_is_put_aside() {
    let (mut core, mut now) = (training(4, Durable::default()), 10);
    cut(&mut core, &mut now, &[(1, 2), (2, 1)]);
    assert_eq!(core.members, [0, 1, 2, 3], "once may be chance");
    assert_eq!(core.generation, 2);
    cut(&mut core, &mut now, &[(1, 2), (2, 1)]);
    assert_eq!(core.members, [0, 1, 3]);
    assert_eq!(
        core.generation, 3,
        "one more generation, not one for each end"
    );
    core.apply(now, Event::Hello(200, hello(2)));
    core.apply(now, Event::Tick);
    assert!(core.is_aside(2), "its link is as broken as before");
    assert!(core.newcomers(now).is_empty());
}

#[test]
fn other_pairs_every_time_are_chance_until_they_are_many() {
    let (mut core, mut now) = (training(4, Durable::default()), 10);
    for (a, b) in [(0, 1), (2, 3), (0, 2), (1, 3), (0, 3)] {
        cut(&mut core, &mut now, &[(a, b)]);
        assert_eq!(core.members, [0, 1, 2, 3]);
    }
    cut(&mut core, &mut now, &[(1, 2)]);
    assert!(core.members.len() < 4, "this step is not to hang for ever");
}

fn fails(core: &mut Core, id: u64, error: &str) -> Vec<Effect> {
    let fatal = v1::Fatal {
        error: error.into(),
    };
    core.apply(10, Event::Message(100 + id, up::Body::Fatal(fatal)))
}

#[test]
fn a_worker_that_fails_goes_and_the_others_go_on() {
    let mut core = training(3, Durable::default());
    let effects = fails(&mut core, 1, "data.cache_dir: no space left");
    assert!(ended(&effects).is_none());
    assert_eq!(core.members, [0, 2]);
    let named = |e: &Effect| match e {
        Effect::Emit(event) => {
            event.reason() == Reason::WorkerFailed && event.notice.contains("no space left")
        }
        _ => false,
    };
    assert!(effects.iter().any(named), "{effects:?}");
    // At the next step it is another matter.
    ready(&mut core, 0, 9, true);
    ready(&mut core, 2, 9, true);
    assert_eq!(core.committed, 1);
    assert!(ended(&fails(&mut core, 2, "out of memory")).is_none());
    assert_eq!(core.members, [0]);
}

#[test]
fn what_follows_the_step_to_a_second_worker_ends_the_run() {
    let mut core = training(3, Durable::default());
    assert!(ended(&fails(&mut core, 1, "shard 7 is cut off")).is_none());
    let effects = fails(&mut core, 2, "shard 7 is cut off");
    let (success, reason) = ended(&effects).expect("ends");
    assert!(!success);
    for part in ["step 0", "worker 1", "worker 2", "shard 7 is cut off"] {
        assert!(reason.contains(part), "{part}: {reason}");
    }
    let mut alone = training(1, Durable::default());
    let effects = fails(&mut alone, 0, "shard 7 is cut off");
    assert!(!ended(&effects).expect("nobody is left to go on").0);
}
