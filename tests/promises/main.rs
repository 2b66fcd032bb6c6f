//! The promises, each a test, on the real binary and on the real cores. One test binary: each would
//! link the whole of Belfry.

mod bench;
mod inspect;
mod s3_server;
mod shards;
mod simulation;
mod system;
mod tidy;
mod weights;

/// Says loudly that something is not tested here: past the harness, which hides what passing tests
/// print.
fn skipped(what: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stderr(), "SKIPPED: {what}");
}
