//! What people see while a run trains, and `metrics.jsonl`.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use belfry_proto::v1::coordinator_client::CoordinatorClient;
use belfry_proto::v1::{self, RunEvent, WatchRequest};
use indicatif::{ProgressBar, ProgressStyle};

/// How the run ended.
pub struct Ended {
    /// Whether it trained to its end.
    pub success: bool,
    /// In words.
    pub reason: String,
}

/// Watches the coordinator, over its restarts.
pub struct Progress {
    address_file: PathBuf,
    metrics: PathBuf,
    last_written: Option<u64>,
    bar: ProgressBar,
    stream: Option<tonic::Streaming<RunEvent>>,
    restarts: u32,
    generation: u64,
    begun: Option<(Instant, u64)>,
    pairs: u64,
    waiting_for: String,
}

impl Progress {
    /// Progress of a run of `steps` steps, with `metrics.jsonl` in `local`.
    pub fn new(local: &Path, steps: u64, address_file: PathBuf) -> Self {
        let metrics = local.join("metrics.jsonl");
        let text = std::fs::read_to_string(&metrics).unwrap_or_default();
        let last = text.lines().rev().find_map(|line| {
            let value: serde_json::Value = serde_json::from_str(line).ok()?;
            value["step"].as_u64()
        });
        let style = ProgressStyle::with_template("step {pos}/{len} {bar:24} ETA {eta} {msg}");
        let bar = ProgressBar::new(steps).with_style(style.expect("a valid template"));
        Progress {
            address_file,
            metrics,
            last_written: last,
            bar,
            stream: None,
            restarts: 0,
            generation: 0,
            begun: None,
            pairs: 0,
            waiting_for: String::new(),
        }
    }

    /// Tells how many children were started again.
    pub fn restarts(&mut self, restarts: u32) {
        self.restarts = restarts;
    }

    /// Ends the bar.
    pub fn close(&self) {
        self.bar.abandon();
    }

    fn say(&self, text: &str) {
        if self.bar.is_hidden() {
            eprintln!("{text}");
        } else {
            self.bar.println(text);
        }
    }

    /// Waits for the next event; returns how the run ended when it did.
    pub async fn next(&mut self) -> anyhow::Result<Option<Ended>> {
        let Some(stream) = &mut self.stream else {
            match connect(&self.address_file).await {
                Some(stream) => self.stream = Some(stream),
                None => tokio::time::sleep(Duration::from_millis(50)).await,
            }
            return Ok(None);
        };
        match stream.message().await {
            Ok(Some(event)) => self.show(event),
            Ok(None) | Err(_) => {
                self.stream = None;
                Ok(None)
            }
        }
    }

    fn show(&mut self, event: RunEvent) -> anyhow::Result<Option<Ended>> {
        self.generation = event.generation;
        if self.waiting_for != event.waiting_for {
            self.waiting_for = event.waiting_for.clone();
            if !self.waiting_for.is_empty() {
                self.say(&format!("waiting: {}", self.waiting_for));
            }
        }
        if event.phase == "finished" || event.phase == "failed" {
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
                "validation at step {}: MLM loss {:.4}, accuracy {:.3}; ITM loss {:.4}, accuracy {:.3}",
                e.step, e.mlm_loss, e.mlm_accuracy, e.itm_loss, e.itm_accuracy
            ));
        }
        if event.checkpoint > 0 {
            self.say(&format!(
                "checkpoint of step {} is durable",
                event.checkpoint
            ));
        }
        if let Some(record) = &event.committed {
            self.committed(record, event.workers)?;
        }
        Ok(None)
    }

    fn committed(&mut self, r: &v1::StepRecord, workers: u32) -> anyhow::Result<()> {
        let (since, first) = *self.begun.get_or_insert((Instant::now(), r.step));
        self.pairs += if r.step > first { r.pairs } else { 0 };
        let rate = self.pairs as f64 / since.elapsed().as_secs_f64().max(1e-9);
        let text = format!(
            "MLM {:.3} ({:.2}) ITM {:.3} ({:.2}) {rate:.1} pairs/s, generation {}, {workers} workers, \
             {} restarts",
            r.mlm_loss, r.mlm_accuracy, r.itm_loss, r.itm_accuracy, self.generation, self.restarts
        );
        self.bar.set_position(r.step + 1);
        self.bar.set_message(text.clone());
        if self.bar.is_hidden() && (r.step + 1).is_multiple_of(10) {
            eprintln!("step {} {text}", r.step + 1);
        }
        // A step recomputed after a crash is the same step.
        if self.last_written.is_some_and(|last| r.step <= last) {
            return Ok(());
        }
        self.last_written = Some(r.step);
        let line = serde_json::json!({
            "step": r.step, "mlm_loss": r.mlm_loss, "itm_loss": r.itm_loss,
            "mlm_accuracy": r.mlm_accuracy, "itm_accuracy": r.itm_accuracy,
            "mlm_masked": r.mlm_masked, "pairs": r.pairs,
            "unmasked_micro_batches": r.unmasked_micro_batches,
            "pairs_per_second": rate, "generation": self.generation, "restarts": self.restarts,
            "sum_digest": r.sum_digest,
        });
        let opened = File::options()
            .create(true)
            .append(true)
            .open(&self.metrics);
        opened
            .and_then(|mut file| writeln!(file, "{line}"))
            .with_context(|| format!("cannot write {}", self.metrics.display()))
    }
}

async fn connect(address_file: &Path) -> Option<tonic::Streaming<RunEvent>> {
    let address = std::fs::read_to_string(address_file).ok()?;
    let mut client = CoordinatorClient::connect(format!("http://{}", address.trim()))
        .await
        .ok()?;
    Some(client.watch(WatchRequest {}).await.ok()?.into_inner())
}
