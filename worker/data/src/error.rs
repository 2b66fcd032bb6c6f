//! What can be wrong with data, with shard, member and offset.

use shard_tools::ShardError;
use shard_tools::store::StoreError;

use crate::quarantine::ShardRef;

/// Errors of the data plane.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// Manifest, index, shard or store is not as it should be.
    #[error(transparent)]
    Shard(#[from] shard_tools::ShardError),
    /// A shard's bytes are not those that were packed.
    #[error(
        "shard {shard}: sha256 is {found}, its manifest says {expected}; run `belfry shards verify` \
         and pack or copy it again"
    )]
    Hash {
        /// The shard with its dataset.
        shard: String,
        /// As read.
        found: String,
        /// As packed.
        expected: String,
    },
    /// An image cannot be used.
    #[error("shard {shard}, member {member}, offset {offset}: {reason}")]
    Image {
        /// The shard with its dataset.
        shard: String,
        /// The member.
        member: String,
        /// Its data's offset.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// The tokenizer cannot be used.
    #[error("data.tokenizer = \"{file}\": {reason}")]
    Tokenizer {
        /// As configured.
        file: String,
        /// What is wrong.
        reason: String,
    },
    /// A setting does not fit the data.
    #[error("{key}: {reason}")]
    Setting {
        /// The key.
        key: &'static str,
        /// What is wrong and what to do.
        reason: String,
    },
    /// A shard stays unreadable: where a run allows a quarantine, it can go on without it.
    #[error("{source}")]
    Unreadable {
        /// Which one.
        shard: ShardRef,
        /// Why, with its name.
        #[source]
        source: Box<DataError>,
    },
    /// Making a batch came to an end that nobody foresaw.
    #[error("step {step}, lane {lane}: preparing its batches panicked: {reason}")]
    Panicked {
        /// The step.
        step: u64,
        /// The lane.
        lane: u32,
        /// What was said.
        reason: String,
    },
    /// The shard cache cannot be written.
    #[error("data.cache_dir: {path}: {source}")]
    Cache {
        /// The file or folder.
        path: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

impl DataError {
    /// The training shard that cannot be read, where that is what is wrong: not a full disk, not
    /// credentials that do not fit, which would lose every shard one after the other.
    pub fn unreadable(&self) -> Option<ShardRef> {
        let DataError::Unreadable { shard, source } = self else {
            return None;
        };
        let elsewhere = match &**source {
            DataError::Cache { .. } => true,
            DataError::Shard(ShardError::Store(error)) => matches!(
                error,
                StoreError::Denied { .. } | StoreError::Full { .. } | StoreError::Location { .. }
            ),
            _ => false,
        };
        (!elsewhere).then_some(*shard)
    }
}
