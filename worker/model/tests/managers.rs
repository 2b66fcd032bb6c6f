//! Every manager against its formula (model_spec 5), restated plainly in f64, in layers and with
//! numbers of experts that no golden file has. Experts and cross-modal outputs come from the trace.

use belfry_configs::rng::{Key, Purpose};
use belfry_configs::{Manager, ManagerQuery, ManagerWeight, Model};
use belfry_model::{ClassifyBatch, Device, Draws, Labels, ManagerTower, Record, Trace, Weights};

mod tiny;
use tiny::{ANSWERS, PAIRS, TEXT_LEN, images, texts, vqa};

const TOLERANCE: f64 = 2e-5;
const EPSILON: f64 = 1e-5;

type Vector = Vec<f64>;

/// The parameters of one manager.
struct Params<'a> {
    tower: &'a ManagerTower,
    flat: &'a [f32],
    prefix: String,
}

impl Params<'_> {
    fn get(&self, name: &str) -> Vector {
        let full = format!("{}.{name}", self.prefix);
        let entry = self.tower.table().get(&full);
        let entry = entry.unwrap_or_else(|| panic!("no {full}"));
        let values = &self.flat[entry.offset..entry.offset + entry.len];
        values.iter().map(|v| f64::from(*v)).collect()
    }

    fn norm(&self, name: &str, x: &[f64]) -> Vector {
        let n = x.len() as f64;
        let mean = x.iter().sum::<f64>() / n;
        let variance = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
        let (scale, shift) = (
            self.get(&format!("{name}.weight")),
            self.get(&format!("{name}.bias")),
        );
        let deviation = (variance + EPSILON).sqrt();
        let one = |i: usize| (x[i] - mean) / deviation * scale[i] + shift[i];
        (0..x.len()).map(one).collect()
    }

    fn linear(&self, name: &str, x: &[f64]) -> Vector {
        let bias = self.get(&format!("{name}.bias"));
        let weight = self.get(&format!("{name}.weight"));
        let rows = weight.chunks(x.len()).zip(bias);
        rows.map(|(row, bias)| dot(row, x) + bias).collect()
    }

    /// Learned scores, one row per expert, as wide as a feature vector.
    fn rows(&self, count: usize, width: usize) -> Vec<Vector> {
        let scores = self.get("layer_scores");
        let rows = scores.chunks(scores.len() / count);
        rows.map(|row| spread(row, width)).collect()
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn spread(row: &[f64], width: usize) -> Vector {
    row.iter().copied().cycle().take(width).collect()
}

/// Softmax over the first axis, feature by feature, then the weighted sum of `items`.
fn mix(scores: &[Vector], temperature: f64, items: &[Vector]) -> Vector {
    let feature = |d: usize| {
        let exp: Vector = scores.iter().map(|s| (s[d] / temperature).exp()).collect();
        let sum: f64 = exp.iter().sum();
        exp.iter()
            .zip(items)
            .map(|(e, item)| e / sum * item[d])
            .sum()
    };
    (0..items[0].len()).map(feature).collect()
}

fn add(a: Vector, b: &[f64]) -> Vector {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

/// One token of a stream in one layer.
struct Token<'a> {
    model: &'a Model,
    /// This token in every expert, and each expert's first token.
    experts: Vec<Vector>,
    firsts: Vec<Vector>,
    /// This token in the own stream's outputs below, oldest first.
    own: Vec<Vector>,
    /// All tokens of the other stream's output below.
    other: Vec<Vector>,
}

impl Token<'_> {
    fn expected(&self, p: &Params) -> Vector {
        let n = self.experts.len();
        let width = self.experts[0].len();
        let norm = |(k, x): (usize, &Vector)| p.norm(&format!("LayerNorm.{k}"), x);
        let normed: Vec<Vector> = self.experts.iter().enumerate().map(norm).collect();
        let cross_norm = |(j, x): (usize, &Vector)| p.norm(&format!("LayerNorm.{}", n + j), x);
        let temperature = p.get("softmax_temperature")[0];
        match self.model.manager {
            Manager::SaeJoint => {
                let crossed = self.own.iter().enumerate().map(cross_norm);
                let items: Vec<Vector> = normed.into_iter().chain(crossed).collect();
                mix(&p.rows(items.len(), width), temperature, &items)
            }
            Manager::SaeSplit => {
                let crossed: Vec<Vector> = self.own.iter().enumerate().map(cross_norm).collect();
                let rows = p.rows(n + crossed.len(), width);
                let sum = mix(&rows[..n], temperature, &normed);
                if crossed.is_empty() {
                    return sum;
                }
                let temperature = p.get("softmax_temperature_cross")[0];
                add(sum, &mix(&rows[n..], temperature, &crossed))
            }
            kind => {
                let own = self
                    .own
                    .last()
                    .map(|x| p.norm(&format!("LayerNorm.{n}"), x));
                let Some(own) = own else {
                    return mix(&p.rows(n, width), temperature, &normed);
                };
                let (scores, weight) = if kind == Manager::Saue {
                    let mut rows = p.rows(n + 1, width);
                    let weight = rows.pop().unwrap();
                    (rows, weight)
                } else {
                    let weight = spread(&p.get("layer_scores_cross"), width);
                    (self.scores(p, &own, &normed), weight)
                };
                let cross: Vector = own.iter().zip(&weight).map(|(c, w)| c * w).collect();
                add(mix(&scores, temperature, &normed), &cross)
            }
        }
    }

    fn scores(&self, p: &Params, own: &[f64], normed: &[Vector]) -> Vec<Vector> {
        let width = own.len();
        let query = match self.model.manager_query {
            ManagerQuery::Visual => own.to_vec(),
            ManagerQuery::Fused => {
                let keys = self
                    .other
                    .iter()
                    .map(|e| p.norm("extra_query_LayerNorm", e));
                let keys: Vec<Vector> = keys.collect();
                let q = p.linear("fusion_attention.q_proj", own);
                let score = |e: &Vector| {
                    let k = p.linear("fusion_attention.k_proj", e);
                    vec![dot(&q, &k) / (width as f64).sqrt(); width]
                };
                let scores: Vec<Vector> = keys.iter().map(score).collect();
                [mix(&scores, 1.0, &keys), own.to_vec()].concat()
            }
        };
        match self.model.manager {
            Manager::ConcatAttention => normed
                .iter()
                .map(|v| p.linear("linear_controller", &[v.clone(), query.clone()].concat()))
                .collect(),
            Manager::CrossAttention => {
                let q = p.linear("layer_attention.q_proj", &query);
                let score = |(k, first): (usize, &Vector)| {
                    let first = p.norm(&format!("LayerNorm.{k}"), first);
                    let key = p.linear("layer_attention.k_proj", &first);
                    vec![dot(&q, &key) / (width as f64).sqrt(); width]
                };
                self.firsts.iter().enumerate().map(score).collect()
            }
            _ => {
                let gates = p.linear("linear_controller", &query);
                gates.into_iter().map(|g| vec![g; width]).collect()
            }
        }
    }
}

/// Row `[.., index, :]` of a record, counted over all axes but the last.
fn row(record: &Record, index: usize) -> Vector {
    let width = *record.shape.last().unwrap();
    let values = &record.values[index * width..][..width];
    values.iter().map(|v| f64::from(*v)).collect()
}

fn record<'a>(trace: &'a Trace, name: &str) -> &'a Record {
    let full = format!("pass0/{name}");
    let found = trace.records.iter().find(|r| r.name == full);
    found.unwrap_or_else(|| panic!("no {full}"))
}

/// Every token of every manager; the largest difference.
fn worst(model: &Model, tower: &ManagerTower, flat: &[f32], trace: &Trace) -> f64 {
    let mut worst = 0.0f64;
    for (stream, other) in [("text", "image"), ("image", "text")] {
        let experts = record(trace, &format!("{stream}_manager_input"));
        let [batch, n, length, _] = experts.shape[..] else {
            panic!("experts are stacked")
        };
        for layer in 0..model.cross_layers as usize {
            let ours = record(trace, &format!("{stream}_manager.{layer}"));
            let below = |stream: &str, i: usize| record(trace, &format!("{stream}_cross.{i}"));
            let params = Params {
                tower,
                flat,
                prefix: format!("cross_modal_{stream}_manager_tower.{layer}.manager_layer"),
            };
            for b in 0..batch {
                for l in 0..length {
                    let expert = |l: usize| move |k: usize| row(experts, (b * n + k) * length + l);
                    let token = Token {
                        model,
                        experts: (0..n).map(expert(l)).collect(),
                        firsts: (0..n).map(expert(0)).collect(),
                        own: (0..layer)
                            .map(|i| row(below(stream, i), b * length + l))
                            .collect(),
                        other: match layer.checked_sub(1) {
                            Some(i) => {
                                let other = below(other, i);
                                let keys = other.shape[1];
                                (0..keys).map(|k| row(other, b * keys + k)).collect()
                            }
                            None => Vec::new(),
                        },
                    };
                    let expected = token.expected(&params);
                    let differences = row(ours, b * length + l).into_iter().zip(expected);
                    for (ours, expected) in differences {
                        assert!((ours - expected).is_finite(), "layer {layer} of {stream}");
                        worst = worst.max((ours - expected).abs());
                    }
                }
            }
        }
    }
    worst
}

#[test]
fn every_manager_is_its_formula() {
    use Manager::*;
    let key = Key::new(1, Purpose::Pack);
    let (ids, text_mask) = texts(key, PAIRS);
    let batch = ClassifyBatch {
        micro_batches: 1,
        pairs: PAIRS,
        text_len: TEXT_LEN,
        ids,
        text_mask,
        images: vec![images(key.with(1), PAIRS)],
        labels: Labels::Scores(vec![0.5; PAIRS * ANSWERS as usize]),
    };
    for manager in Manager::ALL {
        for manager_query in [ManagerQuery::Visual, ManagerQuery::Fused] {
            for manager_weight in [ManagerWeight::Scalar, ManagerWeight::Vector] {
                if manager == ConcatAttention && manager_weight == ManagerWeight::Scalar {
                    continue;
                }
                let mut model = Model {
                    manager,
                    manager_query,
                    manager_weight,
                    cross_layers: 4,
                    ..vqa()
                };
                model.text.managed = 3;
                let tower = ManagerTower::new(&model, TEXT_LEN).unwrap();
                let mut flat = tower.table().init(3);
                // Fresh weights are all alike: every row, scale and temperature another number.
                for entry in tower.table().entries() {
                    if entry.name.contains("manager_tower") {
                        let key = key.with_name(&entry.name);
                        let values = &mut flat[entry.offset..entry.offset + entry.len];
                        for (i, value) in values.iter_mut().enumerate() {
                            *value += 0.6 * (key.uniform(i as u64) - 0.5);
                        }
                    }
                }
                let weights = Weights::load(tower.table(), &flat, &Device::flex()).unwrap();
                let traced = tower.classify_trace(&weights, &batch, Draws::Off);
                let (_, trace) = traced.unwrap();
                let error = worst(&model, &tower, &flat, &trace);
                println!("{manager:?} {manager_query:?} {manager_weight:?}: {error:.1e}");
                assert!(
                    error < TOLERANCE,
                    "{manager:?} {manager_query:?} {manager_weight:?}: {error}"
                );
            }
        }
    }
}
