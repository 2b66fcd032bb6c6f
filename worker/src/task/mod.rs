//! What a worker trains, task by task: from host batches to a device batch, through the model, to
//! sums by objective.
//!
//! The room between data plane and model that knows which head and which labels a task has; the
//! train step in front of it knows none. It refuses to know lanes, steps and the network.

use belfry_configs::Task;
use belfry_configs::rng::Key;
use belfry_data::HostBatch;
use belfry_model::{
    ClassifyBatch, Draws, ManagerTower, ModelError, PretrainBatch, Target, Weights,
};

mod batches;
mod report;

pub use batches::RetrievalRows;
pub use report::Reports;

/// Micro-batches that go through the model together.
#[derive(Clone, Debug)]
pub enum DeviceBatch {
    /// Masked words and matching with drawn false images.
    Pretrain(PretrainBatch),
    /// A classifier's texts, of the objective of this name.
    Classify(&'static str, ClassifyBatch),
    /// Contrast and matching with hard negatives, one micro-batch after the other: each is a group
    /// of its own.
    Contrast(Vec<RetrievalRows>),
}

/// The random numbers of a device batch: a key per micro-batch.
#[derive(Clone, Copy, Debug)]
pub struct Keys<'a> {
    /// Of dropout and of the managers' noise.
    pub draws: &'a [Key],
    /// Of hard negatives.
    pub negatives: &'a [Key],
}

impl DeviceBatch {
    /// The batch of these micro-batches, which are equally large.
    pub fn new(task: Task, batches: impl Iterator<Item = HostBatch>) -> Self {
        match task {
            Task::Pretrain => DeviceBatch::Pretrain(batches::pretrain(batches)),
            Task::Vqa => DeviceBatch::Classify("vqa", batches::classify(batches)),
            Task::SnliVe => DeviceBatch::Classify("snli_ve", batches::classify(batches)),
            Task::Nlvr2 => DeviceBatch::Classify("nlvr2", batches::classify(batches)),
            Task::PretrainItc | Task::Retrieval => {
                DeviceBatch::Contrast(batches.map(RetrievalRows::new).collect())
            }
        }
    }

    /// Adds the gradient of the sum of the micro-batches' losses to `sum`.
    ///
    /// # Errors
    /// [`ModelError`] if model, batch or keys do not fit.
    pub fn gradient(
        &self,
        tower: &ManagerTower,
        weights: &Weights,
        keys: Keys<'_>,
        mut sum: Target<'_>,
    ) -> Result<Reports, ModelError> {
        let draws = Draws::Keys(keys.draws);
        match self {
            DeviceBatch::Pretrain(batch) => {
                let reports = tower.pretrain_step(weights, batch, draws, sum)?;
                Ok(Reports::Pretrain(reports))
            }
            DeviceBatch::Classify(name, batch) => {
                let reports = tower.classify_step(weights, batch, draws, sum)?;
                Ok(Reports::Classify(name, reports))
            }
            DeviceBatch::Contrast(all) => {
                let words = tower.predicts_words();
                let mut reports = Vec::with_capacity(all.len());
                for (rows, at) in all.iter().zip(0..) {
                    let draws = Draws::Keys(&keys.draws[at..=at]);
                    let mut group = rows.alone();
                    let company = batches::company(&mut group, keys.negatives[at]);
                    let report =
                        tower.retrieve_gradient(weights, &rows.batch, draws, company, sum.again());
                    reports.push(report?);
                }
                Ok(Reports::Contrast { words, reports })
            }
        }
    }
}
