//! The contrastive loss of one micro-batch against its group, and the draw of hard negatives
//! (model_spec 8).
//!
//! Features in, losses and gradients out, all on the host: similarities are few numbers beside the
//! network, and like every loss they are folded in f64 in row order. It refuses to know where the
//! group's features come from.

use belfry_configs::rng::Key;

/// The temperature stays within these bounds.
pub(crate) const TEMPERATURE_BOUNDS: [f32; 2] = [0.001, 0.5];
/// Added to all weights of a draw when none is left.
const LAST_RESORT: f64 = 1e-5;

/// Text and image features, `[rows, width]` each.
pub(crate) type Features = [Vec<f32>; 2];

/// Which pairs of (own row, row of the group) belong together.
pub(crate) struct Positives<'a> {
    /// The image of every row of the group.
    pub images: &'a [u64],
    /// The place of the first own row.
    pub first: usize,
    /// Whether a row belongs to itself alone, whatever image the others have (pre-training).
    pub one_hot: bool,
}

impl Positives<'_> {
    fn is(&self, row: usize, place: usize) -> bool {
        let own = self.first + row;
        place == own || (!self.one_hot && self.images[place] == self.images[own])
    }

    /// Probability that each row of the group should get, `[own rows, group]`.
    pub fn targets(&self, rows: usize) -> Vec<f32> {
        let mut targets = Vec::with_capacity(rows * self.images.len());
        for row in 0..rows {
            let places = 0..self.images.len();
            let count = places.clone().filter(|p| self.is(row, *p)).count();
            targets.extend(places.map(|place| match self.is(row, place) {
                true => 1.0 / count as f32,
                false => 0.0,
            }));
        }
        targets
    }
}

/// What the contrast of own rows against the group gives.
pub(crate) struct Contrast {
    /// Own texts against the group's images, and own images against its texts: `[rows, group]`.
    pub logits: [Vec<f32>; 2],
    /// Mean of the two directions' mean cross-entropies.
    pub loss: f64,
    /// Its gradient with respect to the own rows as queries.
    pub own: Features,
    /// Its gradient with respect to the group's rows.
    pub group: Features,
    /// Its gradient with respect to the temperature.
    pub temperature: f64,
}

impl Contrast {
    /// `width` is that of a feature, `targets` are `[own rows, group]`.
    pub fn new(
        own: &Features,
        group: &Features,
        width: usize,
        targets: &[f32],
        temperature: f32,
    ) -> Self {
        let mut contrast = Contrast {
            logits: [Vec::new(), Vec::new()],
            loss: 0.0,
            own: [vec![0.0; own[0].len()], vec![0.0; own[1].len()]],
            group: [vec![0.0; group[0].len()], vec![0.0; group[1].len()]],
            temperature: 0.0,
        };
        for side in [0, 1] {
            let other = 1 - side;
            let queries: Vec<&[f32]> = own[side].chunks(width).collect();
            let keys: Vec<&[f32]> = group[other].chunks(width).collect();
            let (mut own_slopes, mut group_slopes) = (
                vec![0.0f64; own[side].len()],
                vec![0.0f64; group[other].len()],
            );
            // Both directions' means, and the mean of the two.
            let weight = 0.5 / queries.len() as f64;
            for (row, query) in queries.iter().enumerate() {
                let logits = keys
                    .iter()
                    .map(|key| dot(query, key) / f64::from(temperature));
                let logits: Vec<f64> = logits.collect();
                let targets = &targets[row * keys.len()..(row + 1) * keys.len()];
                let probabilities = softmax(&logits);
                for (place, (p, target)) in probabilities.iter().zip(targets).enumerate() {
                    let target = f64::from(*target);
                    if target > 0.0 {
                        contrast.loss -= weight * target * p.ln();
                    }
                    let slope = (p - target) * weight / f64::from(temperature);
                    contrast.temperature -= slope * logits[place];
                    add_scaled(&mut own_slopes[row * width..][..width], keys[place], slope);
                    add_scaled(&mut group_slopes[place * width..][..width], query, slope);
                }
                contrast.logits[side].extend(logits.iter().map(|l| *l as f32));
            }
            contrast.own[side] = own_slopes.iter().map(|s| *s as f32).collect();
            contrast.group[other] = group_slopes.iter().map(|s| *s as f32).collect();
        }
        contrast
    }

    /// One hard negative per own row of a side, drawn by its similarity: a place in the group.
    /// `candidates` are the places that may be drawn from.
    pub fn draw(
        &self,
        side: usize,
        positives: &Positives,
        candidates: std::ops::Range<usize>,
        key: Key,
    ) -> Vec<usize> {
        let places = positives.images.len();
        let draw = |(row, logits): (usize, &[f32])| {
            let logits: Vec<f64> = logits.iter().map(|l| f64::from(*l)).collect();
            let mut weights = softmax(&logits)[candidates.clone()].to_vec();
            for (weight, place) in weights.iter_mut().zip(candidates.clone()) {
                if positives.is(row, place) {
                    *weight = 0.0;
                }
            }
            candidates.start + draw_place(weights, key.uniform(row as u64))
        };
        self.logits[side]
            .chunks(places)
            .enumerate()
            .map(draw)
            .collect()
    }
}

/// A place drawn by its weight; where no weight is left, any place. `uniform` lies in [0, 1).
pub(crate) fn draw_place(mut weights: Vec<f64>, uniform: f32) -> usize {
    if weights.iter().all(|w| *w == 0.0) {
        weights.iter_mut().for_each(|w| *w += LAST_RESORT);
    }
    let total: f64 = weights.iter().sum();
    let mut left = f64::from(uniform) * total;
    let stop = |weight: &f64| {
        left -= weight;
        left < 0.0
    };
    let last = weights.iter().rposition(|w| *w > 0.0).unwrap_or(0);
    weights.iter().position(stop).unwrap_or(last)
}

pub(crate) fn dot(a: &[f32], b: &[f32]) -> f64 {
    let products = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
    products.sum()
}

pub(crate) fn add_scaled(sum: &mut [f64], terms: &[f32], scale: f64) {
    for (sum, term) in sum.iter_mut().zip(terms) {
        *sum += scale * f64::from(*term);
    }
}

fn softmax(logits: &[f64]) -> Vec<f64> {
    let max = logits.iter().fold(f64::NEG_INFINITY, |max, l| max.max(*l));
    let exp: Vec<f64> = logits.iter().map(|l| (l - max).exp()).collect();
    let sum: f64 = exp.iter().sum();
    exp.iter().map(|e| e / sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use belfry_configs::rng::Purpose;

    fn features(seed: u64, rows: usize, width: usize) -> Features {
        let key = Key::new(seed, Purpose::Pack);
        [0, 1].map(|side| {
            let row = |i: usize| key.with(side).normal(i as u64);
            (0..rows * width).map(row).collect()
        })
    }

    #[test]
    fn same_images_share_probability_and_are_never_negatives() {
        let images = [7, 8, 7, 9, 8];
        let positives = Positives {
            images: &images,
            first: 2,
            one_hot: false,
        };
        let targets = positives.targets(2);
        assert_eq!(targets[..5], [0.5, 0.0, 0.5, 0.0, 0.0]);
        assert_eq!(targets[5..], [0.0, 0.0, 0.0, 1.0, 0.0]);
        let group = features(1, 5, 3);
        let own = [group[0][6..12].to_vec(), group[1][6..12].to_vec()];
        let contrast = Contrast::new(&own, &group, 3, &targets, 0.3);
        let key = Key::new(1, Purpose::Negatives);
        let mut drawn = [0usize; 5];
        for i in 0..4000 {
            drawn[contrast.draw(0, &positives, 0..5, key.with(i))[0]] += 1;
        }
        assert_eq!((drawn[0], drawn[2]), (0, 0), "{drawn:?}");
        let expected = softmax(
            &contrast.logits[0][..5]
                .iter()
                .map(|l| f64::from(*l))
                .collect::<Vec<_>>(),
        );
        let ratio = drawn[1] as f64 / drawn[4] as f64;
        let wanted = expected[1] / expected[4];
        assert!((ratio / wanted - 1.0).abs() < 0.15, "{ratio} {wanted}");
        // From the own rows alone, and where nothing is left but what belongs together.
        assert!(
            contrast
                .draw(1, &positives, 2..4, key)
                .iter()
                .zip([3, 2])
                .all(|(a, b)| *a == b)
        );
        let alike = Positives {
            images: &[1; 5],
            first: 2,
            one_hot: false,
        };
        assert!(
            contrast
                .draw(0, &alike, 0..5, key)
                .iter()
                .all(|place| *place < 5)
        );
    }

    #[test]
    fn one_hot_ignores_shared_images() {
        let positives = Positives {
            images: &[4, 4, 4],
            first: 1,
            one_hot: true,
        };
        assert_eq!(positives.targets(2), [0.0, 1.0, 0.0, 0.0, 0.0, 1.0]);
    }

    #[test]
    fn the_gradient_is_the_difference_quotient() {
        let (own, group) = (features(2, 2, 4), features(3, 3, 4));
        let targets = [0.5, 0.5, 0.0, 0.0, 0.0, 1.0];
        let loss =
            |own: &Features, group: &Features, t| Contrast::new(own, group, 4, &targets, t).loss;
        let found = Contrast::new(&own, &group, 4, &targets, 0.4);
        let near =
            |slope: f64, gradient: f64| (slope - gradient).abs() < 1e-3 * (1.0 + slope.abs());
        for side in [0, 1] {
            for i in 0..group[side].len() {
                let moved = |features: &Features, by: f32| {
                    let mut features = features.clone();
                    features[side][i] += by;
                    features
                };
                let (up, down) = (moved(&group, 5e-3), moved(&group, -5e-3));
                let slope = (loss(&own, &up, 0.4) - loss(&own, &down, 0.4)) / 1e-2;
                assert!(near(slope, found.group[side][i].into()), "group {side} {i}");
                if i < own[side].len() {
                    let (up, down) = (moved(&own, 5e-3), moved(&own, -5e-3));
                    let slope = (loss(&up, &group, 0.4) - loss(&down, &group, 0.4)) / 1e-2;
                    assert!(near(slope, found.own[side][i].into()), "own {side} {i}");
                }
            }
        }
        let slope = (loss(&own, &group, 0.401) - loss(&own, &group, 0.399)) / 2e-3;
        assert!(
            near(slope, found.temperature),
            "{slope} {}",
            found.temperature
        );
    }
}
