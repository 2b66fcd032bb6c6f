//! Bugs that a test plants, one at a time, to prove that the simulator finds them. No shell plants
//! any, which a test of the house checks.

use super::Core;

/// One bug of the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Planted {
    /// Gradients are kept when their step was applied.
    KeepsPartials,
    /// Features are kept when their step was applied.
    KeepsFeatures,
    /// The outcome of an earlier exchange counts.
    TakesOldSums,
    /// What was computed before a quarantine is kept under it.
    KeepsLostShards,
}

impl Core {
    /// The same core with a bug.
    #[must_use]
    pub fn planted(mut self, bug: Planted) -> Self {
        self.planted = Some(bug);
        self
    }

    pub(super) fn has(&self, bug: Planted) -> bool {
        self.planted == Some(bug)
    }
}
