//! One chunk of pairs: what the model says of it, counted.
//!
//! A chunk is a fixed range of pairs by number, whatever process judges it: of pre-training one
//! micro-batch, since its labels are drawn there, else `eval.pairs_per_batch` pairs.

use std::ops::Range;

use belfry_configs::{Task, ValidConfig};
use belfry_data::{About, DataPlane, HostBatch, Targets};
use belfry_model::{ManagerTower, Weights, judge_rows};
use serde::{Deserialize, Serialize};

use super::tally::{Part, Tally};
use crate::error::WorkerError;
use crate::task::DeviceBatch;

/// What a classifier chose for a pair that its publisher has an id for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chosen {
    /// The publisher's id: a VQAv2 question id.
    pub id: String,
    /// The chosen class.
    pub class: u32,
}

/// Objectives of a task whose pairs are judged chunk by chunk, as their figures are named.
pub fn objectives(task: Task) -> &'static [&'static str] {
    match task {
        Task::Pretrain => &["mlm", "itm"],
        Task::Vqa => &["vqa"],
        Task::SnliVe => &["snli_ve"],
        Task::Nlvr2 => &["nlvr2"],
        Task::Retrieval | Task::PretrainItc => &[],
    }
}

/// Pairs of one chunk.
pub fn pairs_per_chunk(config: &ValidConfig) -> u64 {
    match config.model.task {
        Task::Pretrain => config.batch.micro_batch.into(),
        _ => config.eval.pairs_per_batch.into(),
    }
}

/// The pairs of chunk `number` of `pairs`.
fn range(config: &ValidConfig, number: u64, pairs: u64) -> Range<u64> {
    let size = pairs_per_chunk(config);
    number * size..((number + 1) * size).min(pairs)
}

/// Who judges, and what.
pub struct Judge<'a> {
    pub config: &'a ValidConfig,
    pub data: &'a DataPlane,
    pub model: &'a ManagerTower,
    pub weights: &'a Weights,
    pub parts: &'a [Part],
}

impl Judge<'_> {
    /// What is counted in a chunk, and what was chosen.
    pub fn chunk(&self, number: u64) -> Result<(Tally, Vec<Chosen>), WorkerError> {
        let pairs = range(self.config, number, self.data.pairs());
        let (batch, about) = self.data.evaluation_batch(pairs, number)?;
        match self.config.model.task {
            Task::Pretrain => Ok((self.pretraining(batch)?, Vec::new())),
            _ => self.classified(batch, &about),
        }
    }

    fn pretraining(&self, batch: HostBatch) -> Result<Tally, WorkerError> {
        let batch = DeviceBatch::new(self.config.model.task, std::iter::once(batch));
        let DeviceBatch::Pretrain(batch) = batch else {
            return Err(self.other_task());
        };
        let mut tally = Tally::default();
        for one in self.model.pretrain_evaluate(self.weights, &batch)? {
            let words = tally.sum("mlm", 0);
            if one.mlm_masked > 0 {
                words.add_loss(one.mlm_loss);
            }
            words.add_right(one.mlm_correct.into(), one.mlm_masked.into());
            let matches = tally.sum("itm", 0);
            matches.add_loss(one.itm_loss);
            matches.add_right(one.itm_correct.into(), one.pairs.into());
        }
        Ok(tally)
    }

    fn classified(
        &self,
        batch: HostBatch,
        about: &[About],
    ) -> Result<(Tally, Vec<Chosen>), WorkerError> {
        let scored = scored(&batch.targets, batch.pairs);
        let batch = DeviceBatch::new(self.config.model.task, std::iter::once(batch));
        let DeviceBatch::Classify(objective, batch) = batch else {
            return Err(self.other_task());
        };
        let classes = self.model.classes().unwrap_or_default();
        let logits = self.model.classify_logits(self.weights, &batch)?;
        let judged = judge_rows(&logits, classes, &batch.labels)?;
        let mut tally = Tally::default();
        let mut chosen = Vec::new();
        for ((row, about), scored) in judged.iter().zip(about).zip(scored) {
            if scored {
                let sum = tally.sum(objective, self.part(about));
                sum.add_loss(row.loss);
                sum.add_score(row.score);
            }
            if let Some(id) = &about.id {
                chosen.push(Chosen {
                    id: id.clone(),
                    class: row.chosen as u32,
                });
            }
        }
        Ok((tally, chosen))
    }

    fn other_task(&self) -> WorkerError {
        let task = self.config.model.task;
        WorkerError::Internal(format!("pairs of {task:?} are not judged one by one"))
    }

    fn part(&self, about: &About) -> u32 {
        let mut parts = self.parts.iter();
        let found = parts.position(|p| (p.dataset, p.source) == (about.dataset, about.source));
        found.unwrap_or_default() as u32
    }
}

/// Whether each row has something to be scored by: test questions have no answers.
fn scored(targets: &Targets, rows: usize) -> Vec<bool> {
    match targets {
        Targets::Scores { rows, .. } => rows.iter().map(|answers| !answers.is_empty()).collect(),
        _ => vec![true; rows],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_questions_are_not_scored() {
        let targets = Targets::Scores {
            answers: 4,
            rows: vec![vec![(2, 0.3), (0, 1.0)], vec![]],
        };
        assert_eq!(scored(&targets, 2), [true, false]);
    }
}
