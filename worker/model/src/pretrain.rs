//! The pre-training step of one device batch: MLM pass, ITM pass, losses, gradients (model_spec 8).
//!
//! The last room before the train step's partial sums: host batch in, reports and an added gradient
//! out. The two passes are independent, so each runs backward before the other starts: half the
//! memory. It refuses to know lanes and how gradients are combined further.

use burn::tensor::{Tensor, TensorData};

use crate::batch::{IGNORED, MicroBatchReport, PretrainBatch};
use crate::cross_modal::Outputs;
use crate::draws::Draws;
use crate::error::ModelError;
use crate::loss::{GroupLoss, cross_entropy};
use crate::pass::{Pass, Trace};
use crate::tower::{Inputs, ManagerTower};
use crate::weights::{Weights, read};

/// The pass that predicts masked words.
const MLM: u64 = 0;
/// The pass that tells true images from false ones.
const ITM: u64 = 1;

/// Logits on the device and what they should say.
struct Scored {
    logits: Tensor<2>,
    labels: Vec<i32>,
    /// The micro-batch of each row.
    groups: Vec<usize>,
}

impl ManagerTower {
    /// Adds the gradient of sum over micro-batches of (MLM mean + ITM mean) to `gradient` (flat, name
    /// order), and reports each micro-batch. `draws` holds one key per micro-batch.
    ///
    /// # Errors
    /// [`ModelError`] if batch, draws or vectors do not fit, before anything is computed.
    pub fn pretrain_gradient(
        &self,
        weights: &Weights,
        batch: &PretrainBatch,
        draws: Draws<'_>,
        gradient: &mut [f32],
    ) -> Result<Vec<MicroBatchReport>, ModelError> {
        if !weights.device().is_autodiff() {
            return Err(ModelError::NoAutodiff);
        }
        self.run(weights, batch, draws, Some(gradient), None)
    }

    /// The same reports without gradient, dropout or noise.
    ///
    /// # Errors
    /// [`ModelError`] if the batch does not fit.
    pub fn pretrain_evaluate(
        &self,
        weights: &Weights,
        batch: &PretrainBatch,
    ) -> Result<Vec<MicroBatchReport>, ModelError> {
        self.run(&weights.without_gradient(), batch, Draws::Off, None, None)
    }

    /// As [`ManagerTower::pretrain_evaluate`] with given draws, and shows every intermediate tensor.
    ///
    /// # Errors
    /// [`ModelError`] if batch or draws do not fit.
    pub fn pretrain_trace(
        &self,
        weights: &Weights,
        batch: &PretrainBatch,
        draws: Draws<'_>,
    ) -> Result<(Vec<MicroBatchReport>, Trace), ModelError> {
        let mut trace = Trace::default();
        let weights = weights.without_gradient();
        let reports = self.run(&weights, batch, draws, None, Some(&mut trace))?;
        Ok((reports, trace))
    }

    fn run(
        &self,
        weights: &Weights,
        batch: &PretrainBatch,
        draws: Draws<'_>,
        mut gradient: Option<&mut [f32]>,
        mut trace: Option<&mut Trace>,
    ) -> Result<Vec<MicroBatchReport>, ModelError> {
        batch.check(&self.batch_sizes())?;
        self.check_vectors(batch, draws, gradient.as_deref())?;
        let count = batch.micro_batches;
        let mut mlm = vec![GroupLoss::default(); count];
        // Without any masked token the whole pass is worth exactly zero.
        if trace.is_some() || batch.mlm_labels.iter().any(|label| *label != IGNORED) {
            let draws = first_calls(draws, 0, self.sizes.manager_calls);
            let mut pass = Pass::new(weights, MLM, draws, trace.as_deref_mut());
            if let Some(scored) = self.score_words(&mut pass, batch)? {
                mlm = finish(pass, scored, count, gradient.as_deref_mut())?;
            }
        }
        let draws = first_calls(draws, 1, self.sizes.manager_calls);
        let mut pass = Pass::new(weights, ITM, draws, trace);
        let scored = self.score_matches(&mut pass, batch)?;
        let itm = finish(pass, scored, count, gradient)?;
        let report = |(mlm, itm): (GroupLoss, GroupLoss)| MicroBatchReport {
            mlm_loss: mlm.mean,
            itm_loss: itm.mean,
            mlm_masked: mlm.rows,
            mlm_correct: mlm.correct,
            itm_correct: itm.correct,
            pairs: itm.rows,
        };
        Ok(mlm.into_iter().zip(itm).map(report).collect())
    }

    /// The MLM pass. Only masked tokens meet the vocabulary: the loss ignores the others.
    fn score_words(
        &self,
        pass: &mut Pass,
        batch: &PretrainBatch,
    ) -> Result<Option<Scored>, ModelError> {
        let inputs = Inputs {
            ids: &batch.masked_ids,
            text_mask: &batch.text_mask,
            pixels: &batch.images,
            batch: batch.rows(),
        };
        let traced = pass.is_traced();
        let outputs = if traced { Outputs::All } else { Outputs::Text };
        let (text, image) = self.encode(pass, &inputs, outputs)?;
        if let (true, Some(image)) = (traced, image) {
            self.pool(pass, text.clone(), image)?;
            pass.record("mlm_score_input", &text)?;
            let [rows, length, width] = text.dims();
            let all = self
                .mlm
                .forward(pass, text.clone().reshape([rows * length, width]));
            pass.record("mlm_score", &all.reshape([rows, length, self.sizes.vocab]))?;
        }
        let masked: Vec<i32> = (0..batch.mlm_labels.len() as i32)
            .filter(|token| batch.mlm_labels[*token as usize] != IGNORED)
            .collect();
        if masked.is_empty() {
            return Ok(None);
        }
        let [rows, length, width] = text.dims();
        let indices = TensorData::new(masked.clone(), [masked.len()]);
        let indices = Tensor::from_data(indices, pass.weights.device());
        let text = text.reshape([rows * length, width]).select(0, indices);
        let tokens = batch.pairs * batch.text_len;
        Ok(Some(Scored {
            logits: self.mlm.forward(pass, text),
            labels: masked
                .iter()
                .map(|token| batch.mlm_labels[*token as usize])
                .collect(),
            groups: masked
                .iter()
                .map(|token| *token as usize / tokens)
                .collect(),
        }))
    }

    /// The ITM pass.
    fn score_matches(&self, pass: &mut Pass, batch: &PretrainBatch) -> Result<Scored, ModelError> {
        let inputs = Inputs {
            ids: &batch.ids,
            text_mask: &batch.text_mask,
            pixels: &batch.itm_images,
            batch: batch.rows(),
        };
        let outputs = if pass.is_traced() {
            Outputs::All
        } else {
            Outputs::FirstTokens
        };
        let (text, image) = self.encode(pass, &inputs, outputs)?;
        let image = image.expect("only the MLM pass goes without the image stream");
        let pooled = self.pool(pass, text, image)?;
        pass.record("itm_score_input", &pooled)?;
        let logits = self.itm.forward(pass, pooled);
        pass.record("itm_score", &logits)?;
        Ok(Scored {
            logits,
            labels: batch.itm_labels.clone(),
            groups: (0..batch.rows()).map(|row| row / batch.pairs).collect(),
        })
    }

    fn check_vectors(
        &self,
        batch: &PretrainBatch,
        draws: Draws<'_>,
        gradient: Option<&[f32]>,
    ) -> Result<(), ModelError> {
        let expect = |what, expected: usize, found: usize| {
            if expected == found {
                return Ok(());
            }
            Err(ModelError::Length {
                what,
                expected,
                found,
            })
        };
        if let Some(gradient) = gradient {
            expect("gradient", self.table().elements(), gradient.len())?;
        }
        match draws {
            Draws::Off => Ok(()),
            Draws::Keys(keys) => expect("keys", batch.micro_batches, keys.len()),
            Draws::Noise(tensors) => {
                expect("noise tensors", 2 * self.sizes.manager_calls, tensors.len())?;
                tensors.iter().enumerate().try_for_each(|(call, noise)| {
                    let len = self.sizes.noise_lens[call % 2] * batch.rows();
                    expect("noise tensor", len, noise.len())
                })
            }
        }
    }
}

/// Given noise is one list for both passes: the part that starts with this pass's first manager.
fn first_calls(draws: Draws<'_>, pass: usize, calls: usize) -> Draws<'_> {
    match draws {
        Draws::Noise(tensors) => Draws::Noise(&tensors[pass * calls..]),
        other => other,
    }
}

/// Losses on the host; then, if asked, the backward pass from the gradient of the logits.
fn finish(
    pass: Pass,
    scored: Scored,
    count: usize,
    gradient: Option<&mut [f32]>,
) -> Result<Vec<GroupLoss>, ModelError> {
    let shape = scored.logits.dims();
    let mut slopes = read(scored.logits.clone(), "logits")?;
    let losses = cross_entropy(&mut slopes, shape[1], &scored.labels, &scored.groups, count);
    if let Some(gradient) = gradient {
        // The derivative of sum(logits * slopes) is slopes; its value is never read.
        let slopes = pass.constant(slopes, shape);
        let gradients = (scored.logits * slopes).sum().backward();
        pass.collect(gradients, gradient)?;
    }
    Ok(losses)
}
