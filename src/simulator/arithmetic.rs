//! What a simulated device computes: few floats, but their sums depend on the order of addition, and
//! a state that remembers every bit that went into it.

use std::collections::BTreeMap;
use std::sync::Arc;

use belfry_data::Quarantine;
use belfry_proto::lanes::root;
use belfry_proto::{Digest, LaneRange, Schedule};
use bytes::Bytes;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

/// Floats of a gradient.
const LEN: u64 = 3;

/// Shards of the simulated dataset.
pub const SHARDS: u32 = 8;

/// The state after some updates stands for its parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    pub step: u64,
    pub value: u64,
}

/// The shard that a lane reads at a step when all are there.
pub fn first_choice(step: u64, lane: u32) -> u32 {
    ((step * 5 + u64::from(lane)) % u64::from(SHARDS)) as u32
}

/// The shard that it reads under a quarantine: the next one that is not lost.
pub fn shard_read(step: u64, lane: u32, quarantine: &Quarantine) -> u32 {
    let lost = |shard: &u32| {
        let dataset = 0;
        let shard = *shard;
        quarantine.contains(&belfry_data::ShardRef { dataset, shard })
    };
    let first = first_choice(step, lane);
    let mut choices = (first..first + SHARDS).map(|shard| shard % SHARDS);
    choices
        .find(|shard| !lost(shard))
        .expect("not all are lost")
}

/// Shards under quarantine at a step.
pub fn quarantine_at(schedule: &Schedule, step: u64) -> Quarantine {
    let shards = schedule.at(step).map(|s| belfry_data::ShardRef {
        dataset: s.dataset,
        shard: s.shard,
    });
    shards.collect()
}

/// The features of a lane that read this shard.
pub fn features(state: State, lane: u32, shard: u32) -> Bytes {
    let read = u64::from(lane) << 32 | u64::from(shard);
    let parts = [state.value, !read].map(u64::to_le_bytes);
    Bytes::copy_from_slice(&xxh3_64(&parts.concat()).to_le_bytes())
}

/// What a gradient sees of all lanes' features, in lane order; nothing where it needs none.
pub fn seen<'a>(all: impl Iterator<Item = &'a Bytes>) -> u64 {
    let bytes: Vec<u8> = all.flatten().copied().collect();
    if bytes.is_empty() { 0 } else { xxh3_64(&bytes) }
}

/// The gradient of a lane that read this shard and sees these features.
pub fn gradient(state: State, lane: u32, shard: u32, seen: u64) -> Vec<f32> {
    let read = u64::from(lane) << 32 | u64::from(shard);
    let key = xxh3_64(&[state.value, read, seen].map(u64::to_le_bytes).concat());
    (0..LEN)
        .map(|i| 0.1 + (key.rotate_left(i as u32 * 13) % 1000) as f32 * 1.000_1e-3)
        .collect()
}

/// Which pairs a lane trained.
pub fn lane_digest(lane: u32, shard: u32) -> Digest {
    Digest(u128::from(lane) << 32 | u128::from(shard))
}

pub fn tree_sum(node: LaneRange, parts: &BTreeMap<LaneRange, Arc<Vec<f32>>>) -> Option<Vec<f32>> {
    if let Some(part) = parts.get(&node) {
        return Some(part.to_vec());
    }
    let (left, right) = node.children()?;
    let (left, right) = (tree_sum(left, parts)?, tree_sum(right, parts)?);
    Some(left.iter().zip(right).map(|(l, r)| l + r).collect())
}

pub fn digest(sum: &[f32]) -> Digest {
    let bytes: Vec<u8> = sum.iter().flat_map(|x| x.to_le_bytes()).collect();
    Digest(xxh3_128(&bytes))
}

pub fn updated(state: State, sum: &[f32]) -> State {
    let mut bytes = state.value.to_le_bytes().to_vec();
    bytes.extend(sum.iter().flat_map(|x| x.to_le_bytes()));
    State {
        step: state.step + 1,
        value: xxh3_64(&bytes),
    }
}

pub fn state_digest(state: State) -> Digest {
    Digest(u128::from(state.value))
}

/// The states before every step and the digests of their gradients, computed serially as far as
/// they are asked for, as if every quarantine had been known when its first step began.
#[derive(Debug)]
pub struct Reference {
    lanes: u32,
    gathers: bool,
    quarantine: Schedule,
    /// The state before each step, and the digest of the step's gradient.
    steps: Vec<(State, Digest)>,
    next: State,
}

impl Reference {
    pub fn new(lanes: u32, gathers: bool) -> Self {
        Reference {
            lanes,
            gathers,
            quarantine: Schedule::default(),
            steps: Vec::new(),
            next: State { step: 0, value: 1 },
        }
    }

    /// The state before a step.
    pub fn state(&mut self, step: u64) -> State {
        self.at(step).0
    }

    /// The digest of a step's gradient.
    pub fn digest(&mut self, step: u64) -> Digest {
        self.at(step).1
    }

    /// From `from` on other shards are read.
    pub fn set_quarantine(&mut self, quarantine: &Schedule, from: u64) {
        if let Some((state, _)) = self.steps.get(from as usize) {
            self.next = *state;
            self.steps.truncate(from as usize);
        }
        self.quarantine = quarantine.clone();
    }

    fn at(&mut self, step: u64) -> (State, Digest) {
        while self.steps.len() as u64 <= step {
            let state = self.next;
            let quarantine = quarantine_at(&self.quarantine, state.step);
            let read = |lane| shard_read(state.step, lane, &quarantine);
            let of = |lane| features(state, lane, read(lane));
            let lanes = if self.gathers { self.lanes } else { 0 };
            let seen = seen((0..lanes).map(of).collect::<Vec<_>>().iter());
            let leaves = (0..self.lanes).map(|lane| {
                let leaf = LaneRange {
                    start: lane,
                    end: lane + 1,
                };
                (leaf, Arc::new(gradient(state, lane, read(lane), seen)))
            });
            let sum = tree_sum(root(self.lanes), &leaves.collect()).expect("all lanes");
            self.steps.push((state, digest(&sum)));
            self.next = updated(state, &sum);
        }
        self.steps[step as usize]
    }
}

pub fn part_hash(state: State, part: u32) -> String {
    format!("{}/{part}", state.value)
}
