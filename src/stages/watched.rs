//! What an agent hears from the coordinator that it runs: how far the run is, and a line of metrics
//! for every committed step.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use shard_tools::store::Root;
use tokio::task::JoinHandle;

use crate::run::metrics::Metrics;
use crate::run::watch::watch;

/// A coordinator that is listened to.
pub struct Watched {
    step: Arc<AtomicU64>,
    total: Arc<AtomicU64>,
    listening: JoinHandle<()>,
}

impl Watched {
    /// Listens to whatever coordinator `address_file` names; metrics go to `folder`.
    pub fn open(address_file: PathBuf, folder: PathBuf, silence: Duration) -> Self {
        let (step, total) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let (step_seen, total_seen) = (Arc::clone(&step), Arc::clone(&total));
        let listening = tokio::spawn(async move {
            let mut metrics = Metrics::open(&folder);
            let wanted = Arc::new(AtomicU64::new(metrics.next()));
            let mut events = watch(address_file, Arc::clone(&wanted), silence);
            while let Some(event) = events.recv().await {
                total_seen.store(event.steps_total, Ordering::Relaxed);
                step_seen.fetch_max(event.step, Ordering::Relaxed);
                let Some(record) = &event.committed else {
                    continue;
                };
                step_seen.fetch_max(record.step + 1, Ordering::Relaxed);
                let more = serde_json::json!({"generation": event.generation});
                if let Err(error) = metrics.append(record, more) {
                    tracing::warn!("{error:#}");
                }
                wanted.store(metrics.next(), Ordering::Relaxed);
            }
        });
        Watched {
            step,
            total,
            listening,
        }
    }

    /// Steps committed, of how many; 0 of 0 as long as nothing was heard.
    pub fn progress(&self) -> (u64, u64) {
        let read = |number: &AtomicU64| number.load(Ordering::Relaxed);
        (read(&self.step), read(&self.total))
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

/// Fills in from the ledger what was committed while nobody listened.
pub async fn complete(folder: PathBuf, root: String) {
    let completed = async {
        let root = Root::existing(&root)?;
        Metrics::open(&folder).complete(&root).await
    };
    if let Err(error) = completed.await {
        tracing::warn!("metrics.jsonl lacks steps: {error:#}");
    }
}
