//! A pass in segments: what is kept between forward and backward, and what is computed again.
//!
//! The library differentiates one graph and keeps everything in it. Here a pass is a chain of small
//! graphs: a block (a layer of a tower, a transform, a cross-modal layer with its managers) starts
//! from leaves, and its outputs are leaves again. Backward begins at the loss and walks the segments
//! from the last to the first: what later ones owe to a segment's outputs starts the backward of its
//! graph. That graph was either kept since the forward pass or is made now, by running the block
//! again ([`Recompute::Blocks`]): the forward pass then ran outside autodiff and kept only outputs.
//! Both ways add the same numbers in the same order, so recomputation changes no bit; draws are
//! keyed, so they are the same the second time. Price of the seams: a product and a sum per output.
//! It refuses to know what blocks compute.

use belfry_configs::Recompute;
use burn::tensor::{Gradients, Tensor};

use crate::error::ModelError;
use crate::gradient::Target;
use crate::pass::Pass;
use crate::weights::{Weights, enter, new_leaf};

/// A block's verb. All it reads beside its inputs comes from the pass that it is given: the second
/// run, or the one outside autodiff, is given another.
type Run<'a> =
    Box<dyn Fn(&mut Pass, &[Tensor<3>]) -> Result<Vec<Tensor<3>>, ModelError> + Send + 'a>;

/// The end of a segment's graph.
enum Ends<'a> {
    Kept(Vec<Tensor<3>>),
    Again {
        run: Run<'a>,
        inputs: Vec<Tensor<3>>,
    },
}

/// A part of a pass with a graph of its own.
pub(crate) struct Segment<'a> {
    ends: Ends<'a>,
    /// The ends' numbers as leaves: where whatever comes behind begins.
    outputs: Vec<Tensor<3>>,
    /// [`Pass::number`] when it ran.
    number: u64,
}

/// Gradients of a pass, those of the last graph first.
#[derive(Default)]
pub(crate) struct Slopes(Vec<Gradients>);

impl Slopes {
    /// A leaf's gradient, if anything reached it; it is taken out.
    pub fn take<const D: usize>(&mut self, leaf: &Tensor<D>) -> Option<Tensor<D>> {
        let terms = self.0.iter_mut().filter_map(|g| leaf.grad_remove(g));
        terms.reduce(|a, b| a + b)
    }

    /// As [`Weights::collect_all`] wants them.
    pub fn sources<'s>(
        &'s mut self,
        weights: &'s Weights,
    ) -> impl Iterator<Item = (&'s Weights, &'s mut Gradients)> {
        self.0.iter_mut().map(move |gradients| (weights, gradients))
    }
}

impl<'a> Pass<'a> {
    /// Runs a block. `inputs` are outputs of earlier segments or other leaves; a block reads nothing
    /// else that asks for gradients, and gathers no rows.
    pub fn block<F>(&mut self, inputs: Vec<Tensor<3>>, run: F) -> Result<Vec<Tensor<3>>, ModelError>
    where
        F: Fn(&mut Pass, &[Tensor<3>]) -> Result<Vec<Tensor<3>>, ModelError> + Send + 'a,
    {
        if !self.weights.device().is_autodiff() {
            return run(self, &inputs);
        }
        debug_assert!(inputs.iter().all(Tensor::is_require_grad), "cut them first");
        match self.recompute {
            Recompute::None => {
                let ends = run(self, &inputs)?;
                Ok(self.cut(ends))
            }
            Recompute::Blocks => {
                let weights = self.weights;
                let plain = self.plain.get_or_insert_with(|| weights.without_gradient());
                let values: Vec<_> = inputs.iter().map(|x| x.clone().inner()).collect();
                let outputs = run(
                    &mut Pass::new(plain, self.number, self.draws, None),
                    &values,
                )?;
                let run = Box::new(run);
                Ok(self.close(Ends::Again { run, inputs }, outputs))
            }
        }
    }

    /// Ends a segment whose graph is kept: the same numbers as leaves.
    pub fn cut(&mut self, ends: Vec<Tensor<3>>) -> Vec<Tensor<3>> {
        if !self.weights.device().is_autodiff() {
            return ends;
        }
        let values = ends.iter().map(|end| end.clone().inner()).collect();
        self.close(Ends::Kept(ends), values)
    }

    fn close(&mut self, ends: Ends<'a>, values: Vec<Tensor<3>>) -> Vec<Tensor<3>> {
        let leaf = |values| new_leaf(values, self.weights.device());
        let outputs: Vec<_> = values.into_iter().map(leaf).collect();
        self.segments.push(Segment {
            ends,
            outputs: outputs.clone(),
            number: self.number,
        });
        outputs
    }

    /// Backward from `loss` through all segments that led to it. Others wait for a later backward.
    /// With `sum` the weights' gradients are added to it as they come and dropped;
    /// without they stay until they are collected, because another pass's come first.
    ///
    /// # Errors
    /// Those of the blocks that run again; [`ModelError::Device`] if a gradient cannot be read.
    pub fn backward(
        &mut self,
        loss: Tensor<1>,
        mut sum: Option<Target>,
    ) -> Result<Slopes, ModelError> {
        let weights = self.weights;
        let mut slopes = Slopes::default();
        let mut differentiate = |loss: Tensor<1>, slopes: &mut Slopes| {
            let mut gradients = loss.backward();
            if let Some(sum) = &mut sum {
                Weights::collect_all(&mut [(weights, &mut gradients)], sum.again())?;
            }
            slopes.0.push(gradients);
            Ok(())
        };
        differentiate(loss, &mut slopes)?;
        let mut waiting = Vec::new();
        while let Some(segment) = self.segments.pop() {
            let owed = segment.outputs.iter().map(|output| slopes.take(output));
            let owed: Vec<Option<Tensor<3>>> = owed.collect();
            if owed.iter().all(Option::is_none) {
                waiting.push(segment);
                continue;
            }
            let ends = match segment.ends {
                Ends::Kept(ends) => ends,
                Ends::Again { run, inputs } => {
                    self.number = segment.number;
                    run(self, &inputs)?
                }
            };
            // The derivative of sum(end * owed) is what is owed; its value is never read.
            let terms = ends
                .into_iter()
                .zip(owed)
                .filter_map(|(end, owed)| Some((end * enter(owed?, weights.device())).sum()));
            let loss = terms.reduce(|a, b| a + b).expect("something is owed");
            differentiate(loss, &mut slopes)?;
        }
        waiting.reverse();
        self.segments = waiting;
        Ok(slopes)
    }

    /// A constant of this pass or of another over the same weights, as this one computes with it.
    pub fn adopt<const D: usize>(&self, constant: &Tensor<D>) -> Tensor<D> {
        if constant.device().is_autodiff() && !self.weights.device().is_autodiff() {
            constant.clone().inner()
        } else {
            constant.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use burn::tensor::{Device, TensorData};

    use super::*;
    use crate::draws::Draws;
    use crate::params::{Builder, Init};
    use crate::weights::read;

    /// `w` with one number, 3.
    fn weights(b: &mut Builder) -> (crate::params::ParamId, Weights) {
        let id = b.leaf("w", &[1], Init::Constant(3.0));
        let table = std::mem::take(b).finish();
        let device = Device::flex().autodiff();
        (id, Weights::load(&table, &[3.0], &device).unwrap())
    }

    /// `y = w x`, `z = y y + x` of `x = 2`: dz/dw = 2 w x^2 = 24, dz/dx = 2 w^2 x + 1 = 37.
    fn gradients(recompute: Recompute) -> ([f32; 2], usize) {
        let (id, weights) = weights(&mut Builder::default());
        let runs = AtomicUsize::new(0);
        let mut pass = Pass::new(&weights, 0, Draws::Off, None);
        pass.recompute = recompute;
        let two = TensorData::new(vec![2.0f32], [1, 1, 1]);
        let x = Tensor::<3>::from_data(two, weights.device()).require_grad();
        let scaled = pass.block(vec![x.clone()], |pass, x| {
            runs.fetch_add(1, Ordering::Relaxed);
            Ok(vec![
                x[0].clone() * pass.weights.vector(id).reshape([1, 1, 1]),
            ])
        });
        let y = scaled.unwrap().remove(0);
        // Nobody looks at this one's output: it must not run again, nor end the walk.
        let unread = pass.block(vec![x.clone()], |_, x| {
            runs.fetch_add(10, Ordering::Relaxed);
            Ok(vec![x[0].clone()])
        });
        assert_eq!(unread.unwrap().len(), 1);
        let squared = pass.block(vec![y, x.clone()], |_, inputs| {
            runs.fetch_add(1, Ordering::Relaxed);
            let [y, x] = [inputs[0].clone(), inputs[1].clone()];
            Ok(vec![y.clone() * y + x])
        });
        let mut sum = [0.0];
        let loss = squared.unwrap().remove(0).sum();
        let target = Target::Host(&mut sum);
        let mut slopes = pass.backward(loss, Some(target)).unwrap();
        let of_x = read(slopes.take(&x).unwrap(), "x").unwrap()[0];
        assert!(slopes.take(&x).is_none(), "a gradient is taken once");
        drop(pass);
        ([sum[0], of_x], runs.into_inner())
    }

    #[test]
    fn gradients_cross_the_seams_and_blocks_run_again_only_where_it_is_asked() {
        assert_eq!(gradients(Recompute::None), ([24.0, 37.0], 12));
        assert_eq!(gradients(Recompute::Blocks), ([24.0, 37.0], 14));
    }
}
