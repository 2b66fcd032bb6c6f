//! Wall clocks that jump: the coordinator's a year ahead, a worker's a year back, while they run. No
//! decision may ask them.
//!
//! Linux has no namespace for the wall clock, and setting the machine's own would be felt by
//! everybody on it: a small library between the binary and the C library moves it for one process.

use std::path::Path;
use std::process::Command;

use crate::Test;
use crate::case::Case;
use crate::cluster::{Cluster, Setup};
use crate::skipped::skipped;

pub const TESTS: &[Test] = &[("jump_of_wall_clocks", jump_of_wall_clocks)];

const YEAR_SECONDS: i64 = 400 * 86_400;

/// The library, if a C compiler makes one that works.
fn library(folder: &Path) -> Option<String> {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/chaos/clock.c");
    let made = folder.join("clock.so");
    let mut compiler = Command::new("cc");
    let compiler = compiler
        .args(["-shared", "-fPIC", "-O1", "-o"])
        .arg(&made)
        .arg(source);
    match compiler.output() {
        Ok(output) if output.status.success() => Some(made.display().to_string()),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            skipped(&format!("clock jumps: cc: {said}"));
            None
        }
        Err(error) => {
            skipped(&format!("clock jumps need a C compiler: cc: {error}"));
            None
        }
    }
}

/// The year of the first and of the last line that `name` has logged.
fn years(run: &Cluster, name: &str) -> (i32, i32) {
    let log = run.log(name);
    let year = |line: &str| {
        let told = line.split("\"timestamp\":\"").nth(1).expect("has a time");
        told[..4].parse::<i32>().expect("a year")
    };
    let mut lines = log.lines();
    let first = lines.next().map(year).expect("has said something");
    (first, lines.next_back().map_or(first, year))
}

fn jump_of_wall_clocks() {
    let folder = tempfile::tempdir().expect("a folder");
    let Some(library) = library(folder.path()) else {
        return;
    };
    let mut setup = Setup::new(3, &["run.steps=24"]);
    let clock = |name: &str| folder.path().join(name).display().to_string();
    for name in ["coordinator", "worker-1"] {
        let mut set = |key: &str, value: String| {
            setup.environment.push((name.into(), key.into(), value));
        };
        set("LD_PRELOAD", library.clone());
        set("BELFRY_CLOCK", clock(name));
    }
    let name = "wall clocks jump: coordinator +400 d, worker -400 d";
    let mut case = Case::start(name, setup);
    case.at(4, 3);
    case.fire(|_| {
        std::fs::write(clock("coordinator"), YEAR_SECONDS.to_string()).expect("is written");
        std::fs::write(clock("worker-1"), (-YEAR_SECONDS).to_string()).expect("is written");
    });
    case.recover();
    case.run.finish();
    let (before, after) = years(&case.run, "coordinator");
    assert!(after > before, "the coordinator's clock stayed in {before}");
    let (before, after) = years(&case.run, "worker-1");
    assert!(after < before, "the worker's clock stayed in {before}");
    case.fired("2: years in the logs");
    let run = case.end();
    assert_eq!((run.restarts, run.recomputed), (0, 0));
}
