//! Snapshots: the state of a step held for its checkpoint while training goes on, its parts on their
//! way to the store, and what that costs the next update.
//!
//! A snapshot is a copy that is made while the next step is computed. At most one is open; a part that cannot be stored is tried again until it is, or until the
//! coordinator closes the snapshot. Decides nothing about checkpoints; that is the coordinator's.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use belfry_configs::ValidConfig;
use belfry_model::ManagerTower;
use belfry_proto::v1::{self, PartStored, worker_message as up};
use shard_tools::store::Root;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use crate::checkpoint::{self, Encoded};
use crate::core::Event;
use crate::duplicate::Duplicates;
use crate::held::HeldState;
use crate::optimizer::AdamW;

/// Pause before a part is tried again; doubled up to the longest.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// A store that takes less in a second keeps a part waiting, which is said.
const SLOW_BYTES_PER_SECOND: f64 = 10.0 * 1024.0 * 1024.0;
/// Updates in place by which the usual one is known.
const USUAL_MAX: usize = 15;

/// What a worker's snapshots need.
pub struct Snapshots {
    uploads: Uploads,
    /// Of the run: the state behind the last is not updated.
    steps: u64,
    duplicates: Duplicates,
    usual: VecDeque<Duration>,
    open: Option<Open>,
    /// The next update is the first since the snapshot of this step was taken.
    first_after: Option<u64>,
    /// Of the snapshot of this step, once it is known: what the update waited.
    stall: Option<(u64, Duration)>,
}

/// How parts get out.
#[derive(Clone)]
struct Uploads {
    root: Root,
    model: Arc<ManagerTower>,
    parts: u32,
    /// A store that says nothing for so long is reported.
    patience: Duration,
    events: mpsc::Sender<Event>,
}

/// The snapshot that is being stored.
struct Open {
    step: u64,
    tasks: Vec<AbortHandle>,
    parts: Parts,
}

/// What is known of each part asked for: stored, or on its way.
type Parts = Arc<Mutex<BTreeMap<u32, Option<PartStored>>>>;

impl Snapshots {
    /// No snapshot yet.
    pub fn new(
        root: Root,
        model: Arc<ManagerTower>,
        config: &ValidConfig,
        events: mpsc::Sender<Event>,
    ) -> Self {
        Snapshots {
            uploads: Uploads {
                root,
                model,
                parts: config.checkpoint.parts,
                patience: Duration::from_secs_f64(config.cluster.max_stall_seconds),
                events,
            },
            steps: config.run.steps,
            duplicates: Duplicates::default(),
            usual: VecDeque::new(),
            open: None,
            first_after: None,
            stall: None,
        }
    }

    /// One update, once no copy is being made of the state.
    pub fn update(&mut self, state: &mut Arc<HeldState>, optimizer: &AdamW, sum: &[f32]) {
        let begun = Instant::now();
        self.duplicates.wait();
        HeldState::update(state, optimizer, sum);
        let took = begun.elapsed();
        match self.first_after.take() {
            Some(step) => {
                let usual = self.usual();
                self.stall = usual.map(|usual| (step, took.saturating_sub(usual)));
            }
            None => {
                self.usual.push_back(took);
                if self.usual.len() > USUAL_MAX {
                    self.usual.pop_front();
                }
            }
        }
    }

    /// The middle of the last updates that followed no snapshot.
    fn usual(&self) -> Option<Duration> {
        let mut sorted: Vec<Duration> = self.usual.iter().copied().collect();
        sorted.sort_unstable();
        sorted.get(sorted.len() / 2).copied()
    }

    /// Stores parts of `state` while training goes on. A snapshot of another step is closed: its
    /// copy is let go.
    pub fn store(&mut self, state: &Arc<HeldState>, parts: Vec<u32>) {
        let step = state.step();
        if self.open.as_ref().is_none_or(|open| open.step != step) {
            self.close(u64::MAX);
            self.first_after = Some(step);
        }
        let open = self.open.get_or_insert_with(|| Open {
            step,
            tasks: Vec::new(),
            parts: Parts::default(),
        });
        let mut new = Vec::new();
        // Asked again for what is stored already: the word of it was lost.
        let mut again = Vec::new();
        let mut known = locked(&open.parts);
        for part in parts {
            match known.entry(part) {
                Entry::Vacant(place) => {
                    place.insert(None);
                    new.push(part);
                }
                Entry::Occupied(place) => again.extend(place.get().clone()),
            }
        }
        drop(known);
        // The last state is not updated any more, and is read where it is.
        let copied = (!new.is_empty() && step < self.steps).then(|| self.duplicates.begin(state));
        let (uploads, known) = (self.uploads.clone(), Arc::clone(&open.parts));
        let (state, buffers) = (Arc::downgrade(state), self.duplicates.buffers());
        let task = tokio::spawn(async move {
            for stored in again {
                uploads.tell(stored).await;
            }
            let state = match copied {
                Some(copied) => copied.await.ok(),
                None => state.upgrade(),
            };
            for part in new {
                let stored = match &state {
                    Some(state) => uploads.store(state, part).await,
                    None => failed(step, part, "the copy of the state was not made".into()),
                };
                locked(&known).insert(part, Some(stored.clone()));
                uploads.tell(stored).await;
            }
            if let Some(state) = state {
                buffers.give(state);
            }
        });
        open.tasks.push(task.abort_handle());
    }

    /// The coordinator needs no snapshot up to `step` any more.
    pub fn close(&mut self, step: u64) {
        if let Some(open) = self.open.take_if(|open| open.step <= step) {
            for task in open.tasks {
                task.abort();
            }
        }
    }

    /// What is stored and being stored, for a new session.
    pub fn held(&self) -> Option<v1::SnapshotHeld> {
        let open = self.open.as_ref()?;
        let parts = locked(&open.parts);
        let parts = parts.iter().map(|(part, stored)| {
            stored.clone().unwrap_or(PartStored {
                step: open.step,
                part: *part,
                ..Default::default()
            })
        });
        Some(v1::SnapshotHeld {
            parts: parts.collect(),
        })
    }

    /// Adds to the word that an update was applied what it waited for a snapshot.
    pub fn tell_stall(&mut self, applied: &mut v1::Applied) {
        let stall = self.stall.take_if(|(step, _)| *step == applied.step);
        applied.stall_seconds = stall.map(|(_, stall)| stall.as_secs_f64());
    }
}

impl Uploads {
    /// Encodes and stores one part; comes back when it is stored, or cannot be encoded.
    async fn store(&self, state: &Arc<HeldState>, part: u32) -> PartStored {
        let step = state.step();
        let encoded = {
            let (state, model, parts) = (Arc::clone(state), Arc::clone(&self.model), self.parts);
            // Copying and hashing half a gigabyte is no work for a thread that serves sockets.
            let encode = move || checkpoint::encode_part(&state, model.table(), part, parts);
            tokio::task::spawn_blocking(encode).await
        };
        let Encoded { mut stored, bytes } = match encoded {
            Ok(Ok(encoded)) => encoded,
            Ok(Err(error)) => return failed(step, part, error.to_string()),
            Err(error) => return failed(step, part, error.to_string()),
        };
        let path = format!("{}/{}", checkpoint::folder(step), stored.file);
        let slow = bytes.len() as f64 / SLOW_BYTES_PER_SECOND;
        let patience = self.patience + Duration::from_secs_f64(slow);
        let (begun, mut pause) = (Instant::now(), RETRY_MIN);
        loop {
            // The name is the content, so an overwrite by the other copy changes nothing.
            let put = self.root.put_large(&path, bytes.clone());
            let error = match self.watched(put, &stored, &path, patience).await {
                Ok(()) => {
                    stored.seconds = begun.elapsed().as_secs_f64();
                    return stored;
                }
                Err(error) => error,
            };
            tracing::warn!(step, part, %error, "a checkpoint part is tried again");
            let late = PartStored {
                error: format!("cannot write checkpoint part {path}: {error}"),
                tries_again: true,
                may_pass: error.may_pass(),
                ..stored.clone()
            };
            self.tell(late).await;
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_MAX);
        }
    }

    /// Waits for a put; says so when the store does not answer for long.
    async fn watched(
        &self,
        put: impl Future<Output = Result<(), shard_tools::store::StoreError>>,
        stored: &PartStored,
        path: &str,
        patience: Duration,
    ) -> Result<(), shard_tools::store::StoreError> {
        tokio::pin!(put);
        if let Ok(done) = tokio::time::timeout(patience, &mut put).await {
            return done;
        }
        let waited = patience.as_secs_f64();
        let late = PartStored {
            error: format!("checkpoint part {path} is not written after {waited:.0} s"),
            tries_again: true,
            may_pass: true,
            ..stored.clone()
        };
        self.tell(late).await;
        put.await
    }

    async fn tell(&self, stored: PartStored) {
        // Without a loop there is nobody to tell.
        let report = Event::Report(up::Body::PartStored(stored));
        let _ = self.events.send(report).await;
    }
}

fn failed(step: u64, part: u32, error: String) -> PartStored {
    tracing::error!(step, part, error, "a checkpoint part cannot be made");
    PartStored {
        step,
        part,
        error,
        ..Default::default()
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that holds it can leave it half written.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
