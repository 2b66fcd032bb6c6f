//! Packing: from a publisher's files to shards. The same input and options give the same bytes.
//!
//! A format describes what it finds in a [`Catalog`]; the engine shuffles, reads, cuts and writes,
//! and knows no format.

mod answers;
mod bad;
mod catalog;
pub mod cli;
mod contractions;
mod cut;
mod engine;
pub mod formats;
mod journal;
mod order;
mod progress;
mod read;
mod shard;

pub use answers::{Majorities, Vocabulary, normalize, soft_score};
pub use bad::{BAD_FILE, Bad, BadKind, MaxBad, by_kind};
pub use catalog::{Catalog, Description, Place, Texts, key_of};
pub use engine::{Packed, pack};
pub use formats::folder::{catalog as folder, list_keys};
pub use shard::tar_of;
pub(crate) use shard::{describe, manifest_of, write_manifest};

use crate::check::Check;

/// A shard's bytes, where no one says otherwise: some of them fit into memory while they are
/// written, and one is fetched from a store in seconds.
pub const SHARD_BYTES: u64 = 256 << 20;
/// A shard's pairs, where no one says otherwise.
pub const PAIRS_PER_SHARD: u32 = 2000;

/// How to pack, whatever the format.
#[derive(Clone, Debug)]
pub struct PackOptions {
    /// Folder or URL of the dataset.
    pub output: String,
    /// A name for people.
    pub dataset: String,
    /// A shard is closed before it holds more pairs than this, unless its only sample does.
    pub pairs_per_shard: u32,
    /// A shard is closed before its tar is longer than this, unless by its only sample.
    pub shard_bytes: u64,
    /// Seeds the shuffle of samples over shards.
    pub seed: u64,
    /// How closely images are looked at.
    pub check: Check,
    /// How much may be bad.
    pub max_bad: MaxBad,
    /// Go on with an unfinished dataset.
    pub resume: bool,
    /// Threads that read and check; 0: one per core.
    pub threads: usize,
    /// Show how far it is.
    pub progress: bool,
}

impl PackOptions {
    /// What no one says otherwise, for `dataset` at `output`.
    pub fn new(output: impl Into<String>, dataset: impl Into<String>) -> Self {
        PackOptions {
            output: output.into(),
            dataset: dataset.into(),
            pairs_per_shard: PAIRS_PER_SHARD,
            shard_bytes: SHARD_BYTES,
            seed: 0,
            check: Check::default(),
            max_bad: MaxBad::Count(0),
            resume: false,
            threads: 0,
            progress: false,
        }
    }
}
