//! What can be wrong with data, with shard, member and offset.

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
    /// A store gave less of a shard than its manifest says.
    #[error(
        "shard {shard}: {found} bytes from offset {offset}, where its manifest says {expected}; the \
         shard is cut off, pack or copy it again"
    )]
    Short {
        /// The shard with its dataset.
        shard: String,
        /// Where the bytes begin.
        offset: u64,
        /// Bytes that came.
        found: u64,
        /// Bytes that were asked for.
        expected: u64,
    },
    /// A shard or its index stays unreadable, while its dataset's manifest can be read: the shard is
    /// at fault, and neither credentials nor network are. What a quarantine is for.
    #[error("a shard stays unreadable (attempts: {attempts}): {source}")]
    GivenUp {
        /// The shard or index with its dataset.
        shard: String,
        /// How often it was tried.
        attempts: u32,
        /// What was wrong at last.
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
    /// A text would be cut, where that is not wanted.
    #[error(
        "`{text}` has {tokens} tokens, and the model reads {text_len} (data.text_len); shorten it"
    )]
    TooLong {
        /// The text.
        text: String,
        /// With its beginning and end.
        tokens: usize,
        /// Of the run.
        text_len: usize,
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
    /// The disk of the shard cache is full before the cache is.
    #[error(
        "data.cache_dir: {path}: no space left on the device, and data.cache_bytes_max allows \
         {bytes_max} bytes; lower it, free some space, or name a folder on another disk"
    )]
    CacheFull {
        /// The folder.
        path: String,
        /// The limit.
        bytes_max: u64,
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
    /// The training shard that cannot be read, where that is what is wrong.
    pub fn unreadable(&self) -> Option<ShardRef> {
        match self {
            DataError::Unreadable { shard, .. } => Some(*shard),
            _ => None,
        }
    }

    /// Whether the same request may succeed later.
    pub(crate) fn may_pass(&self) -> bool {
        match self {
            DataError::Shard(shard_tools::ShardError::Store(store)) => store.may_pass(),
            DataError::Short { .. } => true,
            _ => false,
        }
    }

    /// Whether it may be the fault of one shard alone, if the rest of its dataset can be read.
    pub(crate) fn is_of_one_shard(&self) -> bool {
        use shard_tools::{ShardError, store::StoreError};
        match self {
            DataError::Shard(ShardError::Store(store)) => matches!(
                store,
                StoreError::NotFound { .. } | StoreError::Other { .. }
            ),
            DataError::Shard(ShardError::Input { .. } | ShardError::Member { .. }) => true,
            DataError::Hash { .. } | DataError::Short { .. } => true,
            _ => false,
        }
    }
}
