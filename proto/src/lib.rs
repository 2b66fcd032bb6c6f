//! The words that workers and coordinator share: messages, ids, and the canonical lane tree.
//!
//! Knows nothing of clocks, sockets or tensors.

pub mod ids;
pub mod journal;
pub mod lanes;
pub mod objective;
mod quarantine;

/// Generated messages and services of `belfry.proto` and `scheduler.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod v1 {
    tonic::include_proto!("belfry.v1");
}

pub use ids::{Digest, Generation, Lane, Rank, Step, Term, WorkerId};
pub use lanes::LaneRange;
pub use quarantine::Schedule;

/// Slices of a state of which a step's readiness tells one: a state that was corrupted is found
/// within so many steps.
pub const STATE_SLICES: u64 = 64;

impl From<LaneRange> for v1::Node {
    fn from(range: LaneRange) -> Self {
        v1::Node {
            start: range.start,
            end: range.end,
        }
    }
}

impl From<v1::Node> for LaneRange {
    fn from(node: v1::Node) -> Self {
        LaneRange {
            start: node.start,
            end: node.end,
        }
    }
}
