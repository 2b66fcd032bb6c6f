//! Shards that stay unreadable, as the run has agreed on them.
//!
//! A quarantine cannot be derived from configuration and data: the coordinator journals it before
//! the step that uses it, and every worker is told. This room only obeys the set that it is given
//! with a step, so a lane's pairs stay a pure function of (configuration, data, step, quarantine).

use std::collections::BTreeSet;

/// A shard: its dataset's place in `data.train`, and its own in that dataset's manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShardRef {
    /// Index in `data.train`.
    pub dataset: u32,
    /// Index in the manifest's shards.
    pub shard: u32,
}

/// All shards under quarantine at one step.
pub type Quarantine = BTreeSet<ShardRef>;
