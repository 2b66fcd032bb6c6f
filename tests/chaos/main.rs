//! Chaos on real processes: coordinators and workers of the real binary, each on a host of its own in
//! Linux network namespaces, meet every fault that a cluster knows. Each case asserts that its fault
//! really fired and that the run ends with the bits of an undisturbed one, has its ledger audited,
//! and prints how long the fault took to be seen and to be over.
//!
//! `cargo test --release --workspace --test chaos` runs all, `-- kill` those whose name says so.
//! `BELFRY_CHAOS_LONG=10` measures the targets over many faults, `BELFRY_CHAOS_REPEAT=N` runs the
//! suite so many times and stops at the first failure with its folders kept.

mod apart;
mod case;
mod clock;
mod cluster;
mod disks;
mod figures;
#[path = "../../shard_tools/tests/store/http_server.rs"]
mod http_server;
mod network;
mod networks;
mod processes;
mod proxy;
#[path = "../promises/s3_server.rs"]
mod s3_server;
mod silent;
#[path = "../promises/skipped.rs"]
mod skipped;
#[path = "../promises/small_disk.rs"]
mod small_disk;
mod stores;
mod table;
mod watch;

use std::process::ExitCode;
use std::time::Instant;

use libtest_mimic::{Arguments, Trial};

/// A name, and what it does.
type Test = (&'static str, fn());

fn trials() -> Vec<Trial> {
    let mut all = [
        processes::TESTS,
        networks::TESTS,
        disks::TESTS,
        stores::TESTS,
        clock::TESTS,
        silent::TESTS,
    ]
    .concat();
    if figures::minutes().is_some() {
        all.extend(figures::TESTS);
    }
    let trial = |(name, test): Test| {
        Trial::test(name, move || {
            test();
            Ok(())
        })
    };
    all.into_iter().map(trial).collect()
}

/// Runs everything that was asked for, so many times, up to the first failure.
fn repeat(arguments: &Arguments, times: u32) -> ExitCode {
    for time in 1..=times {
        let begun = Instant::now();
        let conclusion = libtest_mimic::run(arguments, trials());
        table::print();
        if conclusion.has_failed() {
            table::say(&format!("failed in repetition {time} of {times}"));
            return conclusion.exit_code();
        }
        let seconds = begun.elapsed().as_secs();
        table::say(&format!(
            "repetition {time} of {times} is green after {seconds} s"
        ));
    }
    ExitCode::SUCCESS
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    if arguments.list {
        return libtest_mimic::run(&arguments, trials()).exit_code();
    }
    if !apart::inside() {
        let why = apart::enter();
        skipped::skipped(&format!("chaos on real processes: {why}"));
        return ExitCode::SUCCESS;
    }
    // The first process of its namespace is spared by signals that it does not ask for.
    std::thread::spawn(apart::end_on_interrupt);
    network::open();
    // They would only slow each other down, and the clock is part of what is tested.
    arguments.test_threads = Some(1);
    let times = std::env::var("BELFRY_CHAOS_REPEAT").ok();
    let times = times.map_or(1, |n| n.parse().expect("BELFRY_CHAOS_REPEAT is a number"));
    repeat(&arguments, times)
}
