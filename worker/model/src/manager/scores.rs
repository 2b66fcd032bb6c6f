//! Scores of the uni-modal experts, generated from the previous cross-modal output (model_spec 5.2,
//! 5.4; paper Equation 7 and Appendix D).
//!
//! A gate looks at the query and gives one score per expert and token. It refuses to know the
//! softmax behind it.

use burn::tensor::Tensor;

use super::{EPSILON, ManagerSizes};
use crate::layers::{INIT_STD, LayerNorm, Linear, exp_and_sum};
use crate::params::{Builder, Init, ParamId};
use crate::pass::Pass;
use belfry_configs::{Manager as Kind, ManagerQuery};

/// What the gate looks at.
#[derive(Clone, Debug)]
enum Query {
    /// The own stream's previous output.
    Visual,
    /// `concat(A e, c)`: fused with the other stream's.
    Fused {
        norm: LayerNorm,
        query: Linear,
        key: Linear,
    },
}

/// How the query becomes scores.
#[derive(Clone, Debug)]
enum Scoring {
    /// A linear layer from the query to one score per expert (AAUE).
    Controller(Linear),
    /// A linear layer, the same for all experts, from `concat(expert, query)` to one score per
    /// feature (concat-attention).
    Concat { weight: ParamId, bias: ParamId },
    /// Single-head attention of the query over the experts' first tokens (cross-attention).
    Attention { query: Linear, key: Linear },
}

/// Query and scoring of one adaptive manager.
#[derive(Clone, Debug)]
pub(super) struct Gate {
    query: Query,
    scoring: Scoring,
}

impl Gate {
    pub fn new(b: &mut Builder, sizes: ManagerSizes) -> Self {
        let width = sizes.hidden;
        let (query, query_width) = match sizes.query {
            ManagerQuery::Visual => (Query::Visual, width),
            ManagerQuery::Fused => {
                let fused = Query::Fused {
                    norm: LayerNorm::new(b, "extra_query_LayerNorm", width, EPSILON),
                    query: Linear::new(b, "fusion_attention.q_proj", width, width),
                    key: Linear::new(b, "fusion_attention.k_proj", width, width),
                };
                (fused, 2 * width)
            }
        };
        let scoring = match sizes.kind {
            Kind::ConcatAttention => {
                let shape = [width, width + query_width];
                Scoring::Concat {
                    weight: b.matrices(
                        "linear_controller.weight",
                        &shape,
                        Init::Normal(INIT_STD),
                        1,
                    ),
                    bias: b.leaf("linear_controller.bias", &[width], Init::Constant(0.0)),
                }
            }
            Kind::CrossAttention => Scoring::Attention {
                query: Linear::new(b, "layer_attention.q_proj", query_width, width),
                key: Linear::new(b, "layer_attention.k_proj", width, width),
            },
            _ => Scoring::Controller(Linear::new(
                b,
                "linear_controller",
                query_width,
                sizes.experts,
            )),
        };
        Gate { query, scoring }
    }

    /// Whether scores have a value per token and feature.
    pub fn is_full_size(&self) -> bool {
        matches!(self.scoring, Scoring::Concat { .. })
    }

    /// # Shapes
    /// own (normed) and other (raw) `[batch, length, hidden]`, experts (normalised) with their norms
    /// → per expert `[batch, length, 1]`, of concat-attention `[batch, length, hidden]`
    pub fn scores(
        &self,
        pass: &Pass,
        own: &Tensor<3>,
        other: &Tensor<3>,
        (experts, norms): (&[Tensor<3>], &[LayerNorm]),
    ) -> Vec<Tensor<3>> {
        let seen = match &self.query {
            Query::Visual => own.clone(),
            Query::Fused { norm, query, key } => {
                let other = norm.forward(pass, other.clone());
                fuse(pass, query, key, own, other)
            }
        };
        let expert = |i: usize| {
            let (scale, shift) = norms[i].affine::<3>(pass);
            experts[i].clone() * scale + shift
        };
        match &self.scoring {
            Scoring::Controller(controller) => {
                let gates = controller.forward(pass, seen);
                let gate = |i| gates.clone().narrow(2, i, 1);
                (0..experts.len()).map(gate).collect()
            }
            Scoring::Concat { weight, bias } => {
                // The query's part of the product is the same for all experts.
                let weight = pass.weights.matrix(*weight, 0);
                let [inputs, width] = weight.dims();
                let own_part = weight.clone().narrow(0, 0, width);
                let query_part = weight.narrow(0, width, inputs - width);
                let bias = pass.weights.vector(*bias);
                let products = pass.products();
                let common = products.linear(products.operand(seen), query_part, Some(bias));
                let own = |i| products.linear(products.operand(expert(i)), own_part.clone(), None);
                let score = |i| own(i) + common.clone();
                (0..experts.len()).map(score).collect()
            }
            Scoring::Attention { query, key } => {
                let firsts = (0..experts.len()).map(|i| expert(i).narrow(1, 0, 1));
                let keys = key.forward(pass, Tensor::cat(firsts.collect(), 1));
                let width = keys.dims()[2];
                let q = query.forward(pass, seen) * (1.0 / (width as f32).sqrt());
                let products = pass.products();
                let keys = products.operand(keys.swap_dims(1, 2));
                let scores = products.multiply(products.operand(q), keys);
                let score = |i| scores.clone().narrow(2, i, 1);
                (0..experts.len()).map(score).collect()
            }
        }
    }
}

/// The fused query of AAUE: `concat(A e, c)` with A a single-head attention without mask, value or
/// output projection (model_spec 5.2).
///
/// # Shapes
/// own `[batch, length, hidden]`, other `[batch, keys, hidden]` → `[batch, length, 2 x hidden]`
fn fuse(pass: &Pass, query: &Linear, key: &Linear, own: &Tensor<3>, other: Tensor<3>) -> Tensor<3> {
    let width = own.dims()[2];
    let q = query.forward(pass, own.clone()) * (1.0 / (width as f32).sqrt());
    let k = key.forward(pass, other.clone());
    let products = pass.products();
    let keys = products.operand(k.swap_dims(1, 2));
    let (exp, sum) = exp_and_sum(products.multiply(products.operand(q), keys));
    let attended = products.multiply(products.operand(exp), products.operand(other)) * sum.recip();
    Tensor::cat(vec![attended, own.clone()], 2)
}
