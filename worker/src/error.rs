//! What can go wrong in a worker, and what a caller should do about it.

use std::path::PathBuf;

/// A worker's errors.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerError {
    /// The configured device cannot be had.
    #[error("run.device = \"{device}\": {reason}")]
    Device {
        /// As configured.
        device: String,
        /// What is missing, and where it was looked for.
        reason: String,
    },
    /// The model refused its sizes or inputs.
    #[error(transparent)]
    Model(#[from] belfry_model::ModelError),
    /// The data plane refused.
    #[error(transparent)]
    Data(#[from] belfry_data::DataError),
    /// The collective's endpoint failed.
    #[error(transparent)]
    Collective(#[from] belfry_collective::CollectiveError),
    /// The run's root failed.
    #[error("{what}: {source}")]
    Store {
        /// What was being read or written.
        what: String,
        /// What the store said.
        #[source]
        source: shard_tools::store::StoreError,
    },
    /// A checkpoint or one of its parts is not what its manifest says.
    #[error("checkpoint {file}: {reason}; remove the folder of this step or restore the file")]
    Checkpoint {
        /// Manifest or part, relative to the run's root.
        file: String,
        /// What is wrong.
        reason: String,
    },
    /// There is no such checkpoint to export.
    #[error("{root} has no complete checkpoint of that step; steps that have one: {steps:?}")]
    NoCheckpoint {
        /// The run's root.
        root: String,
        /// Steps of the checkpoints there.
        steps: Vec<u64>,
    },
    /// The weights that `[init]` names are not as they must be.
    #[error("init: {0}")]
    Weights(#[from] crate::weights::WeightsError),
    /// The file that holds the coordinator's address is missing for too long.
    #[error("no coordinator address in {path}; is the coordinator running?")]
    NoAddress {
        /// The file.
        path: PathBuf,
    },
    /// The coordinator ended the run, or refused this worker, or this worker cannot go on.
    #[error("{0}")]
    Ended(String),
    /// A state cannot be judged, or not all of it was.
    #[error("evaluation: {0}")]
    Evaluation(String),
    /// A file of findings is not one, or of another evaluation.
    #[error("{path}: {reason}")]
    TallyFile {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A file of an evaluation cannot be read or written.
    #[error("{path}: {source}")]
    Scratch {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A background task died.
    #[error("internal: {0}")]
    Internal(String),
}
