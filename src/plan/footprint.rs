//! Bytes of a run that follow from its configuration alone: gradient, state, checkpoints, receipts,
//! control messages. It refuses to know how many workers there are, and what data they train on.

use belfry_configs::ValidConfig;
use belfry_coordinator::core::LANE_DIGEST_BYTES;
use belfry_coordinator::ledger;
use belfry_model::ManagerTower;
use belfry_proto::{Digest, objective, v1};
use prost::Message as _;
use serde::Serialize;

use crate::size::worker_bytes;

/// Bytes of an f32.
const F32: u64 = 4;
/// Parameters and AdamW's two moments.
const STATE_TENSORS: u64 = 3;

/// See the module.
#[derive(Clone, Debug, Serialize)]
pub struct Footprint {
    /// Elements of all parameters, heads included.
    pub parameters: u64,
    /// One gradient: what a tree node holds and an exchange sums.
    pub gradient_bytes: u64,
    /// Parameters and both moments: what a newcomer copies and a checkpoint stores.
    pub state_bytes: u64,
    /// A worker's memory at the peak of its step, as `belfry model` counts it.
    pub worker_bytes: u64,
    /// Checkpoints of a run that nothing disturbs, the last step's included.
    pub checkpoints: u64,
    /// A step's line of the ledger.
    pub receipt_bytes: u64,
    /// What a worker with one lane says when it is ready, and what another lane adds.
    pub ready_bytes: [u64; 2],
    /// A commit as each worker gets it.
    pub commit_bytes: u64,
}

impl Footprint {
    /// Of this run.
    ///
    /// # Errors
    /// Sizes that do not fit each other.
    pub fn of(config: &ValidConfig) -> anyhow::Result<Self> {
        let tower = ManagerTower::new(&config.model, config.data.text_len as usize)?;
        let parameters = tower.table().elements() as u64;
        let gradient_bytes = F32 * parameters;
        let memory = worker_bytes(config, parameters);
        let receipt = receipt(config);
        let one = ready(1).encoded_len() as u64;
        Ok(Footprint {
            parameters,
            gradient_bytes,
            state_bytes: STATE_TENSORS * gradient_bytes,
            worker_bytes: memory.iter().map(|(_, bytes)| bytes).sum(),
            checkpoints: (1..=config.run.steps)
                .filter(|step| config.is_checkpoint(*step))
                .count() as u64,
            receipt_bytes: ledger::to_line(&receipt).len() as u64 + 1,
            ready_bytes: [one, ready(2).encoded_len() as u64 - one],
            commit_bytes: commit(receipt).encoded_len() as u64,
        })
    }
}

/// As many as a task has, but for contrastive pre-training's third.
const OBJECTIVES: [&str; 2] = ["mlm", "itm"];

/// A receipt of numbers as long as they come.
fn receipt(config: &ValidConfig) -> v1::StepRecord {
    let digest = Digest(u128::MAX / 3).to_string();
    let step = config.run.steps;
    v1::StepRecord {
        step,
        objectives: OBJECTIVES
            .map(|name| v1::Objective {
                accuracy: 1.0 / 3.0,
                rows: u64::from(config.batch.global_batch) * 8,
                ..objective::mean_of(name, 1.0 / 3.0)
            })
            .to_vec(),
        pairs: config.batch.global_batch.into(),
        sum_digest: digest.clone(),
        pairs_digest: digest,
        first_position: step * 32,
        last_position: step * 32 + 31,
        lane_digests: vec![0xab; config.batch.lanes as usize * LANE_DIGEST_BYTES],
        ..Default::default()
    }
}

#[allow(clippy::needless_update, reason = "the message may grow")]
fn ready(lanes: u32) -> v1::Ready {
    let digest = Digest(u128::MAX / 3).to_bytes();
    let report = |lane| v1::LaneReport {
        lane: lane + 100,
        objectives: OBJECTIVES
            .map(|name| v1::ObjectiveSum {
                score: 200.0,
                rows: 200,
                ..objective::sum_of(name, 1.0)
            })
            .to_vec(),
        pairs: 32,
        pairs_digest: digest.clone(),
        ..Default::default()
    };
    v1::Ready {
        term: 1,
        generation: 100,
        step: 100_000,
        sum_digest: digest.clone(),
        finite: true,
        lanes: (0..lanes).map(report).collect(),
        compute_seconds: 1.0,
        ..Default::default()
    }
}

fn commit(receipt: v1::StepRecord) -> v1::Commit {
    v1::Commit {
        term: 1,
        generation: 100,
        step: receipt.step,
        sum_digest: Digest(u128::MAX / 3).to_bytes(),
        durable: receipt.step,
        receipt: Some(receipt),
        ..Default::default()
    }
}
