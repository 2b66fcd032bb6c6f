//! The fault table: one line per fault, printed when it is done and again all together at the end.

use std::io::Write as _;
use std::sync::Mutex;
use std::time::Duration;

/// What a fault did.
#[derive(Clone, Debug)]
pub struct Line {
    pub fault: String,
    /// How often it really fired, and by what that is known.
    pub fired: String,
    /// From the fault until the coordinator said what it sees.
    pub seen: Option<Duration>,
    /// From the fault until the next commit.
    pub recovered: Option<Duration>,
    pub generations: u64,
    pub restarts: u64,
    pub recomputed: u64,
}

static LINES: Mutex<Vec<Line>> = Mutex::new(Vec::new());

fn seconds(time: Option<Duration>) -> String {
    time.map_or_else(|| "-".into(), |t| format!("{:.3} s", t.as_secs_f64()))
}

impl Line {
    fn text(&self) -> String {
        format!(
            "| {:<52} | {:<34} | {:>9} | {:>9} | {:>3} | {:>3} | {:>3} | equal |",
            self.fault,
            self.fired,
            seconds(self.seen),
            seconds(self.recovered),
            self.generations,
            self.restarts,
            self.recomputed
        )
    }
}

/// Past the harness, which hides what passing tests print.
pub fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Adds a line; its bits were found equal before.
pub fn add(line: Line) {
    say(&line.text());
    LINES.lock().expect("no panic inside").push(line);
}

/// Prints all lines and forgets them.
pub fn print() {
    let lines = std::mem::take(&mut *LINES.lock().expect("no panic inside"));
    if lines.is_empty() {
        return;
    }
    say(&format!(
        "\n| {:<52} | {:<34} | {:>9} | {:>9} | gen | st. | re. | bits  |",
        "fault", "fired", "seen", "commit"
    ));
    say(&format!("|{}|", "-".repeat(136)));
    for line in &lines {
        say(&line.text());
    }
    say(
        "seen: fault to the coordinator's notice; commit: fault to the next commit; gen: generations \
         opened; st.: processes started again; re.: steps computed twice; every run audited.",
    );
}
