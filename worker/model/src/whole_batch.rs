//! The contrast of a whole global batch, row by row (model_spec 8).
//!
//! Every row's features in; out, for any rows of it, their loss, the gradient with respect to their
//! features (as queries, and as keys that every row is compared with), their share of the
//! temperature's gradient, and their hard negatives. All of it is a function of the whole batch and
//! of the row's place: sums run in f64 over all rows in their order, so it does not matter how rows
//! are divided among micro-batches, lanes and workers, nor who asks. Price: everybody who asks
//! computes the whole matrix of similarities, rows x rows x width products (a batch of 512 at width
//! 256: 67 million). It refuses to know where features come from.

use belfry_configs::Task;
use belfry_configs::rng::Key;
use rayon::prelude::*;

use crate::batch::expect;
use crate::contrast::{Features, TEMPERATURE_BOUNDS, add_scaled, dot, draw_place};
use crate::error::ModelError;
use crate::heads::Heads;
use crate::tower::ManagerTower;
use crate::weights::Weights;

/// The contrast of all rows of a global batch with each other. B rows, of width W.
#[derive(Debug)]
pub struct WholeBatch {
    /// Of text and image, `[B, W]`.
    features: Features,
    width: usize,
    /// The image of each row: rows of one image belong together.
    images: Vec<u64>,
    /// Whether a row belongs to itself alone (pre-training).
    one_hot: bool,
    /// How many rows belong together with each row, itself included.
    positives: Vec<f64>,
    temperature: f64,
    /// Texts against images over the temperature, `[B, B]`.
    logits: Vec<f64>,
    /// Logarithm of the sum of exponentials of each text's row and of each image's column.
    log_sums: [Vec<f64>; 2],
    key: Key,
}

/// What the contrast of the whole batch means for some of its rows: the contrast's part of a
/// micro-batch's gradient. Means over these rows, so that the mean over equal micro-batches is that
/// over the whole batch.
#[derive(Clone, Debug, PartialEq)]
pub struct ContrastSlopes {
    /// Mean of the two directions' cross-entropies.
    pub loss: f64,
    /// Gradient of the whole batch's loss with respect to the rows' features of text and image,
    /// `[rows, W]` each.
    pub features: [Vec<f32>; 2],
    /// The rows' share of the temperature's gradient.
    pub temperature: f64,
}

/// Places in the whole batch of one hard negative for each of some rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HardNegatives {
    /// A text for each row's image.
    pub texts: Vec<usize>,
    /// An image for each row's text.
    pub images: Vec<usize>,
}

impl ManagerTower {
    /// The contrast of a whole batch at the temperature of `weights`. `features` are of text and
    /// image, `[rows, contrastive]` of length 1 each, as [`ManagerTower::contrastive_features`] gives
    /// them; `images` are every row's image; hard negatives are drawn from `key`.
    ///
    /// # Errors
    /// [`ModelError::Task`] if the model has no contrastive heads; [`ModelError::Length`] if features
    /// and images are not of as many rows.
    pub fn whole_batch(
        &self,
        weights: &Weights,
        features: [Vec<f32>; 2],
        images: Vec<u64>,
        key: Key,
    ) -> Result<WholeBatch, ModelError> {
        let Heads::Contrast { itc, .. } = &self.heads else {
            return Err(self.other_task("retrieval or pretrain_itc"));
        };
        let width = self.sizes.contrastive;
        for side in &features {
            expect(
                "features of the whole batch",
                images.len() * width,
                side.len(),
            )?;
        }
        let [low, high] = TEMPERATURE_BOUNDS;
        let temperature = weights.number(itc.temperature).clamp(low, high);
        let one_hot = self.task == Task::PretrainItc;
        Ok(WholeBatch::new(
            features,
            images,
            (temperature, one_hot),
            key,
        ))
    }
}

impl WholeBatch {
    pub(crate) fn new(
        features: Features,
        images: Vec<u64>,
        (temperature, one_hot): (f32, bool),
        key: Key,
    ) -> Self {
        let rows = images.len();
        let width = features[0].len() / rows.max(1);
        let temperature = f64::from(temperature);
        let mut logits = vec![0.0; rows * rows];
        let keys: Vec<&[f32]> = features[1].chunks(width.max(1)).collect();
        logits
            .par_chunks_mut(rows.max(1))
            .zip(features[0].par_chunks(width.max(1)))
            .for_each(|(logits, query)| {
                for (logit, key) in logits.iter_mut().zip(&keys) {
                    *logit = dot(query, key) / temperature;
                }
            });
        let mut whole = WholeBatch {
            width,
            one_hot,
            positives: Vec::new(),
            temperature,
            logits,
            log_sums: [Vec::new(), Vec::new()],
            key,
            features,
            images,
        };
        let count = |row| {
            (0..rows)
                .filter(|place| whole.together(row, *place))
                .count() as f64
        };
        whole.positives = (0..rows).into_par_iter().map(count).collect();
        whole.log_sums = [0, 1].map(|side| {
            let sums = (0..rows).into_par_iter();
            sums.map(|row| log_sum((0..rows).map(|place| whole.logit(side, row, place))))
                .collect()
        });
        whole
    }

    /// Rows of the batch.
    pub fn rows(&self) -> usize {
        self.images.len()
    }

    /// What the contrast means for these rows.
    pub fn slopes(&self, rows: std::ops::Range<usize>) -> ContrastSlopes {
        let count = rows.len() as f64;
        let all: Vec<RowContrast> = rows.into_par_iter().map(|row| self.row(row)).collect();
        let features = [0, 1].map(|side| {
            let slopes = all.iter().flat_map(|row| &row.features[side]);
            slopes.map(|slope| (slope / count) as f32).collect()
        });
        let mean = |of: fn(&RowContrast) -> f64| all.iter().map(of).sum::<f64>() / count;
        ContrastSlopes {
            loss: mean(|row| row.loss),
            features,
            temperature: mean(|row| row.temperature),
        }
    }

    /// One hard negative of each kind for these rows, drawn by similarity from the whole batch but
    /// for what belongs together. A function of the row's place and the key.
    pub fn negatives(&self, rows: std::ops::Range<usize>) -> HardNegatives {
        let draw = |side: usize, name: &str| {
            let key = self.key.with_name(name);
            let drawn = rows.clone().into_par_iter().map(|row| {
                let weight = |place| match self.together(row, place) {
                    true => 0.0,
                    false => self.probability(side, row, place),
                };
                let weights = (0..self.rows()).map(weight).collect();
                draw_place(weights, key.uniform(row as u64))
            });
            drawn.collect()
        };
        HardNegatives {
            texts: draw(1, "texts"),
            images: draw(0, "images"),
        }
    }

    /// Loss and gradients of one row, as a term of a sum over rows.
    fn row(&self, row: usize) -> RowContrast {
        let mut found = RowContrast {
            loss: 0.0,
            features: [vec![0.0; self.width], vec![0.0; self.width]],
            temperature: 0.0,
        };
        for side in [0, 1] {
            let others = self.features[1 - side].chunks(self.width);
            for (place, other) in others.enumerate() {
                let target = self.target(row, place);
                let logit = self.logit(side, row, place);
                let asked = self.probability(side, row, place) - target;
                // The other direction: this row as a key of row `place`.
                let asking = self.probability(1 - side, place, row) - target;
                if target > 0.0 {
                    found.loss -= 0.5 * target * (logit - self.log_sums[side][row]);
                }
                found.temperature -= 0.5 * asked * logit / self.temperature;
                let slope = 0.5 * (asked + asking) / self.temperature;
                add_scaled(&mut found.features[side], other, slope);
            }
        }
        found
    }

    /// Whether two rows belong together.
    fn together(&self, row: usize, place: usize) -> bool {
        row == place || (!self.one_hot && self.images[row] == self.images[place])
    }

    /// The probability that `place` should get from `row`. Rows that belong together are equally
    /// many for each of them, so it is the same from there to here.
    fn target(&self, row: usize, place: usize) -> f64 {
        match self.together(row, place) {
            true => self.positives[row].recip(),
            false => 0.0,
        }
    }

    /// Of text `row` with image `place` (side 0), or of image `row` with text `place`.
    fn logit(&self, side: usize, row: usize, place: usize) -> f64 {
        let (text, image) = if side == 0 {
            (row, place)
        } else {
            (place, row)
        };
        self.logits[text * self.rows() + image]
    }

    /// What `row` gives to `place` of the other side.
    fn probability(&self, side: usize, row: usize, place: usize) -> f64 {
        (self.logit(side, row, place) - self.log_sums[side][row]).exp()
    }
}

struct RowContrast {
    loss: f64,
    features: [Vec<f64>; 2],
    temperature: f64,
}

fn log_sum(logits: impl Iterator<Item = f64> + Clone) -> f64 {
    let max = logits.clone().fold(f64::NEG_INFINITY, f64::max);
    max + logits.map(|logit| (logit - max).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contrast::{Contrast, Positives};
    use belfry_configs::rng::Purpose;

    const WIDTH: usize = 4;

    fn features(rows: usize) -> Features {
        let key = Key::new(3, Purpose::Pack);
        [0, 1].map(|side| {
            let value = |i: usize| key.with(side).normal(i as u64);
            (0..rows * WIDTH).map(value).collect()
        })
    }

    /// Against the contrast of the whole batch as one micro-batch.
    #[test]
    fn parts_of_the_batch_add_up_to_the_contrast_of_one_micro_batch() {
        let images = vec![7, 8, 7, 9, 8, 7];
        let features = features(images.len());
        for one_hot in [false, true] {
            let key = Key::new(5, Purpose::Negatives);
            let whole = WholeBatch::new(features.clone(), images.clone(), (0.3, one_hot), key);
            let positives = Positives {
                images: &images,
                first: 0,
                one_hot,
            };
            let targets = positives.targets(6);
            let one = Contrast::new(&features, &features, WIDTH, &targets, 0.3);
            for part in [1, 2, 3, 6] {
                let parts = (0..6).step_by(part).map(|first| first..first + part);
                let (mut loss, mut temperature, mut negatives) =
                    (0.0, 0.0, HardNegatives::default());
                for rows in parts {
                    let slopes = whole.slopes(rows.clone());
                    let share = part as f64 / 6.0;
                    loss += share * slopes.loss;
                    temperature += share * slopes.temperature;
                    for side in [0, 1] {
                        for (i, slope) in slopes.features[side].iter().enumerate() {
                            let at = rows.start * WIDTH + i;
                            let expected = one.own[side][at] + one.group[side][at];
                            let slope = *slope * share as f32;
                            assert!((slope - expected).abs() < 1e-6, "{slope} {expected}");
                        }
                    }
                    let drawn = whole.negatives(rows);
                    negatives.texts.extend(drawn.texts);
                    negatives.images.extend(drawn.images);
                }
                assert!((loss - one.loss).abs() < 1e-6);
                assert!((temperature - one.temperature).abs() < 1e-6);
                let draw = |side, name| one.draw(side, &positives, 0..6, key.with_name(name));
                assert_eq!(negatives.texts, draw(1, "texts"));
                assert_eq!(negatives.images, draw(0, "images"));
            }
        }
    }

    #[test]
    fn hard_negatives_are_of_other_images_where_there_are_any() {
        let images = vec![1, 1, 2, 1];
        for number in 0..50 {
            let key = Key::new(number, Purpose::Negatives);
            let whole = WholeBatch::new(features(4), images.clone(), (0.1, false), key);
            let drawn = whole.negatives(0..4);
            for (row, place) in drawn.texts.iter().chain(&drawn.images).enumerate() {
                assert_ne!(images[row % 4], images[*place], "{drawn:?}");
            }
            let alike = WholeBatch::new(features(3), vec![1; 3], (0.1, false), key);
            assert!(alike.negatives(0..3).texts.iter().all(|place| *place < 3));
        }
    }
}
