//! What a classifier says of texts and images without being told what it should say: the logits, and
//! beside them the loss of each row where labels are known (model_spec 8, 14).
//!
//! Evaluation and answering stand on it. It refuses to know which rows are counted together.

use burn::tensor::Tensor;

use crate::batch::{ClassifyBatch, Labels, expect};
use crate::draws::Draws;
use crate::error::ModelError;
use crate::heads::Heads;
use crate::loss::{GroupLoss, binary_cross_entropy, cross_entropy};
use crate::tower::{Images, Inputs, ManagerTower};
use crate::weights::{Weights, read};

/// What was said of one row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowJudgement {
    /// The class of the largest logit, of several the lowest.
    pub chosen: usize,
    /// Cross-entropy of the row; of VQA summed over the answers.
    pub loss: f64,
    /// 1 where the chosen class is the label; of VQA the chosen answer's soft score.
    pub score: f64,
}

impl ManagerTower {
    /// Logits `[rows, classes]` of a classifier, without dropout or noise; the batch's labels are not
    /// read.
    ///
    /// # Errors
    /// [`ModelError`] if model or batch do not fit.
    pub fn classify_logits(
        &self,
        weights: &Weights,
        batch: &ClassifyBatch,
    ) -> Result<Vec<f32>, ModelError> {
        let Heads::Classify(head) = &self.heads else {
            return Err(self.other_task("vqa, snli_ve or nlvr2"));
        };
        batch.check_inputs(&self.batch_sizes(), head.images)?;
        let weights = weights.without_gradient();
        let mut pass = self.pass(&weights, 0, Draws::Off, None);
        let mut features = Vec::with_capacity(head.images);
        for (image, pixels) in batch.images.iter().enumerate() {
            pass.number = image as u64;
            let inputs = Inputs {
                ids: &batch.ids,
                text_mask: &batch.text_mask,
                images: Images::Pixels {
                    values: pixels,
                    token_type: 1 + image,
                },
                batch: batch.rows(),
            };
            features.push(self.features(&mut pass, &inputs)?);
        }
        read(head.forward(&pass, Tensor::cat(features, 1)), "logits")
    }

    /// Classes of the model's classifier; none for other tasks.
    pub fn classes(&self) -> Option<usize> {
        match &self.heads {
            Heads::Classify(head) => Some(head.classes),
            _ => None,
        }
    }
}

/// The row's chosen class, loss and score, each for itself: `logits` is `[rows, classes]`.
///
/// # Errors
/// [`ModelError::Length`], [`ModelError::Range`] if labels and logits do not fit.
pub fn judge_rows(
    logits: &[f32],
    classes: usize,
    labels: &Labels,
) -> Result<Vec<RowJudgement>, ModelError> {
    let rows = logits.len() / classes.max(1);
    expect("logits", rows * classes, logits.len())?;
    let groups: Vec<usize> = (0..rows).collect();
    let mut slopes = logits.to_vec();
    let losses = match labels {
        Labels::Classes(wanted) => {
            expect("labels", rows, wanted.len())?;
            if let Some(index) = wanted.iter().position(|c| !(0..classes as i32).contains(c)) {
                return Err(ModelError::Range {
                    what: "labels",
                    index,
                    value: wanted[index].into(),
                    low: 0,
                    high: classes as i64,
                });
            }
            cross_entropy(&mut slopes, classes, wanted, &groups, rows)
        }
        Labels::Scores(scores) => {
            expect("labels", rows * classes, scores.len())?;
            binary_cross_entropy(&mut slopes, classes, scores, &groups, rows)
        }
    };
    let judged = |(row, loss): (&[f32], GroupLoss)| RowJudgement {
        chosen: best(row, 1)[0].0,
        loss: loss.mean,
        score: loss.score,
    };
    Ok(logits
        .chunks(classes.max(1))
        .zip(losses)
        .map(judged)
        .collect())
}

/// The `count` largest of `logits` with their classes, best first, ties to the lower class.
pub fn best(logits: &[f32], count: usize) -> Vec<(usize, f32)> {
    let mut all: Vec<(usize, f32)> = logits.iter().copied().enumerate().collect();
    let better = |a: &(usize, f32), b: &(usize, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if count < all.len() && count > 0 {
        all.select_nth_unstable_by(count - 1, better);
        all.truncate(count);
    }
    all.sort_unstable_by(better);
    all.truncate(count);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_judged_each_for_itself() {
        let logits = [0.0, 2.0, 2.0, 1.0, 0.0, -1.0];
        let judged = judge_rows(&logits, 3, &Labels::Classes(vec![1, 2])).expect("fits");
        assert_eq!((judged[0].chosen, judged[0].score), (1, 1.0), "ties go low");
        assert_eq!((judged[1].chosen, judged[1].score), (0, 0.0));
        let sum = 1.0 + (-1f64).exp() + (-2f64).exp();
        assert!((judged[1].loss - (sum.ln() + 2.0)).abs() < 1e-6);
        let soft = Labels::Scores(vec![0.0, 0.3, 1.0, 0.6, 0.0, 0.0]);
        let judged = judge_rows(&logits, 3, &soft).expect("fits");
        let scores: Vec<f32> = judged.iter().map(|j| j.score as f32).collect();
        assert_eq!(scores, [0.3, 0.6]);
        assert!(judge_rows(&logits, 3, &Labels::Classes(vec![3, 0])).is_err());
        assert!(judge_rows(&logits, 4, &Labels::Classes(vec![0])).is_err());
    }

    #[test]
    fn the_best_come_first_and_ties_go_to_the_lower_class() {
        let logits = [1.0, 3.0, -2.0, 3.0, 0.5];
        assert_eq!(best(&logits, 3), [(1, 3.0), (3, 3.0), (0, 1.0)]);
        assert_eq!(best(&logits, 9).len(), 5);
        assert!(best(&logits, 0).is_empty());
    }
}
