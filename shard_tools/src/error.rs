//! Every way in which shards can be wrong, with the place.

use crate::store::StoreError;

/// Errors of reading, writing and checking shards.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShardError {
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A file of the input folder cannot be read.
    #[error("cannot read {file}: {source}")]
    Input {
        /// The file.
        file: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A manifest or index is not what it should be.
    #[error("{origin}: {reason}")]
    Manifest {
        /// The file.
        origin: String,
        /// What is wrong and what to do.
        reason: String,
    },
    /// A tar lies or is cut off.
    #[error("shard {shard}, member {member}, offset {offset}: {reason}")]
    Member {
        /// The shard's file.
        shard: String,
        /// The member's name, as far as it can be read.
        member: String,
        /// Byte offset of its header or data in the shard.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// A sample of the input cannot be packed.
    #[error("{file}: {reason}")]
    Sample {
        /// Image or caption file.
        file: String,
        /// What is wrong.
        reason: String,
    },
    /// Something already stands where the output should go.
    #[error("{0} already holds a dataset; choose another output, or --resume an unfinished one")]
    Exists(String),
}
