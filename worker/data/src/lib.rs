//! From shards to host batches: cache, order, decode, transform, tokenise, mask.
//!
//! Every random choice is a function of (seed, epoch or step, lane, micro-batch, pair). This room
//! knows lanes and pairs, and refuses to know workers, networks of models, devices and Burn.

pub mod cache;
mod error;
mod host_batch;
mod identity;
pub mod image;
mod mask;
mod order;
mod plane;
mod quarantine;
mod replay;
mod text;

pub use error::DataError;
pub use host_batch::{HostBatch, Targets};
pub use identity::{DatasetIdentity, found, identities, pairs_digest};
pub use image::{clip_transform, transform};
pub use mask::Masking;
pub use order::{Dataset, FalsePair, Nth, PairRef, Sequence, Tail, contents_of};
pub use plane::{About, DataPlane, EvaluatedTexts, Split, WARM_STEPS, answers};
pub use quarantine::{Quarantine, ShardRef};
pub use replay::{EpochReport, NAMED_MAX, Replay, Replayed};
pub use text::{Special, Text};
