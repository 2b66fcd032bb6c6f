//! What a simulated run did, as numbers. Decides nothing.

use std::collections::BTreeMap;

/// A request to the object store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Request {
    /// A journal entry, created if absent: every change, and every renewal of the lease.
    JournalPut,
    /// A journal entry read: by a standby, by a worker that looks for the leader, or read back.
    JournalGet,
    /// The journal's names listed.
    JournalList,
    /// Receipts.
    LedgerPut,
    /// One part of a checkpoint.
    PartPut,
    /// One part read when a run starts from a checkpoint.
    PartGet,
    /// A checkpoint's manifest.
    ManifestPut,
    /// An evaluation, the data's identity or the result.
    OtherPut,
    /// What a new leader reads: ledger, manifests, evaluations.
    StartGet,
}

/// Totals of a run. Bytes and times are of the simulated world.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Steps that were committed, each counted once.
    pub steps: u64,
    /// Commits of a step that had been committed before: work that a fault lost, done again to the
    /// same bits.
    pub steps_again: u64,
    /// Lanes computed; `steps * lanes` of them were needed.
    pub lanes: u64,
    /// Lanes' features computed, where gradients need them.
    pub features: u64,
    /// Of the lanes the second computations by which lanes are audited.
    pub audits: u64,
    /// Generations announced.
    pub generations: u64,
    /// Time between commits beyond the longest undisturbed step.
    pub stall_ms: u64,
    /// The longest such time.
    pub stall_most_ms: u64,
    /// Checkpoints whose manifests became durable.
    pub checkpoints: u64,
    /// Checkpoint bytes uploaded, repetitions included.
    pub checkpoint_bytes: u64,
    /// Bytes of states copied between workers.
    pub copy_bytes: u64,
    /// Requests to the store that reached it, by kind.
    pub requests: BTreeMap<Request, u64>,
    /// Control messages, without heartbeats.
    pub messages: u64,
    /// Heartbeats.
    pub heartbeats: u64,
    /// Terms that began.
    pub terms: u64,
    /// Faults that fired, by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// Choices of a quarantine.
    pub quarantines: u64,
    /// Stops until people brought a shard back.
    pub restored: u64,
    /// Things that happened: the work of the simulation itself.
    pub happenings: u64,
}

impl Counts {
    /// Adds another run's totals.
    pub fn add(&mut self, other: &Counts) {
        self.steps += other.steps;
        self.steps_again += other.steps_again;
        self.lanes += other.lanes;
        self.features += other.features;
        self.audits += other.audits;
        self.generations += other.generations;
        self.stall_ms += other.stall_ms;
        self.stall_most_ms = self.stall_most_ms.max(other.stall_most_ms);
        self.checkpoints += other.checkpoints;
        self.checkpoint_bytes += other.checkpoint_bytes;
        self.copy_bytes += other.copy_bytes;
        for (request, n) in &other.requests {
            *self.requests.entry(*request).or_default() += n;
        }
        self.messages += other.messages;
        self.heartbeats += other.heartbeats;
        self.terms += other.terms;
        for (fault, n) in &other.faults {
            *self.faults.entry(fault).or_default() += n;
        }
        self.quarantines += other.quarantines;
        self.restored += other.restored;
        self.happenings += other.happenings;
    }

    pub(super) fn request(&mut self, kind: Request, n: u64) {
        *self.requests.entry(kind).or_default() += n;
    }
}
