//! The structs of a run file. Every hyper-parameter is spelled out; defaults are the paper's
//! (Tables 8 and 9) or stand with their reason.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::collective::Collective;
use crate::data::Data;
use crate::eval::Eval;
use crate::init::Init;
use crate::length::Rhythm;
use crate::model::Model;
use crate::precision::Precision;
use crate::timeouts::Timeouts;

/// One run file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// Names the run and seeds it.
    pub run: Run,
    /// The batch arithmetic.
    pub batch: Batch,
    /// Where pairs come from and how they are ordered.
    pub data: Data,
    /// The model's sizes.
    pub model: Model,
    /// The arithmetic of matrix products.
    #[serde(default)]
    pub precision: Precision,
    /// The weights to begin with.
    #[serde(default)]
    pub init: Init,
    /// Optimizer and schedule.
    pub optim: Optim,
    /// How a state is judged.
    #[serde(default)]
    pub eval: Eval,
    /// When checkpoints are written.
    #[serde(default)]
    pub checkpoint: Checkpoint,
    /// Membership and time.
    #[serde(default)]
    pub cluster: Cluster,
    /// How gradients are summed.
    #[serde(default)]
    pub collective: Collective,
}

/// `[run]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// Letters, digits, `-` and `_`; names the folder under `runs/` when no root is given.
    pub name: String,
    /// Seeds every random choice of the run.
    pub seed: u64,
    /// Optimizer updates in total (paper: 100,000 for pre-training); or `epochs` instead.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub steps: u64,
    /// Passes over the training data (Table 9), at most six decimals: ⌊pairs · epochs / global_batch⌋
    /// steps, counted once from the manifests of data.train.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epochs: Option<f64>,
    /// Pairs of one epoch: written by Belfry when it counts them, beside `epochs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch_pairs: Option<u64>,
    /// Steps between evaluations on data.validation; 0: only before the first step and after the last.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub evaluate_every_steps: u64,
    /// The same in epochs: after each step with which so many more are complete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluate_every_epochs: Option<f64>,
    /// `cpu`, or `cuda:N` with the cuda feature. `cpu-apart` is the CPU treated as a device with a
    /// memory of its own: a check of what happens on GPUs, for machines that have none.
    #[serde(default = "default_device")]
    pub device: String,
}

fn is_zero(steps: &u64) -> bool {
    *steps == 0
}

fn default_device() -> String {
    "cpu".into()
}

/// `[batch]`: `global_batch = lanes * micro_batches_per_lane * micro_batch`, exactly.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Batch {
    /// Pairs in one step (paper: 4096).
    pub global_batch: u32,
    /// Data-parallel slots, fixed for the whole run.
    pub lanes: u32,
    /// Pairs over which a loss is a mean (8 in the authors' run). Defines the mathematics.
    pub micro_batch: u32,
    /// Micro-batches in one forward pass: speed and memory only, equal up to rounding.
    #[serde(default = "one")]
    pub device_batch: u32,
    /// What backward passes compute again instead of keeping it: memory against time, the same bits.
    #[serde(default)]
    pub recompute: Recompute,
}

/// What is computed again for the backward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Nothing: every activation stays until its gradient is known.
    #[default]
    None,
    /// Each tower layer, transform and cross-modal layer: only their outputs stay, and one layer's
    /// activations at a time come back. Costs a second forward pass of them (about 1.3 times the
    /// step's work); at BASE sizes a pair then takes 0.26 GB instead of 2.
    Blocks,
}

pub(crate) fn one() -> u32 {
    1
}

/// `[optim]`: AdamW and schedule of model_spec 11. Table 8 gives the pre-training values.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Optim {
    /// Base learning rate (Table 8: 1e-5).
    pub learning_rate: f64,
    /// Multiplier of the task heads' rate (5 for pre-training).
    #[serde(default = "default_mult")]
    pub lr_mult_head: f64,
    /// Multiplier of the cross-modal parameters' rate (5).
    #[serde(default = "default_mult")]
    pub lr_mult_cross_modal: f64,
    /// Decoupled weight decay (0.01).
    #[serde(default = "default_weight_decay")]
    pub weight_decay: f64,
    /// Steps of linear warm-up from 0: a count, or a fraction of all steps below 1.
    pub warmup: f64,
    /// Rate at the end of the decay.
    #[serde(default)]
    pub end_learning_rate: f64,
    /// How the rate falls behind the warm-up.
    #[serde(default)]
    pub decay: Decay,
    /// Power of the polynomial decay (1: linear).
    #[serde(default = "default_decay_power")]
    pub decay_power: f64,
    /// AdamW's betas (0.9, 0.98).
    #[serde(default = "default_betas")]
    pub betas: [f64; 2],
    /// AdamW's epsilon, added before bias correction (1e-8).
    #[serde(default = "default_epsilon")]
    pub epsilon: f64,
    /// What happens when a step's gradient is not finite.
    #[serde(default)]
    pub non_finite: NonFinite,
}

/// What follows a gradient with an infinity or no number in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NonFinite {
    /// The run ends and says what to do: with these losses and rates it is a fault.
    #[default]
    Fail,
    /// The step counts and its receipt says `skipped`, but no parameter and no moment changes. It
    /// follows from the bits, so every worker and every repetition does the same.
    Skip,
}

/// How a learning rate falls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// A power of what remains, down to the end rate (Table 8: linear).
    #[default]
    Polynomial,
    /// Half a cosine, down to 0: an option of the authors' code.
    Cosine,
}

fn default_mult() -> f64 {
    5.0
}
fn default_weight_decay() -> f64 {
    0.01
}
fn default_decay_power() -> f64 {
    1.0
}
fn default_betas() -> [f64; 2] {
    [0.9, 0.98]
}
fn default_epsilon() -> f64 {
    1e-8
}

/// `[checkpoint]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Checkpoint {
    /// Steps between checkpoints; the last step always has one.
    pub every_steps: u64,
    /// Parts of a checkpoint; fixed, whatever the number of workers.
    pub parts: u32,
    /// The newest so many are kept; 0: all. Older ones are deleted once a newer one is durable,
    /// unless one of the next two keys keeps them. One that is found corrupt does not count.
    #[serde(default = "default_keep_last")]
    pub keep_last: u32,
    /// Those of steps that are multiples of this are kept for good; 0: none is for that.
    #[serde(default)]
    pub keep_every_steps: u64,
    /// Each checkpoint is read again once in so many hours, and what is wrong is reported before it
    /// is needed; 0: never. Costs at most 32 MiB/s of the store and a fortieth of one core, in the
    /// coordinator's process.
    #[serde(default = "default_scrub_hours")]
    pub scrub_hours: f64,
    /// The best so many by an evaluation are kept. Every state that is evaluated is made a checkpoint
    /// then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_best: Option<KeepBest>,
}

/// `keep_best = { count = 1, metric = "itm_accuracy" }`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeepBest {
    /// How many.
    pub count: u32,
    /// By which figure of the task's evaluation (`figures`): of losses the lowest is best, of
    /// everything else the highest.
    pub metric: String,
}

fn default_keep_last() -> u32 {
    3
}
fn default_scrub_hours() -> f64 {
    24.0
}

impl Checkpoint {
    /// Whether a checkpoint is made of the state after `step` updates of a run that evaluates in this
    /// rhythm; of the last state it always is.
    pub fn is_due(&self, step: u64, rhythm: Rhythm) -> bool {
        let judged = self.keep_best.is_some() && rhythm.is_due(step);
        judged || step > 0 && step.is_multiple_of(self.every_steps)
    }
}

impl Default for Checkpoint {
    fn default() -> Self {
        Checkpoint {
            every_steps: 1000,
            parts: 8,
            keep_last: default_keep_last(),
            keep_every_steps: 0,
            scrub_hours: default_scrub_hours(),
            keep_best: None,
        }
    }
}

/// `[cluster]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cluster {
    /// Below this number of workers no step is committed; the run waits and says so.
    pub min_workers: u32,
    /// So many workers get lanes at most; 0: as many as there are lanes.
    pub max_workers: u32,
    /// Beyond them, so many hold the state and receive every sum, without lanes: one takes over at
    /// once when a worker goes. More stand by without a state.
    pub spares: u32,
    /// The one time setting: how long training may stand still through one failure. Heartbeats, the
    /// silence that is taken for death (30 % of it), leases and every other time derive from it and
    /// from measured steps and round trips; `belfry status` shows them.
    pub max_stall_seconds: f64,
    /// Tree nodes that one worker may hold; bounds its gradient memory.
    pub nodes_per_worker_max: u32,
    /// Every so many steps one lane is computed by a second worker too and the bits are compared, so
    /// that arithmetic which goes wrong silently is found and its worker removed (0: never). Costs
    /// one lane's time in so many steps.
    pub audit_every_steps: u64,
}

impl Cluster {
    /// Every time by which the run decides, before anything was measured.
    pub fn timeouts(&self) -> Timeouts {
        Timeouts::new(Duration::from_secs_f64(self.max_stall_seconds))
    }
}

impl Default for Cluster {
    fn default() -> Self {
        Cluster {
            min_workers: 1,
            max_workers: 0,
            spares: 2,
            max_stall_seconds: 10.0,
            nodes_per_worker_max: 4,
            audit_every_steps: 64,
        }
    }
}
