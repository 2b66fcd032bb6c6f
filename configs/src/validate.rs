//! What makes a parsed run file a run that can start: sizes that divide, rates that make sense.
//! Refusals name the key and the nearest valid choices (promise 1).

use std::ops::Deref;

use crate::figures;
use crate::layers::ConfigError;
use crate::model::{ContrastiveScope, Manager, ManagerWeight, System, Task};
use crate::precision::Matmul;
use crate::run_config::RunConfig;

/// Lanes above this are refused: rank tables and the reduction tree stay small.
const LANES_MAX: u32 = 4096;
/// Members that may hold the state without lanes.
const SPARES_MAX: u32 = 1024;
/// The CPU, treated as a device with a memory of its own.
pub const CPU_APART: &str = "cpu-apart";
/// Largest image side in pixels.
const IMAGE_SIZE_MAX: u32 = 4096;

/// A [`RunConfig`] that cannot be wrong. Only [`RunConfig::validate`] makes one.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidConfig(RunConfig);

impl Deref for ValidConfig {
    type Target = RunConfig;
    fn deref(&self) -> &RunConfig {
        &self.0
    }
}

impl ValidConfig {
    /// Micro-batches that one lane runs in one step.
    pub fn micro_batches_per_lane(&self) -> u32 {
        self.batch.global_batch / self.batch.lanes / self.batch.micro_batch
    }

    /// Micro-batches of one step: the count by which the summed gradient is divided.
    pub fn micro_batches(&self) -> u32 {
        self.batch.global_batch / self.batch.micro_batch
    }

    /// Warm-up in steps: the setting itself, or its share of all steps, rounded down.
    pub fn warmup_steps(&self) -> u64 {
        let warmup = self.optim.warmup;
        if warmup < 1.0 {
            (self.run.steps as f64 * warmup) as u64
        } else {
            warmup as u64
        }
    }

    /// The resolved configuration as TOML, defaults spelled out.
    pub fn to_toml(&self) -> String {
        toml::to_string(&self.0).expect("a run configuration is plain tables and numbers")
    }

    /// SHA-256 of the resolved configuration.
    pub fn sha256(&self) -> String {
        use sha2::Digest;
        let hash = sha2::Sha256::digest(self.to_toml().as_bytes());
        hash.iter().map(|b| format!("{b:02x}")).collect()
    }
}

/// The divisors of `n` nearest to `wanted`, at most four, ascending.
fn nearest_divisors(n: u32, wanted: u32) -> Vec<u32> {
    let mut divisors: Vec<u32> = (1..=n.min(LANES_MAX))
        .filter(|d| n.is_multiple_of(*d))
        .collect();
    divisors.sort_by_key(|d| (d.abs_diff(wanted), *d));
    divisors.truncate(4);
    divisors.sort_unstable();
    divisors
}

pub(crate) fn refuse(key: &str, reason: impl Into<String>) -> ConfigError {
    ConfigError::Invalid {
        key: key.into(),
        reason: reason.into(),
    }
}

pub(crate) fn at_least_one(key: &str, value: u64) -> Result<(), ConfigError> {
    if value == 0 {
        return Err(refuse(key, "must be at least 1"));
    }
    Ok(())
}

impl RunConfig {
    /// Whether the task has a contrastive loss.
    fn is_contrastive(&self) -> bool {
        matches!(self.model.task, Task::Retrieval | Task::PretrainItc)
    }

    /// Whether a lane's gradient needs features of all lanes first: the contrast is of the whole
    /// global batch.
    pub fn gathers(&self) -> bool {
        let whole = self.model.head.contrastive_scope == ContrastiveScope::GlobalBatch;
        self.is_contrastive() && whole
    }

    /// Checks everything that can be checked without data or device.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] naming the key and the nearest valid choices.
    pub fn validate(mut self) -> Result<ValidConfig, ConfigError> {
        self.check_run()?;
        self.check_batch()?;
        self.check_length()?;
        self.data.check(&self.model.text)?;
        self.check_model()?;
        self.init.check()?;
        self.check_optim()?;
        self.eval.check()?;
        self.collective.check(&self.run.device)?;
        Ok(ValidConfig(self))
    }

    fn check_run(&self) -> Result<(), ConfigError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if self.run.name.is_empty() || !self.run.name.chars().all(plain) {
            return Err(refuse("run.name", "use letters, digits, `-` and `_` only"));
        }
        let device = &self.run.device;
        let cuda = device
            .strip_prefix("cuda:")
            .is_some_and(|n| n.parse::<u16>().is_ok());
        if device != "cpu" && device != CPU_APART && !cuda {
            return Err(refuse(
                "run.device",
                format!("`{device}` is neither `cpu`, `{CPU_APART}` nor `cuda:N`"),
            ));
        }
        if self.precision.matmul == Matmul::Tf32 && !cuda {
            return Err(refuse(
                "precision.matmul",
                "`tf32` is arithmetic of GPUs; with run.device = \"cpu\" choose `f32` or `bf16`",
            ));
        }
        self.check_checkpoint()?;
        at_least_one("cluster.min_workers", self.cluster.min_workers.into())?;
        if self.cluster.min_workers > self.batch.lanes {
            return Err(refuse("cluster.min_workers", "cannot exceed batch.lanes"));
        }
        let max_workers = self.cluster.max_workers;
        if max_workers != 0 && max_workers < self.cluster.min_workers {
            return Err(refuse(
                "cluster.max_workers",
                "cannot be less than cluster.min_workers (0: as many as there are lanes)",
            ));
        }
        if self.cluster.spares > SPARES_MAX {
            return Err(refuse("cluster.spares", "must lie in 0..=1024"));
        }
        if !(0.5..=3600.0).contains(&self.cluster.max_stall_seconds) {
            return Err(refuse(
                "cluster.max_stall_seconds",
                "must lie in 0.5..=3600",
            ));
        }
        at_least_one(
            "cluster.nodes_per_worker_max",
            self.cluster.nodes_per_worker_max.into(),
        )
    }

    fn check_checkpoint(&self) -> Result<(), ConfigError> {
        let c = &self.checkpoint;
        at_least_one("checkpoint.every_steps", c.every_steps)?;
        if !(1..=1024).contains(&c.parts) {
            return Err(refuse("checkpoint.parts", "must lie in 1..=1024"));
        }
        if !c.keep_every_steps.is_multiple_of(c.every_steps) {
            let below = c.keep_every_steps / c.every_steps * c.every_steps;
            let nearest = [below, below + c.every_steps].map(|n| n.to_string());
            return Err(refuse(
                "checkpoint.keep_every_steps",
                format!(
                    "no checkpoint is of such a step: must be a multiple of checkpoint.every_steps = \
                     {}, such as {} (0: none is kept for this)",
                    c.every_steps,
                    nearest.join(" or ")
                ),
            ));
        }
        if let Some(best) = &c.keep_best {
            at_least_one("checkpoint.keep_best.count", best.count.into())?;
            if self.data.validation.is_empty() {
                return Err(refuse(
                    "checkpoint.keep_best",
                    "nothing is evaluated: set data.validation, or leave it out",
                ));
            }
            figures::check("checkpoint.keep_best.metric", self.model.task, &best.metric)?;
        }
        if !c.scrub_hours.is_finite() || c.scrub_hours < 0.0 {
            return Err(refuse(
                "checkpoint.scrub_hours",
                "must be a number of hours, or 0: checkpoints are not read again",
            ));
        }
        Ok(())
    }

    fn check_batch(&self) -> Result<(), ConfigError> {
        let b = &self.batch;
        at_least_one("batch.global_batch", b.global_batch.into())?;
        at_least_one("batch.micro_batch", b.micro_batch.into())?;
        at_least_one("batch.device_batch", b.device_batch.into())?;
        if b.lanes == 0 || b.lanes > LANES_MAX {
            return Err(refuse(
                "batch.lanes",
                format!("must lie in 1..={LANES_MAX}"),
            ));
        }
        if !b.global_batch.is_multiple_of(b.micro_batch) {
            return Err(refuse(
                "batch.micro_batch",
                format!(
                    "{} does not divide global_batch = {}; nearest that do: {:?}",
                    b.micro_batch,
                    b.global_batch,
                    nearest_divisors(b.global_batch, b.micro_batch)
                ),
            ));
        }
        let micro_batches = b.global_batch / b.micro_batch;
        if !micro_batches.is_multiple_of(b.lanes) {
            return Err(refuse(
                "batch.lanes",
                format!(
                    "{} does not divide global_batch / micro_batch = {micro_batches}; \
                     nearest that do: {:?}",
                    b.lanes,
                    nearest_divisors(micro_batches, b.lanes)
                ),
            ));
        }
        let per_lane = micro_batches / b.lanes;
        if !per_lane.is_multiple_of(b.device_batch) {
            return Err(refuse(
                "batch.device_batch",
                format!(
                    "{} does not divide the {per_lane} micro-batches of a lane; \
                     nearest that do: {:?}",
                    b.device_batch,
                    nearest_divisors(per_lane, b.device_batch)
                ),
            ));
        }
        if self.is_contrastive() && b.device_batch != 1 {
            return Err(refuse(
                "batch.device_batch",
                format!(
                    "must be 1 for model.task = {:?}: hard negatives are drawn, and what is drawn \
                     would depend on how many micro-batches run together",
                    self.model.task
                ),
            ));
        }
        Ok(())
    }

    fn check_model(&self) -> Result<(), ConfigError> {
        let m = &self.model;
        let divides = |key: &str, width: u32, heads: u32| {
            if heads == 0 || width == 0 || !width.is_multiple_of(heads) {
                return Err(refuse(
                    key,
                    format!(
                        "{heads} heads do not divide width {width}; nearest that do: {:?}",
                        nearest_divisors(width, heads)
                    ),
                ));
            }
            Ok(())
        };
        divides("model.heads", m.hidden, m.heads)?;
        divides("model.text.heads", m.text.hidden, m.text.heads)?;
        divides("model.image.heads", m.image.hidden, m.image.heads)?;
        at_least_one("model.cross_layers", m.cross_layers.into())?;
        at_least_one("model.mlp_ratio", m.mlp_ratio.into())?;
        at_least_one("model.text.intermediate", m.text.intermediate.into())?;
        self.check_system()?;
        if m.image.patch == 0
            || m.image.size > IMAGE_SIZE_MAX
            || m.image.size < m.image.patch
            || !m.image.size.is_multiple_of(m.image.patch)
        {
            return Err(refuse(
                "model.image.size",
                format!(
                    "must be a multiple of model.image.patch = {} up to {IMAGE_SIZE_MAX}",
                    m.image.patch
                ),
            ));
        }
        if !(0.0..1.0).contains(&m.dropout) {
            return Err(refuse("model.dropout", "must lie in 0..1"));
        }
        self.check_head()
    }

    /// What the chosen system asks of the towers.
    fn check_system(&self) -> Result<(), ConfigError> {
        let m = &self.model;
        at_least_one("model.text.layers", m.text.layers.into())?;
        at_least_one("model.image.layers", m.image.layers.into())?;
        if m.meter_fusion && m.system != System::Meter {
            return Err(refuse(
                "model.meter_fusion",
                "needs model.system = \"meter\"",
            ));
        }
        let towers = [
            ("model.text.managed", m.text.managed, m.text.layers),
            ("model.image.managed", m.image.managed, m.image.layers),
        ];
        for (key, managed, layers) in towers {
            if managed == 0 || managed > layers {
                return Err(refuse(
                    key,
                    format!("must lie in 1..={layers} (the tower's layers)"),
                ));
            }
            if m.system == System::BridgeTower && managed != m.cross_layers {
                return Err(refuse(
                    key,
                    format!(
                        "a link tower stands between one layer of the tower and one cross-modal \
                         layer: must be model.cross_layers = {}",
                        m.cross_layers
                    ),
                ));
            }
        }
        if m.system == System::BridgeTower && m.text.layers != m.image.layers {
            return Err(refuse(
                "model.image.layers",
                format!(
                    "BridgeTower's towers are equally deep: must be model.text.layers = {}",
                    m.text.layers
                ),
            ));
        }
        if m.manager == Manager::ConcatAttention && m.manager_weight == ManagerWeight::Scalar {
            return Err(refuse(
                "model.manager_weight",
                "concat_attention generates a weight per feature: must be \"vector\"",
            ));
        }
        Ok(())
    }

    fn check_head(&self) -> Result<(), ConfigError> {
        let head = &self.model.head;
        if !(1..=2).contains(&head.layers) {
            return Err(refuse("model.head.layers", "must be 1 or 2"));
        }
        at_least_one("model.head.hidden_scale", head.hidden_scale.into())?;
        at_least_one("model.head.answers", head.answers.into())?;
        at_least_one(
            "model.head.contrastive_hidden",
            head.contrastive_hidden.into(),
        )?;
        if !(0.0..1.0).contains(&head.nlvr2_dropout) {
            return Err(refuse("model.head.nlvr2_dropout", "must lie in 0..1"));
        }
        let whole = head.contrastive_scope == ContrastiveScope::GlobalBatch;
        if self.is_contrastive() && whole && !head.global_negatives {
            return Err(refuse(
                "model.head.global_negatives",
                "must be true with model.head.contrastive_scope = \"global_batch\", where nothing may \
                 depend on the micro-batch; negatives of a micro-batch need \"micro_batch\"",
            ));
        }
        if !(0.001..=0.5).contains(&head.temperature) {
            return Err(refuse("model.head.temperature", "must lie in 0.001..=0.5"));
        }
        Ok(())
    }

    fn check_optim(&self) -> Result<(), ConfigError> {
        let o = &self.optim;
        let checks = [
            (
                "optim.learning_rate",
                o.learning_rate > 0.0,
                "must be positive",
            ),
            (
                "optim.lr_mult_head",
                o.lr_mult_head >= 0.0,
                "must not be negative",
            ),
            (
                "optim.lr_mult_cross_modal",
                o.lr_mult_cross_modal >= 0.0,
                "must not be negative",
            ),
            (
                "optim.weight_decay",
                o.weight_decay >= 0.0,
                "must not be negative",
            ),
            ("optim.warmup", o.warmup >= 0.0, "must not be negative"),
            (
                "optim.end_learning_rate",
                o.end_learning_rate >= 0.0,
                "must not be negative",
            ),
            ("optim.decay_power", o.decay_power > 0.0, "must be positive"),
            ("optim.epsilon", o.epsilon > 0.0, "must be positive"),
            (
                "optim.betas",
                o.betas.iter().all(|b| (0.0..1.0).contains(b)),
                "must lie in 0..1",
            ),
        ];
        for (key, valid, reason) in checks {
            if !valid {
                return Err(refuse(key, reason));
            }
        }
        // A run whose epochs are not counted yet has no steps.
        let steps = Some(self.run.steps).filter(|steps| *steps > 0);
        if o.warmup >= 1.0 && steps.is_some_and(|steps| o.warmup as u64 >= steps) {
            return Err(refuse("optim.warmup", "must be below run.steps"));
        }
        Ok(())
    }
}
