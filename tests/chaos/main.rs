//! Chaos on real processes: coordinators and workers of the real binary, each on a host of its own in
//! Linux network namespaces, meet every fault that a cluster knows. Each case asserts that its fault
//! really fired and that the run ends with the bits of an undisturbed one, has its ledger audited,
//! and prints how long the fault took to be seen and to be over.
//!
//! `cargo test --release --workspace --test chaos` runs all, `-- kill` those whose name says so.
//! `BELFRY_CHAOS_LONG=1` measures the targets over many faults, `BELFRY_CHAOS_REPEAT=N` runs the
//! suite so many times and stops at the first failure with its folders kept.

mod apart;
mod case;
mod cluster;
mod network;
mod networks;
mod processes;
mod proxy;
#[path = "../promises/skipped.rs"]
mod skipped;
mod table;
mod watch;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

/// A name, and what it does.
type Test = (&'static str, fn());

fn trials() -> Vec<Trial> {
    let all = [processes::TESTS, networks::TESTS].concat();
    let trial = |(name, test): Test| {
        Trial::test(name, move || {
            test();
            Ok(())
        })
    };
    all.into_iter().map(trial).collect()
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
    let conclusion = libtest_mimic::run(&arguments, trials());
    table::print();
    conclusion.exit_code()
}
