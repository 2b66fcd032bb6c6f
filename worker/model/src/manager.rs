//! Managers: aggregation of uni-modal experts for one cross-modal layer (model_spec 5).
//!
//! Stands between the towers and a cross-modal layer. Experts come normalised (mean 0, variance 1
//! over features), once for all managers; each manager brings its own scale and shift. The stack
//! `[batch, experts, length, hidden]` is never built: experts are added one by one.

use burn::tensor::Tensor;

use crate::error::ModelError;
use crate::layers::{LayerNorm, Linear, exp_and_sum};
use crate::params::{Builder, Init, ParamId};
use crate::pass::Pass;
use belfry_configs::{Manager as ManagerType, ManagerWeight};

/// Layer norm epsilon of everything in a manager.
pub(crate) const EPSILON: f32 = 1e-5;

/// Sizes and kind of a manager.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ManagerSizes {
    pub kind: ManagerType,
    pub weight: ManagerWeight,
    pub noise: bool,
    pub experts: usize,
    pub hidden: usize,
}

/// Where the scores of the uni-modal experts come from.
#[derive(Clone, Debug)]
enum Scores {
    /// SAUE: learned rows, the last one for the cross output (absent in layer 0).
    Static { rows: ParamId },
    /// AAUE with fused query (model_spec 5.2).
    Adaptive {
        query_norm: LayerNorm,
        query: Linear,
        key: Linear,
        controller: Linear,
        cross: ParamId,
    },
}

/// One manager.
#[derive(Clone, Debug)]
pub(crate) struct Manager {
    expert_norms: Vec<LayerNorm>,
    /// For the previous cross-modal output; absent in layer 0.
    cross_norm: Option<LayerNorm>,
    scores: Scores,
    temperature: ParamId,
    sizes: ManagerSizes,
    /// Width of a weight: hidden, or 1 for scalar weights.
    weight_width: usize,
    site: String,
    /// Number of this manager in call order.
    call: usize,
}

/// What the cross-modal layer below gave: own stream and other stream, `[batch, length, hidden]`.
pub(crate) type Previous<'a> = Option<(&'a Tensor<3>, &'a Tensor<3>)>;

impl Manager {
    pub fn new(b: &mut Builder, layer: usize, call: usize, sizes: ManagerSizes) -> Self {
        b.at(format!("{layer}.manager_layer"), |b| {
            let (n, width) = (sizes.experts, sizes.hidden);
            let weight_width = match sizes.weight {
                ManagerWeight::Scalar => 1,
                ManagerWeight::Vector => width,
            };
            let norm = |b: &mut Builder, i: usize| {
                LayerNorm::new(b, &format!("LayerNorm.{i}"), width, EPSILON)
            };
            let expert_norms = (0..n).map(|i| norm(b, i)).collect();
            let cross_norm = (layer > 0).then(|| norm(b, n));
            let scores = if layer == 0 || sizes.kind == ManagerType::Saue {
                let rows = n + usize::from(layer > 0);
                let init = Init::ManagerScores { experts: n };
                Scores::Static {
                    rows: b.leaves("layer_scores", &[1, rows, 1, weight_width], init, rows),
                }
            } else {
                Scores::Adaptive {
                    query_norm: LayerNorm::new(b, "extra_query_LayerNorm", width, EPSILON),
                    query: Linear::new(b, "fusion_attention.q_proj", width, width),
                    key: Linear::new(b, "fusion_attention.k_proj", width, width),
                    controller: Linear::new(b, "linear_controller", 2 * width, n),
                    cross: b.leaf(
                        "layer_scores_cross",
                        &[1, 1, 1, weight_width],
                        Init::Constant(1.0),
                    ),
                }
            };
            b.unused("softmax_temperature_cross", &[1], Init::Constant(1.0));
            Manager {
                expert_norms,
                cross_norm,
                scores,
                temperature: b.leaf("softmax_temperature", &[1], Init::Constant(1.0)),
                sizes,
                weight_width,
                site: b.name("noise"),
                call,
            }
        })
    }

    /// # Shapes
    /// experts (normalised) `[batch, length, hidden]` each → `[batch, length, hidden]`
    pub fn forward(
        &self,
        pass: &Pass,
        experts: &[Tensor<3>],
        previous: Previous,
    ) -> Result<Tensor<3>, ModelError> {
        let cross = previous
            .zip(self.cross_norm.as_ref())
            .map(|((own, other), norm)| (norm.forward(pass, own.clone()), other));
        let (scores, cross_weight) = match &self.scores {
            Scores::Static { rows } => {
                let row = |i| {
                    pass.weights
                        .part(*rows, i)
                        .reshape([1, 1, self.weight_width])
                };
                let scores = (0..self.sizes.experts).map(row).collect();
                (scores, cross.is_some().then(|| row(self.sizes.experts)))
            }
            Scores::Adaptive {
                query_norm,
                query,
                key,
                controller,
                cross: weight,
            } => {
                let (own, other) = cross
                    .as_ref()
                    .expect("adaptive managers stand above layer 0 only");
                let other = query_norm.forward(pass, (*other).clone());
                let fused = fuse(pass, query, key, own, other);
                let gates = controller.forward(pass, fused);
                let gate = |i| gates.clone().narrow(2, i, 1);
                let weight = pass
                    .weights
                    .vector(*weight)
                    .reshape([1, 1, self.weight_width]);
                ((0..self.sizes.experts).map(gate).collect(), Some(weight))
            }
        };
        let aggregated = self.aggregate(pass, experts, scores);
        Ok(match cross.zip(cross_weight) {
            Some(((own, _), weight)) => aggregated + own * weight,
            None => aggregated,
        })
    }

    /// `sum_i softmax_i((scores_i + noise_i) / temperature) * LN_i(expert_i)`. Scores are broadcast
    /// over what they lack of `[batch, length, hidden]`.
    fn aggregate(&self, pass: &Pass, experts: &[Tensor<3>], scores: Vec<Tensor<3>>) -> Tensor<3> {
        let shape = experts[0].dims();
        let noise = if self.sizes.noise {
            pass.noise(&self.site, self.call, self.sizes.experts, shape)
        } else {
            None
        };
        let full_size = noise.is_some();
        let inverse = pass
            .weights
            .vector(self.temperature)
            .reshape([1, 1, 1])
            .recip();
        let scores: Vec<Tensor<3>> = match noise {
            Some(noise) => scores.into_iter().zip(noise).map(|(s, n)| s + n).collect(),
            None => scores,
        };
        let scores: Vec<Tensor<3>> = scores.into_iter().map(|s| s * inverse.clone()).collect();
        let max = scores
            .iter()
            .map(|s| s.clone().detach())
            .reduce(Tensor::max_pair);
        let max = max.expect("a manager has at least one expert");
        let exp: Vec<Tensor<3>> = scores
            .into_iter()
            .map(|s| (s - max.clone()).exp())
            .collect();
        let sum = exp.iter().cloned().reduce(|a, b| a + b).expect("as above");
        let inverse_sum = sum.recip();
        // Small weights are normalised before they meet the experts, large ones behind them.
        let weights = exp.into_iter().map(|exp| {
            if full_size {
                exp
            } else {
                exp * inverse_sum.clone()
            }
        });
        let terms = weights
            .zip(experts.iter().zip(&self.expert_norms))
            .map(|(w, (x, norm))| {
                let (scale, shift) = norm.affine::<3>(pass);
                if w.dims()[1] == 1 {
                    // One weight per feature: fold it into scale and shift.
                    x.clone() * (scale * w.clone()) + shift * w
                } else {
                    (x.clone() * scale + shift) * w
                }
            });
        let total = terms.reduce(|a, b| a + b).expect("as above");
        if full_size {
            total * inverse_sum
        } else {
            total
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
    let (exp, sum) = exp_and_sum(q.matmul(k.swap_dims(1, 2)));
    let attended = exp.matmul(other) * sum.recip();
    Tensor::cat(vec![attended, own.clone()], 2)
}
