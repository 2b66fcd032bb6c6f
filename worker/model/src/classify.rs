//! One device batch of a task that ends in a classifier: VQA, SNLI-VE, NLVR2 (model_spec 8).
//!
//! Host batch in, reports and an added gradient out, as in `pretrain`. NLVR2 goes through the whole
//! network once per image with the same text, as the authors do: dropout differs between the two.

use burn::tensor::Tensor;

use crate::batch::{ClassifyBatch, ClassifyReport};
use crate::draws::Draws;
use crate::error::ModelError;
use crate::gradient::Target;
use crate::heads::{Classifier, Heads};
use crate::loss::GroupLoss;
use crate::pass::{Pass, Trace};
use crate::scored::{Losses, Run, Scored};
use crate::tower::{Images, Inputs, ManagerTower};
use crate::weights::Weights;

impl ManagerTower {
    /// Adds the gradient of the sum of the micro-batches' mean losses to `gradient`, and reports each
    /// micro-batch. `draws` holds one key per micro-batch.
    ///
    /// # Errors
    /// [`ModelError`] if model, batch, draws or vectors do not fit, before anything is computed.
    pub fn classify_gradient<'a>(
        &self,
        weights: &Weights,
        batch: &ClassifyBatch,
        draws: Draws<'_>,
        gradient: impl Into<Target<'a>>,
    ) -> Result<Vec<ClassifyReport>, ModelError> {
        self.classify_step(weights, batch, draws, gradient.into())?
            .read()
    }

    /// The same with the reports left where they are until somebody asks.
    ///
    /// # Errors
    /// As [`ManagerTower::classify_gradient`].
    pub fn classify_step(
        &self,
        weights: &Weights,
        batch: &ClassifyBatch,
        draws: Draws<'_>,
        gradient: Target<'_>,
    ) -> Result<ClassifyReports, ModelError> {
        self.classify(batch, Run::training(weights, draws, gradient)?)
    }

    /// The same reports without gradient, dropout or noise.
    ///
    /// # Errors
    /// [`ModelError`] if model or batch do not fit.
    pub fn classify_evaluate(
        &self,
        weights: &Weights,
        batch: &ClassifyBatch,
    ) -> Result<Vec<ClassifyReport>, ModelError> {
        self.classify(batch, Run::evaluation(&weights.without_gradient()))?
            .read()
    }

    /// As [`ManagerTower::classify_evaluate`] with given draws, and shows every intermediate tensor.
    ///
    /// # Errors
    /// [`ModelError`] if model, batch or draws do not fit.
    pub fn classify_trace(
        &self,
        weights: &Weights,
        batch: &ClassifyBatch,
        draws: Draws<'_>,
    ) -> Result<(Vec<ClassifyReport>, Trace), ModelError> {
        let mut trace = Trace::default();
        let weights = weights.without_gradient();
        let reports = self.classify(batch, Run::traced(&weights, draws, &mut trace))?;
        Ok((reports.read()?, trace))
    }

    fn classify(&self, batch: &ClassifyBatch, run: Run) -> Result<ClassifyReports, ModelError> {
        let Heads::Classify(head) = &self.heads else {
            return Err(self.other_task("vqa, snli_ve or nlvr2"));
        };
        batch.check(&self.batch_sizes(), head.images, head.classes)?;
        self.check_run(&run, batch.micro_batches, &vec![batch.rows(); head.images])?;
        let mut pass = self.pass(run.weights, 0, run.draws, run.trace);
        let logits = self.classified(&mut pass, head, batch)?;
        let scored = Scored {
            logits,
            labels: batch.labels.clone(),
            groups: (0..batch.rows()).map(|row| row / batch.pairs).collect(),
        };
        let losses = scored.finish(pass, batch.micro_batches, run.gradient)?;
        Ok(ClassifyReports { losses })
    }

    /// Logits `[rows, classes]`: each image through the whole network with the same text.
    pub(crate) fn classified<'a>(
        &'a self,
        pass: &mut Pass<'a>,
        head: &Classifier,
        batch: &ClassifyBatch,
    ) -> Result<Tensor<2>, ModelError> {
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
            features.push(self.features(pass, &inputs)?);
        }
        let features = Tensor::cat(features, 1);
        pass.record(&format!("{}_input", head.name), &features)?;
        let logits = head.forward(pass, features);
        pass.record(head.name, &logits)?;
        Ok(logits)
    }
}

/// What happened in the micro-batches of a device batch; perhaps the device has it still.
#[derive(Debug)]
pub struct ClassifyReports {
    losses: Losses,
}

impl ClassifyReports {
    /// One report per micro-batch. From a device of its own this waits for the losses.
    ///
    /// # Errors
    /// [`ModelError::Device`] if the device does not give them back.
    pub fn read(self) -> Result<Vec<ClassifyReport>, ModelError> {
        let report = |loss: GroupLoss| ClassifyReport {
            loss: loss.mean,
            score: loss.score,
            pairs: loss.rows,
        };
        Ok(self.losses.read()?.into_iter().map(report).collect())
    }
}
