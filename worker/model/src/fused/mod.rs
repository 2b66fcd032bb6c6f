//! Layer norm, attention's softmax and activations as single kernels with their own backward, for
//! devices that are not the host.
//!
//! Burn's fusion and autotune stay off, because they choose by timing and history; without them
//! each elementwise operation reads and writes the whole tensor. These kernels do what `layers.rs`
//! spells out for the host, up to rounding: they accumulate in f32 in an order that only sizes
//! decide. They refuse to know layers and weights.

mod activation;
mod attention;
mod launch;
mod norm;

use burn::backend::autodiff::Autodiff;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Cube, Dispatch, backend_extension};
use burn::tensor::{DType, Tensor};
use burn_cubecl::tensor::CubeTensor;

use crate::weights::on_host;

pub(crate) use activation::Gelu;
pub(crate) use attention::Scores;
pub(crate) use launch::Draw;
use norm::Residual;

/// Whether these kernels take tensors like this one.
pub(crate) fn applies<const D: usize>(x: &Tensor<D>) -> bool {
    x.dtype() == DType::F32 && !on_host(&x.device())
}

/// Layer norm over the last axis with scale and shift, `[width]` each.
pub(crate) fn norm<const D: usize>(
    x: Tensor<D>,
    [scale, shift]: [Tensor<1>; 2],
    epsilon: f32,
) -> Tensor<D> {
    let (scale, shift) = (scale.into_dispatch(), shift.into_dispatch());
    Tensor::from_dispatch(Dispatch::norm(x.into_dispatch(), scale, shift, epsilon))
}

/// `norm(dropout(y) + x)` in one kernel.
pub(crate) fn sum_norm<const D: usize>(
    (y, draw): (Tensor<D>, Option<Draw>),
    x: Tensor<D>,
    [scale, shift]: [Tensor<1>; 2],
    epsilon: f32,
) -> Tensor<D> {
    assert_eq!(y.dims(), x.dims(), "a residual has its branch's shape");
    let (scale, shift) = (scale.into_dispatch(), shift.into_dispatch());
    let (y, x) = (y.into_dispatch(), x.into_dispatch());
    Tensor::from_dispatch(Dispatch::sum_norm(y, x, scale, shift, draw, epsilon))
}

/// Layer norm over the last axis without scale and shift.
pub(crate) fn normalise<const D: usize>(x: Tensor<D>, epsilon: f32) -> Tensor<D> {
    Tensor::from_dispatch(Dispatch::normalised(x.into_dispatch(), epsilon))
}

/// `dropout(softmax(scores * factor + mask))` over keys, in the scores' type.
///
/// # Shapes
/// scores `[batch, heads, queries, keys]`, mask `[batch, 1, 1, keys]` → the scores'
pub(crate) fn softmax(
    scores: Tensor<4>,
    factor: f32,
    mask: Option<&Tensor<4>>,
    draw: Option<Draw>,
) -> Tensor<4> {
    let [batch, _, _, keys] = scores.dims();
    let mask = mask.map(|mask| {
        assert_eq!(mask.dims(), [batch, 1, 1, keys], "a mask of keys");
        let mask = mask.clone();
        let mask = if mask.device().is_autodiff() {
            mask.inner()
        } else {
            mask
        };
        mask.try_into_primitive::<Cube>()
            .expect("a mask lies where its scores lie")
    });
    let how = Scores { factor, mask, draw };
    Tensor::from_dispatch(Dispatch::attention_softmax(scores.into_dispatch(), how))
}

/// GELU in one kernel.
pub(crate) fn gelu<const D: usize>(kind: Gelu, x: Tensor<D>) -> Tensor<D> {
    Tensor::from_dispatch(Dispatch::activation(x.into_dispatch(), kind))
}

/// The operations that Burn's backends lack.
#[backend_extension(Cube, Autodiff)]
pub(crate) trait Fused: Backend {
    fn norm(
        x: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        shift: FloatTensor<Self>,
        epsilon: f32,
    ) -> FloatTensor<Self>;
    fn sum_norm(
        y: FloatTensor<Self>,
        x: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        shift: FloatTensor<Self>,
        draw: Option<Draw>,
        epsilon: f32,
    ) -> FloatTensor<Self>;
    fn normalised(x: FloatTensor<Self>, epsilon: f32) -> FloatTensor<Self>;
    fn attention_softmax(scores: FloatTensor<Self>, how: Scores) -> FloatTensor<Self>;
    fn activation(x: FloatTensor<Self>, kind: Gelu) -> FloatTensor<Self>;
}

impl Fused for Cube {
    fn norm(x: CubeTensor, scale: CubeTensor, shift: CubeTensor, epsilon: f32) -> CubeTensor {
        norm::forward(x, None, Some([scale, shift]), epsilon).0
    }

    fn sum_norm(
        y: CubeTensor,
        x: CubeTensor,
        scale: CubeTensor,
        shift: CubeTensor,
        draw: Option<Draw>,
        epsilon: f32,
    ) -> CubeTensor {
        let residual = Some(Residual { x, draw });
        norm::forward(y, residual, Some([scale, shift]), epsilon).0
    }

    fn normalised(x: CubeTensor, epsilon: f32) -> CubeTensor {
        norm::forward(x, None, None, epsilon).0
    }

    fn attention_softmax(scores: CubeTensor, how: Scores) -> CubeTensor {
        attention::forward(scores, how).0
    }

    fn activation(x: CubeTensor, kind: Gelu) -> CubeTensor {
        activation::forward(kind, x).0
    }
}

/// Records an operation whose `forward` gives its result and what backward keeps of it.
macro_rules! record {
    ($operation:expr, [$($input:ident),+], $strategy:ty, $forward:expr) => {{
        let prepared = $operation
            .prepare::<$strategy>([$($input.node()),+])
            .compute_bound()
            .stateful();
        $(let $input = $input.into_primitive();)+
        let (out, saved) = $forward;
        match prepared {
            OpsKind::Tracked(prepared) => prepared.finish(saved, out),
            OpsKind::UnTracked(prepared) => prepared.finish(out),
        }
    }};
}

impl<C: CheckpointStrategy> Fused for Autodiff<Cube, C> {
    fn norm(
        x: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        shift: FloatTensor<Self>,
        epsilon: f32,
    ) -> FloatTensor<Self> {
        record!(
            Norm,
            [x, scale, shift],
            C,
            norm::forward(x, None, Some([scale, shift]), epsilon)
        )
    }

    fn sum_norm(
        y: FloatTensor<Self>,
        x: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        shift: FloatTensor<Self>,
        draw: Option<Draw>,
        epsilon: f32,
    ) -> FloatTensor<Self> {
        record!(SumNorm, [y, x, scale, shift], C, {
            let residual = Some(Residual { x, draw });
            norm::forward(y, residual, Some([scale, shift]), epsilon)
        })
    }

    fn normalised(x: FloatTensor<Self>, epsilon: f32) -> FloatTensor<Self> {
        record!(Normalised, [x], C, norm::forward(x, None, None, epsilon))
    }

    fn attention_softmax(scores: FloatTensor<Self>, how: Scores) -> FloatTensor<Self> {
        record!(Softmax, [scores], C, attention::forward(scores, how))
    }

    fn activation(x: FloatTensor<Self>, kind: Gelu) -> FloatTensor<Self> {
        record!(Activation(kind), [x], C, activation::forward(kind, x))
    }
}

#[derive(Debug)]
struct Norm;
#[derive(Debug)]
struct SumNorm;
#[derive(Debug)]
struct Normalised;
#[derive(Debug)]
struct Softmax;
#[derive(Debug)]
struct Activation(Gelu);

impl Backward<Cube, 3> for Norm {
    type State = norm::Saved;

    fn backward(self, ops: Ops<Self::State, 3>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let gradient = gradients.consume::<Cube>(&ops.node);
        let [x, scale, shift] = ops.parents;
        if scale.is_some() || shift.is_some() {
            let sums = norm::affine_backward(&ops.state, &gradient);
            for (parent, sum) in [scale, shift].into_iter().zip(sums) {
                if let Some(parent) = parent {
                    gradients.register::<Cube>(parent.id, sum);
                }
            }
        }
        if let Some(x) = x {
            let made = norm::backward(&ops.state, &gradient);
            gradients.register::<Cube>(x.id, made.input);
        }
    }
}

impl Backward<Cube, 4> for SumNorm {
    type State = norm::Saved;

    fn backward(self, ops: Ops<Self::State, 4>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let gradient = gradients.consume::<Cube>(&ops.node);
        let [y, x, scale, shift] = ops.parents;
        if scale.is_some() || shift.is_some() {
            let sums = norm::affine_backward(&ops.state, &gradient);
            for (parent, sum) in [scale, shift].into_iter().zip(sums) {
                if let Some(parent) = parent {
                    gradients.register::<Cube>(parent.id, sum);
                }
            }
        }
        if y.is_some() || x.is_some() {
            let made = norm::backward(&ops.state, &gradient);
            if let Some(y) = y {
                let dropped = made.dropped.unwrap_or_else(|| made.input.clone());
                gradients.register::<Cube>(y.id, dropped);
            }
            if let Some(x) = x {
                gradients.register::<Cube>(x.id, made.input);
            }
        }
    }
}

impl Backward<Cube, 1> for Normalised {
    type State = norm::Saved;

    fn backward(self, ops: Ops<Self::State, 1>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let gradient = gradients.consume::<Cube>(&ops.node);
        if let [Some(x)] = ops.parents {
            let made = norm::backward(&ops.state, &gradient);
            gradients.register::<Cube>(x.id, made.input);
        }
    }
}

impl Backward<Cube, 1> for Softmax {
    type State = attention::Saved;

    fn backward(self, ops: Ops<Self::State, 1>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let gradient = gradients.consume::<Cube>(&ops.node);
        if let [Some(scores)] = ops.parents {
            let made = attention::backward(&ops.state, gradient);
            gradients.register::<Cube>(scores.id, made);
        }
    }
}

impl Backward<Cube, 1> for Activation {
    type State = CubeTensor;

    fn backward(self, ops: Ops<Self::State, 1>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let gradient = gradients.consume::<Cube>(&ops.node);
        if let [Some(x)] = ops.parents {
            let made = activation::backward(self.0, &ops.state, gradient);
            gradients.register::<Cube>(x.id, made);
        }
    }
}

#[cfg(all(test, feature = "cuda"))]
mod ptx_tests;
#[cfg(test)]
mod tests;
