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
    #[error("{0} already holds a dataset; choose another output")]
    Exists(String),
    /// An unfinished dataset stands where the output should go.
    #[error(
        "{0} already holds a dataset that is not finished; go on with it by --resume, or choose \
         another output"
    )]
    Unfinished(String),
    /// Tars stand where the output should go, and no packer left them.
    #[error(
        "{0} holds tars and neither a manifest nor the journal of an unfinished packing; choose \
         another output (`index` makes a dataset of tars in place)"
    )]
    Foreign(String),
    /// The unfinished dataset has other options or another input.
    #[error(
        "{output} was begun with other options, so going on would not give one dataset: \
         {differing}; repeat those, or choose another output"
    )]
    OtherOptions {
        /// The output.
        output: String,
        /// Each that differs, with both values.
        differing: String,
    },
    /// More of the input is bad than is allowed.
    #[error(
        "{input}: {last} ({bad} bad of {seen} so far, {allowed} allowed); `--max-bad N` or a share \
         as `--max-bad 0.5%` goes on without such samples and lists each in bad.jsonl"
    )]
    TooManyBad {
        /// The input's folder.
        input: String,
        /// The one that was too much.
        last: String,
        /// Bad ones up to it.
        bad: u64,
        /// Samples and records seen up to it.
        seen: u64,
        /// How many may be bad.
        allowed: u64,
    },
    /// An option that cannot be.
    #[error("{0}")]
    Option(String),
}
