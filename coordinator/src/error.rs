//! Why a coordinator cannot go on.

use shard_tools::store::StoreError;

/// A coordinator's errors.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CoordinatorError {
    /// The run's root failed.
    #[error("{what}: {source}")]
    Store {
        /// What was being read or written.
        what: String,
        /// What the store said.
        #[source]
        source: StoreError,
    },
    /// Another coordinator has written the journal entry that this one wanted to write.
    #[error(
        "another coordinator (term {term} at {address}) leads this run; this one ends. A second one \
         that waits its turn is started with --standby"
    )]
    Superseded {
        /// Its term.
        term: u64,
        /// Where it listens.
        address: String,
    },
    /// A durable file is not what this program writes.
    #[error("{file}: {reason}")]
    Corrupt {
        /// Relative to the run's root.
        file: String,
        /// What is wrong.
        reason: String,
    },
    /// The server failed.
    #[error("the coordinator's server failed: {0}")]
    Server(#[from] tonic::transport::Error),
    /// The listener failed.
    #[error("the coordinator's listener failed: {0}")]
    Listener(#[from] std::io::Error),
}

impl CoordinatorError {
    /// What was being done when the store refused.
    pub(crate) fn store(what: impl Into<String>, source: StoreError) -> Self {
        let what = what.into();
        CoordinatorError::Store { what, source }
    }
}
