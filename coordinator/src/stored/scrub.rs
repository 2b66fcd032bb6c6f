//! The scrubber: reads old checkpoints again in the background, so that what rots is known before it
//! is needed. One at a time, at a bounded rate, in the leader's process; it never holds up a step.

use std::time::{Duration, SystemTime};

use shard_tools::store::{Root, StoreError};
use tokio::sync::mpsc;

use super::verify::{Pace, Verdict, verify};
use super::{list, mark};
use crate::core::Event;
use crate::persist::Told;

/// Bytes read in a second: the 4 GB of 339 million parameters take two minutes and, for their hash, a
/// fortieth of one core.
const BYTES_PER_SECOND: f64 = 32.0 * 1024.0 * 1024.0;
/// Looks for something to read so often in the time between two readings of a checkpoint.
const LOOKS_PER_TURN: f64 = 24.0;
/// Pause between looks, at most.
const PAUSE_MAX: Duration = Duration::from_secs(3600);

/// Reads each usable checkpoint once in `every`, for ever. What is wrong is told to the loop and
/// marked, so that no run begins from it.
pub async fn scrub(root: Root, every: Duration, tell: mpsc::Sender<Told>) {
    let pause = every.div_f64(LOOKS_PER_TURN).min(PAUSE_MAX);
    loop {
        tokio::time::sleep(pause).await;
        match next(&root, every).await {
            Ok(Some(verdict)) if !verdict.faults.is_empty() => {
                let Verdict { step, faults, .. } = verdict;
                let rotten = Event::CheckpointCorrupt { step, faults };
                if tell.send(Told::Event(rotten)).await.is_err() {
                    return;
                }
            }
            Ok(_) => {}
            // A store that is away is asked again after the next pause.
            Err(error) => tracing::warn!(%error, "no checkpoint was read again"),
        }
    }
}

/// Reads the checkpoint that was read longest ago, if its time has come.
async fn next(root: &Root, every: Duration) -> Result<Option<Verdict>, StoreError> {
    let found = list(root).await?;
    let now = SystemTime::now();
    let read = found.values().filter(|stored| stored.is_usable());
    let read = read.filter_map(|stored| Some((stored.verified.max(stored.made)?, stored.step)));
    let due = read.filter(|(at, _)| now.duration_since(*at).unwrap_or_default() >= every);
    let Some((_, step)) = due.min() else {
        return Ok(None);
    };
    let verdict = verify(root, step, &mut Pace::new(BYTES_PER_SECOND), |_| {}).await?;
    // It may have been deleted meanwhile; then it is not corrupt but gone.
    let there = list(root).await?;
    if there.get(&step).is_none_or(|stored| stored.made.is_none()) {
        return Ok(None);
    }
    mark(root, &verdict).await?;
    tracing::info!(step, bytes = verdict.bytes, faults = ?verdict.faults, "checkpoint read again");
    Ok(Some(verdict))
}
