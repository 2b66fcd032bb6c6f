//! The pre-training step of one device batch: MLM pass, ITM pass, losses, gradients (model_spec 8).
//!
//! The last room before the train step's partial sums: host batch in, reports and an added gradient
//! out. The two passes are independent, so each runs backward before the other starts: half the
//! memory. It refuses to know lanes and how gradients are combined further.

use burn::tensor::Tensor;

use crate::batch::{Labels, MicroBatchReport, PretrainBatch};
use crate::draws::Draws;
use crate::error::ModelError;
use crate::heads::Heads;
use crate::layers::Linear;
use crate::loss::GroupLoss;
use crate::pass::{Pass, Trace};
use crate::scored::{Run, Scored};
use crate::tower::{Inputs, ManagerTower};
use crate::weights::Weights;
use crate::words::Words;

/// The pass that predicts masked words.
const MLM: u64 = 0;
/// The pass that tells true images from false ones.
const ITM: u64 = 1;

impl ManagerTower {
    /// Adds the gradient of sum over micro-batches of (MLM mean + ITM mean) to `gradient` (flat, name
    /// order), and reports each micro-batch. `draws` holds one key per micro-batch.
    ///
    /// # Errors
    /// [`ModelError`] if model, batch, draws or vectors do not fit, before anything is computed.
    pub fn pretrain_gradient(
        &self,
        weights: &Weights,
        batch: &PretrainBatch,
        draws: Draws<'_>,
        gradient: &mut [f32],
    ) -> Result<Vec<MicroBatchReport>, ModelError> {
        self.pretrain(batch, Run::training(weights, draws, gradient)?)
    }

    /// The same reports without gradient, dropout or noise.
    ///
    /// # Errors
    /// [`ModelError`] if model or batch do not fit.
    pub fn pretrain_evaluate(
        &self,
        weights: &Weights,
        batch: &PretrainBatch,
    ) -> Result<Vec<MicroBatchReport>, ModelError> {
        self.pretrain(batch, Run::evaluation(&weights.without_gradient()))
    }

    /// As [`ManagerTower::pretrain_evaluate`] with given draws, and shows every intermediate tensor.
    ///
    /// # Errors
    /// [`ModelError`] if model, batch or draws do not fit.
    pub fn pretrain_trace(
        &self,
        weights: &Weights,
        batch: &PretrainBatch,
        draws: Draws<'_>,
    ) -> Result<(Vec<MicroBatchReport>, Trace), ModelError> {
        let mut trace = Trace::default();
        let weights = weights.without_gradient();
        let reports = self.pretrain(batch, Run::traced(&weights, draws, &mut trace))?;
        Ok((reports, trace))
    }

    fn pretrain(
        &self,
        batch: &PretrainBatch,
        run: Run,
    ) -> Result<Vec<MicroBatchReport>, ModelError> {
        let Heads::Pretrain { mlm, itm } = &self.heads else {
            return Err(self.other_task("pretrain"));
        };
        batch.check(&self.batch_sizes())?;
        self.check_run(&run, batch.micro_batches, &[batch.rows(); 2])?;
        let Run {
            weights,
            draws,
            mut gradient,
            mut trace,
        } = run;
        let count = batch.micro_batches;
        let mut words_losses = vec![GroupLoss::default(); count];
        let words = Words {
            inputs: Inputs {
                ids: &batch.masked_ids,
                text_mask: &batch.text_mask,
                pixels: &batch.images,
                batch: batch.rows(),
                image_type: 1,
            },
            labels: &batch.mlm_labels,
            tokens: batch.pairs * batch.text_len,
        };
        if trace.is_some() || words.any() {
            let mut pass = Pass::new(weights, MLM, draws, trace.as_deref_mut());
            if let Some(scored) = self.score_words(&mut pass, mlm, &words)? {
                words_losses = scored.finish(pass, count, gradient.as_deref_mut())?;
            }
        }
        let mut pass = Pass::new(weights, ITM, draws, trace);
        let scored = self.score_matches(&mut pass, itm, batch)?;
        let match_losses = scored.finish(pass, count, gradient)?;
        let report = |(mlm, itm): (GroupLoss, GroupLoss)| MicroBatchReport {
            mlm_loss: mlm.mean,
            itm_loss: itm.mean,
            mlm_masked: mlm.rows,
            mlm_correct: mlm.score as u32,
            itm_correct: itm.score as u32,
            pairs: itm.rows,
        };
        let losses = words_losses.into_iter().zip(match_losses);
        Ok(losses.map(report).collect())
    }

    /// The ITM pass.
    fn score_matches(
        &self,
        pass: &mut Pass,
        head: &Linear,
        batch: &PretrainBatch,
    ) -> Result<Scored, ModelError> {
        let inputs = Inputs {
            ids: &batch.ids,
            text_mask: &batch.text_mask,
            pixels: &batch.itm_images,
            batch: batch.rows(),
            image_type: 1,
        };
        let features = self.features(pass, &inputs)?;
        Ok(Scored {
            logits: match_logits(pass, head, features)?,
            labels: Labels::Classes(batch.itm_labels.clone()),
            groups: (0..batch.rows()).map(|row| row / batch.pairs).collect(),
        })
    }
}

/// Logits of no match and match.
pub(crate) fn match_logits(
    pass: &mut Pass,
    head: &Linear,
    features: Tensor<2>,
) -> Result<Tensor<2>, ModelError> {
    pass.record("itm_score_input", &features)?;
    let logits = head.forward(pass, features);
    pass.record("itm_score", &logits)?;
    Ok(logits)
}
