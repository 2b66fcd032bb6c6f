//! What can be wrong with sizes, weights or a batch before a forward pass starts.

use belfry_configs::{System, Task};

/// Errors of this crate. All but the last of the device and the group are found before
/// the device does any work.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The configured sizes do not make a model.
    #[error("`{key}` = {value}: {reason}")]
    Sizes {
        /// The key as the user wrote it.
        key: &'static str,
        /// Its value.
        value: u64,
        /// What it must be.
        reason: String,
    },
    /// A host vector has the wrong length.
    #[error("`{what}` holds {found} elements, {expected} are needed")]
    Length {
        /// Field or vector.
        what: &'static str,
        /// Elements needed.
        expected: usize,
        /// Elements found.
        found: usize,
    },
    /// A token, label or count lies outside its range.
    #[error("`{what}` at element {index} is {value}, it must lie in {low}..{high}")]
    Range {
        /// Field of the batch.
        what: &'static str,
        /// Element of that field.
        index: usize,
        /// The value found.
        value: i64,
        /// Smallest valid value.
        low: i64,
        /// First value beyond the valid ones.
        high: i64,
    },
    /// The device did not give a result back.
    #[error("the device could not return `{what}`: {reason}; restart the worker")]
    Device {
        /// What was read.
        what: &'static str,
        /// The backend's words.
        reason: String,
    },
    /// A batch of another task than the model's.
    #[error("this call needs a model of {needed}, `model.task` is {task:?}")]
    Task {
        /// What the call is for.
        needed: &'static str,
        /// The model's task.
        task: Task,
    },
    /// Managers were to be looked at, and the system has none.
    #[error("model.system = {system:?} has no managers to look at; it must be managertower")]
    NoManagers {
        /// The system.
        system: System,
    },
    /// The features of other members of a contrastive group did not come.
    #[error("the contrastive group could not exchange {what}")]
    Group {
        /// What was exchanged.
        what: &'static str,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A gradient was asked of weights that were loaded without autodiff.
    #[error("weights were loaded for evaluation; load them on an autodiff device to train")]
    NoAutodiff,
}
