//! From a lane's host batches to its flat gradient: the only crossing from host to device.
//!
//! One thread owns the device's weights and runs one job at a time, so a worker's bits cannot
//! depend on what else the process does. It knows the data plane and the model, and refuses to
//! know the network, ranks and generations.

use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::Instant;

use belfry_configs::ValidConfig;
use belfry_configs::rng::{Key, Purpose};
use belfry_data::{DataPlane, HostBatch, Split};
use belfry_model::{
    Device, Draws, ManagerTower, MicroBatchReport, ModelError, PretrainBatch, Weights, on_host,
};
use belfry_proto::v1;
use tokio::sync::mpsc::Sender;
use xxhash_rust::xxh3::Xxh3;

use crate::core::Event;
use crate::error::WorkerError;
use crate::state::{Parameters, TrainState};

/// Jobs that may wait for the compute thread: one lane, and what comes between lanes.
const JOBS_MAX: usize = 8;

/// Work for the compute thread.
pub enum Job {
    /// Gradient of one lane at `state`.
    Lane {
        /// The lane.
        lane: u32,
        /// The state before the step.
        state: Arc<TrainState>,
    },
    /// Losses and accuracies on the validation data.
    Evaluate {
        /// The state to be judged.
        state: Arc<TrainState>,
    },
}

/// The compute thread's address.
pub struct Compute {
    jobs: mpsc::SyncSender<Job>,
    /// The training data, for prefetch hints.
    pub data: Arc<DataPlane>,
    /// The model's structure.
    pub model: Arc<ManagerTower>,
}

impl Compute {
    /// Opens data, model and device and starts the thread; results arrive as events.
    ///
    /// # Errors
    /// [`WorkerError::Data`] or [`WorkerError::Device`], before anything is computed.
    pub fn start(
        config: &ValidConfig,
        cache_dir: &Path,
        events: Sender<Event>,
    ) -> Result<Self, WorkerError> {
        let device = open_device(&config.run.device)?;
        let data = Arc::new(DataPlane::open(config, cache_dir, Split::Train)?);
        let model = ManagerTower::new(&config.model, config.data.text_len as usize)
            .map_err(|e| WorkerError::Internal(e.to_string()))?;
        let model = Arc::new(model.recomputing(config.batch.recompute));
        let (jobs, queue) = mpsc::sync_channel(JOBS_MAX);
        let mut room = Room {
            config: config.clone(),
            cache_dir: cache_dir.to_owned(),
            data: Arc::clone(&data),
            model: Arc::clone(&model),
            device,
            weights: None,
        };
        std::thread::Builder::new()
            .name("compute".into())
            .spawn(move || {
                while let Ok(job) = queue.recv() {
                    let event = room.run(job).unwrap_or_else(Event::Failed);
                    if events.blocking_send(event).is_err() {
                        return;
                    }
                }
            })
            .map_err(|e| WorkerError::Internal(format!("no compute thread: {e}")))?;
        Ok(Compute { jobs, data, model })
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

/// The device of `run.device`, ready for gradients.
fn open_device(name: &str) -> Result<Device, WorkerError> {
    let Some(index) = name.strip_prefix("cuda:") else {
        return Ok(Device::flex().autodiff());
    };
    open_cuda(index).map_err(|reason| WorkerError::Device {
        device: name.to_owned(),
        reason,
    })
}

#[cfg(feature = "cuda")]
fn open_cuda(index: &str) -> Result<Device, String> {
    let index: usize = index
        .parse()
        .map_err(|e| format!("`{index}` is no index: {e}"))?;
    Ok(Device::cuda(index).autodiff())
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(_index: &str) -> Result<Device, String> {
    Err("this binary was built without GPUs; build it with `--features cuda`".into())
}

/// What the compute thread owns.
struct Room {
    config: ValidConfig,
    cache_dir: std::path::PathBuf,
    data: Arc<DataPlane>,
    model: Arc<ManagerTower>,
    device: Device,
    weights: Option<(u64, Weights)>,
}

impl Room {
    fn run(&mut self, job: Job) -> Result<Event, String> {
        match job {
            Job::Lane { lane, state } => self.lane(lane, &state),
            Job::Evaluate { state } => {
                let step = state.step;
                let evaluated = self.evaluate(&state).unwrap_or_else(|error| v1::Evaluated {
                    step,
                    error,
                    ..Default::default()
                });
                Ok(Event::Report(v1::worker_message::Body::Evaluated(
                    evaluated,
                )))
            }
        }
    }

    /// The weights of `state` on the device. A device in host memory reads them where they are,
    /// and must let go of them before the update; any other loads its copy once per step.
    fn weights(&mut self, state: &Arc<TrainState>) -> Result<Weights, String> {
        let table = self.model.table();
        let (step, parameters) = (state.step, Parameters(Arc::clone(state)));
        let at = |e: ModelError| format!("step {step}: {e}");
        if on_host(&self.device) {
            return Weights::share(table, parameters, &self.device).map_err(at);
        }
        if let Some((loaded, weights)) = &self.weights
            && *loaded == step
        {
            return Ok(weights.clone());
        }
        // Freed before the next are made: two sets never stand side by side.
        self.weights = None;
        let weights = Weights::load(table, &state.parameters, &self.device).map_err(at)?;
        self.weights = Some((step, weights.clone()));
        Ok(weights)
    }

    fn lane(&mut self, lane: u32, state: &Arc<TrainState>) -> Result<Event, String> {
        let step = state.step;
        let begun = Instant::now();
        let at = |e: &dyn std::fmt::Display| format!("step {step}, lane {lane}: {e}");
        let batches = self.data.lane_step(step, lane).map_err(|e| at(&e))?;
        let weights = self.weights(state)?;
        let root = Key::new(self.config.run.seed, Purpose::Dropout)
            .with(step)
            .with(u64::from(lane));
        let mut gradient = vec![0.0; self.model.table().elements()];
        let mut report = v1::LaneReport {
            lane,
            ..Default::default()
        };
        let mut pairs = Xxh3::new();
        let group = self.config.batch.device_batch as usize;
        for (index, group_batches) in batches.chunks(group).enumerate() {
            let keys: Vec<Key> = (0..group_batches.len())
                .map(|i| root.with((index * group + i) as u64))
                .collect();
            let inputs = device_batch(group_batches);
            let reports = self
                .model
                .pretrain_gradient(&weights, &inputs, Draws::Keys(&keys), &mut gradient)
                .map_err(|e| at(&e))?;
            for one in &reports {
                add_report(&mut report, one);
            }
            for id in group_batches.iter().flat_map(|b| &b.pair_ids) {
                pairs.update(&id.to_le_bytes());
            }
        }
        report.pairs_digest = pairs.digest128().to_le_bytes().to_vec();
        Ok(Event::LaneDone {
            step,
            report,
            gradient,
            seconds: begun.elapsed().as_secs_f64(),
        })
    }

    fn evaluate(&mut self, state: &Arc<TrainState>) -> Result<v1::Evaluated, String> {
        let data = DataPlane::open(&self.config, &self.cache_dir, Split::Validation)
            .map_err(|e| e.to_string())?;
        let weights = self.weights(state)?;
        let mut sum = v1::LaneReport::default();
        let mut micro_batches = 0u32;
        for batch in data.evaluation_batches() {
            let batch = batch.map_err(|e| e.to_string())?;
            let inputs = device_batch(std::slice::from_ref(&batch));
            let reports = self.model.pretrain_evaluate(&weights, &inputs);
            for one in &reports.map_err(|e| e.to_string())? {
                add_report(&mut sum, one);
                micro_batches += 1;
            }
        }
        let mean = |total: f64, count: f64| if count > 0.0 { total / count } else { 0.0 };
        let with_tokens = f64::from(micro_batches - sum.unmasked_micro_batches);
        Ok(v1::Evaluated {
            step: state.step,
            mlm_loss: mean(sum.mlm_loss, with_tokens),
            mlm_accuracy: mean(sum.mlm_correct as f64, sum.mlm_masked as f64),
            itm_loss: mean(sum.itm_loss, f64::from(micro_batches)),
            itm_accuracy: mean(sum.itm_correct as f64, sum.pairs as f64),
            pairs: sum.pairs,
            error: String::new(),
        })
    }
}

fn add_report(sum: &mut v1::LaneReport, one: &MicroBatchReport) {
    sum.mlm_loss += one.mlm_loss;
    sum.itm_loss += one.itm_loss;
    sum.mlm_masked += u64::from(one.mlm_masked);
    sum.mlm_correct += u64::from(one.mlm_correct);
    sum.itm_correct += u64::from(one.itm_correct);
    sum.pairs += u64::from(one.pairs);
    sum.unmasked_micro_batches += u32::from(one.mlm_masked == 0);
}

/// Micro-batches side by side in one forward pass.
fn device_batch(batches: &[HostBatch]) -> PretrainBatch {
    let first = batches.first().expect("a device batch has a micro-batch");
    let mut inputs = PretrainBatch {
        micro_batches: batches.len(),
        pairs: first.pairs,
        text_len: first.text_len,
        ..Default::default()
    };
    for batch in batches {
        inputs.ids.extend_from_slice(&batch.ids);
        inputs.masked_ids.extend_from_slice(&batch.masked_ids);
        inputs.mlm_labels.extend_from_slice(&batch.mlm_labels);
        inputs
            .text_mask
            .extend(batch.text_mask.iter().map(|m| f32::from(*m)));
        inputs.images.extend_from_slice(&batch.images);
        inputs.itm_images.extend_from_slice(&batch.itm_images);
        inputs.itm_labels.extend_from_slice(&batch.itm_labels);
    }
    inputs
}
