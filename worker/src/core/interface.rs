//! What the core is told, and what it answers: identity, events, effects.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use belfry_data::Quarantine;
use belfry_model::Gradient;
use belfry_proto::v1::{self, coordinator_message as down, worker_message as up};
use belfry_proto::{Digest, LaneRange};
use bytes::Bytes;

use super::{Attempt, Features, Gathering, Linked};

/// What is constant for the process.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Hash of configuration and root.
    pub run_id: String,
    /// Lasts over restarts.
    pub worker_id: u64,
    /// Differs for every process.
    pub incarnation: u64,
    /// Numeric fingerprint.
    pub fingerprint: String,
    /// Address of the collective endpoint.
    pub data_address: String,
    /// Lanes of the run.
    pub lanes: u32,
    /// Whether a lane's gradient needs every lane's features first.
    pub gathers: bool,
    /// Where this worker computes.
    pub device: v1::Device,
    /// What it trains and validates on.
    pub data: Vec<v1::Dataset>,
}

/// Something happened.
#[derive(Debug)]
pub enum Event {
    /// A session with the coordinator stands.
    LinkUp,
    /// The session broke.
    LinkDown,
    /// The coordinator said something.
    Message(down::Body),
    /// A lane's features are there.
    FeaturesDone {
        step: u64,
        lane: u32,
        features: Bytes,
        seconds: f64,
    },
    /// The gathering of this generation finished.
    Gathered {
        generation: u64,
        step: u64,
        features: Features,
    },
    /// A lane's gradient is there, or will be: a device may still be computing it.
    LaneDone {
        step: u64,
        report: v1::LaneReport,
        gradient: Gradient,
        seconds: f64,
    },
    /// The digest of an audited lane's gradient is taken, or could not be.
    LaneDigest {
        attempt: Attempt,
        digest: Result<Digest, String>,
        seconds: f64,
    },
    /// The digest of a state is taken, or the state was gone.
    StateDigest {
        step: u64,
        digest: Option<Digest>,
        seconds: f64,
    },
    /// A lane cannot be computed: these shards stay unreadable.
    Unreadable {
        step: u64,
        lane: u32,
        shards: Vec<v1::Shard>,
        detail: String,
    },
    /// The all-reduce of this generation finished.
    Reduced {
        generation: u64,
        step: u64,
        sum: Vec<f32>,
        digest: Digest,
        finite: bool,
        /// Of lanes whose losses the device gave only now, and the time that it took for all.
        late: LateReports,
        digests: Digests,
    },
    /// The gathering or the all-reduce of this generation failed on these ranks.
    ReduceFailed {
        generation: u64,
        step: u64,
        ranks: Vec<u32>,
        detail: String,
    },
    /// The id for this generation's device links is made, or could not be.
    IdMade {
        generation: u64,
        id: Result<Vec<u8>, String>,
    },
    /// The update of `step` is in the state.
    Applied { step: u64 },
    /// Init, load or copy succeeded.
    StateArrived {
        step: u64,
        digest: Digest,
        copied: Copied,
    },
    /// Init, load or copy failed.
    StateFailed {
        step: u64,
        error: String,
        copied: Copied,
    },
    /// A report that passes through: part stored, evaluated, exported.
    Report(up::Body),
    /// Something that no restart mends: bad data, a missing device.
    Failed(String),
    /// The process was asked to stop.
    Shutdown,
}

/// What a device says of lanes when it is waited for: before the exchange, once per step.
#[derive(Clone, Debug, Default)]
pub struct LateReports {
    /// Complete reports; they replace those that came with the gradients.
    pub reports: Vec<v1::LaneReport>,
    /// Time of the device since it was last waited for.
    pub seconds: f64,
}

/// How a copy of a state went, also one that failed; nothing for what was loaded.
#[derive(Clone, Debug, Default)]
pub struct Copied {
    /// That arrived.
    pub bytes: u64,
    /// Of the whole state.
    pub bytes_total: u64,
    /// Since it began.
    pub seconds: f64,
    /// Addresses of sources that held or sent other bits than most.
    pub liars: Vec<String>,
}

/// What was hashed around an exchange besides the sum.
#[derive(Clone, Debug, Default)]
pub struct Digests {
    /// Of the own tree nodes that lie in host memory.
    pub nodes: Vec<(LaneRange, u64)>,
    /// Of the sum's buckets, by owner.
    pub sum_parts: Vec<u64>,
    /// Of what the step's readiness tells of the state before it.
    pub state: Option<Digest>,
}

/// Something to do.
#[derive(Debug)]
pub enum Effect {
    /// What the run has measured; every time derives from it.
    Measured {
        step: Duration,
        round_trip: Duration,
    },
    /// Say this to the coordinator, if a session stands.
    Send(up::Body),
    /// Drop the session and connect again.
    Reconnect,
    /// Compute one lane's features at the present state, without these shards; answered by
    /// [`Event::FeaturesDone`].
    ComputeFeatures {
        step: u64,
        lane: u32,
        quarantine: Quarantine,
    },
    /// Start the gathering of this generation; a running exchange is dropped. Answered by
    /// [`Event::Gathered`].
    Gather(Gathering),
    /// Compute one lane's gradient at the present state, without these shards.
    Compute {
        step: u64,
        lane: u32,
        quarantine: Quarantine,
        /// Of all lanes, where the gradient needs them.
        features: Option<Arc<Features>>,
    },
    /// Take the digest of an audited lane's gradient, off the loop; answered by
    /// [`Event::LaneDigest`].
    DigestLane {
        attempt: Attempt,
        gradient: Gradient,
        /// What the lane took.
        seconds: f64,
    },
    /// Take the digest of the present state, off the loop; answered by [`Event::StateDigest`].
    DigestState { step: u64 },
    /// What was staged of the open step does not count any more.
    Unstage,
    /// A node that this worker brings to the exchange is complete: have it where the exchange reads.
    Stage {
        step: u64,
        node: LaneRange,
        sum: Gradient,
    },
    /// These lanes will be wanted at `step`, without these shards.
    Prefetch {
        step: u64,
        lanes: Vec<u32>,
        quarantine: Quarantine,
    },
    /// Make an id for this generation's device links; answered by [`Event::IdMade`].
    MakeId { generation: u64 },
    /// Start the all-reduce of this generation; a running one is dropped.
    Reduce(Exchange),
    /// Drop a running gathering or all-reduce.
    AbortReduce,
    /// Apply the reduced gradient; copy the state afterwards for these checkpoint parts.
    Apply {
        step: u64,
        sum: Arc<Vec<f32>>,
        snapshot_parts: Vec<u32>,
        /// The gradient is not finite: the step counts, and nothing is changed. It follows from the
        /// bits, so everybody does the same.
        skip: bool,
    },
    /// Initialise (empty manifest) or load a checkpoint.
    Load { step: u64, manifest: String },
    /// Copy the state of `step` from peers.
    Copy { step: u64, sources: Vec<String> },
    /// Store these checkpoint parts of the present state.
    StoreParts { step: u64, parts: Vec<u32> },
    /// Evaluate the present state: a share, or the figures.
    Evaluate(v1::Evaluate),
    /// Export the present state.
    Export { step: u64 },
    /// End the process.
    Exit { success: bool, reason: String },
}

/// One all-reduce, in the collective's terms but without addresses resolved.
#[derive(Debug)]
pub struct Exchange {
    /// Fencing.
    pub generation: u64,
    /// The open step.
    pub step: u64,
    /// This worker's rank.
    pub rank: usize,
    /// Addresses and nodes by rank.
    pub members: Vec<(String, Vec<LaneRange>)>,
    /// The nodes that this worker brings.
    pub partials: BTreeMap<LaneRange, Gradient>,
    /// Device links beside TCP.
    pub links: Option<Linked>,
}
