//! What the model says of a device batch, as sums by objective in the task's order.

use belfry_model::{
    ClassifyReport, ClassifyReports, MicroBatchReport, ModelError, PretrainReports, RetrievalReport,
};
use belfry_proto::{objective, v1};

/// What happened in a device batch; perhaps the device has it still.
#[derive(Debug)]
pub enum Reports {
    /// Of pre-training.
    Pretrain(PretrainReports),
    /// Of a classifier, by its objective.
    Classify(&'static str, ClassifyReports),
    /// Of a contrastive task.
    Contrast {
        /// Whether masked words are predicted too.
        words: bool,
        /// By micro-batch.
        reports: Vec<RetrievalReport>,
    },
}

impl Reports {
    /// Adds every micro-batch to `sums`, in order. From a device of its own this waits for the
    /// losses.
    ///
    /// # Errors
    /// [`ModelError::Device`] if the device does not give them back.
    pub fn add_to(self, sums: &mut Vec<v1::ObjectiveSum>) -> Result<(), ModelError> {
        match self {
            Reports::Pretrain(reports) => add_pretrain(sums, &reports.read()?),
            Reports::Classify(name, reports) => add_classify(sums, name, &reports.read()?),
            Reports::Contrast { words, reports } => add_contrast(sums, words, &reports),
        }
        Ok(())
    }
}

/// Adds pre-training's micro-batches.
pub fn add_pretrain(sums: &mut Vec<v1::ObjectiveSum>, reports: &[MicroBatchReport]) {
    for one in reports {
        let words = (one.mlm_correct, one.mlm_masked);
        let pairs = (one.itm_correct, one.pairs);
        let both = [
            counted("mlm", one.mlm_loss, words),
            counted("itm", one.itm_loss, pairs),
        ];
        objective::add(sums, &both);
    }
}

/// Adds the micro-batches of the classifier whose objective is `name`.
pub fn add_classify(sums: &mut Vec<v1::ObjectiveSum>, name: &str, reports: &[ClassifyReport]) {
    for one in reports {
        let mut sum = counted(name, one.loss, (0, one.pairs));
        sum.score = one.score;
        objective::add(sums, &[sum]);
    }
}

/// Adds a contrastive task's micro-batches, with `words` those of masked words too. Matching is
/// judged over the pairs and both kinds of hard negatives.
pub fn add_contrast(sums: &mut Vec<v1::ObjectiveSum>, words: bool, reports: &[RetrievalReport]) {
    for one in reports {
        if words {
            let masked = (one.mlm_correct, one.mlm_masked);
            objective::add(sums, &[counted("mlm", one.mlm_loss, masked)]);
        }
        let matches = (one.itm_correct, 3 * one.pairs);
        let both = [
            counted("itc", one.itc_loss, (0, 0)),
            counted("itm", one.itm_loss, matches),
        ];
        objective::add(sums, &both);
    }
}

fn counted(name: &str, loss: f64, (right, rows): (u32, u32)) -> v1::ObjectiveSum {
    v1::ObjectiveSum {
        score: right.into(),
        rows: rows.into(),
        empty: u32::from(rows == 0),
        ..objective::sum_of(name, loss)
    }
}
