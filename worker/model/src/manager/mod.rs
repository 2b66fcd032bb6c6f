//! Managers: aggregation of uni-modal experts for one cross-modal layer (model_spec 5).
//!
//! Stands between the towers and a cross-modal layer. Experts come normalised (mean 0, variance 1
//! over features), once for all managers; each manager brings its own scale and shift. The stack
//! `[batch, experts, length, hidden]` is never built: experts are added one by one. Where the
//! weights of an adaptive manager come from is in `scores`.

mod scores;

use burn::tensor::Tensor;

use crate::error::ModelError;
use crate::layers::{LayerNorm, normalise};
use crate::params::{Builder, Init, ParamId};
use crate::pass::Pass;
use belfry_configs::{Manager as Kind, ManagerQuery, ManagerWeight, Model};

use scores::Gate;

/// Layer norm epsilon of everything in a manager.
pub(crate) const EPSILON: f32 = 1e-5;

/// Sizes and kind of a stream's managers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ManagerSizes {
    pub kind: Kind,
    pub query: ManagerQuery,
    pub weight: ManagerWeight,
    pub noise: bool,
    pub experts: usize,
    pub hidden: usize,
    /// Managers of both streams.
    pub calls: usize,
}

impl ManagerSizes {
    pub fn new(config: &Model, experts: u32) -> Self {
        ManagerSizes {
            kind: config.manager,
            query: config.manager_query,
            weight: config.manager_weight,
            noise: config.manager_noise,
            experts: experts as usize,
            hidden: config.hidden as usize,
            calls: 2 * config.cross_layers as usize,
        }
    }

    /// Width of a weight: hidden, or 1 for scalar weights.
    fn weight_width(&self) -> usize {
        match self.weight {
            ManagerWeight::Scalar => 1,
            ManagerWeight::Vector => self.hidden,
        }
    }
}

/// Where the weights of experts and of earlier cross-modal outputs come from.
#[derive(Clone, Debug)]
enum Weighting {
    /// Learned rows under one softmax, experts' and cross outputs' alike (SAE).
    Joint { rows: ParamId },
    /// Learned rows; the cross outputs' have their own softmax and temperature (SAE split).
    Split { rows: ParamId, cross: ParamId },
    /// Learned rows; the last one is the previous cross output's and meets no softmax (SAUE, and
    /// layer 0 of every other manager, which has no cross output).
    Static { rows: ParamId },
    /// Generated per token; `cross` weighs the previous cross output (AAUE and its like).
    Adaptive { gate: Gate, cross: ParamId },
}

/// One manager.
#[derive(Clone, Debug)]
pub(crate) struct Manager {
    /// Of the experts, then of the earlier cross-modal outputs that this manager looks at.
    norms: Vec<LayerNorm>,
    weighting: Weighting,
    temperature: ParamId,
    sizes: ManagerSizes,
    site: String,
    /// Number of this manager in call order.
    call: usize,
}

/// What the cross-modal layers below gave, oldest first: own stream and other stream,
/// `[batch, length, hidden]` each. Empty in layer 0.
#[derive(Clone, Copy)]
pub(crate) struct Below<'a> {
    pub own: &'a [Tensor<3>],
    pub other: &'a [Tensor<3>],
}

impl Manager {
    pub fn new(b: &mut Builder, layer: usize, call: usize, sizes: ManagerSizes) -> Self {
        b.at(format!("{layer}.manager_layer"), |b| {
            let n = sizes.experts;
            let seen = match sizes.kind {
                Kind::SaeJoint | Kind::SaeSplit => layer,
                _ => layer.min(1),
            };
            let norm = |i| LayerNorm::new(b, &format!("LayerNorm.{i}"), sizes.hidden, EPSILON);
            let norms = (0..n + seen).map(norm).collect();
            Manager {
                norms,
                weighting: Weighting::new(b, layer, seen, sizes),
                temperature: b.leaf("softmax_temperature", &[1], Init::Constant(1.0)),
                sizes,
                site: b.name("noise"),
                call,
            }
        })
    }

    /// # Shapes
    /// experts (normalised) `[batch, length, hidden]` each → `[batch, length, hidden]`
    pub fn forward(
        &self,
        pass: &mut Pass,
        experts: &[Tensor<3>],
        below: Below,
    ) -> Result<Tensor<3>, ModelError> {
        let aggregated = self.aggregate(pass, experts, below);
        pass.show_manager(self.call, &aggregated)?;
        Ok(match aggregated.cross {
            Some(cross) => aggregated.experts + cross,
            None => aggregated.experts,
        })
    }

    fn aggregate(&self, pass: &Pass, experts: &[Tensor<3>], below: Below) -> Aggregated {
        let n = self.sizes.experts;
        let (own_norms, cross_norms) = self.norms.split_at(n);
        let seen = &below.own[below.own.len() - cross_norms.len()..];
        match &self.weighting {
            Weighting::Joint { rows } => {
                let all = experts.len() + seen.len();
                let mut weights = self.weigh(pass, experts, self.rows(pass, *rows, 0, all));
                let crossed: Vec<Tensor<3>> = normalised(seen).collect();
                let shown = weights.shown(pass);
                let cross_weights = weights.split_off(n);
                let cross = weighted(pass, &crossed, cross_norms, cross_weights);
                Aggregated {
                    experts: weighted(pass, experts, own_norms, weights)
                        .expect("a manager has experts"),
                    cross,
                    weights: shown,
                }
            }
            Weighting::Split { rows, cross } => {
                let scores = self.rows(pass, *rows, 0, n);
                let mut aggregated = self.mix(pass, experts, own_norms, scores);
                if !seen.is_empty() {
                    let scores = self.rows(pass, *rows, n, seen.len());
                    let weights = softmax(pass, scores, *cross, false);
                    let crossed: Vec<Tensor<3>> = normalised(seen).collect();
                    aggregated.weights.extend(weights.shown(pass));
                    aggregated.cross = weighted(pass, &crossed, cross_norms, weights);
                }
                aggregated
            }
            Weighting::Static { rows } => {
                let cross = norm_last(pass, seen, cross_norms);
                let mut scores = self.rows(pass, *rows, 0, n + seen.len());
                let weight = scores.split_off(n).pop();
                let aggregated = self.mix(pass, experts, own_norms, scores);
                match cross.zip(weight) {
                    Some((cross, weight)) => aggregated.with_cross(pass, cross, weight),
                    None => aggregated,
                }
            }
            Weighting::Adaptive { gate, cross } => {
                let own = norm_last(pass, seen, cross_norms)
                    .expect("adaptive managers stand above layer 0 only");
                let other = below.other.last().expect("as long as the own stream's");
                let scores = gate.scores(pass, &own, other, (experts, own_norms));
                let weight = pass.weights.vector(*cross);
                let weight = weight.reshape([1, 1, self.sizes.weight_width()]);
                let aggregated = self.mix(pass, experts, own_norms, scores);
                aggregated.with_cross(pass, own, weight)
            }
        }
    }

    /// Rows of learned scores, `[1, 1, weight width]` each.
    fn rows(&self, pass: &Pass, rows: ParamId, first: usize, count: usize) -> Vec<Tensor<3>> {
        let width = self.sizes.weight_width();
        let row = |i| pass.weights.part(rows, i).reshape([1, 1, width]);
        (first..first + count).map(row).collect()
    }

    /// `sum_i softmax_i((scores_i + noise_i) / temperature) * LN_i(expert_i)`.
    fn mix(
        &self,
        pass: &Pass,
        experts: &[Tensor<3>],
        norms: &[LayerNorm],
        scores: Vec<Tensor<3>>,
    ) -> Aggregated {
        let weights = self.weigh(pass, experts, scores);
        Aggregated {
            weights: weights.shown(pass),
            experts: weighted(pass, experts, norms, weights).expect("a manager has experts"),
            cross: None,
        }
    }

    /// `softmax((scores + noise) / temperature)`. Scores are broadcast over what they lack of
    /// `[batch, length, hidden]`; noise goes to the uni-modal experts, which come first.
    fn weigh(&self, pass: &Pass, experts: &[Tensor<3>], scores: Vec<Tensor<3>>) -> Weights {
        let shape = experts[0].dims();
        let noise = if self.sizes.noise {
            let calls = (self.call, self.sizes.calls);
            pass.noise(&self.site, calls, self.sizes.experts, shape)
        } else {
            None
        };
        let full_size = noise.is_some()
            || matches!(&self.weighting, Weighting::Adaptive { gate, .. } if gate.is_full_size());
        let scores = match noise {
            Some(noise) => disturb(scores, noise, shape),
            None => scores,
        };
        softmax(pass, scores, self.temperature, full_size)
    }
}

/// What a manager makes of its experts: the two parts of paper Equation 4.
#[derive(Clone, Debug)]
pub(crate) struct Aggregated {
    /// Of uni-modal experts, `[batch, length, hidden]`.
    pub experts: Tensor<3>,
    /// Of earlier cross-modal outputs; nothing in layer 0.
    pub cross: Option<Tensor<3>>,
    /// Of experts, then of earlier outputs, broadcast over `[batch, length, hidden]`; empty unless
    /// somebody looks.
    pub weights: Vec<Tensor<3>>,
}

impl Aggregated {
    /// With the normed previous cross output and its weight.
    fn with_cross(mut self, pass: &Pass, cross: Tensor<3>, weight: Tensor<3>) -> Self {
        if pass.observer.is_some() {
            self.weights.push(weight.clone());
        }
        self.cross = Some(cross * weight);
        self
    }
}

impl Weighting {
    fn new(b: &mut Builder, layer: usize, seen: usize, sizes: ManagerSizes) -> Self {
        let n = sizes.experts;
        let shape = [1, n + seen, 1, sizes.weight_width()];
        let rows = |b: &mut Builder, init| b.leaves("layer_scores", &shape, init, n + seen);
        let one = Init::Constant(1.0);
        match sizes.kind {
            Kind::SaeJoint => Weighting::Joint {
                rows: rows(b, Init::Constant(1.0 / (n + seen) as f32)),
            },
            Kind::SaeSplit => {
                let init = Init::ManagerScores {
                    experts: n,
                    cross: 1.0 / seen.max(1) as f32,
                };
                let name = "softmax_temperature_cross";
                Weighting::Split {
                    rows: rows(b, init),
                    cross: if seen == 0 {
                        b.unused(name, &[1], one)
                    } else {
                        b.leaf(name, &[1], one)
                    },
                }
            }
            kind if kind == Kind::Saue || layer == 0 => {
                b.unused("softmax_temperature_cross", &[1], one);
                let init = Init::ManagerScores {
                    experts: n,
                    cross: 1.0,
                };
                Weighting::Static {
                    rows: rows(b, init),
                }
            }
            kind => {
                // Only the authors' own adaptive manager carries the unused temperature: without
                // it the visual query has Table 6's parameter count.
                if kind == Kind::Aaue && sizes.query == ManagerQuery::Fused {
                    b.unused("softmax_temperature_cross", &[1], one);
                }
                let shape = [1, 1, 1, sizes.weight_width()];
                Weighting::Adaptive {
                    gate: Gate::new(b, sizes),
                    cross: b.leaf("layer_scores_cross", &shape, one),
                }
            }
        }
    }
}

/// Scores of full size: the first ones with their noise, the others as they are.
fn disturb(scores: Vec<Tensor<3>>, noise: Vec<Tensor<3>>, shape: [usize; 3]) -> Vec<Tensor<3>> {
    let mut noise = noise.into_iter();
    let scores = scores.into_iter().map(|s| match noise.next() {
        Some(noise) => s + noise,
        None => s.expand(shape),
    });
    scores.collect()
}

/// Weights before they meet their experts.
struct Weights {
    /// One per expert; where `inverse_sum` stands, not yet divided.
    parts: Vec<Tensor<3>>,
    inverse_sum: Option<Tensor<3>>,
}

impl Weights {
    /// The weights of what stands at `at` and behind.
    fn split_off(&mut self, at: usize) -> Self {
        Weights {
            parts: self.parts.split_off(at),
            inverse_sum: self.inverse_sum.clone(),
        }
    }

    /// Divided, if somebody looks.
    fn shown(&self, pass: &Pass) -> Vec<Tensor<3>> {
        if pass.observer.is_none() {
            return Vec::new();
        }
        let divided = |part: &Tensor<3>| match &self.inverse_sum {
            Some(inverse_sum) => part.clone() * inverse_sum.clone(),
            None => part.clone(),
        };
        self.parts.iter().map(divided).collect()
    }
}

/// Softmax over the experts of `scores / temperature`. Small weights are normalised before they
/// meet the experts, weights of full size behind them.
fn softmax(pass: &Pass, scores: Vec<Tensor<3>>, temperature: ParamId, full_size: bool) -> Weights {
    let inverse = pass.weights.vector(temperature);
    let inverse = inverse.reshape([1, 1, 1]).recip();
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
    if full_size {
        return Weights {
            parts: exp,
            inverse_sum: Some(inverse_sum),
        };
    }
    let parts = exp.into_iter().map(|exp| exp * inverse_sum.clone());
    Weights {
        parts: parts.collect(),
        inverse_sum: None,
    }
}

/// `sum_i weights_i * LN_i(expert_i)` of normalised experts, if there are any.
fn weighted(
    pass: &Pass,
    experts: &[Tensor<3>],
    norms: &[LayerNorm],
    weights: Weights,
) -> Option<Tensor<3>> {
    let terms = weights
        .parts
        .into_iter()
        .zip(experts.iter().zip(norms))
        .map(|(w, (x, norm))| {
            let (scale, shift) = norm.affine::<3>(pass);
            if w.dims()[1] == 1 {
                // One weight per feature: fold it into scale and shift.
                x.clone() * (scale * w.clone()) + shift * w
            } else {
                (x.clone() * scale + shift) * w
            }
        });
    let total = terms.reduce(|a, b| a + b)?;
    Some(match weights.inverse_sum {
        Some(inverse_sum) => total * inverse_sum,
        None => total,
    })
}

fn normalised(outputs: &[Tensor<3>]) -> impl Iterator<Item = Tensor<3>> + '_ {
    outputs.iter().map(|x| normalise(x.clone(), EPSILON))
}

/// The layer norm of the previous cross output; nothing in layer 0.
fn norm_last(pass: &Pass, seen: &[Tensor<3>], norms: &[LayerNorm]) -> Option<Tensor<3>> {
    let (x, norm) = seen.last().zip(norms.last())?;
    Some(norm.forward(pass, x.clone()))
}
