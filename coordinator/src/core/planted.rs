//! Bugs that a test plants, one at a time, to prove that the simulator finds them. No shell plants
//! any, which a test of the house checks.

use super::Core;

/// One bug of the coordinator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Planted {
    /// A step is committed without the last member's ready.
    CommitsEarly,
    /// A ready of an older generation counts.
    OldReady,
    /// A generation is announced before its journal entry is durable.
    AnnouncesFirst,
    /// Steps are committed beyond the journal's horizon.
    IgnoresHorizon,
    /// Lost lanes are handed to two workers.
    LanesTwice,
    /// A manifest is put when one part is still missing.
    ManifestEarly,
    /// Receipts that workers kept are forgotten at a change of leader.
    ForgetsReceipts,
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
