//! The order of one dataset: rounds over its shards, slices of lanes, windows (DESIGN 5, "Order").
//!
//! Pair p of shard s falls in epoch e into round (p + h(seed, s) + e) mod rounds. The pairs of an
//! image stand one behind the other in its shard, so they come apart into different rounds, and
//! move on by one round from epoch to epoch. How many pairs of a shard a round has is arithmetic on
//! the shard's total: an index is never needed to say what stands where. (Dealing an image's
//! captions from a hash of its key would need every index, 200 MB at nine million pairs, for each
//! epoch anew.) Round sizes are the same in every epoch, turned by one, so a lane seeks in
//! O(rounds). It refuses to know what is inside a shard.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use belfry_configs::rng::{Key, Purpose};
use shard_tools::manifest::Manifest;
use shard_tools::pair::Contents;

use super::windows::Windows;

/// Rounds whose shards' order is kept: the present one of fast and of slow lanes, and the next.
const ROUNDS_KEPT_MAX: usize = 4;

/// The order's constants.
#[derive(Clone, Copy)]
pub struct Shape {
    pub seed: u64,
    pub lanes: u32,
    pub rounds: u32,
    pub window_shards: u32,
}

/// A training dataset: its names and totals, and the order of its pairs.
pub struct Dataset {
    /// As configured.
    pub path: String,
    /// For people.
    pub name: String,
    /// What its pairs carry.
    pub contents: Contents,
    /// Where its samples come from.
    pub sources: Vec<String>,
    files: Vec<Box<str>>,
    /// Pairs before each shard, and in all.
    before: Vec<u64>,
    /// The same for each source, where there are several.
    source_before: Vec<Vec<u64>>,
    shape: Shape,
    /// Its place in the configuration.
    number: u32,
    /// Pairs of round `r` of epoch `e` at `(r - e) mod rounds`.
    sizes: Vec<u64>,
    kept: Mutex<VecDeque<(u64, u32, Arc<Round>)>>,
}

/// Where a pair of a lane's stream stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub epoch: u64,
    pub round: u32,
    pub window: u32,
    pub shard: u32,
    /// Index among all pairs of the shard.
    pub pair: u32,
}

/// The shards of one round, in its order; those without a pair in it are left out.
struct Round {
    epoch: u64,
    number: u32,
    shards: Vec<u32>,
    /// Pairs before each, and in all.
    before: Vec<u64>,
}

/// Positions of a round that a lane shuffles together.
struct Window {
    number: u32,
    positions: Range<u64>,
}

/// Pairs `0..pairs` whose number is `first` modulo `rounds`.
fn dealt(pairs: u64, first: u32, rounds: u32) -> u64 {
    pairs
        .saturating_sub(u64::from(first))
        .div_ceil(u64::from(rounds))
}

/// Sums before each item, and of all.
fn sums(items: impl Iterator<Item = u32>) -> Vec<u64> {
    let sums = items.scan(0u64, |sum, item| {
        *sum += u64::from(item);
        Some(*sum)
    });
    std::iter::once(0).chain(sums).collect()
}

/// The item that holds `at`, by the sums before each.
fn holder(before: &[u64], at: u64) -> usize {
    before.partition_point(|first| *first <= at) - 1
}

impl Dataset {
    /// The order of dataset `number`, which lies at `path`.
    pub fn new(shape: Shape, number: u32, path: &str, manifest: &Manifest) -> Self {
        let sources = manifest.sources.len();
        let of = |source: usize| {
            let shards = manifest.shards.iter();
            sums(shards.map(move |s| s.source_pairs(sources)[source]))
        };
        let mut dataset = Dataset {
            path: path.to_owned(),
            name: manifest.dataset.clone(),
            contents: manifest.contents,
            sources: manifest.sources.iter().map(|s| s.name.clone()).collect(),
            files: manifest
                .shards
                .iter()
                .map(|s| s.file.as_str().into())
                .collect(),
            before: sums(manifest.shards.iter().map(|s| s.pairs)),
            source_before: match sources {
                1 => Vec::new(),
                _ => (0..sources).map(of).collect(),
            },
            shape,
            number,
            sizes: Vec::new(),
            kept: Mutex::default(),
        };
        let size = |turn| -> u64 {
            let shards = 0..dataset.shards();
            shards.map(|shard| dataset.in_round(shard, 0, turn).1).sum()
        };
        dataset.sizes = (0..shape.rounds).map(size).collect();
        dataset
    }

    /// Its pairs.
    pub fn pairs(&self) -> u64 {
        self.before[self.before.len() - 1]
    }

    /// Its shards.
    pub fn shards(&self) -> u32 {
        self.files.len() as u32
    }

    /// Path and file of a shard.
    pub fn shard_name(&self, shard: u32) -> String {
        format!("{}/{}", self.path, self.files[shard as usize])
    }

    /// Pairs before `shard`.
    pub fn pairs_before(&self, shard: u32) -> u64 {
        self.before[shard as usize]
    }

    /// (shard, pair in it) of pair `pair` of the dataset.
    pub fn locate(&self, pair: u64) -> (u32, u32) {
        let shard = holder(&self.before, pair);
        (shard as u32, (pair - self.before[shard]) as u32)
    }

    /// Pairs before each shard, and in all.
    pub fn before(&self) -> &[u64] {
        &self.before
    }

    /// The same of one source, where there are several.
    pub fn source_before(&self, source: u32) -> &[u64] {
        let of_source = self.source_before.get(source as usize);
        of_source.unwrap_or(&self.before)
    }

    /// Pairs of `lane` in each epoch.
    pub fn epoch_pairs(&self, lane: u32) -> u64 {
        let lens = self.sizes.iter().map(|size| self.slice(*size, lane));
        lens.map(|slice| slice.end - slice.start).sum()
    }

    /// Bytes held for the order.
    pub fn bytes(&self) -> usize {
        let names: usize = self.files.iter().map(|f| f.len() + size_of_val(f)).sum();
        let of_sources: usize = self.source_before.iter().map(|b| size_of_val(&b[..])).sum();
        let kept = self.kept.lock().expect("no holder panics");
        let round = |round: &Round| size_of_val(&round.shards[..]) + size_of_val(&round.before[..]);
        let rounds: usize = kept.iter().map(|(_, _, r)| round(r)).sum();
        names + of_sources + size_of_val(&self.before[..]) + rounds
    }

    /// The pair at `position` of the lane's stream of this dataset.
    pub fn place(&self, windows: &Windows, lane: u32, position: u64) -> Place {
        let (round, at) = self.seek(lane, position);
        let window = self.window(&round, lane, at);
        let len = window.positions.end - window.positions.start;
        let key = self.key(Purpose::WindowOrder, round.epoch, round.number);
        let key = key.with(u64::from(lane)).with(window.number.into());
        let order = windows.order(key, len as usize);
        let drawn = order[(at - window.positions.start) as usize];
        let at = window.positions.start + u64::from(drawn);
        self.pair_of_round(&round, window.number, at)
    }

    /// How many pairs the window of `position` holds.
    pub fn window_pairs(&self, lane: u32, position: u64) -> u64 {
        let (round, at) = self.seek(lane, position);
        let positions = self.window(&round, lane, at).positions;
        positions.end - positions.start
    }

    /// Pair `nth` of the window of `position`, in the round's order.
    pub fn of_window(&self, lane: u32, position: u64, nth: u64) -> Place {
        let (round, at) = self.seek(lane, position);
        let window = self.window(&round, lane, at);
        self.pair_of_round(&round, window.number, window.positions.start + nth)
    }

    /// Shards of all windows that the lane's `positions` touch, in their order.
    pub fn shards_of(&self, lane: u32, positions: Range<u64>) -> Vec<u32> {
        let mut found = Vec::new();
        let mut position = positions.start;
        while position < positions.end {
            let (round, at) = self.seek(lane, position);
            let window = self.window(&round, lane, at).positions;
            let held = holder(&round.before, window.start)..=holder(&round.before, window.end - 1);
            found.extend_from_slice(&round.shards[held]);
            position += window.end - at;
        }
        found
    }

    fn pair_of_round(&self, round: &Round, window: u32, at: u64) -> Place {
        let holder = holder(&round.before, at);
        let shard = round.shards[holder];
        let nth = (at - round.before[holder]) as u32;
        let (first, _) = self.in_round(shard, round.epoch, round.number);
        Place {
            epoch: round.epoch,
            round: round.number,
            window,
            shard,
            pair: first + nth * self.shape.rounds,
        }
    }

    fn window(&self, round: &Round, lane: u32, at: u64) -> Window {
        let slice = self.slice(round.before[round.before.len() - 1], lane);
        let first = holder(&round.before, slice.start);
        let size = self.shape.window_shards as usize;
        let number = (holder(&round.before, at) - first) / size;
        let begin = first + number * size;
        let end = (begin + size).min(round.shards.len());
        Window {
            number: number as u32,
            positions: round.before[begin].max(slice.start)..round.before[end].min(slice.end),
        }
    }

    /// The lane's slice of a round of `pairs`.
    fn slice(&self, pairs: u64, lane: u32) -> Range<u64> {
        let lanes = u128::from(self.shape.lanes);
        let edge = |l: u32| (u128::from(pairs) * u128::from(l) / lanes) as u64;
        edge(lane)..edge(lane + 1)
    }

    /// The round of a lane's position, and the position in it.
    fn seek(&self, lane: u32, position: u64) -> (Arc<Round>, u64) {
        let per_epoch = self.epoch_pairs(lane);
        let (epoch, mut left) = (position / per_epoch, position % per_epoch);
        for round in 0..self.shape.rounds {
            let slice = self.slice(self.sizes[self.turn(epoch, round) as usize], lane);
            let len = slice.end - slice.start;
            if left < len {
                return (self.round(epoch, round), slice.start + left);
            }
            left -= len;
        }
        unreachable!("the rounds of an epoch hold all its pairs")
    }

    /// (round - epoch) mod rounds: which of the equal shares of the shards it is.
    fn turn(&self, epoch: u64, round: u32) -> u32 {
        let rounds = self.shape.rounds;
        (round + rounds - (epoch % u64::from(rounds)) as u32) % rounds
    }

    /// First pair of a shard in a round, and how many.
    fn in_round(&self, shard: u32, epoch: u64, round: u32) -> (u32, u64) {
        let rounds = self.shape.rounds;
        let key = self.key_of(Purpose::CaptionRound).with(shard.into());
        let start = key.below(0, rounds.into()) as u32;
        let first = (self.turn(epoch, round) + rounds - start) % rounds;
        let pairs = self.before[shard as usize + 1] - self.before[shard as usize];
        (first, dealt(pairs, first, rounds))
    }

    fn round(&self, epoch: u64, round: u32) -> Arc<Round> {
        let mut kept = self.kept.lock().expect("no holder panics");
        if let Some((_, _, found)) = kept.iter().find(|(e, r, _)| (*e, *r) == (epoch, round)) {
            return Arc::clone(found);
        }
        let order = self.key(Purpose::ShardOrder, epoch, round);
        let mut shards = order.permutation(self.shards() as usize);
        shards.retain(|shard| self.in_round(*shard, epoch, round).1 > 0);
        let pairs = shards
            .iter()
            .map(|s| self.in_round(*s, epoch, round).1 as u32);
        let made = Arc::new(Round {
            epoch,
            number: round,
            before: sums(pairs),
            shards,
        });
        while kept.len() >= ROUNDS_KEPT_MAX {
            kept.pop_front();
        }
        kept.push_back((epoch, round, Arc::clone(&made)));
        made
    }

    fn key(&self, purpose: Purpose, epoch: u64, round: u32) -> Key {
        let round = u64::from(self.number) << 32 | u64::from(round);
        Key::new(self.shape.seed, purpose).with(epoch).with(round)
    }

    fn key_of(&self, purpose: Purpose) -> Key {
        Key::new(self.shape.seed, purpose).with(self.number.into())
    }
}
