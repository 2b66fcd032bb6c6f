//! How far packing is: a bar with rates and ETA on a terminal, a line now and then elsewhere.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressStyle};

/// Time between two lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Counts samples and bytes since packing began or went on.
pub struct Progress {
    shown: Shown,
    samples: u64,
    begun: Instant,
    done: u64,
    bytes: u64,
    bad: u64,
    before: u64,
}

enum Shown {
    Nothing,
    Bar(ProgressBar),
    Lines { last: Instant },
}

impl Progress {
    /// Of `samples`, `before` were done by an earlier start.
    pub fn new(wanted: bool, samples: u64, before: u64) -> Self {
        let shown = if !wanted {
            Shown::Nothing
        } else if std::io::stderr().is_terminal() {
            let style = "packing {bar:30} {pos}/{len} samples {msg}";
            let style = ProgressStyle::with_template(style).expect("a valid template");
            let bar = ProgressBar::new(samples).with_style(style);
            bar.set_position(before);
            Shown::Bar(bar)
        } else {
            let last = Instant::now();
            Shown::Lines { last }
        };
        Progress {
            shown,
            samples,
            begun: Instant::now(),
            done: 0,
            bytes: 0,
            bad: 0,
            before,
        }
    }

    /// One sample of so many bytes more; none where it was bad.
    pub fn count(&mut self, bytes: Option<u64>) {
        self.done += 1;
        self.bytes += bytes.unwrap_or(0);
        self.bad += u64::from(bytes.is_none());
        let all = self.before + self.done;
        match &mut self.shown {
            Shown::Nothing => {}
            Shown::Bar(bar) => {
                bar.set_position(all);
                // Words change far less often than the bar would be drawn.
                if self.done.is_multiple_of(64) || all == self.samples {
                    bar.set_message(
                        told(self.begun.elapsed(), self.done, self.bytes, self.bad)
                            + &eta(self.begun.elapsed(), self.done, self.samples - all),
                    );
                }
            }
            Shown::Lines { last } => {
                if last.elapsed() >= LINE_EVERY || all == self.samples {
                    *last = Instant::now();
                    let elapsed = self.begun.elapsed();
                    eprintln!(
                        "packed {all} of {} samples {}{}",
                        self.samples,
                        told(elapsed, self.done, self.bytes, self.bad),
                        eta(elapsed, self.done, self.samples - all)
                    );
                }
            }
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Shown::Bar(bar) = &self.shown {
            bar.finish_and_clear();
        }
    }
}

fn told(elapsed: Duration, done: u64, bytes: u64, bad: u64) -> String {
    let seconds = elapsed.as_secs_f64().max(1e-3);
    let rate = done as f64 / seconds;
    let byte_rate = HumanBytes((bytes as f64 / seconds) as u64);
    let bad = if bad == 0 {
        String::new()
    } else {
        format!(", {bad} bad")
    };
    format!("({rate:.0}/s, {byte_rate}/s{bad})")
}

fn eta(elapsed: Duration, done: u64, left: u64) -> String {
    if left == 0 || done == 0 {
        return String::new();
    }
    let seconds = elapsed.as_secs_f64() / done as f64 * left as f64;
    format!(" ETA {}", HumanDuration(Duration::from_secs_f64(seconds)))
}
