//! Which pair stands where: the exact, seekable order of every lane (DESIGN 5, "Order").
//!
//! An epoch is `rounds` passes over the shards, permuted per (seed, epoch, round). A round's pairs,
//! concatenated, are one sequence; a lane owns a slice of it and shuffles windows of K shards
//! inside its slice, pair by pair. A lane's stream is its slice of one round, then of the next.
//! Position to pair is computed from the seed and per-shard totals; nothing is replayed. Pure.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use belfry_configs::rng::{Key, Purpose};

/// Permutations kept: two per lane of a large worker.
const WINDOWS_KEPT_MAX: usize = 256;

/// How many pairs of each shard fall into (epoch, round).
pub trait ShardPairs {
    /// Totals by shard, in the manifest's order. With one round: the manifest's own totals.
    fn totals(&self, epoch: u64, round: u32) -> Arc<Vec<u32>>;
}

/// Epoch, round, lane, and the window's number in the lane's slice.
type WindowId = (u64, u32, u32, usize);

/// The order's constants.
pub struct Order {
    seed: u64,
    lanes: u32,
    rounds: u32,
    window_shards: usize,
    windows: Mutex<BTreeMap<WindowId, Arc<Vec<u32>>>>,
}

/// Where a pair stands in the data, and in which window of the lane it was drawn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PairPlace {
    /// Pass over the data.
    pub epoch: u64,
    /// Pass within the epoch.
    pub round: u32,
    /// Index of the shard in the manifest.
    pub shard: usize,
    /// Index of the pair among the shard's pairs of this round.
    pub pair: u32,
    /// The window's pairs as (shard, pairs of this round in the slice), in order.
    pub window: Arc<Vec<(usize, Range<u32>)>>,
}

impl Order {
    /// An order for `lanes` lanes.
    pub fn new(seed: u64, lanes: u32, rounds: u32, window_shards: u32) -> Self {
        Order {
            seed,
            lanes,
            rounds,
            window_shards: window_shards as usize,
            windows: Mutex::default(),
        }
    }

    /// The pair at `position` of `lane`'s stream.
    ///
    /// # Panics
    /// If the data holds fewer pairs than lanes, which is refused when data is opened.
    pub fn place(&self, data: &impl ShardPairs, lane: u32, position: u64) -> PairPlace {
        let (epoch, round, offset) = self.seek(data, lane, position);
        let totals = data.totals(epoch, round);
        let key = Key::new(self.seed, Purpose::ShardOrder)
            .with(epoch)
            .with(u64::from(round));
        let shards = key.permutation(totals.len());
        let slice = self.slice(&totals, lane);
        // Windows of K shards, counted from the first shard that the slice touches.
        let mut begin = 0u64;
        let mut touched = 0usize;
        let mut window: Vec<(usize, Range<u32>)> = Vec::new();
        let mut before = 0u64;
        let mut number = 0usize;
        for shard in shards.into_iter().map(|s| s as usize) {
            let end = begin + u64::from(totals[shard]);
            let low = begin.max(slice.start);
            let high = end.min(slice.end);
            if low < high {
                if touched > 0 && touched.is_multiple_of(self.window_shards) {
                    let held: u64 = window.iter().map(|(_, r)| r.len() as u64).sum();
                    if offset < before + held {
                        break;
                    }
                    before += held;
                    number += 1;
                    window.clear();
                }
                touched += 1;
                window.push((shard, (low - begin) as u32..(high - begin) as u32));
            }
            begin = end;
        }
        let held: usize = window.iter().map(|(_, r)| r.len()).sum();
        let shuffled = self.window((epoch, round, lane, number), held);
        let mut at = shuffled[(offset - before) as usize];
        for (shard, range) in &window {
            let len = range.len() as u32;
            if at < len {
                return PairPlace {
                    epoch,
                    round,
                    shard: *shard,
                    pair: range.start + at,
                    window: Arc::new(window),
                };
            }
            at -= len;
        }
        unreachable!("a permutation of the window lies inside the window")
    }

    /// The lane's slice of a round of `totals`.
    fn slice(&self, totals: &[u32], lane: u32) -> Range<u64> {
        let pairs: u64 = totals.iter().map(|t| u64::from(*t)).sum();
        let edge = |l: u32| (u128::from(pairs) * u128::from(l) / u128::from(self.lanes)) as u64;
        edge(lane)..edge(lane + 1)
    }

    /// (epoch, round, offset in the lane's slice). O(1) for one round; with several rounds their
    /// sizes differ between epochs, so it walks over the rounds before.
    fn seek(&self, data: &impl ShardPairs, lane: u32, position: u64) -> (u64, u32, u64) {
        let slice_len = |epoch, round| {
            let slice = self.slice(&data.totals(epoch, round), lane);
            slice.end - slice.start
        };
        if self.rounds == 1 {
            let len = slice_len(0, 0);
            assert!(len > 0, "a lane without pairs");
            return (position / len, 0, position % len);
        }
        let mut left = position;
        let mut epoch = 0;
        loop {
            for round in 0..self.rounds {
                let len = slice_len(epoch, round);
                if left < len {
                    return (epoch, round, left);
                }
                left -= len;
            }
            epoch += 1;
        }
    }

    fn window(&self, id: WindowId, len: usize) -> Arc<Vec<u32>> {
        let mut kept = self.windows.lock().expect("no holder panics");
        if let Some(order) = kept.get(&id) {
            return Arc::clone(order);
        }
        while kept.len() >= WINDOWS_KEPT_MAX {
            kept.pop_first();
        }
        let (epoch, round, lane, number) = id;
        let order = Key::new(self.seed, Purpose::WindowOrder)
            .with(epoch)
            .with(u64::from(round))
            .with(u64::from(lane))
            .with(number as u64)
            .permutation(len);
        let order = Arc::new(order);
        kept.insert(id, Arc::clone(&order));
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    struct Totals(Arc<Vec<u32>>);

    impl ShardPairs for Totals {
        fn totals(&self, _: u64, _: u32) -> Arc<Vec<u32>> {
            Arc::clone(&self.0)
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn every_round_holds_every_pair_once(
            seed in 0u64..1000,
            shards in prop::collection::vec(1u32..30, 1..12),
            lanes in 1u32..9,
            window in 1u32..5,
            rounds in 1u32..3,
        ) {
            let pairs: u32 = shards.iter().sum();
            prop_assume!(pairs >= lanes);
            let data = Totals(Arc::new(shards));
            let order = Order::new(seed, lanes, rounds, window);
            for epoch in 0..2u64 {
                for round in 0..rounds {
                    let mut seen = BTreeSet::new();
                    for lane in 0..lanes {
                        let slice = order.slice(&data.0, lane);
                        let len = slice.end - slice.start;
                        let start = (epoch * u64::from(rounds) + u64::from(round)) * len;
                        for position in start..start + len {
                            let place = order.place(&data, lane, position);
                            prop_assert_eq!((place.epoch, place.round), (epoch, round));
                            prop_assert!(seen.insert((place.shard, place.pair)), "twice");
                        }
                    }
                    prop_assert_eq!(seen.len() as u32, pairs);
                }
            }
        }
    }

    #[test]
    fn seeking_gives_what_walking_gives_and_epochs_differ() {
        let data = Totals(Arc::new(vec![20; 8]));
        let walk: Vec<PairPlace> = (0..40)
            .map(|p| Order::new(5, 8, 1, 2).place(&data, 3, p))
            .collect();
        let order = Order::new(5, 8, 1, 2);
        for position in (0..40).rev() {
            assert_eq!(order.place(&data, 3, position), walk[position as usize]);
        }
        assert_ne!(walk[0].pair, walk[20].pair, "another epoch, another order");
    }
}
