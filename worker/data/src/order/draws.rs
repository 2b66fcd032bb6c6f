//! Pairs that are drawn and not walked: substitutes for shards under quarantine, false images.
//!
//! Every draw is a function of (seed, epoch, pair id) and the quarantine that the run agreed on.

use belfry_configs::FalseImage;
use belfry_configs::rng::{Key, Purpose};

use super::{PairRef, Sequence};
use crate::quarantine::{Quarantine, ShardRef};

/// Where a false image comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FalsePair {
    /// The shard.
    pub shard: ShardRef,
    /// Which of the shard's pairs.
    pub pair: Nth,
}

/// A pair of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nth {
    /// Index among all pairs.
    OfAll(u32),
    /// Index among the pairs of one source.
    OfSource {
        /// The source.
        source: u32,
        /// The index.
        nth: u32,
    },
}

impl Sequence {
    /// The pair itself, or its substitute: uniform over the dataset's pairs outside quarantined
    /// shards. Where none is outside it stays, and reading it says why it cannot be read.
    pub(super) fn replaced(&self, pair: PairRef, quarantine: &Quarantine) -> PairRef {
        let (dataset, shard) = (pair.dataset, pair.shard);
        if !quarantine.contains(&ShardRef { dataset, shard }) {
            return pair;
        }
        let before = self.datasets[dataset as usize].before();
        let key = self.key(Purpose::Substitute, &pair);
        let Some((shard, nth)) = outside(before, dataset, quarantine, |bound| key.below(0, bound))
        else {
            return pair;
        };
        PairRef {
            id: self.id(dataset, shard, nth),
            shard,
            pair: nth,
            replaces: Some(pair.id),
            ..pair
        }
    }

    /// Where the false image of `pair`, a pair of `source`, comes from: uniform over the pairs of
    /// the same source of the same dataset, as the authors do (by chance the true image), or over
    /// the pair's window. One that falls into a shard under quarantine is drawn again outside.
    pub fn false_pair(
        &self,
        lane: u32,
        pair: &PairRef,
        source: u32,
        (from, quarantine): (FalseImage, &Quarantine),
    ) -> FalsePair {
        let dataset = &self.datasets[pair.dataset as usize];
        let several = dataset.sources.len() > 1;
        let before = dataset.source_before(source);
        let key = self.key(Purpose::FalseImage, pair);
        let of_source = |nth| match several {
            true => Nth::OfSource { source, nth },
            false => Nth::OfAll(nth),
        };
        let (shard, nth) = match from {
            FalseImage::Window => {
                let drawn = key.below(0, dataset.window_pairs(lane, pair.position));
                let place = dataset.of_window(lane, pair.position, drawn);
                (place.shard, Nth::OfAll(place.pair))
            }
            FalseImage::Dataset => {
                let drawn = key.below(0, before[before.len() - 1]);
                let shard = before.partition_point(|first| *first <= drawn) - 1;
                (shard as u32, of_source((drawn - before[shard]) as u32))
            }
        };
        let drawn = FalsePair {
            shard: ShardRef {
                dataset: pair.dataset,
                shard,
            },
            pair: nth,
        };
        if !quarantine.contains(&drawn.shard) {
            return drawn;
        }
        let key = self.key(Purpose::Substitute, pair);
        let again = |bound| key.below(1, bound);
        match outside(before, pair.dataset, quarantine, again) {
            Some((shard, nth)) => FalsePair {
                shard: ShardRef {
                    dataset: pair.dataset,
                    shard,
                },
                pair: of_source(nth),
            },
            None => drawn,
        }
    }

    fn key(&self, purpose: Purpose, pair: &PairRef) -> Key {
        Key::new(self.seed, purpose).with(pair.epoch).with(pair.id)
    }
}

/// (shard, pair in it) of a draw over the pairs outside the dataset's quarantined shards, by the
/// sums of pairs before each shard; none where all lie inside. `draw` gets their number.
fn outside(
    before: &[u64],
    dataset: u32,
    quarantine: &Quarantine,
    draw: impl Fn(u64) -> u64,
) -> Option<(u32, u32)> {
    let shard = |shard| ShardRef { dataset, shard };
    // Shards that the dataset does not have are no part of the draw.
    let inside = || quarantine.range(shard(0)..shard(before.len() as u32 - 1));
    let pairs = |shard: &ShardRef| {
        let shard = shard.shard as usize;
        before[shard + 1] - before[shard]
    };
    let left = before[before.len() - 1] - inside().map(pairs).sum::<u64>();
    if left == 0 {
        return None;
    }
    let mut at = draw(left);
    for shard in inside() {
        if at >= before[shard.shard as usize] {
            at += pairs(shard);
        }
    }
    let holder = before.partition_point(|first| *first <= at) - 1;
    Some((holder as u32, (at - before[holder]) as u32))
}
