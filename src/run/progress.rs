//! What people see while a run trains.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use belfry_coordinator::evaluation_told;
use belfry_proto::objective;
use belfry_proto::v1::{self, RunEvent};
use indicatif::{ProgressBar, ProgressStyle};

use super::metrics::Metrics;

/// Steps between lines where standard error is no terminal.
const STEPS_PER_LINE: u64 = 10;

/// How the run ended.
pub struct Ended {
    /// Whether it trained to its end.
    pub success: bool,
    /// In words.
    pub reason: String,
}

/// Shows events and keeps the metrics.
pub struct Progress {
    metrics: Metrics,
    wanted: Arc<AtomicU64>,
    bar: ProgressBar,
    restarts: u32,
    begun: Option<(Instant, u64)>,
    pairs: u64,
    waiting_for: String,
}

impl Progress {
    /// Progress of a run of `steps` steps.
    pub fn new(metrics: Metrics, steps: u64) -> Self {
        let style = ProgressStyle::with_template("step {pos}/{len} {bar:24} ETA {eta} {msg}");
        let bar = ProgressBar::new(steps).with_style(style.expect("a valid template"));
        Progress {
            wanted: Arc::new(AtomicU64::new(metrics.next())),
            metrics,
            bar,
            restarts: 0,
            begun: None,
            pairs: 0,
            waiting_for: String::new(),
        }
    }

    /// The first step whose receipt was not shown yet.
    pub fn wanted(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.wanted)
    }

    /// Tells how many children were started again.
    pub fn restarts(&mut self, restarts: u32) {
        self.restarts = restarts;
    }

    /// Ends the bar; gives the metrics back.
    pub fn close(self) -> Metrics {
        self.bar.abandon();
        self.metrics
    }

    fn say(&self, text: &str) {
        if self.bar.is_hidden() {
            eprintln!("{text}");
        } else {
            self.bar.println(text);
        }
    }

    /// Shows an event; returns how the run ended when it did.
    pub fn show(&mut self, event: RunEvent) -> anyhow::Result<Option<Ended>> {
        if self.waiting_for != event.waiting_for {
            self.waiting_for.clone_from(&event.waiting_for);
            if !self.waiting_for.is_empty() {
                self.say(&format!("waiting: {}", self.waiting_for));
            }
        }
        if ["finished", "failed", "drained"].contains(&event.phase.as_str()) {
            let success = event.phase == "finished";
            return Ok(Some(Ended {
                success,
                reason: event.notice,
            }));
        }
        if !event.notice.is_empty() {
            self.say(&format!("[step {}] {}", event.step, event.notice));
        }
        if let Some(e) = &event.evaluated {
            self.say(&format!(
                "validation at step {}: {}",
                e.step,
                evaluation_told(e)
            ));
        }
        if let Some(record) = &event.committed {
            self.committed(record, &event)?;
        }
        Ok(None)
    }

    fn committed(&mut self, r: &v1::StepRecord, event: &RunEvent) -> anyhow::Result<()> {
        if r.step < self.wanted.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.wanted.store(r.step + 1, Ordering::Relaxed);
        let (since, first) = *self.begun.get_or_insert((Instant::now(), r.step));
        self.pairs += if r.step > first { r.pairs } else { 0 };
        let rate = self.pairs as f64 / since.elapsed().as_secs_f64().max(1e-9);
        let objective = |one: &v1::Objective| {
            let (title, loss) = (objective::title(&one.name), one.loss);
            match one.rows {
                0 => format!("{title} {loss:.3}"),
                _ => format!("{title} {loss:.3} ({:.2})", one.accuracy),
            }
        };
        let objectives: Vec<String> = r.objectives.iter().map(objective).collect();
        let text = format!(
            "{} {rate:.1} pairs/s, generation {}, {} workers, {} restarts",
            objectives.join(" "),
            event.generation,
            event.workers,
            self.restarts
        );
        self.bar.set_position(r.step + 1);
        self.bar.set_message(text.clone());
        if self.bar.is_hidden() && (r.step + 1).is_multiple_of(STEPS_PER_LINE) {
            eprintln!("step {}/{} {text}", r.step + 1, event.steps_total);
        }
        let extra = serde_json::json!({
            "pairs_per_second": rate, "generation": event.generation, "restarts": self.restarts,
        });
        self.metrics.append(r, extra)
    }
}
