//! The end of every pass: logits to losses on the host, and backward from their gradient.
//!
//! Shared by all tasks. It refuses to know which head made the logits.

use burn::tensor::Tensor;

use crate::batch::{Labels, expect};
use crate::draws::Draws;
use crate::error::ModelError;
use crate::loss::{GroupLoss, binary_cross_entropy, cross_entropy};
use crate::pass::{Pass, Trace};
use crate::segments::Slopes;
use crate::tower::ManagerTower;
use crate::weights::{Weights, read};

/// What one call computes: losses, and beside them a gradient, a trace, or neither.
pub(crate) struct Run<'a> {
    pub weights: &'a Weights,
    pub draws: Draws<'a>,
    /// Flat, in name order; gradients are added.
    pub gradient: Option<&'a mut [f32]>,
    pub trace: Option<&'a mut Trace>,
}

impl<'a> Run<'a> {
    /// With gradient.
    pub fn training(
        weights: &'a Weights,
        draws: Draws<'a>,
        gradient: &'a mut [f32],
    ) -> Result<Self, ModelError> {
        if !weights.device().is_autodiff() {
            return Err(ModelError::NoAutodiff);
        }
        Ok(Run {
            weights,
            draws,
            gradient: Some(gradient),
            trace: None,
        })
    }

    /// Losses alone, from weights outside autodiff.
    pub fn evaluation(weights: &'a Weights) -> Self {
        Run {
            weights,
            draws: Draws::Off,
            gradient: None,
            trace: None,
        }
    }

    /// Losses and every intermediate tensor, from weights outside autodiff.
    pub fn traced(weights: &'a Weights, draws: Draws<'a>, trace: &'a mut Trace) -> Self {
        Run {
            weights,
            draws,
            gradient: None,
            trace: Some(trace),
        }
    }
}

impl ManagerTower {
    /// Refuses gradients and draws that do not fit a call of `micro_batches` whose passes have
    /// these rows.
    pub(crate) fn check_run(
        &self,
        run: &Run,
        micro_batches: usize,
        pass_rows: &[usize],
    ) -> Result<(), ModelError> {
        if let Some(gradient) = &run.gradient {
            expect("gradient", self.table().elements(), gradient.len())?;
        }
        match run.draws {
            Draws::Off => Ok(()),
            Draws::Keys(keys) => expect("keys", micro_batches, keys.len()),
            Draws::Noise(tensors) => {
                let calls = self.sizes.manager_calls;
                expect("noise tensors", pass_rows.len() * calls, tensors.len())?;
                tensors.iter().enumerate().try_for_each(|(call, noise)| {
                    let len = self.sizes.noise_lens[call % 2] * pass_rows[call / calls];
                    expect("noise tensor", len, noise.len())
                })
            }
        }
    }
}

/// Logits on the device and what they should say.
pub(crate) struct Scored {
    pub logits: Tensor<2>,
    pub labels: Labels,
    /// The micro-batch of each row.
    pub groups: Vec<usize>,
}

impl Scored {
    /// Losses of the micro-batches, and the gradient of their sum with respect to the logits.
    pub fn losses(&self, micro_batches: usize) -> Result<(Vec<GroupLoss>, Vec<f32>), ModelError> {
        let classes = self.logits.dims()[1];
        let mut slopes = read(self.logits.clone(), "logits")?;
        let losses = match &self.labels {
            Labels::Classes(labels) => {
                cross_entropy(&mut slopes, classes, labels, &self.groups, micro_batches)
            }
            Labels::Scores(scores) => {
                binary_cross_entropy(&mut slopes, classes, scores, &self.groups, micro_batches)
            }
        };
        Ok((losses, slopes))
    }

    /// The backward pass from the gradient of the logits, as [`Pass::backward`].
    pub fn backward(
        self,
        pass: &mut Pass,
        slopes: Vec<f32>,
        sum: Option<&mut [f32]>,
    ) -> Result<Slopes, ModelError> {
        // The derivative of sum(logits * slopes) is slopes; its value is never read.
        let slopes = pass.constant(slopes, self.logits.dims());
        pass.backward((self.logits * slopes).sum(), sum)
    }

    /// Losses on the host; then, if asked, the backward pass.
    pub fn finish(
        self,
        mut pass: Pass,
        micro_batches: usize,
        gradient: Option<&mut [f32]>,
    ) -> Result<Vec<GroupLoss>, ModelError> {
        let (losses, slopes) = self.losses(micro_batches)?;
        if let Some(gradient) = gradient {
            let slopes = self.backward(&mut pass, slopes, Some(gradient))?;
            pass.collect(slopes, gradient)?;
        }
        Ok(losses)
    }
}
