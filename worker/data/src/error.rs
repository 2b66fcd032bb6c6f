//! What can be wrong with data, with shard, member and offset.

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
    /// A training shard cannot be had, after all attempts.
    #[error("shard {name} cannot be read ({attempts} attempts): {source}")]
    Unreadable {
        /// Its dataset's place in `data.train`.
        dataset: u32,
        /// Its place in the manifest.
        shard: u32,
        /// The shard with its dataset.
        name: String,
        /// How often it was tried.
        attempts: u32,
        /// What the last attempt said.
        #[source]
        source: Box<DataError>,
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
