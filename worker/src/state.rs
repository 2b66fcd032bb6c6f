//! The training state in host memory: parameters and both moments as flat f32 vectors in
//! parameter-name order. Where a worker holds it while it trains is `held`'s business.

use belfry_collective::digest::{slice_digests, state_digest};
use belfry_configs::ValidConfig;
use belfry_model::ManagerTower;
use belfry_proto::Digest;
use sha2::{Digest as _, Sha256};

use crate::error::WorkerError;
use crate::optimizer::{AdamW, Bounded, ParamGroup, State};
use crate::weights::import;

/// Parameters, first and second moments, after `step` updates.
#[derive(Debug, PartialEq)]
pub struct TrainState {
    /// Updates applied.
    pub step: u64,
    /// Parameters.
    pub parameters: Vec<f32>,
    /// AdamW's first moment.
    pub exp_avg: Vec<f32>,
    /// AdamW's second moment.
    pub exp_avg_sq: Vec<f32>,
}

impl Clone for TrainState {
    fn clone(&self) -> Self {
        TrainState {
            step: self.step,
            parameters: self.parameters.clone(),
            exp_avg: self.exp_avg.clone(),
            exp_avg_sq: self.exp_avg_sq.clone(),
        }
    }

    /// Into memory that is there: a derived one would ask for new.
    fn clone_from(&mut self, source: &Self) {
        self.step = source.step;
        self.parameters.clone_from(&source.parameters);
        self.exp_avg.clone_from(&source.exp_avg);
        self.exp_avg_sq.clone_from(&source.exp_avg_sq);
    }
}

impl TrainState {
    /// The initial state of a run: a function of the seed and of what `[init]` names, files and a
    /// checkpoint of another run, which stand with their hashes in the log. The optimizer begins
    /// fresh.
    ///
    /// # Errors
    /// [`WorkerError::Weights`] naming file and key.
    pub async fn init(config: &ValidConfig, model: &ManagerTower) -> Result<Self, WorkerError> {
        let mut parameters = model.table().init(config.run.seed);
        if !config.init.is_fresh() {
            let (filled, report) = import(&config.init, &model.table().into(), parameters).await?;
            parameters = filled;
            for line in report.to_string().lines() {
                tracing::info!("init: {line}");
            }
        }
        let moments = vec![0.0; parameters.len()];
        Ok(TrainState {
            step: 0,
            parameters,
            exp_avg: moments.clone(),
            exp_avg_sq: moments,
        })
    }

    /// From the three tensors of a peer's copy.
    pub fn from_tensors(step: u64, tensors: Vec<Vec<f32>>) -> Option<Self> {
        let [parameters, exp_avg, exp_avg_sq] = <[Vec<f32>; 3]>::try_from(tensors).ok()?;
        Some(TrainState {
            step,
            parameters,
            exp_avg,
            exp_avg_sq,
        })
    }

    /// The three vectors, in their fixed order.
    pub fn tensors(&self) -> [&[f32]; 3] {
        [&self.parameters, &self.exp_avg, &self.exp_avg_sq]
    }

    /// One update with the mean gradient of step `self.step`.
    pub fn update(&mut self, optimizer: &AdamW, gradient: &[f32]) {
        let held = State {
            params: &mut self.parameters,
            m: &mut self.exp_avg,
            v: &mut self.exp_avg_sq,
        };
        optimizer.apply(self.step, held, gradient);
        self.step += 1;
    }

    /// The digest by which workers agree on a state.
    pub fn digest(&self) -> Digest {
        Digest(state_digest(self.step, &slice_digests(&self.tensors())))
    }

    /// SHA-256 of the parameters' little-endian bytes in name order.
    pub fn parameters_sha256(&self) -> String {
        sha256(&[&self.parameters])
    }

    /// SHA-256 of both moments' little-endian bytes in name order.
    pub fn optimizer_sha256(&self) -> String {
        sha256(&[&self.exp_avg, &self.exp_avg_sq])
    }
}

/// The optimizer of a run.
pub fn optimizer(config: &ValidConfig, model: &ManagerTower) -> AdamW {
    let entries = model.table().entries().iter();
    let groups = entries.map(|e| ParamGroup::of(&e.name, e.offset, e.len, e.trained));
    let bounded = model.bounded_temperature();
    let bounded = bounded.map(|(offset, bounds)| Bounded { offset, bounds });
    let optimizer = AdamW::new(
        config.optim.clone(),
        config.run.steps,
        config.warmup_steps(),
        groups.collect(),
    );
    optimizer.bounding(bounded)
}

fn sha256(tensors: &[&[f32]]) -> String {
    let mut hash = Sha256::new();
    for tensor in tensors {
        each_chunk(tensor, |bytes| hash.update(bytes));
    }
    hex(&hash.finalize())
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Little-endian bytes of `values`, a few kilobytes at a time.
fn each_chunk(values: &[f32], mut sink: impl FnMut(&[u8])) {
    let mut bytes = Vec::with_capacity(4 * 4096);
    for chunk in values.chunks(4096) {
        bytes.clear();
        bytes.extend(chunk.iter().flat_map(|x| x.to_le_bytes()));
        sink(&bytes);
    }
}
