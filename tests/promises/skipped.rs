//! Says what a machine lacks for a test. The tests of other packages include this file too.

/// Says loudly that something is not tested here: past the harness, which hides what passing tests
/// print.
pub fn skipped(what: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stderr(), "SKIPPED: {what}");
}
