//! What can go wrong between workers, whom it names, and what a caller should do about it.

use std::io;
use std::net::SocketAddr;

/// Errors of the all-reduce and of the state copy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CollectiveError {
    /// The listener could not be opened.
    #[error("cannot listen on {addr}: {source}; choose a free port or an address of this host")]
    Bind {
        /// As asked for.
        addr: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A peer's connection failed or ended in the middle of an exchange.
    #[error("lost rank {rank} at {addr}: {source}; wait for the next generation")]
    PeerLost {
        /// The peer's rank.
        rank: usize,
        /// The peer's address.
        addr: SocketAddr,
        /// What the socket said.
        #[source]
        source: io::Error,
    },
    /// A peer closed its connection but still listens: it lost somebody else, or was told to stop.
    #[error("rank {rank} at {addr} gave generation {generation} up; wait for the next one")]
    GaveUp {
        /// The peer's rank.
        rank: usize,
        /// The peer's address.
        addr: SocketAddr,
        /// Of this exchange.
        generation: u64,
    },
    /// A peer neither sent nor read anything for too long.
    #[error("rank {rank} at {addr} was silent for {seconds:.1} s; wait for the next generation")]
    PeerSilent {
        /// The peer's rank.
        rank: usize,
        /// The peer's address.
        addr: SocketAddr,
        /// The limit that was passed.
        seconds: f64,
    },
    /// A frame's checksum or header is wrong.
    #[error(
        "corrupt frame from rank {rank} at {addr}, bucket {bucket}, offset {offset}: {reason}; \
         if it recurs, take that host or its network card out"
    )]
    Corrupt {
        /// The sender's rank.
        rank: usize,
        /// The sender's address.
        addr: SocketAddr,
        /// As the frame's header claims.
        bucket: u32,
        /// As the frame's header claims, in floats from the bucket's start.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// A frame is intact but does not belong into this exchange.
    #[error("unexpected frame from rank {rank} at {addr}: {reason}; do the members agree?")]
    Unexpected {
        /// The sender's rank.
        rank: usize,
        /// The sender's address.
        addr: SocketAddr,
        /// What is wrong.
        reason: String,
    },
    /// A peer has gone on to a newer generation, or has given this one up.
    #[error(
        "rank {rank} at {addr} refuses generation {generation}: it holds generation {held}; wait \
         for the next one"
    )]
    StaleGeneration {
        /// The peer's rank.
        rank: usize,
        /// The peer's address.
        addr: SocketAddr,
        /// Of this exchange.
        generation: u64,
        /// The newest that the peer knows.
        held: u64,
    },
    /// This endpoint has seen a newer generation, or an exchange of this one failed here.
    #[error("generation {generation} is over here (newest {held}); ask for a newer one")]
    GenerationOver {
        /// As asked for.
        generation: u64,
        /// The newest that this endpoint knows.
        held: u64,
    },
    /// The peer belongs to another run.
    #[error("rank {rank} at {addr} belongs to run {theirs:016x}, not to this one; check addresses")]
    OtherRun {
        /// The peer's rank.
        rank: usize,
        /// The peer's address.
        addr: SocketAddr,
        /// The peer's run.
        theirs: u64,
    },
    /// The request contradicts itself.
    #[error("cannot reduce: {0}; the members' nodes must tile all lanes exactly")]
    BadNodes(String),
    /// The device links of a generation broke.
    #[error(
        "the device links of generation {generation} broke: {reason}; ranks that do not answer: \
         {ranks:?}; wait for the next generation"
    )]
    LinksBroke {
        /// Of this exchange.
        generation: u64,
        /// Members whose processes do not answer; none where all live.
        ranks: Vec<usize>,
        /// What the links said.
        reason: String,
    },
    /// Device links were asked for where there are none.
    #[error("no device links: {0}; set collective.transport = \"tcp\" or mend this")]
    NoDeviceLinks(String),
    /// This process's device failed.
    #[error("device: {0}")]
    Device(String),
    /// Every source of a state copy failed; this is the last failure.
    #[error("no source left for the state of step {step}, last {addr}: {reason}; ask again")]
    NoSource {
        /// The wanted step.
        step: u64,
        /// The source that failed last.
        addr: SocketAddr,
        /// What went wrong there.
        reason: String,
    },
    /// The sources no longer hold the step.
    #[error("{addr} no longer holds the state of step {step}; ask for the newer one")]
    StateGone {
        /// The wanted step.
        step: u64,
        /// Who said so.
        addr: SocketAddr,
    },
    /// Sources hold different states of one step, and no majority tells which is right.
    #[error("{sources} hold different states of step {step}; ask again when one is removed")]
    Disagree {
        /// The wanted step.
        step: u64,
        /// Their addresses.
        sources: String,
    },
    /// A state copy was asked for without sources, or of more than memory can address.
    #[error("cannot copy a state: {0}")]
    BadCopy(String),
    /// A task of this process failed.
    #[error("internal: {0}; this is a bug")]
    Internal(String),
}

/// What a loop does after an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reaction {
    /// The same call may work.
    Retry,
    /// Wait for a new generation from the coordinator, then repeat the exchange.
    Rejoin,
    /// As rejoin, and count this against the named peer.
    Quarantine,
    /// No repetition helps.
    Fatal,
}

impl CollectiveError {
    /// What a loop should do.
    pub fn reaction(&self) -> Reaction {
        match self {
            Self::PeerLost { .. }
            | Self::PeerSilent { .. }
            | Self::GaveUp { .. }
            | Self::StaleGeneration { .. }
            | Self::GenerationOver { .. }
            | Self::LinksBroke { .. }
            | Self::StateGone { .. } => Reaction::Rejoin,
            Self::Corrupt { .. } | Self::Unexpected { .. } => Reaction::Quarantine,
            Self::NoSource { .. } | Self::Disagree { .. } => Reaction::Retry,
            Self::Bind { .. }
            | Self::OtherRun { .. }
            | Self::BadNodes(_)
            | Self::BadCopy(_)
            | Self::NoDeviceLinks(_)
            | Self::Device(_)
            | Self::Internal(_) => Reaction::Fatal,
        }
    }

    /// The same error with its rank looked up in `ranks`: of an exchange between some members.
    pub(crate) fn with_ranks(mut self, ranks: &[usize]) -> Self {
        match &mut self {
            Self::PeerLost { rank, .. }
            | Self::GaveUp { rank, .. }
            | Self::PeerSilent { rank, .. }
            | Self::Corrupt { rank, .. }
            | Self::Unexpected { rank, .. }
            | Self::StaleGeneration { rank, .. }
            | Self::OtherRun { rank, .. } => *rank = ranks.get(*rank).copied().unwrap_or(*rank),
            _ => {}
        }
        self
    }

    /// The ranks that this error blames; a peer that gave up or went on is not to blame.
    pub fn ranks(&self) -> Vec<u32> {
        match self {
            Self::PeerLost { rank, .. }
            | Self::PeerSilent { rank, .. }
            | Self::Corrupt { rank, .. }
            | Self::Unexpected { rank, .. }
            | Self::OtherRun { rank, .. } => vec![*rank as u32],
            Self::LinksBroke { ranks, .. } => ranks.iter().map(|r| *r as u32).collect(),
            _ => Vec::new(),
        }
    }
}
