//! A worker's step on random pairs: the one place where benchmarks touch the worker's rooms.
//!
//! A step is what a worker does: weights to the device, the gradient of its lanes in device batches,
//! the lanes folded along their tree, the mean, the optimizer's update. Left out are the data plane
//! and the network, which have benchmarks of their own.

use std::sync::Arc;

use anyhow::{Context as _, ensure};
use belfry_configs::rng::{Key, Purpose};
use belfry_configs::{CPU_APART, Task, ValidConfig};
use belfry_model::phase::{PHASES, Phase};
use belfry_model::{
    Device, Draws, Gradient, GradientSum, ManagerTower, PretrainBatch, PretrainReports, Weights,
    fill_normal,
};
use belfry_proto::{LaneRange, v1};
use belfry_worker::held::{HeldState, Place, StepWeights};
use belfry_worker::open_device;
use belfry_worker::optimizer::AdamW;
use belfry_worker::partials::Partials;
use belfry_worker::state::{TrainState, optimizer};
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
    batches: Vec<PretrainBatch>,
    lanes: u32,
}

impl Rehearsal {
    /// A worker of `config` that computes `lanes` lanes per step, with random weights and pairs.
    pub fn new(config: &ValidConfig, lanes: u32) -> anyhow::Result<Self> {
        ensure!(
            config.model.task == Task::Pretrain,
            "model.task: only `pretrain` can be trained yet, so only its step is measured"
        );
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

    fn lane(&mut self, lane: u32, reports: &mut Vec<PretrainReports>) -> anyhow::Result<Gradient> {
        let step = self.state.step();
        let weights = self.weights()?;
        let root = Key::new(self.config.run.seed, Purpose::Dropout)
            .with(step)
            .with(u64::from(lane));
        let mut sum = GradientSum::new(&weights);
        let mut first = 0;
        for batch in &self.batches {
            let keys: Vec<Key> = (0..batch.micro_batches as u64)
                .map(|i| root.with(first + i))
                .collect();
            first += keys.len() as u64;
            let (draws, target) = (Draws::Keys(&keys), (&mut sum).into());
            let report = self.tower.pretrain_step(&weights, batch, draws, target);
            reports.push(report.with_context(|| format!("step {step}, lane {lane}"))?);
        }
        let _flat = self.phase(trace_span!(target: PHASES, "gradient collection"));
        Ok(sum.finish())
    }

    /// Losses are read when all lanes are through, as in a worker.
    fn check(&self, reports: Vec<PretrainReports>) -> anyhow::Result<()> {
        let _phase = self.phase(trace_span!(target: PHASES, "losses to host"));
        for report in reports {
            for one in report.read()? {
                let finite = one.mlm_loss.is_finite() && one.itm_loss.is_finite();
                ensure!(finite, "step {}: a loss is not finite", self.state.step());
            }
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
        let lane: usize = self.batches.iter().map(PretrainBatch::rows).sum();
        lane * self.lanes as usize
    }

    /// Multiply-accumulates of a step.
    pub fn products(&self) -> f64 {
        let labels = self.batches.iter().flat_map(|batch| &batch.mlm_labels);
        let masked = labels.filter(|label| **label != IGNORED).count() as u64;
        let masked = u64::from(self.lanes) * masked;
        step_macs(&self.config, self.pairs() as u64, masked)
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

/// A lane's device batches: random words and pixels; half of each micro-batch has a false image.
fn lane_batches(config: &ValidConfig) -> Vec<PretrainBatch> {
    let micro_batches = config.micro_batches_per_lane() as usize;
    let group = config.batch.device_batch as usize;
    let starts = (0..micro_batches).step_by(group);
    starts
        .map(|start| device_batch(config, start, group.min(micro_batches - start)))
        .collect()
}

fn device_batch(config: &ValidConfig, first: usize, micro_batches: usize) -> PretrainBatch {
    let pairs = config.batch.micro_batch as usize;
    let text_len = config.data.text_len as usize;
    let rows = micro_batches * pairs;
    let size = 3 * (config.model.image.size as usize).pow(2);
    let mut batch = PretrainBatch {
        micro_batches,
        pairs,
        text_len,
        ..Default::default()
    };
    for row in 0..rows {
        // A row is the same whatever device batch it stands in.
        let place = (first * pairs + row) as u64;
        let key = Key::new(config.run.seed, Purpose::Pack).with(place);
        let vocab = u64::from(config.model.text.vocab);
        let ids = (0..text_len as u64).map(|i| 3 + key.below(i, vocab - 3) as i32);
        batch.ids.extend(ids);
        let noise = |name: &str| {
            let mut pixels = vec![0.0; size];
            fill_normal(key.with_name(name), 0, 1.0, &mut pixels);
            pixels
        };
        let image = noise("image");
        let matches = row % pairs < pairs.div_ceil(2);
        batch.itm_labels.push(i32::from(matches));
        if matches {
            batch.itm_images.extend_from_slice(&image);
        } else {
            batch.itm_images.extend(noise("false image"));
        }
        batch.images.extend(image);
    }
    batch.masked_ids.clone_from(&batch.ids);
    batch.text_mask = vec![1.0; batch.ids.len()];
    let label = |(i, id): (usize, &i32)| {
        let predicted = i % text_len % TOKENS_PER_MASK == 1;
        if predicted { *id } else { IGNORED }
    };
    batch.mlm_labels = batch.ids.iter().enumerate().map(label).collect();
    batch
}
