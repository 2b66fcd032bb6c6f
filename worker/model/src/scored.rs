//! The end of every pass: logits to losses, and backward from their gradient.
//!
//! Shared by all tasks. On the host losses are there at once; a device of its own keeps them until
//! somebody asks, so that nothing in a step waits for it. It refuses to know which head made the
//! logits.

use burn::tensor::{Tensor, TensorData};

use crate::batch::{Labels, expect};
use crate::draws::Draws;
use crate::error::ModelError;
use crate::gradient::Target;
use crate::loss::{GroupLoss, binary_cross_entropy, cross_entropy};
use crate::loss_on_device;
use crate::pass::{Pass, Trace};
use crate::phase::phase;
use crate::segments::Slopes;
use crate::tower::ManagerTower;
use crate::weights::{Weights, enter, read};

/// What one call computes: losses, and beside them a gradient, a trace, or neither.
pub(crate) struct Run<'a> {
    pub weights: &'a Weights,
    pub draws: Draws<'a>,
    /// Gradients are added here.
    pub gradient: Option<Target<'a>>,
    pub trace: Option<&'a mut Trace>,
}

impl<'a> Run<'a> {
    /// With gradient.
    pub fn training(
        weights: &'a Weights,
        draws: Draws<'a>,
        gradient: Target<'a>,
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
            gradient.check(self.table())?;
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

/// Losses of micro-batches, in their order.
#[derive(Debug)]
pub(crate) enum Losses {
    /// On the host.
    Read(Vec<GroupLoss>),
    /// Still on the device: loss and score of each row, and the rows' micro-batches.
    Waiting {
        said: Box<Tensor<2>>,
        groups: Vec<usize>,
        count: usize,
    },
}

impl Losses {
    /// On the host; a device is waited for.
    pub fn read(self) -> Result<Vec<GroupLoss>, ModelError> {
        match self {
            Losses::Read(losses) => Ok(losses),
            Losses::Waiting {
                said,
                groups,
                count,
            } => {
                let said = read(*said, "losses")?;
                let mut losses = vec![GroupLoss::default(); count];
                for (row, group) in said.chunks(2).zip(groups) {
                    losses[group].mean += f64::from(row[0]);
                    losses[group].score += f64::from(row[1]);
                    losses[group].rows += 1;
                }
                for loss in &mut losses {
                    loss.mean /= f64::from(loss.rows.max(1));
                }
                Ok(losses)
            }
        }
    }
}

impl Scored {
    /// Losses of the micro-batches, and the gradient of their sum with respect to the logits,
    /// outside autodiff.
    pub fn losses(
        &self,
        pass: &Pass,
        micro_batches: usize,
    ) -> Result<(Losses, Tensor<2>), ModelError> {
        let _phase = phase!(pass.weights.device(), "losses");
        let logits = match self.logits.is_autodiff() {
            true => self.logits.clone().inner(),
            false => self.logits.clone(),
        };
        if pass.weights.on_host() {
            return self.losses_on_host(logits, micro_batches);
        }
        let mut rows = vec![0.0f32; micro_batches];
        for group in &self.groups {
            rows[*group] += 1.0;
        }
        let weights: Vec<f32> = self.groups.iter().map(|g| rows[*g].recip()).collect();
        let rows = match &self.labels {
            Labels::Classes(labels) => loss_on_device::cross_entropy(logits, labels, &weights),
            Labels::Scores(scores) => {
                loss_on_device::binary_cross_entropy(logits, scores, &weights)
            }
        };
        let losses = Losses::Waiting {
            said: Box::new(rows.said),
            groups: self.groups.clone(),
            count: micro_batches,
        };
        Ok((losses, rows.slopes))
    }

    fn losses_on_host(
        &self,
        logits: Tensor<2>,
        micro_batches: usize,
    ) -> Result<(Losses, Tensor<2>), ModelError> {
        let ([rows, classes], device) = (logits.dims(), logits.device());
        let mut slopes = read(logits, "logits")?;
        let losses = match &self.labels {
            Labels::Classes(labels) => {
                cross_entropy(&mut slopes, classes, labels, &self.groups, micro_batches)
            }
            Labels::Scores(scores) => {
                binary_cross_entropy(&mut slopes, classes, scores, &self.groups, micro_batches)
            }
        };
        let slopes = Tensor::from_data(TensorData::new(slopes, [rows, classes]), &device);
        Ok((Losses::Read(losses), slopes))
    }

    /// The backward pass from the gradient of the logits, as [`Pass::backward`].
    pub fn backward(
        self,
        pass: &mut Pass,
        slopes: Tensor<2>,
        sum: Option<Target>,
    ) -> Result<Slopes, ModelError> {
        let _phase = phase!(pass.weights.device(), "passes, backward");
        // The derivative of sum(logits * slopes) is slopes; its value is never read.
        let slopes = enter(slopes, pass.weights.device());
        pass.backward((self.logits * slopes).sum(), sum)
    }

    /// Losses; and, if asked, the backward pass.
    pub fn finish(
        self,
        mut pass: Pass,
        micro_batches: usize,
        gradient: Option<Target>,
    ) -> Result<Losses, ModelError> {
        let (losses, slopes) = self.losses(&pass, micro_batches)?;
        if let Some(mut gradient) = gradient {
            let slopes = self.backward(&mut pass, slopes, Some(gradient.again()))?;
            pass.collect(slopes, gradient)?;
        }
        Ok(losses)
    }
}
