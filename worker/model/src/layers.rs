//! The layers that the towers share: linear, layer norm, attention, feed-forward.
//!
//! Layers are structure: they hold parameter ids and sizes, and read weights from the [`Pass`].
//! Attention and norms are written out, because the library's attention has no dropout behind the
//! softmax and its decompositions keep more full-size tensors for the backward pass than needed.

use burn::tensor::{Tensor, activation};

use crate::params::{Builder, Init, ParamId};
use crate::pass::{Dropout, Pass};
use crate::product::Operand;

/// Standard deviation of fresh linear and embedding weights (model_spec 11).
pub(crate) const INIT_STD: f32 = 0.02;
/// What is added to the scores of padded keys (model_spec 2): large, but finite.
const MASKED_SCORE: f32 = -10_000.0;

/// `y = x W^T + b`, W `[out, in]` as in the checkpoint.
#[derive(Clone, Debug)]
pub(crate) struct Linear {
    weight: ParamId,
    bias: Option<ParamId>,
}

impl Linear {
    pub fn new(b: &mut Builder, name: &str, inputs: usize, outputs: usize) -> Self {
        Self::named(
            b,
            &format!("{name}.weight"),
            Some(&format!("{name}.bias")),
            &[outputs, inputs],
        )
    }

    /// With the parameters' own names; a weight's axes behind the first are one input axis.
    pub fn named(b: &mut Builder, weight: &str, bias: Option<&str>, shape: &[usize]) -> Self {
        Linear {
            weight: b.matrices(weight, shape, Init::Normal(INIT_STD), 1),
            bias: bias.map(|bias| b.leaf(bias, &shape[..1], Init::Constant(0.0))),
        }
    }

    /// # Shapes
    /// `[.., in]` → `[.., out]`
    pub fn forward<const D: usize>(&self, pass: &Pass, x: Tensor<D>) -> Tensor<D> {
        self.forward_shared(pass, pass.products().operand(x))
    }

    /// Of an input that other layers read as well.
    pub fn forward_shared<const D: usize>(&self, pass: &Pass, x: Operand<D>) -> Tensor<D> {
        let bias = self.bias.map(|bias| pass.weights.vector(bias));
        let weight = pass.weights.matrix(self.weight, 0);
        pass.products().linear(x, weight, bias)
    }

    /// With another vector added to the bias, which is cheaper than adding it to every row.
    pub fn forward_plus<const D: usize>(
        &self,
        pass: &Pass,
        x: Tensor<D>,
        plus: Tensor<1>,
    ) -> Tensor<D> {
        let bias = match self.bias {
            Some(bias) => pass.weights.vector(bias) + plus,
            None => plus,
        };
        let (products, weight) = (pass.products(), pass.weights.matrix(self.weight, 0));
        products.linear(products.operand(x), weight, Some(bias))
    }
}

/// A ViT's packed query, key and value projection: one `[3 x width, width]` parameter, three leaves.
#[derive(Clone, Debug)]
pub(crate) struct PackedProjection {
    weight: ParamId,
    bias: ParamId,
}

impl PackedProjection {
    /// With the names of weight and bias.
    pub fn new(b: &mut Builder, [weight, bias]: [&str; 2], width: usize) -> Self {
        let weight = b.matrices(weight, &[3 * width, width], Init::Normal(INIT_STD), 3);
        let bias = b.leaves(bias, &[3 * width], Init::Constant(0.0), 3);
        PackedProjection { weight, bias }
    }

    /// # Shapes
    /// `[batch, length, width]` → three of the same
    pub fn forward(&self, pass: &Pass, x: Tensor<3>) -> [Tensor<3>; 3] {
        let products = pass.products();
        let x = products.operand(x);
        [0, 1, 2].map(|part| {
            let weight = pass.weights.matrix(self.weight, part);
            let bias = pass.weights.part(self.bias, part);
            products.linear(x.clone(), weight, Some(bias))
        })
    }
}

/// Layer norm over the last axis.
#[derive(Clone, Debug)]
pub(crate) struct LayerNorm {
    weight: ParamId,
    bias: ParamId,
    width: usize,
    epsilon: f32,
}

impl LayerNorm {
    pub fn new(b: &mut Builder, name: &str, width: usize, epsilon: f32) -> Self {
        LayerNorm {
            weight: b.leaf(&format!("{name}.weight"), &[width], Init::Constant(1.0)),
            bias: b.leaf(&format!("{name}.bias"), &[width], Init::Constant(0.0)),
            width,
            epsilon,
        }
    }

    /// A norm that is registered but never read.
    pub fn unused(b: &mut Builder, name: &str, width: usize) {
        b.unused(&format!("{name}.weight"), &[width], Init::Constant(1.0));
        b.unused(&format!("{name}.bias"), &[width], Init::Constant(0.0));
    }

    /// # Shapes
    /// `[.., width]` → `[.., width]`
    pub fn forward<const D: usize>(&self, pass: &Pass, x: Tensor<D>) -> Tensor<D> {
        let (weight, bias) = self.affine::<D>(pass);
        normalise(x, self.epsilon) * weight + bias
    }

    /// Scale and shift, each `[1, .., 1, width]`, for callers that normalised before.
    pub fn affine<const D: usize>(&self, pass: &Pass) -> (Tensor<D>, Tensor<D>) {
        let mut shape = [1; D];
        shape[D - 1] = self.width;
        let weight = pass.weights.vector(self.weight).reshape(shape);
        let bias = pass.weights.vector(self.bias).reshape(shape);
        (weight, bias)
    }
}

/// `(x - mean) / sqrt(variance + epsilon)` over the last axis.
pub(crate) fn normalise<const D: usize>(x: Tensor<D>, epsilon: f32) -> Tensor<D> {
    let centred = x.clone() - x.mean_dim(D - 1);
    let variance = (centred.clone() * centred.clone()).mean_dim(D - 1);
    centred * (variance + epsilon).sqrt().recip()
}

/// x · sigmoid(1.702 x), CLIP's activation.
pub(crate) fn quick_gelu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    x.clone() * activation::sigmoid(x * 1.702)
}

/// What is added to attention scores: 0 for tokens, -10000 for padding (model_spec 2).
///
/// # Shapes
/// mask `[batch x length]` → `[batch, 1, 1, length]`
pub(crate) fn score_mask(pass: &Pass, mask: &[f32], batch: usize) -> Tensor<4> {
    let added = mask.iter().map(|m| (1.0 - m) * MASKED_SCORE).collect();
    pass.constant(added, [batch, 1, 1, mask.len() / batch])
}

/// Multi-head scaled dot-product attention with dropout of the probabilities.
///
/// The softmax's denominator divides the result instead of the probabilities, which saves several
/// tensors of `[batch, heads, queries, keys]` in each direction; dropout does not mind.
///
/// # Shapes
/// q `[batch, queries, width]`, k and v `[batch, keys, width]`, mask broadcast over
/// `[batch, heads, queries, keys]` → `[batch, queries, width]`
pub(crate) fn attend(
    pass: &Pass,
    [q, k, v]: [Tensor<3>; 3],
    heads: usize,
    mask: Option<&Tensor<4>>,
    dropout: Option<&Dropout>,
) -> Tensor<3> {
    let [batch, queries, width] = q.dims();
    let products = pass.products();
    let split = |x: Tensor<3>| {
        let length = x.dims()[1];
        let split = x.reshape([batch, length, heads, width / heads]);
        products.operand(split.swap_dims(1, 2))
    };
    let scale = 1.0 / ((width / heads) as f32).sqrt();
    let keys = split(k).seen(|k| k.swap_dims(2, 3));
    let mut scores = products.multiply(split(q * scale), keys);
    if let Some(mask) = mask {
        scores = scores + mask.clone();
    }
    let (exp, sum) = exp_and_sum(scores);
    let kept = match dropout.and_then(|dropout| pass.dropout_mask(dropout, exp.dims())) {
        Some(mask) => exp * mask,
        None => exp,
    };
    let context = products.multiply(products.operand(kept), split(v)) * sum.recip();
    context.swap_dims(1, 2).reshape([batch, queries, width])
}

/// `exp(x - max)` over the last axis and its sum: a softmax whose division is left to the caller.
pub(crate) fn exp_and_sum<const D: usize>(x: Tensor<D>) -> (Tensor<D>, Tensor<D>) {
    let max = x.clone().detach().max_dim(D - 1);
    let exp = (x - max).exp();
    let sum = exp.clone().sum_dim(D - 1);
    (exp, sum)
}

/// Sizes of a RoBERTa-style layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerSizes {
    pub hidden: usize,
    pub heads: usize,
    pub intermediate: usize,
    pub dropout: f32,
    /// 1e-5 in the text tower, 1e-12 in the cross-modal layers (model_spec 1).
    pub epsilon: f32,
}

/// Attention block of RoBERTa with post-LN (model_spec 2): self- or cross-attention.
#[derive(Clone, Debug)]
pub(crate) struct AttentionBlock {
    query: Linear,
    key: Linear,
    value: Linear,
    dense: Linear,
    norm: LayerNorm,
    heads: usize,
    dropout_probabilities: Dropout,
    dropout_output: Dropout,
}

impl AttentionBlock {
    pub fn new(b: &mut Builder, name: &str, sizes: LayerSizes) -> Self {
        let width = sizes.hidden;
        b.at(name, |b| AttentionBlock {
            query: Linear::new(b, "self.query", width, width),
            key: Linear::new(b, "self.key", width, width),
            value: Linear::new(b, "self.value", width, width),
            dense: Linear::new(b, "output.dense", width, width),
            norm: LayerNorm::new(b, "output.LayerNorm", width, sizes.epsilon),
            heads: sizes.heads,
            dropout_probabilities: Dropout {
                rate: sizes.dropout,
                site: b.name("self.dropout"),
            },
            dropout_output: Dropout {
                rate: sizes.dropout,
                site: b.name("output.dropout"),
            },
        })
    }

    /// # Shapes
    /// x `[batch, queries, hidden]`, source `[batch, keys, hidden]` → x's
    pub fn forward(
        &self,
        pass: &Pass,
        x: Tensor<3>,
        source: Tensor<3>,
        mask: Option<&Tensor<4>>,
    ) -> Tensor<3> {
        let source = pass.products().operand(source);
        let qkv = [
            self.query.forward(pass, x.clone()),
            self.key.forward_shared(pass, source.clone()),
            self.value.forward_shared(pass, source),
        ];
        let context = attend(
            pass,
            qkv,
            self.heads,
            mask,
            Some(&self.dropout_probabilities),
        );
        let output = pass.dropout(&self.dropout_output, self.dense.forward(pass, context));
        self.norm.forward(pass, output + x)
    }
}

/// Feed-forward block of RoBERTa with post-LN and exact GELU.
#[derive(Clone, Debug)]
pub(crate) struct FeedForward {
    widen: Linear,
    narrow: Linear,
    norm: LayerNorm,
    dropout: Dropout,
}

impl FeedForward {
    pub fn new(b: &mut Builder, sizes: LayerSizes) -> Self {
        FeedForward {
            widen: Linear::new(b, "intermediate.dense", sizes.hidden, sizes.intermediate),
            narrow: Linear::new(b, "output.dense", sizes.intermediate, sizes.hidden),
            norm: LayerNorm::new(b, "output.LayerNorm", sizes.hidden, sizes.epsilon),
            dropout: Dropout {
                rate: sizes.dropout,
                site: b.name("output.dropout"),
            },
        }
    }

    /// # Shapes
    /// `[batch, length, hidden]` → the same
    pub fn forward(&self, pass: &Pass, x: Tensor<3>) -> Tensor<3> {
        let wide = activation::gelu(self.widen.forward(pass, x.clone()));
        let output = pass.dropout(&self.dropout, self.narrow.forward(pass, wide));
        self.norm.forward(pass, output + x)
    }
}

/// First token, linear, tanh.
#[derive(Clone, Debug)]
pub(crate) struct Pooler(Linear);

impl Pooler {
    pub fn new(b: &mut Builder, name: &str, width: usize) -> Self {
        Pooler(Linear::new(b, &format!("{name}.dense"), width, width))
    }

    /// # Shapes
    /// `[batch, length, hidden]` → `[batch, hidden]`
    pub fn forward(&self, pass: &Pass, x: Tensor<3>) -> Tensor<2> {
        let [batch, _, width] = x.dims();
        let first = x.narrow(1, 0, 1).reshape([batch, width]);
        self.0.forward(pass, first).tanh()
    }
}
