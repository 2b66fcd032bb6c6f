//! A run's order walked again: which pairs were trained, marked one by one, epoch by epoch.
//!
//! Whoever holds receipts says which lanes of which steps they confirm; this room marks their pairs
//! and closes an epoch when every lane has left it. It holds one bit per pair of an open epoch (9
//! million pairs: 1.1 MB) and refuses to know what a receipt or a ledger is.

use std::collections::BTreeMap;

use rayon::prelude::*;

use crate::identity::pairs_digest;
use crate::order::Sequence;
use crate::quarantine::{Quarantine, ShardRef};

/// Pairs that an epoch's report names; more are counted.
pub const NAMED_MAX: usize = 20;

/// See the module.
pub struct Replay {
    sequence: Sequence,
    open: BTreeMap<(u32, u64), Marks>,
    /// Epochs of each dataset that are closed.
    closed: Vec<u64>,
    replaced: BTreeMap<ShardRef, u64>,
}

/// What the order says of one step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Replayed {
    /// Each lane's digest of pair ids.
    pub digests: Vec<u128>,
    /// Pairs that stand for those of shards under quarantine.
    pub substituted: u64,
}

/// What became of the pairs of one epoch of a dataset.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EpochReport {
    /// Index in `data.train`.
    pub dataset: u32,
    /// The epoch.
    pub epoch: u64,
    /// Pairs of the dataset.
    pub pairs: u64,
    /// Pairs trained, each counted once.
    pub trained: u64,
    /// Pairs of shards under quarantine, in whose place others were trained.
    pub substituted: u64,
    /// Pairs of which no confirmed step says that they were trained.
    pub missing: u64,
    /// Ids of the first of them.
    pub missing_named: Vec<u64>,
    /// Pairs met again after their first time.
    pub repeated: u64,
    /// Ids of the first of them.
    pub repeated_named: Vec<u64>,
}

impl EpochReport {
    /// Whether every pair was trained exactly once, or lies in a shard under quarantine.
    pub fn exact(&self) -> bool {
        self.missing == 0 && self.repeated == 0
    }
}

#[derive(Clone, Default)]
struct Marks {
    seen: Vec<u64>,
    report: EpochReport,
}

/// One pair of a lane, or the pair that it stands for.
struct Mark {
    dataset: u32,
    epoch: u64,
    id: u64,
    substituted: bool,
}

/// A lane over some steps.
struct Walked {
    digests: Vec<u128>,
    substituted: Vec<u64>,
    marks: Vec<Mark>,
}

impl Replay {
    /// A replay from the run's beginning.
    pub fn new(sequence: Sequence) -> Self {
        Replay {
            closed: vec![0; sequence.datasets().len()],
            sequence,
            open: BTreeMap::new(),
            replaced: BTreeMap::new(),
        }
    }

    /// The order.
    pub fn sequence(&self) -> &Sequence {
        &self.sequence
    }

    /// Walks `steps`, each with the shards that it did without, and marks the pairs of every lane
    /// whose digest `confirms` (index into `steps`, lane, digest). Gives what the order says of each.
    pub fn walk(
        &mut self,
        steps: &[(u64, Quarantine)],
        confirms: impl Fn(usize, u32, u128) -> bool + Sync,
    ) -> Vec<Replayed> {
        // A lane walks its windows in order: their permutations are drawn once.
        let lanes = 0..self.sequence.lanes();
        let walked: Vec<Walked> = lanes
            .into_par_iter()
            .map(|lane| self.walk_lane(lane, steps, &confirms))
            .collect();
        let mut replayed = vec![Replayed::default(); steps.len()];
        for lane in walked {
            for (index, step) in replayed.iter_mut().enumerate() {
                step.digests.push(lane.digests[index]);
                step.substituted += lane.substituted[index];
            }
            for mark in lane.marks {
                self.mark(&mark);
            }
        }
        replayed
    }

    fn walk_lane(
        &self,
        lane: u32,
        steps: &[(u64, Quarantine)],
        confirms: &(impl Fn(usize, u32, u128) -> bool + Sync),
    ) -> Walked {
        let mut walked = Walked {
            digests: Vec::new(),
            substituted: Vec::new(),
            marks: Vec::new(),
        };
        for (index, (step, quarantine)) in steps.iter().enumerate() {
            let pairs = self.sequence.pairs(*step, lane, quarantine);
            let digest = pairs_digest(pairs.iter().map(|pair| pair.id));
            let replaced = pairs.iter().filter(|pair| pair.replaces.is_some());
            walked.substituted.push(replaced.count() as u64);
            walked.digests.push(digest);
            if confirms(index, lane, digest) {
                walked.marks.extend(pairs.iter().map(|pair| Mark {
                    dataset: pair.dataset,
                    epoch: pair.epoch,
                    id: pair.replaces.unwrap_or(pair.id),
                    substituted: pair.replaces.is_some(),
                }));
            }
        }
        walked
    }

    fn mark(&mut self, mark: &Mark) {
        let ids = self.sequence.ids(mark.dataset);
        let pairs = ids.end - ids.start;
        let marks = self.open.entry((mark.dataset, mark.epoch));
        let marks = marks.or_insert_with(|| Marks {
            seen: vec![0; pairs.div_ceil(64) as usize],
            report: EpochReport {
                dataset: mark.dataset,
                epoch: mark.epoch,
                pairs,
                ..EpochReport::default()
            },
        });
        let at = mark.id - ids.start;
        let (word, bit) = ((at / 64) as usize, 1u64 << (at % 64));
        let report = &mut marks.report;
        if marks.seen[word] & bit != 0 {
            report.repeated += 1;
            if report.repeated_named.len() < NAMED_MAX {
                report.repeated_named.push(mark.id);
            }
            return;
        }
        marks.seen[word] |= bit;
        if !mark.substituted {
            report.trained += 1;
            return;
        }
        report.substituted += 1;
        if let Some((shard, _)) = self.sequence.describe(mark.id) {
            *self.replaced.entry(shard).or_default() += 1;
        }
    }

    /// Closes the epochs that all lanes have left after `steps` steps.
    pub fn close(&mut self, steps: u64) -> Vec<EpochReport> {
        let mut reports = Vec::new();
        for (dataset, completed) in (0..).zip(self.sequence.completed(steps)) {
            for epoch in self.closed[dataset as usize]..completed {
                let marks = self.open.remove(&(dataset, epoch));
                reports.push(self.judged(dataset, epoch, marks.unwrap_or_default()));
            }
            let closed = &mut self.closed[dataset as usize];
            *closed = completed.max(*closed);
        }
        reports
    }

    /// Epochs that were begun and are not complete, without a word about what they lack.
    pub fn unfinished(&self) -> impl Iterator<Item = &EpochReport> {
        self.open.values().map(|marks| &marks.report)
    }

    /// Pairs of each shard under quarantine that others stood for.
    pub fn replaced(&self) -> &BTreeMap<ShardRef, u64> {
        &self.replaced
    }

    fn judged(&self, dataset: u32, epoch: u64, marks: Marks) -> EpochReport {
        let ids = self.sequence.ids(dataset);
        let seen = |id: &u64| {
            let at = id - ids.start;
            let word = marks.seen.get((at / 64) as usize);
            word.is_some_and(|word| word >> (at % 64) & 1 == 1)
        };
        let pairs = ids.end - ids.start;
        let missing = pairs - marks.report.trained - marks.report.substituted;
        let named = ids.clone().filter(|id| !seen(id)).take(match missing {
            0 => 0,
            _ => NAMED_MAX,
        });
        EpochReport {
            dataset,
            epoch,
            pairs,
            missing,
            missing_named: named.collect(),
            ..marks.report.clone()
        }
    }
}

#[cfg(test)]
mod tests;
