//! What the core is told, and what it answers: settings, events, effects.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use belfry_configs::{Rhythm, Timeouts};
use belfry_proto::Schedule;
use belfry_proto::v1::{self, coordinator_message as down, worker_message as up};

use super::LinkPolicy;

/// What never changes in a term.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Hash of configuration and root.
    pub run_id: String,
    /// Lanes of the run.
    pub lanes: u32,
    /// Micro-batches of a step, by which losses are divided.
    pub micro_batches: u32,
    /// Pairs that one lane trains in one step.
    pub pairs_per_lane: u64,
    /// Optimizer updates in total.
    pub steps_total: u64,
    /// Below this no step is committed.
    pub min_workers: usize,
    /// So many get lanes at most; 0: as many as there are lanes.
    pub max_workers: usize,
    /// Beyond them, so many follow without lanes.
    pub spares: usize,
    /// A gradient that is not finite is not applied and the run goes on; otherwise it ends.
    pub skip_non_finite: bool,
    /// So many are expected; gathering ends early when they are there.
    pub expected_workers: usize,
    /// Every time by which the run decides, before anything was measured.
    pub timeouts: Timeouts,
    /// When checkpoints are written, in how many parts, and which are kept.
    pub checkpoint: belfry_configs::Checkpoint,
    /// Tree nodes a worker may hold.
    pub nodes_max: u32,
    /// Steps between lane audits; 0: none.
    pub audit_every: u64,
    /// Whether the run evaluates: its first state, its last, and those in between that `rhythm` says.
    pub evaluates: bool,
    /// When it evaluates in between.
    pub rhythm: Rhythm,
    /// How gradients are to be summed.
    pub links: LinkPolicy,
    /// Shards that the run may do without.
    pub quarantine_shards_max: u32,
    /// Steps that may be committed beyond the newest journal entry.
    pub horizon_steps: u64,
    /// This leadership.
    pub term: u64,
}

/// What earlier terms made durable.
#[derive(Clone, Debug, Default)]
pub struct Durable {
    /// Number of the newest journal entry: the one that began this term.
    pub entry: u64,
    /// Highest generation journaled.
    pub generation: u64,
    /// Updates that the journal takes for committed.
    pub committed: u64,
    /// No update at or beyond this one was committed.
    pub horizon: u64,
    /// Members of the generation journaled last.
    pub members: Vec<u64>,
    /// Shards under quarantine, as journaled.
    pub quarantine: Schedule,
    /// What the run trains and validates on, once a worker has said it.
    pub data: Option<Vec<v1::Dataset>>,
    /// Receipts in the ledger, by step, without their lanes.
    pub receipts: BTreeMap<u64, v1::StepRecord>,
    /// Receipts of all steps below this one are in the ledger too, and were not read.
    pub receipts_from: u64,
    /// Evaluations, by step.
    pub evaluations: BTreeMap<u64, v1::Evaluated>,
    /// Steps of checkpoints whose manifests exist.
    pub manifests: BTreeSet<u64>,
    /// Steps of checkpoints that were found corrupt.
    pub corrupt: BTreeSet<u64>,
}

/// Something happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// A worker's session began. Sessions are numbered by the shell and never reused.
    Hello(u64, v1::Hello),
    /// A worker said something in this session.
    Message(u64, up::Body),
    /// This session ended.
    Gone(u64),
    /// Receipts of all steps below this one are in the ledger.
    ReceiptsDurable {
        /// One past the last step.
        below: u64,
    },
    /// Receipts and manifest of a checkpoint are durable.
    CheckpointDurable {
        /// Its step.
        step: u64,
    },
    /// Receipts that [`Effect::ReadReceipts`] asked for.
    ReceiptsRead {
        /// The first step that was asked for.
        from: u64,
        /// By step, without their lanes.
        receipts: BTreeMap<u64, v1::StepRecord>,
    },
    /// The oldest [`Effect::Journal`] that was not answered yet is durable.
    Journaled {
        /// The entry's number.
        seq: u64,
    },
    /// Something cannot be written at the moment; it is tried until it can.
    StoreAway {
        /// What is being written.
        what: String,
        /// Why it cannot.
        error: String,
    },
    /// It is written now.
    StoreBack {
        /// What was being written.
        what: String,
    },
    /// What is stored differs from this run's, which ends it.
    StoreDiffers {
        /// What was being stored.
        what: String,
        /// How it differs.
        how: String,
    },
    /// A checkpoint was read again and is not what its manifest says.
    CheckpointCorrupt {
        /// Its step.
        step: u64,
        /// What is wrong, with files and places.
        faults: Vec<String>,
    },
    /// Finish the open step, write a checkpoint and end.
    Drain,
    /// Time passed.
    Tick,
}

/// Something to do.
#[derive(Clone, Debug)]
pub enum Effect {
    /// Write a journal entry; answered by [`Event::Journaled`]. What follows waits for it, unless it
    /// is written ahead of need.
    Journal {
        /// The generation from now on.
        generation: u64,
        /// Updates below this one count as committed, by this term or an earlier one.
        committed: u64,
        /// Updates from this one on will not be committed without another entry.
        horizon: u64,
        /// Its members.
        members: Vec<u64>,
        /// All shards under quarantine.
        quarantine: Vec<v1::Shard>,
        /// Renews the leadership or the horizon before either is used up: nothing waits for it.
        ahead: bool,
    },
    /// Write down what the run trains on; what follows waits for it.
    StoreData(Vec<v1::Dataset>),
    /// Say this in a session.
    Send(u64, down::Body),
    /// Say the same in all these sessions. One message, however many they are: what opens a
    /// generation names every member, so a copy for each would be their number squared.
    SendAll(Vec<u64>, Box<down::Body>),
    /// End a session.
    Close(u64),
    /// Put receipts into the ledger; answered by [`Event::ReceiptsDurable`].
    StoreReceipts(Vec<v1::StepRecord>),
    /// Make receipts, then the manifest durable.
    StoreCheckpoint {
        /// Its step.
        step: u64,
        /// Receipts that are not durable yet, ascending.
        receipts: Vec<v1::StepRecord>,
        /// Its parts, ascending.
        parts: Vec<v1::PartStored>,
    },
    /// Delete the checkpoints of these steps.
    Prune(Vec<u64>),
    /// Keep what a checkpoint cost beside it.
    StoreCost(u64, v1::CheckpointMade),
    /// Read these receipts from the ledger; answered by [`Event::ReceiptsRead`].
    ReadReceipts(Range<u64>),
    /// Keep an evaluation; what follows waits for it.
    StoreEvaluation(v1::Evaluated),
    /// Write down how the run ended; what follows waits for it.
    StoreResult {
        /// Hashes and the exported file.
        exported: v1::Exported,
        /// Receipt of the last step.
        last: Option<v1::StepRecord>,
        /// All evaluations, ascending.
        evaluations: Vec<v1::Evaluated>,
    },
    /// Tell watchers.
    Emit(Box<v1::RunEvent>),
    /// A worker has heard of a later leadership: this one is over.
    StepDown {
        /// The later one.
        term: u64,
    },
    /// The run is over.
    Finish {
        /// Whether it trained to its end.
        success: bool,
        /// In words.
        reason: String,
    },
}
