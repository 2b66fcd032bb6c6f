//! A newcomer's copy: compared with what the members hold, and given more time when it needs it.

use super::*;

/// Two members and a newcomer that was told to copy: the copy's request.
fn joining(core: &mut Core, now: Millis) -> u64 {
    let effects = core.apply(now, Event::Hello(102, hello(2)));
    asked(&effects).expect("is asked to copy")
}

fn asked(effects: &[Effect]) -> Option<u64> {
    sent(effects, 102).into_iter().find_map(|body| match body {
        down::Body::CopyState(copy) => Some(copy.request),
        _ => None,
    })
}

fn arrived(core: &mut Core, now: Millis, request: u64, digest: u128) -> Vec<Effect> {
    let ready = v1::StateReady {
        term: 1,
        step: core.committed,
        digest: Digest(digest).to_bytes(),
        request,
        ..Default::default()
    };
    core.apply(now, Event::Message(102, up::Body::StateReady(ready)))
}

fn holds(core: &mut Core, now: Millis, id: u64, digest: u128) -> Vec<Effect> {
    let told = v1::StateDigest {
        term: 1,
        step: core.committed,
        digest: Digest(digest).to_bytes(),
        seconds: 0.1,
    };
    core.apply(now, Event::Message(100 + id, up::Body::StateDigest(told)))
}

#[test]
fn a_newcomer_joins_with_what_the_members_agree_on() {
    let mut core = training(2, Durable::default());
    let request = joining(&mut core, 10);
    arrived(&mut core, 20, request, 5);
    holds(&mut core, 20, 0, 5);
    assert_eq!(core.members, [0, 1], "waits for all");
    holds(&mut core, 20, 1, 5);
    assert_eq!(core.members, [0, 1, 2]);

    let mut core = training(2, Durable::default());
    let request = joining(&mut core, 10);
    holds(&mut core, 20, 0, 5);
    holds(&mut core, 20, 1, 5);
    let effects = arrived(&mut core, 20, request, 6);
    let told = notices(&effects);
    assert!(told[0].contains("the members agree on"), "{told:?}");
    assert_eq!(core.members, [0, 1]);
}

#[test]
fn a_member_whose_whole_state_differs_is_found_when_a_newcomer_comes() {
    let mut core = training(3, Durable::default());
    let effects = core.apply(10, Event::Hello(107, hello(7)));
    let request = sent(&effects, 107).into_iter().find_map(|body| match body {
        down::Body::CopyState(copy) => Some(copy.request),
        _ => None,
    });
    let ready = v1::StateReady {
        term: 1,
        digest: Digest(5).to_bytes(),
        request: request.expect("is asked to copy"),
        liars: vec!["worker-1".into()],
        ..Default::default()
    };
    let effects = core.apply(20, Event::Message(107, up::Body::StateReady(ready)));
    let told = notices(&effects);
    assert!(told[0].contains("from others than worker 1"), "{told:?}");
    for (id, digest) in [(0, 5), (1, 6), (2, 5)] {
        holds(&mut core, 20, id, digest);
    }
    assert!(!core.members.contains(&1), "{:?}", core.members);
    core.apply(30, Event::Tick);
    assert_eq!(core.members, [0, 2, 7], "the newcomer's copy was right");
}

#[test]
fn a_copy_that_is_too_slow_gets_the_time_that_it_needs() {
    let mut core = training(2, Durable::default());
    let (mut now, mut request) = (10, joining(&mut core, 10));
    let mut given = Vec::new();
    for attempt in 0..3 {
        let until = core.workers[&2].copying.expect("copies").until;
        given.push(until - now);
        let mut failed = v1::StateReady {
            term: 1,
            step: 0,
            error: "the sources went on".into(),
            request,
            ..Default::default()
        };
        if attempt == 1 {
            (failed.bytes, failed.bytes_total, failed.seconds) = (10, 200, 1.0);
        }
        now += 10;
        core.apply(now, Event::Message(102, up::Body::StateReady(failed)));
        now = core.workers[&2].copy_after;
        for worker in core.workers.values_mut() {
            worker.last_seen = now;
        }
        request = asked(&core.apply(now, Event::Tick)).expect("tries again");
    }
    assert_eq!(given, [1_000, 2_000, 30_000]);
}

/// It came back with an older state and the sum of that state's step, copied the present one, and was
/// removed because its next sum was another.
#[test]
fn what_a_newcomer_held_before_its_copy_is_no_evidence() {
    let mut s = settings(2);
    s.steps_total = 9;
    let mut core = training_as(s, Durable::default());
    for id in [0, 1] {
        ready(&mut core, id, 9, true);
    }
    assert_eq!(core.committed, 1);
    let returns = v1::Hello {
        has_state: true,
        applied: 0,
        pending_digest: Digest(8).to_bytes(),
        ..hello(2)
    };
    let effects = core.apply(10, Event::Hello(102, returns));
    let request = asked(&effects).expect("is asked to copy");
    for id in [0, 1] {
        holds(&mut core, 20, id, 5);
    }
    arrived(&mut core, 20, request, 5);
    assert_eq!(core.members, [0, 1, 2]);
    // Another generation, and then a sum that differs from that of the older step.
    core.apply(30, Event::Gone(101));
    for id in [0, 2] {
        ready(&mut core, id, 10, true);
    }
    assert_eq!((core.committed, &core.members[..]), (2, &[0, 2][..]));
}
