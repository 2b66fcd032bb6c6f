//! Which dataset a lane's next pair comes from: integers only, exact at every position.
//!
//! Dataset 0 takes every W/w-th position of a lane, dataset 1 its share of those that are left,
//! and so on. Counts up to a position are one division per dataset, so a lane seeks in O(datasets).
//! After any number of positions a dataset's count is its exact share, up to one position for it
//! and one for each dataset in front of it. Lanes are shifted against each other by 1/L of a
//! position, so that a step's counts over all lanes are as even as a lane's. The pairs of one step
//! and lane are permuted, so that no micro-batch sees the pattern.

use belfry_configs::Datasets;
use belfry_configs::rng::{Key, Purpose};

/// The heaviest dataset's weight as an integer; the others' are rounded against it, so a share is
/// what was configured up to one position in four billion.
const HEAVIEST: f64 = 4_294_967_296.0;

/// The shares of a run.
pub struct Mixture {
    seed: u64,
    lanes: u32,
    /// Configured weights as integers; none: each lane's own number of pairs.
    weights: Option<Vec<u64>>,
}

impl Mixture {
    /// The shares that `datasets` are configured to have.
    pub fn new(seed: u64, lanes: u32, datasets: &Datasets) -> Self {
        let weights: Option<Vec<f64>> = datasets.0.iter().map(|d| d.weight).collect();
        let weights = weights.map(|weights| {
            let heaviest = weights.iter().copied().fold(0.0, f64::max);
            let integer = |w: &f64| ((w / heaviest * HEAVIEST).round() as u64).max(1);
            weights.iter().map(integer).collect()
        });
        Mixture {
            seed,
            lanes,
            weights,
        }
    }

    /// (dataset, position in the lane's stream of this dataset) of all pairs of `lane` at `step`,
    /// in order. `epoch_pairs` are the lane's pairs of one epoch by dataset: with them as weights
    /// all datasets end their epochs at the same position of the lane.
    pub fn step(
        &self,
        (step, lane): (u64, u32),
        pairs: u64,
        epoch_pairs: &[u64],
    ) -> Vec<(usize, u64)> {
        let first = step * pairs;
        if epoch_pairs.len() == 1 {
            return (first..first + pairs).map(|p| (0, p)).collect();
        }
        let weights = self.weights.as_deref().unwrap_or(epoch_pairs);
        let key = Key::new(self.seed, Purpose::Mixture)
            .with(u64::from(lane))
            .with(step);
        let order = key.permutation(pairs as usize);
        let at = |place: u32| self.at(weights, lane, first + u64::from(place));
        order.into_iter().map(at).collect()
    }

    /// Positions of each dataset before `position` of the lane.
    pub fn counts(&self, lane: u32, position: u64, epoch_pairs: &[u64]) -> Vec<u64> {
        if epoch_pairs.len() == 1 {
            return vec![position];
        }
        let weights = self.weights.as_deref().unwrap_or(epoch_pairs);
        let mut rest: u128 = weights.iter().map(|w| u128::from(*w)).sum();
        let mut left = position;
        let counts = weights.iter().map(|weight| {
            let count = self.share(lane, left, *weight, rest);
            rest -= u128::from(*weight);
            left -= count;
            count
        });
        counts.collect()
    }

    fn at(&self, weights: &[u64], lane: u32, position: u64) -> (usize, u64) {
        let mut rest: u128 = weights.iter().map(|w| u128::from(*w)).sum();
        let mut left = position;
        for (dataset, weight) in weights.iter().enumerate() {
            let count = self.share(lane, left, *weight, rest);
            if self.share(lane, left + 1, *weight, rest) > count {
                return (dataset, count);
            }
            left -= count;
            rest -= u128::from(*weight);
        }
        unreachable!("the last dataset takes whatever is left")
    }

    /// Of `positions`, those of a dataset that weighs `weight` of `rest`: it grows by at most one
    /// with each position, and is exact where `rest` divides.
    fn share(&self, lane: u32, positions: u64, weight: u64, rest: u128) -> u64 {
        let shift = rest * u128::from(lane) / u128::from(self.lanes);
        ((u128::from(positions) * u128::from(weight) + shift) / rest) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mixture(lanes: u32, weights: Option<Vec<u64>>) -> Mixture {
        Mixture {
            seed: 3,
            lanes,
            weights,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn each_position_belongs_to_one_dataset_and_shares_are_exact(
            weights in prop::collection::vec(1u64..50, 2..6),
            lanes in 1u32..9,
            pairs in 1u64..9,
        ) {
            let mixture = mixture(lanes, Some(weights.clone()));
            let sum: u64 = weights.iter().sum();
            for lane in 0..lanes {
                let mut next = vec![0u64; weights.len()];
                for step in 0..30 {
                    let mut places = mixture.step((step, lane), pairs, &vec![0; weights.len()]);
                    places.sort_unstable();
                    for (dataset, position) in places {
                        prop_assert_eq!(position, next[dataset], "none left out, none twice");
                        next[dataset] += 1;
                    }
                    let done = (step + 1) * pairs;
                    prop_assert_eq!(&mixture.counts(lane, done, &weights), &next);
                    for (dataset, count) in next.iter().enumerate() {
                        let ideal = done as f64 * weights[dataset] as f64 / sum as f64;
                        let off = (*count as f64 - ideal).abs();
                        prop_assert!(off <= 1.0 + dataset as f64, "{} is off by {}", dataset, off);
                    }
                }
                // After a whole period every dataset has exactly its weight.
                prop_assert_eq!(&mixture.counts(lane, 7 * sum, &weights),
                    &weights.iter().map(|w| 7 * w).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn a_step_over_all_lanes_is_as_even_as_a_lane() {
        let mixture = mixture(64, Some(vec![6, 94]));
        for step in 0..50 {
            let all = (0..64).flat_map(|lane| mixture.step((step, lane), 32, &[0, 0]));
            let first = all.filter(|(dataset, _)| *dataset == 0).count() as i64;
            let ideal = 64 * 32 * 6 / 100;
            assert!(
                (first - ideal).abs() <= 1,
                "step {step}: {first} of {ideal}"
            );
        }
    }
}
