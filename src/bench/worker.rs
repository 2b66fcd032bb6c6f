//! A worker's step on random pairs: the one place where benchmarks touch the worker's rooms.
//!
//! A step is what a worker does: weights to the device, the gradient of its lanes in device batches,
//! the lanes folded along their tree, the mean, the optimizer's update. Left out are the data plane
//! and the network, which have benchmarks of their own.

use std::sync::Arc;

use anyhow::{Context as _, ensure};
use belfry_configs::rng::{Key, Purpose};
use belfry_configs::{CPU_APART, Task, ValidConfig};
use belfry_data::{HostBatch, Targets};
use belfry_model::phase::{PHASES, Phase};
use belfry_model::{Device, Gradient, GradientSum, ManagerTower, Weights, fill_normal};
use belfry_proto::{LaneRange, v1};
use belfry_worker::held::{HeldState, Place, StepWeights};
use belfry_worker::open_device;
use belfry_worker::optimizer::AdamW;
use belfry_worker::partials::Partials;
use belfry_worker::state::{TrainState, optimizer};
use belfry_worker::task::{DeviceBatch, Keys, Reports};
use tracing::{Span, trace_span};

use crate::size::{step_macs, worker_bytes};

/// Every seventh token is to be predicted: 15 percent of those that are no special ones.
const TOKENS_PER_MASK: usize = 7;
const IGNORED: i32 = -100;

/// What a worker has for its step.
pub struct Rehearsal {
    /// The device, with autodiff.
    pub device: Device,
    config: ValidConfig,
    tower: ManagerTower,
    optimizer: AdamW,
    state: Arc<HeldState>,
    weights: StepWeights,
    /// Device batches of one lane; every lane has the same.
    batches: Vec<DeviceBatch>,
    lanes: u32,
}

impl Rehearsal {
    /// A worker of `config` that computes `lanes` lanes per step, with random weights and pairs.
    pub fn new(config: &ValidConfig, lanes: u32) -> anyhow::Result<Self> {
        let most = config.batch.lanes;
        ensure!(
            (1..=most).contains(&lanes),
            "--lanes {lanes}: the run has 1 to {most} lanes"
        );
        let device = open_device(&config.run.device)?;
        let tower = ManagerTower::new(&config.model, config.data.text_len as usize)?;
        let tower = tower.recomputing(config.batch.recompute);
        let parameters = tower.table().init(config.run.seed);
        let moments = vec![0.0; parameters.len()];
        let place = Place::new(&device, config.run.device == CPU_APART);
        let state = place.hold(TrainState {
            step: 0,
            parameters,
            exp_avg: moments.clone(),
            exp_avg_sq: moments,
        });
        Ok(Rehearsal {
            optimizer: optimizer(config, &tower),
            batches: lane_batches(config),
            state: Arc::new(state),
            weights: StepWeights::default(),
            config: config.clone(),
            device,
            tower,
            lanes,
        })
    }

    /// One step.
    pub fn step(&mut self) -> anyhow::Result<()> {
        let _rest = self.phase(trace_span!(target: PHASES, "other"));
        let whole = LaneRange {
            start: 0,
            end: self.lanes,
        };
        let mut partials = Partials::new(self.lanes);
        let mut reports = Vec::new();
        for lane in 0..self.lanes {
            let gradient = self.lane(lane, &mut reports)?;
            let _fold = self.phase(trace_span!(target: PHASES, "fold"));
            let report = v1::LaneReport {
                lane,
                ..Default::default()
            };
            partials.insert(report, gradient, &[whole])?;
        }
        self.check(reports)?;
        let staging = self.phase(trace_span!(target: PHASES, "gradient to host"));
        let nodes = partials.complete(&[whole]).context("a lane is missing")?;
        let sum = nodes[&whole].clone().read()?;
        drop(staging);
        let dividing = self.phase(trace_span!(target: PHASES, "mean"));
        let count = (self.lanes * self.config.micro_batches_per_lane()) as f32;
        let mean: Vec<f32> = sum.iter().map(|sum| sum / count).collect();
        drop(dividing);
        let _update = self.phase(trace_span!(target: PHASES, "optimizer"));
        HeldState::update(&mut self.state, &self.optimizer, &mean);
        // What is still under way on the device belongs to this step.
        self.device.sync().context("the device failed")
    }

    fn phase(&self, span: Span) -> Phase {
        Phase::begin(span, &self.device)
    }

    fn lane(&mut self, lane: u32, reports: &mut Vec<Reports>) -> anyhow::Result<Gradient> {
        let step = self.state.step();
        let weights = self.weights()?;
        let group = u64::from(self.config.batch.device_batch);
        let keys = |purpose, first: u64| -> Vec<Key> {
            let root = Key::new(self.config.run.seed, purpose);
            let root = root.with(step).with(u64::from(lane));
            (first..first + group).map(|i| root.with(i)).collect()
        };
        let mut sum = GradientSum::new(&weights);
        for (batch, number) in self.batches.iter().zip(0..) {
            let keys = Keys {
                draws: &keys(Purpose::Dropout, number * group),
                negatives: &keys(Purpose::Negatives, number * group),
            };
            let report = batch.gradient(&self.tower, &weights, keys, (&mut sum).into());
            reports.push(report.with_context(|| format!("step {step}, lane {lane}"))?);
        }
        let _flat = self.phase(trace_span!(target: PHASES, "gradient collection"));
        Ok(sum.finish())
    }

    /// Losses are read when all lanes are through, as in a worker.
    fn check(&self, reports: Vec<Reports>) -> anyhow::Result<()> {
        let _phase = self.phase(trace_span!(target: PHASES, "losses to host"));
        let mut sums = Vec::new();
        for report in reports {
            report.add_to(&mut sums)?;
        }
        for sum in sums {
            let (step, name) = (self.state.step(), &sum.name);
            ensure!(
                sum.loss.is_finite(),
                "step {step}: the {name} loss is not finite"
            );
        }
        Ok(())
    }

    fn weights(&mut self) -> anyhow::Result<Weights> {
        let (table, matmul) = (self.tower.table(), self.config.precision.matmul);
        let weights = self.weights.of(&self.state, table, &self.device, matmul);
        Ok(weights?)
    }

    /// Pairs of a step.
    pub fn pairs(&self) -> usize {
        let batch = &self.config.batch;
        (self.lanes * self.config.micro_batches_per_lane() * batch.micro_batch) as usize
    }

    /// Multiply-accumulates of a step.
    pub fn products(&self) -> f64 {
        let text_len = self.config.data.text_len as usize;
        let masked = (0..text_len).filter(|place| is_masked(*place)).count();
        step_macs(
            &self.config,
            self.pairs() as u64,
            (self.pairs() * masked) as u64,
        )
    }

    /// SHA-256 of the parameters: steps that computed the same have the same.
    pub fn parameters_sha256(&self) -> anyhow::Result<String> {
        Ok(self.state.host()?.parameters_sha256())
    }
}

/// What `belfry model` says of a worker's memory in bytes.
pub fn predicted_bytes(config: &ValidConfig) -> anyhow::Result<u64> {
    let tower = ManagerTower::new(&config.model, config.data.text_len as usize)?;
    let memory = worker_bytes(config, tower.table().elements() as u64);
    Ok(memory.iter().map(|(_, bytes)| bytes).sum())
}

/// A state of the configured size whose numbers are no zeros.
pub fn synthetic_state(config: &ValidConfig) -> anyhow::Result<(ManagerTower, TrainState)> {
    let tower = ManagerTower::new(&config.model, config.data.text_len as usize)?;
    let parameters = tower.table().init(config.run.seed);
    let scaled = |by: f32| parameters.iter().map(|x| by * x).collect();
    let state = TrainState {
        step: 1,
        exp_avg: scaled(1e-3),
        exp_avg_sq: scaled(1e-6),
        parameters,
    };
    Ok((tower, state))
}

/// A lane's device batches of random words and pixels.
fn lane_batches(config: &ValidConfig) -> Vec<DeviceBatch> {
    let (task, group) = (config.model.task, config.batch.device_batch);
    let starts = (0..config.micro_batches_per_lane()).step_by(group as usize);
    let batch = |first| {
        let micro_batches = first..first + group;
        DeviceBatch::new(task, micro_batches.map(|number| host_batch(config, number)))
    };
    starts.map(batch).collect()
}

fn is_masked(place: usize) -> bool {
    place % TOKENS_PER_MASK == 1
}

/// Micro-batch `number` of a lane, whatever device batch it stands in; where images are told from
/// false ones, half of them are false.
fn host_batch(config: &ValidConfig, number: u32) -> HostBatch {
    let task = config.model.task;
    let (pairs, text_len) = (
        config.batch.micro_batch as usize,
        config.data.text_len as usize,
    );
    let side = config.model.image.size as usize;
    let mut batch = HostBatch {
        pairs,
        text_len,
        image_side: side,
        ..Default::default()
    };
    for row in 0..pairs {
        let place = number as usize * pairs + row;
        let key = Key::new(config.run.seed, Purpose::Pack).with(place as u64);
        let vocab = u64::from(config.model.text.vocab);
        let ids = (0..text_len as u64).map(|i| 3 + key.below(i, vocab - 3) as i32);
        batch.ids.extend(ids);
        let noise = |name: &str, all: &mut Vec<f32>| {
            let first = all.len();
            all.resize(first + 3 * side * side, 0.0);
            fill_normal(key.with_name(name), 0, 1.0, &mut all[first..]);
        };
        noise("image", &mut batch.images);
        batch.image_ids.push(place as u64);
        match task {
            Task::Pretrain => {
                let matches = row < pairs.div_ceil(2);
                batch.itm_labels.push(i32::from(matches));
                if !matches {
                    noise("false image", &mut batch.false_images);
                }
            }
            Task::Nlvr2 => noise("second image", &mut batch.second_images),
            _ => {}
        }
    }
    batch.text_mask = vec![1; batch.ids.len()];
    if matches!(task, Task::Pretrain | Task::PretrainItc) {
        batch.masked_ids.clone_from(&batch.ids);
        let label = |(i, id): (usize, &i32)| match is_masked(i % text_len) {
            true => *id,
            false => IGNORED,
        };
        batch.mlm_labels = batch.ids.iter().enumerate().map(label).collect();
    }
    batch.targets = match task {
        Task::Vqa => Targets::Scores {
            answers: config.model.head.answers as usize,
            rows: vec![vec![(0, 1.0)]; pairs],
        },
        Task::SnliVe | Task::Nlvr2 => {
            Targets::Classes((0..pairs as i32).map(|row| row % 2).collect())
        }
        _ => Targets::None,
    };
    batch
}
