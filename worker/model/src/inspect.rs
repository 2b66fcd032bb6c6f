//! What trained managers do with their experts: average aggregation weights (paper section 4.4,
//! Figures 6, 7, 9, 10) and how alike consecutive managers are (section 3.2, Figure 3).
//!
//! Batches go through the encoder without dropout and noise; every manager shows what it aggregated,
//! and means over tokens are folded on the host in f64, in the order of the batches. Padding counts
//! for nothing. It refuses to know files and figures.

use burn::tensor::Tensor;

use belfry_configs::{Model, System};

use crate::cross_modal::Outputs;
use crate::draws::Draws;
use crate::error::ModelError;
use crate::manager::Aggregated;
use crate::pass::Pass;
use crate::tower::{Images, Inputs, ManagerTower};
use crate::weights::{Weights, read};

/// Text and image: the streams of the cross-modal encoder, in the order of their managers' calls.
const MODALITIES: [Modality; 2] = [Modality::Text, Modality::Image];

/// A stream of the cross-modal encoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Modality {
    /// Words.
    Text,
    /// Patches and the class token.
    Image,
}

/// What a manager weighs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A uni-modal layer, counted from 1.
    Expert(u32),
    /// A cross-modal layer below, counted from 1.
    Cross(u32),
}

/// One of the two parts of what a manager gives (paper Equation 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The weighted sum of uni-modal experts.
    Experts,
    /// The weighted sum of earlier cross-modal outputs.
    Cross,
}

/// The weight that a manager gives to a source, over all tokens and features.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WeightRow {
    /// The manager's stream.
    pub modality: Modality,
    /// The manager's cross-modal layer, counted from 1.
    pub layer: u32,
    /// What is weighed.
    pub source: Source,
    /// Mean.
    pub mean: f64,
    /// Standard deviation between tokens, of each token's mean over features; 0 where the weight
    /// is the same for all tokens.
    pub deviation: f64,
}

/// Cosine similarity of the same part of two consecutive managers, over all tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SimilarityRow {
    /// The managers' stream.
    pub modality: Modality,
    /// The upper manager's cross-modal layer, counted from 1.
    pub layer: u32,
    /// Which part.
    pub part: Part,
    /// Mean.
    pub mean: f64,
}

/// A mean and a deviation in the making.
#[derive(Clone, Copy, Debug, Default)]
struct Moments {
    count: f64,
    sum: f64,
    squares: f64,
}

impl Moments {
    /// Adds `values` weighed by `mask`; a single value stands for all tokens.
    fn add(&mut self, values: &[f32], mask: &[f32]) {
        let last = values.len() - 1;
        for (token, weight) in mask.iter().enumerate() {
            let (value, weight) = (f64::from(values[token.min(last)]), f64::from(*weight));
            self.count += weight;
            self.sum += weight * value;
            self.squares += weight * value * value;
        }
    }

    fn mean(&self) -> f64 {
        self.sum / self.count
    }

    fn deviation(&self) -> f64 {
        let mean = self.mean();
        (self.squares / self.count - mean * mean).max(0.0).sqrt()
    }
}

/// The numbers of one manager.
#[derive(Clone, Debug, Default)]
struct ManagerMoments {
    /// Of experts, then of cross outputs, oldest first.
    weights: Vec<Moments>,
    /// With the manager below.
    experts: Moments,
    cross: Moments,
}

/// Means over everything that was inspected.
#[derive(Clone, Debug)]
pub struct Inspection {
    /// Of text and image, by layer.
    managers: [Vec<ManagerMoments>; 2],
    /// Of text and image: experts, and uni-modal layers below the first of them.
    experts: [(usize, u32); 2],
    pairs: u64,
}

impl Inspection {
    /// Nothing seen yet.
    ///
    /// # Errors
    /// [`ModelError::NoManagers`] if the system has none.
    pub fn new(model: &Model) -> Result<Self, ModelError> {
        if model.system != System::ManagerTower {
            return Err(ModelError::NoManagers {
                system: model.system,
            });
        }
        let towers = [
            (model.text.managed, model.text.layers),
            (model.image.managed, model.image.layers),
        ];
        let none = vec![ManagerMoments::default(); model.cross_layers as usize];
        Ok(Inspection {
            managers: [none.clone(), none],
            experts: towers.map(|(managed, layers)| (managed as usize, layers - managed)),
            pairs: 0,
        })
    }

    /// Pairs that were looked at.
    pub fn pairs(&self) -> u64 {
        self.pairs
    }

    /// Average aggregation weights, by modality, layer and source.
    pub fn weights(&self) -> Vec<WeightRow> {
        let mut rows = Vec::new();
        for (side, modality) in MODALITIES.into_iter().enumerate() {
            let (experts, below) = self.experts[side];
            for (layer, manager) in self.managers[side].iter().enumerate() {
                let seen = manager.weights.len().saturating_sub(experts);
                for (i, moments) in manager.weights.iter().enumerate() {
                    rows.push(WeightRow {
                        modality,
                        layer: layer as u32 + 1,
                        source: match i.checked_sub(experts) {
                            None => Source::Expert(below + i as u32 + 1),
                            Some(cross) => Source::Cross((layer - seen + cross) as u32 + 1),
                        },
                        mean: moments.mean(),
                        deviation: moments.deviation(),
                    });
                }
            }
        }
        rows
    }

    /// Similarities of consecutive managers, by modality, part and layer. The first two managers
    /// share no cross-modal part.
    pub fn similarities(&self) -> Vec<SimilarityRow> {
        let mut rows = Vec::new();
        for (side, modality) in MODALITIES.into_iter().enumerate() {
            for part in [Part::Experts, Part::Cross] {
                for (layer, manager) in self.managers[side].iter().enumerate() {
                    let moments = match part {
                        Part::Experts => manager.experts,
                        Part::Cross => manager.cross,
                    };
                    if moments.count > 0.0 {
                        rows.push(SimilarityRow {
                            modality,
                            layer: layer as u32 + 1,
                            part,
                            mean: moments.mean(),
                        });
                    }
                }
            }
        }
        rows
    }
}

/// Watches the managers of one pass.
pub(crate) struct Observer<'a> {
    inspection: &'a mut Inspection,
    /// Of the text's tokens.
    text_mask: &'a [f32],
    /// What the managers below gave, of text and image.
    below: [Option<Aggregated>; 2],
}

impl Observer<'_> {
    /// Takes what manager number `call` (layer by layer, text before image) aggregated.
    pub fn see(&mut self, call: usize, aggregated: &Aggregated) -> Result<(), ModelError> {
        let (layer, side) = (call / 2, call % 2);
        let [batch, length, _] = aggregated.experts.dims();
        let everything = vec![1.0; batch * length];
        let mask = match MODALITIES[side] {
            Modality::Text => self.text_mask,
            Modality::Image => &everything,
        };
        let moments = &mut self.inspection.managers[side][layer];
        moments
            .weights
            .resize(aggregated.weights.len(), Moments::default());
        for (moments, weight) in moments.weights.iter_mut().zip(&aggregated.weights) {
            let by_token = read(weight.clone().mean_dim(2), "aggregation weights")?;
            moments.add(&by_token, mask);
        }
        if let Some(below) = &self.below[side] {
            let alike = cosine(&below.experts, &aggregated.experts)?;
            moments.experts.add(&alike, mask);
            if let Some((below, cross)) = below.cross.as_ref().zip(aggregated.cross.as_ref()) {
                moments.cross.add(&cosine(below, cross)?, mask);
            }
        }
        self.below[side] = Some(aggregated.clone());
        Ok(())
    }
}

/// Of each token.
fn cosine(a: &Tensor<3>, b: &Tensor<3>) -> Result<Vec<f32>, ModelError> {
    let dot = |a: &Tensor<3>, b: &Tensor<3>| (a.clone() * b.clone()).sum_dim(2);
    let lengths = (dot(a, a) * dot(b, b)).sqrt();
    read(dot(a, b) / lengths, "cosine similarities")
}

impl ManagerTower {
    /// Adds what the managers do with these pairs to `inspection`: captions `ids` and `text_mask`
    /// `[B, T]`, normalised `images` `[B, 3, S, S]`.
    ///
    /// # Errors
    /// [`ModelError`] if the vectors do not fit, before anything is computed.
    pub fn inspect(
        &self,
        weights: &Weights,
        (ids, text_mask): (&[i32], &[f32]),
        images: &[f32],
        inspection: &mut Inspection,
    ) -> Result<(), ModelError> {
        let sizes = self.batch_sizes();
        let batch = ids.len() / sizes.text_len;
        sizes.check_texts(batch, sizes.text_len, ids, text_mask)?;
        sizes.check_images("images", batch, images)?;
        inspection.pairs += batch as u64;
        let weights = weights.without_gradient();
        let mut pass = Pass::new(&weights, 0, Draws::Off, None);
        pass.observer = Some(Observer {
            inspection,
            text_mask,
            below: [None, None],
        });
        let inputs = Inputs {
            ids,
            text_mask,
            images: Images::Pixels {
                values: images,
                token_type: 1,
            },
            batch,
        };
        self.encode(&mut pass, &inputs, Outputs::All)?;
        Ok(())
    }
}
