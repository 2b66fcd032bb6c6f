//! From a lane's host batches to its flat gradient: the only crossing from host to device.
//!
//! One thread owns the device's weights and runs one job at a time, so a worker's bits cannot
//! depend on what else the process does. A device with a memory of its own is not waited for: a
//! lane is done when all its work is queued, and its losses are asked for once per step, in front of
//! the exchange. It knows the data plane and the model, and refuses to know the network, ranks and
//! generations.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::Instant;

use belfry_configs::rng::{Key, Purpose};
use belfry_configs::{CPU_APART, ValidConfig};
use belfry_data::{
    DataError, DataPlane, DatasetIdentity, HostBatch, Quarantine, Split, identities, pairs_digest,
};
use belfry_model::{Device, GradientSum, ManagerTower, ModelError, Weights};
use belfry_proto::Digest;
use belfry_proto::v1::{self, worker_message as up};
use shard_tools::store::Root;
use tokio::sync::mpsc::Sender;
use tokio::sync::oneshot;

use crate::contrast::{ContrastError, GlobalContrast, LaneOfStep};
use crate::core::{Event, Features, LateReports};
use crate::device;
use crate::error::WorkerError;
use crate::evaluate::{Evaluator, InRun, Share};
use crate::held::{HeldState, Place, StepWeights};
use crate::task::{DeviceBatch, Keys, Reports};

/// Jobs that may wait for the compute thread: one lane, and what comes between lanes.
const JOBS_MAX: usize = 8;

/// Work for the compute thread.
pub enum Job {
    /// Gradient of one lane at `state`.
    Lane {
        /// The lane.
        lane: u32,
        /// The state before the step.
        state: Arc<HeldState>,
        /// Shards that nobody reads at this step.
        quarantine: Quarantine,
        /// Every lane's, where the gradient needs them.
        features: Option<Arc<Features>>,
    },
    /// Features of one lane at `state`.
    Features {
        /// The lane.
        lane: u32,
        /// The state before the step.
        state: Arc<HeldState>,
        /// Shards that nobody reads at this step.
        quarantine: Quarantine,
    },
    /// The complete reports of these lanes of `step`, which were computed before.
    Reports {
        /// The open step.
        step: u64,
        /// Its lanes.
        lanes: Vec<u32>,
        /// Who wants to know.
        answer: oneshot::Sender<Result<LateReports, String>>,
    },
    /// What the validation data say of a state.
    Evaluate {
        /// The state to be judged.
        state: Arc<HeldState>,
        /// The share, or the figures of all.
        ask: v1::Evaluate,
    },
}

/// The compute thread's address.
pub struct Compute {
    jobs: mpsc::SyncSender<Job>,
    /// The training data, for prefetch hints.
    pub data: Arc<DataPlane>,
    /// What it trains and validates on.
    pub identity: Vec<v1::Dataset>,
    /// The model's structure.
    pub model: Arc<ManagerTower>,
    place: Place,
}

impl Compute {
    /// Opens data, model and device and starts the thread; results arrive as events.
    ///
    /// # Errors
    /// [`WorkerError::Data`] or [`WorkerError::Device`], before anything is computed.
    pub fn start(
        config: &ValidConfig,
        (root, cache_dir): (&Root, &Path),
        events: Sender<Event>,
    ) -> Result<Self, WorkerError> {
        let runtime = tokio::runtime::Handle::current();
        let device = device::open(&config.run.device)?;
        let place = Place::new(&device, config.run.device == CPU_APART);
        let data = Arc::new(DataPlane::open(config, cache_dir, Split::Train)?);
        let identity = identity(config)?;
        let model = ManagerTower::new(&config.model, config.data.text_len as usize)?;
        let model = Arc::new(model.recomputing(config.batch.recompute));
        let (jobs, queue) = mpsc::sync_channel(JOBS_MAX);
        let mut room = Room {
            config: config.clone(),
            root: root.clone(),
            runtime,
            cache_dir: cache_dir.to_owned(),
            data: Arc::clone(&data),
            identity: identity.clone(),
            model: Arc::clone(&model),
            device,
            weights: StepWeights::default(),
            waiting: Waiting::default(),
            contrast: GlobalContrast::default(),
        };
        std::thread::Builder::new()
            .name("compute".into())
            .spawn(move || {
                while let Ok(job) = queue.recv() {
                    let event = room.run(job).unwrap_or_else(|e| Some(Event::Failed(e)));
                    if event.is_some_and(|event| events.blocking_send(event).is_err()) {
                        return;
                    }
                }
            })
            .map_err(|e| WorkerError::Internal(format!("no compute thread: {e}")))?;
        Ok(Compute {
            jobs,
            data,
            identity,
            model,
            place,
        })
    }

    /// Where states are trained.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Queues a job.
    ///
    /// # Errors
    /// [`WorkerError::Internal`] when the thread is gone or its queue is full.
    pub fn submit(&self, job: Job) -> Result<(), WorkerError> {
        let gone = |_| WorkerError::Internal("the compute thread does not take work".into());
        self.jobs.try_send(job).map_err(gone)
    }
}

/// What the compute thread owns.
struct Room {
    config: ValidConfig,
    root: Root,
    /// For the store, which the compute thread asks when it evaluates.
    runtime: tokio::runtime::Handle,
    cache_dir: std::path::PathBuf,
    data: Arc<DataPlane>,
    identity: Vec<v1::Dataset>,
    model: Arc<ManagerTower>,
    device: Device,
    weights: StepWeights,
    waiting: Waiting,
    contrast: GlobalContrast,
}

/// Lanes of the open step whose losses a device of its own has, or had until they were read.
#[derive(Default)]
struct Waiting {
    step: u64,
    begun: Option<Instant>,
    unread: BTreeMap<u32, (v1::LaneReport, Vec<Reports>)>,
    read: BTreeMap<u32, v1::LaneReport>,
}

impl Waiting {
    fn begin(&mut self, step: u64, begun: Instant) {
        if self.step != step {
            *self = Waiting {
                step,
                ..Waiting::default()
            };
        }
        self.begun.get_or_insert(begun);
    }

    fn reports(&mut self, step: u64, lanes: &[u32]) -> Result<LateReports, String> {
        let mut late = LateReports::default();
        for lane in lanes {
            let at = |e: &dyn std::fmt::Display| format!("step {step}, lane {lane}: {e}");
            if let Some((mut report, parts)) = self.unread.remove(lane) {
                read_reports(&mut report, parts).map_err(|e| at(&e))?;
                self.read.insert(*lane, report);
            }
            let report = self.read.get(lane).filter(|_| self.step == step);
            let report = report.ok_or_else(|| at(&"its losses are not here"))?;
            late.reports.push(report.clone());
        }
        if let Some(begun) = self.begun.take() {
            late.seconds = begun.elapsed().as_secs_f64();
        }
        Ok(late)
    }
}

impl Room {
    fn run(&mut self, job: Job) -> Result<Option<Event>, String> {
        match job {
            Job::Lane {
                lane,
                state,
                quarantine,
                features,
            } => {
                let done = self.lane((lane, &state), &quarantine, features.as_ref());
                self.event(done, (state.step(), lane)).map(Some)
            }
            Job::Features {
                lane,
                state,
                quarantine,
            } => {
                let done = self.features((lane, &state), &quarantine);
                self.event(done, (state.step(), lane)).map(Some)
            }
            Job::Reports {
                step,
                lanes,
                answer,
            } => {
                // Whoever asked may have been told to stop.
                let _ = answer.send(self.waiting.reports(step, &lanes));
                Ok(None)
            }
            Job::Evaluate { state, ask } => Ok(Some(Event::Report(self.evaluate(&state, ask)))),
        }
    }

    fn weights(&mut self, state: &Arc<HeldState>) -> Result<Weights, ModelError> {
        let (table, matmul) = (self.model.table(), self.config.precision.matmul);
        self.weights.of(state, table, &self.device, matmul)
    }

    fn features(
        &mut self,
        (lane, state): (u32, &Arc<HeldState>),
        quarantine: &Quarantine,
    ) -> Result<Event, LaneError> {
        let begun = Instant::now();
        let (step, weights) = (state.step(), self.weights(state)?);
        let at = LaneOfStep {
            config: &self.config,
            model: &self.model,
            data: &self.data,
            weights: &weights,
            step,
            lane,
            quarantine,
        };
        Ok(Event::FeaturesDone {
            step,
            lane,
            features: self.contrast.features(at)?,
            seconds: begun.elapsed().as_secs_f64(),
        })
    }

    fn lane(
        &mut self,
        (lane, state): (u32, &Arc<HeldState>),
        quarantine: &Quarantine,
        features: Option<&Arc<Features>>,
    ) -> Result<Event, LaneError> {
        let begun = Instant::now();
        let (step, weights) = (state.step(), self.weights(state)?);
        let at = LaneOfStep {
            config: &self.config,
            model: &self.model,
            data: &self.data,
            weights: &weights,
            step,
            lane,
            quarantine,
        };
        let batches = match features {
            Some(_) => self.contrast.batches(at)?,
            None => self.data.lane_step(step, lane, quarantine)?,
        };
        let ids = batches.iter().flat_map(|batch| &batch.pair_ids).copied();
        let mut report = v1::LaneReport {
            lane,
            pairs: ids.clone().count() as u64,
            pairs_digest: Digest(pairs_digest(ids)).to_bytes(),
            substituted: self.substituted(step, lane, quarantine),
            ..Default::default()
        };
        let mut sum = GradientSum::new(&weights);
        let reports = match features {
            Some(features) => self.contrast.gradient(at, features, batches, &mut sum)?,
            None => micro_batches(at, batches, &mut sum)?,
        };
        let mut seconds = 0.0;
        if weights.on_host() {
            read_reports(&mut report, reports)?;
            seconds = begun.elapsed().as_secs_f64();
        } else {
            self.waiting.begin(step, begun);
            let unread = (report.clone(), reports);
            self.waiting.unread.insert(lane, unread);
        }
        Ok(Event::LaneDone {
            step,
            report,
            gradient: sum.finish(),
            seconds,
        })
    }

    /// What the core hears of a lane: also that a shard keeps it from being computed.
    fn event(
        &self,
        done: Result<Event, LaneError>,
        (step, lane): (u64, u32),
    ) -> Result<Event, String> {
        let error = match done {
            Ok(event) => return Ok(event),
            Err(error) => error,
        };
        let data = match &error {
            LaneError::Data(data) | LaneError::Contrast(ContrastError::Data(data)) => Some(data),
            _ => None,
        };
        let unreadable = data.and_then(|data| self.unreadable(step, lane, data));
        unreadable.ok_or_else(|| format!("step {step}, lane {lane}: {error}"))
    }

    /// Pairs of the lane's step that stand for those of shards under quarantine.
    fn substituted(&self, step: u64, lane: u32, quarantine: &Quarantine) -> u64 {
        if quarantine.is_empty() {
            return 0;
        }
        let pairs = self.data.sequence().pairs(step, lane, quarantine);
        let replaced = pairs.iter().filter(|pair| pair.replaces.is_some());
        replaced.count() as u64
    }

    /// A lane that a shard keeps from being computed; another error is none that a quarantine mends.
    fn unreadable(&self, step: u64, lane: u32, error: &DataError) -> Option<Event> {
        let place = error.unreadable()?;
        let datasets = self.data.sequence().datasets();
        let name = datasets[place.dataset as usize].shard_name(place.shard);
        let shard = v1::Shard {
            dataset: place.dataset,
            shard: place.shard,
            file: name.rsplit('/').next().unwrap_or(&name).to_owned(),
            from_step: 0,
        };
        Some(Event::Unreadable {
            step,
            lane,
            shards: vec![shard],
            detail: format!("lane {lane}: {error}"),
        })
    }

    fn evaluate(&mut self, state: &Arc<HeldState>, ask: v1::Evaluate) -> up::Body {
        let v1::Evaluate {
            step,
            shares,
            share,
        } = ask;
        match share {
            Some(share) => {
                let found = self.judge(state, |run| run.share(Share::new(share + 1, shares)));
                up::Body::ShareEvaluated(v1::ShareEvaluated {
                    step,
                    shares,
                    share,
                    error: found.err().unwrap_or_default(),
                })
            }
            None => {
                let evaluated = self.judge(state, |run| run.conclude(shares));
                up::Body::Evaluated(evaluated.unwrap_or_else(|error| v1::Evaluated {
                    step,
                    error,
                    ..Default::default()
                }))
            }
        }
    }

    fn judge<T>(
        &mut self,
        state: &Arc<HeldState>,
        judge: impl FnOnce(&mut InRun) -> Result<T, WorkerError>,
    ) -> Result<T, String> {
        if identity(&self.config).map_err(|e| e.to_string())? != self.identity {
            return Err("data.train or data.validation was replaced while the run trained".into());
        }
        let weights = self.weights(state).map_err(|e| e.to_string())?;
        let model = Arc::clone(&self.model);
        let evaluator = Evaluator::open(&self.config, &self.cache_dir, model, &weights);
        let mut run = InRun {
            root: &self.root,
            step: state.step(),
            evaluator: &mut evaluator.map_err(|e| e.to_string())?,
            runtime: &self.runtime,
        };
        judge(&mut run).map_err(|e| e.to_string())
    }
}

/// Why a lane was not computed.
#[derive(Debug, thiserror::Error)]
enum LaneError {
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Contrast(#[from] ContrastError),
}

/// Adds the gradient of a lane's micro-batches, which see nothing but themselves.
fn micro_batches(
    at: LaneOfStep,
    batches: Vec<HostBatch>,
    sum: &mut GradientSum,
) -> Result<Vec<Reports>, ModelError> {
    let config = at.config;
    let root = |purpose| {
        let root = Key::new(config.run.seed, purpose);
        root.with(at.step).with(u64::from(at.lane))
    };
    let group = config.batch.device_batch as usize;
    let (mut reports, mut batches) = (Vec::new(), batches.into_iter());
    for first in (0..config.micro_batches_per_lane() as usize).step_by(group) {
        let keys = |purpose| -> Vec<Key> {
            let micro_batches = first..first + group;
            micro_batches
                .map(|i| root(purpose).with(i as u64))
                .collect()
        };
        let keys = Keys {
            draws: &keys(Purpose::Dropout),
            negatives: &keys(Purpose::Negatives),
        };
        let batch = DeviceBatch::new(config.model.task, batches.by_ref().take(group));
        let target = (&mut *sum).into();
        reports.push(batch.gradient(at.model, at.weights, keys, target)?);
    }
    Ok(reports)
}

/// What the configured datasets are, for the coordinator to compare.
fn identity(config: &ValidConfig) -> Result<Vec<v1::Dataset>, WorkerError> {
    let mut all = identities(config, Split::Train)?;
    all.extend(identities(config, Split::Validation)?);
    let dataset = |d: DatasetIdentity| v1::Dataset {
        key: d.split.key().into(),
        path: d.path,
        manifest_sha256: d.manifest_sha256,
        pairs: d.pairs,
    };
    Ok(all.into_iter().map(dataset).collect())
}

/// Adds what the device says of a lane's device batches, in their order.
fn read_reports(report: &mut v1::LaneReport, parts: Vec<Reports>) -> Result<(), ModelError> {
    for part in parts {
        part.add_to(&mut report.objectives)?;
    }
    Ok(())
}
