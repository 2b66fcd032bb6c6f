//! A plan that can run: every stage once per seed, with its resolved run and its needs. Whole in
//! itself, so that it can be sent to another machine and kept in a journal.

use serde::{Deserialize, Serialize};

use super::file::Target;

/// A plan that cannot be wrong. Only [`super::load`] makes one from files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Its name.
    pub name: String,
    /// Its stages, repetitions apart, as the file lists them.
    pub stages: Vec<Stage>,
}

/// One stage of a plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// Its own in the plan; names its folder.
    pub name: String,
    /// Its name in the file, which repetitions with other seeds share.
    pub group: String,
    /// What it does.
    pub work: Work,
    /// Stages that must have ended well before.
    pub after: Vec<String>,
    /// Workers without which it does not begin and does not go on; at least 1.
    pub min_workers: u32,
    /// Workers that it gets where there are enough; at least `min_workers`.
    pub preferred_workers: u32,
    /// Higher numbers get workers first.
    pub priority: i32,
    /// How often it is tried again after a failure.
    pub retries: u32,
    /// Its rows in the table of results.
    pub results: Vec<Target>,
}

/// What a stage does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "lowercase")]
pub enum Work {
    /// Trains a run.
    Train {
        /// The resolved run file.
        run: String,
        /// The stage with whose newest verified checkpoint it begins.
        init_from: Option<String>,
    },
    /// Evaluates a checkpoint.
    Eval {
        /// Of this stage.
        of: String,
        /// The packed dataset; without it the run's own.
        data: Option<String>,
        /// The best by this figure; without it the newest.
        best: Option<String>,
        /// Settings over the run's configuration.
        set: Vec<String>,
    },
}

impl Work {
    /// Whether a coordinator leads it.
    pub fn trains(&self) -> bool {
        matches!(self, Work::Train { .. })
    }
}
