//! From shards to host batches: cache, order, decode, transform, tokenise, mask.
//!
//! Every random choice is a function of (seed, epoch or step, lane, micro-batch, pair). This room
//! knows lanes and pairs, and refuses to know workers, networks of models, devices and Burn.

mod cache;
mod error;
mod host_batch;
mod image;
mod mask;
mod order;
mod plane;
mod quarantine;
mod resize;
mod text;

pub use error::DataError;
pub use host_batch::HostBatch;
pub use image::clip_transform;
pub use mask::{Masking, mask};
pub use order::{Order, PairPlace, ShardPairs};
pub use plane::{DataPlane, Split};
pub use quarantine::{Quarantine, ShardRef};
pub use text::{Special, Text};
