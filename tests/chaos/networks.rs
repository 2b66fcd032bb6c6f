//! Networks that part, lose, slow down, delay or change what they carry.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use belfry_configs::Timeouts;
use belfry_proto::v1::Reason;

use crate::Test;
use crate::case::{Case, kill};
use crate::cluster::Setup;
use crate::network::{Filter, Throttle, address, filters, on};
use crate::processes::GONE;
use crate::proxy::{Effects, Proxy};

pub const TESTS: &[Test] = &[
    ("partition_of_a_worker", partition_of_a_worker),
    ("partition_of_the_coordinator", partition_of_the_coordinator),
    (
        "partition_between_two_workers",
        partition_between_two_workers,
    ),
    (
        "half_open_after_a_worker_died",
        half_open_after_a_worker_died,
    ),
    (
        "half_open_after_the_coordinator_died",
        half_open_after_the_coordinator_died,
    ),
    (
        "loss_of_one_packet_in_a_hundred",
        loss_of_one_packet_in_a_hundred,
    ),
    ("slow_worker_of_ten_megabits", slow_worker_of_ten_megabits),
    ("delay_between_two_workers", delay_between_two_workers),
    ("flipped_bit_on_the_wire", flipped_bit_on_the_wire),
];

const STEPS: &str = "run.steps=40";
/// The default setting: silence counts after three seconds.
const DEFAULT_STALL: &str = "cluster.max_stall_seconds=10";
/// A busy machine sees a little later.
const SLACK: Duration = Duration::from_secs(2);

fn partition_of_a_worker() {
    if !filters() {
        return;
    }
    let setup = Setup::new(3, &[STEPS, DEFAULT_STALL]);
    let mut case = Case::start("partition of a worker (default setting)", setup);
    case.at(4, 3);
    let filter = case.fire(|_| Filter::partition("worker-1"));
    case.seen_and_recovered(1, GONE);
    let derived = Timeouts::new(Duration::from_secs(10)).silence;
    let seen = case.seen().expect("was seen");
    assert!(
        seen < derived + SLACK,
        "seen after {seen:?}, derived {derived:?}"
    );
    case.fired(format!("{} packets dropped", some(filter.packets())));
    drop(filter);
    case.back(1);
    let run = case.end();
    assert_eq!(run.recomputed, 0);
}

fn partition_of_the_coordinator() {
    if !filters() {
        return;
    }
    let mut case = Case::start("partition of the coordinator", Setup::new(3, &[STEPS]));
    case.at(4, 3);
    let filter = case.fire(|_| Filter::partition("coordinator"));
    case.see("all workers gone", |seen| {
        GONE.contains(&seen.event.reason())
    });
    case.fired(format!("{} packets dropped", some(filter.packets())));
    drop(filter);
    case.recover();
    let run = case.end();
    assert_eq!((run.restarts, run.recomputed), (0, 0));
}

fn partition_between_two_workers() {
    if !filters() {
        return;
    }
    let mut case = Case::start("partition between two workers", Setup::new(3, &[STEPS]));
    case.at(4, 3);
    let filter = case.fire(|_| Filter::cut("worker-1", "worker-2"));
    let trouble = [Reason::PeerTrouble, Reason::WorkerUnreachable];
    case.see("a word about peers", |seen| {
        trouble.contains(&seen.event.reason())
    });
    case.recover();
    case.fired(format!("{} packets dropped", some(filter.packets())));
    drop(filter);
    let run = case.end();
    assert_eq!(run.recomputed, 0);
}

/// The port at which `host` holds connections with the coordinator.
fn session_ports(host: &str) -> Vec<u16> {
    let mut command = on(host, "ss");
    let to = format!("{}", address("coordinator"));
    let listed = crate::apart::must(command.args(["-Htn", "state", "established", "dst", &to]));
    let local = listed
        .lines()
        .filter_map(|line| line.split_whitespace().nth(2));
    let ports = local.filter_map(|a| a.rsplit(':').next()?.parse().ok());
    ports.collect()
}

fn half_open_after_a_worker_died() {
    if !filters() {
        return;
    }
    let name = "half-open: a worker's last words are dropped";
    let mut case = Case::start(name, Setup::new(3, &[STEPS]));
    case.at(4, 3);
    let ports = session_ports("worker-1");
    assert!(!ports.is_empty(), "worker 1 has a session");
    let from = address("worker-1");
    // Whatever the dead process's connections still say is lost; its successor's pass.
    let rule = |port: &u16| format!("ip saddr {from} tcp sport {port} counter drop");
    let rules: Vec<String> = ports.iter().map(rule).collect();
    let filter = case.fire(|run| {
        let filter = Filter::between(&rules);
        kill(run.pid("worker-1"));
        filter
    });
    case.seen_and_recovered(1, GONE);
    case.fired(format!("{} packets dropped", some(filter.packets())));
    case.back(1);
    let run = case.end();
    assert_eq!(run.recomputed, 0);
}

fn half_open_after_the_coordinator_died() {
    if !filters() {
        return;
    }
    let name = "half-open: the coordinator's last words are dropped";
    let mut case = Case::start(name, Setup::new(2, &[STEPS]));
    case.at(4, 2);
    let ports = session_ports("worker-0");
    assert!(!ports.is_empty(), "worker 0 has a session");
    let to = address("worker-0");
    let rule = |port: &u16| format!("ip daddr {to} tcp dport {port} counter drop");
    let rules: Vec<String> = ports.iter().map(rule).collect();
    let filter = case.fire(|run| {
        let filter = Filter::between(&rules);
        kill(run.pid("coordinator"));
        filter
    });
    case.see("a coordinator of a higher term", |seen| {
        seen.event.term >= 2
    });
    case.recover();
    case.fired(format!("{} packets dropped", some(filter.packets())));
    let run = case.end();
    assert_eq!((run.restarts, run.recomputed), (1, 0));
}

fn loss_of_one_packet_in_a_hundred() {
    if !filters() {
        return;
    }
    let mut case = Case::start("1 % of all packets lost", Setup::new(3, &[STEPS]));
    case.at(4, 3);
    let rule = "numgen random mod 100 < 1 counter drop".to_owned();
    let filter = case.fire(|_| Filter::between(&[rule]));
    case.recover();
    case.run.committed(30);
    case.fired(format!("{} packets dropped", some(filter.packets())));
    drop(filter);
    let run = case.end();
    assert_eq!(run.recomputed, 0);
}

fn slow_worker_of_ten_megabits() {
    if !filters() {
        return;
    }
    let mut case = Case::start("a worker with 10 Mbit/s", Setup::new(3, &[STEPS]));
    case.at(4, 3);
    let throttle = case.fire(|_| Throttle::new("worker-1", 10));
    case.recover();
    case.run.next_commit();
    case.fired(format!("{} packets held back", some(throttle.held_back())));
    drop(throttle);
    let run = case.end();
    assert_eq!((run.restarts, run.recomputed), (0, 0), "slow is not dead");
}

/// Where a worker's peers reach it, as it says itself.
fn data_address(log: &std::path::Path) -> Option<SocketAddr> {
    let text = std::fs::read_to_string(log).ok()?;
    let told = text.rsplit("data_address: ").next()?;
    let told = told.trim_start_matches(['\\', '"']);
    let end = told.find(['\\', '"'])?;
    told[..end].parse().ok()
}

/// Leads what `from` sends to `to` through a proxy; the run's folder is told when it is known.
fn between(from: &str, to: &str, effects: Effects) -> (Proxy, Filter, Arc<OnceLock<PathBuf>>) {
    let folder = Arc::new(OnceLock::<PathBuf>::new());
    let (known, name) = (Arc::clone(&folder), to.to_owned());
    let proxy = Proxy::open(effects, move || {
        data_address(&known.get()?.join("logs").join(format!("{name}.jsonl")))
    });
    let (to, through) = (address(to), proxy.address);
    let rule = format!("ip daddr {to} meta l4proto tcp counter dnat to {through}");
    (proxy, Filter::leading(from, &[rule]), folder)
}

fn delay_between_two_workers() {
    if !filters() {
        return;
    }
    let effects = Effects {
        delay: Duration::from_millis(20),
        ..Effects::default()
    };
    let (proxy, filter, folder) = between("worker-0", "worker-1", effects);
    let mut case = Case::start(
        "20 ms between two workers",
        Setup::new(2, &["run.steps=12"]),
    );
    folder.set(case.run.folder.clone()).expect("once");
    case.fire(|_| ());
    case.recover();
    case.run.committed(8);
    some(filter.packets());
    let bytes = some(proxy.effects.bytes.load(Ordering::Relaxed));
    case.fired(format!("{bytes} bytes delayed"));
    let run = case.end();
    assert_eq!((run.restarts, run.recomputed), (0, 0));
}

fn flipped_bit_on_the_wire() {
    if !filters() {
        return;
    }
    let (proxy, filter, folder) = between("worker-0", "worker-1", Effects::default());
    let mut case = Case::start("a bit flipped on the wire", Setup::new(2, &[STEPS]));
    folder.set(case.run.folder.clone()).expect("once");
    case.at(4, 2);
    some(filter.packets());
    case.fire(|_| proxy.effects.flip.store(true, Ordering::Relaxed));
    case.see("a word about peers", |seen| {
        seen.event.reason() == Reason::PeerTrouble
            || seen.event.reason() == Reason::GenerationOpened
    });
    case.recover();
    assert_eq!(proxy.effects.flipped.load(Ordering::Relaxed), 1);
    let told = case
        .run
        .log("worker-1")
        .matches("corrupt frame from rank")
        .count();
    assert!(told > 0, "the checksum names the sender");
    case.fired("1: \"corrupt frame from rank 0\"");
    let run = case.end();
    assert_eq!((run.restarts, run.recomputed), (0, 0));
}

/// A count that proves that a fault fired.
fn some(count: u64) -> u64 {
    assert!(count > 0, "the fault met nothing");
    count
}
