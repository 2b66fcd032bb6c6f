//! An object store that is away: refused, or silent for half a minute. Checkpoints and the journal
//! wait for it; nothing that is not written is announced.

use std::process::Command;
use std::time::{Duration, Instant};

use belfry_proto::v1::Reason;

use crate::Test;
use crate::case::{Case, freeze, state, thaw};
use crate::cluster::{Setup, resolved};
use crate::network::{Filter, HUB, filters};
use crate::s3_server::{S3Server, SECRET_KEY};

pub const TESTS: &[Test] = &[
    (
        "store_refuses_for_eight_seconds",
        store_refuses_for_eight_seconds,
    ),
    (
        "store_is_silent_for_thirty_seconds",
        store_is_silent_for_thirty_seconds,
    ),
];

const SETTINGS: [&str; 1] = ["run.steps=60"];

/// A run on the server.
fn on_s3(server: &S3Server, folder: &str) -> Setup {
    let mut setup = Setup::new(2, &SETTINGS);
    let mut command = Command::new("true");
    let text = |s: &std::ffi::OsStr| s.to_str().expect("is text").to_owned();
    for (key, value) in server.reach(&mut command, SECRET_KEY).get_envs() {
        let value = text(value.expect("is set"));
        setup.environment.push(("*".into(), text(key), value));
    }
    server.put(
        &format!("{folder}/run.toml"),
        &resolved(setup.config, &setup.settings),
    );
    setup.root = Some(server.url(folder));
    setup
}

/// What is committed while the store is away for so long.
fn steps_during(case: &mut Case, outage: Duration) -> u64 {
    let (begun, before) = (Instant::now(), case.run.steps());
    while let Some(left) = outage.checked_sub(begun.elapsed()) {
        case.run.within(left, &|_| false);
    }
    case.run.steps() - before
}

fn store_refuses_for_eight_seconds() {
    if !filters() {
        return;
    }
    let Some(server) = S3Server::start_at(&HUB.to_string()) else {
        return;
    };
    let mut case = Case::start("S3 refuses connections for 8 s", on_s3(&server, "refuses"));
    case.at(6, 2);
    let port = server.port();
    let rule = format!("tcp dport {port} counter reject with tcp reset");
    let filter = case.fire(|_| Filter::arriving(&[rule]));
    let steps = steps_during(&mut case, Duration::from_secs(8));
    let packets = filter.packets();
    assert!(packets > 0, "nobody asked for the store");
    case.fired(format!(
        "{packets} packets refused, {steps} steps meanwhile"
    ));
    drop(filter);
    case.recover();
    let run = case.end();
    assert_eq!((run.restarts, run.recomputed), (0, 0));
}

fn store_is_silent_for_thirty_seconds() {
    let Some(server) = S3Server::start_at(&HUB.to_string()) else {
        return;
    };
    let mut case = Case::start("S3 silent for 30 s", on_s3(&server, "silent"));
    case.at(6, 2);
    case.fire(|_| freeze(server.pid()));
    let steps = steps_during(&mut case, Duration::from_secs(30));
    let stopped = state(server.pid());
    assert_eq!(stopped, 'T');
    let told = case
        .run
        .seen
        .iter()
        .any(|s| s.event.reason() == Reason::StoreUnavailable);
    case.fired(format!("state {stopped} for 30 s, {steps} steps meanwhile"));
    thaw(server.pid());
    case.recover();
    let run = case.end();
    assert!(told, "the coordinator says that the store is away");
    assert_eq!((run.restarts, run.recomputed), (0, 0));
}
