//! What a plan's journal holds: its stages, how often each was tried and how it ended, and the
//! agents that were heard. What runs now is not in it: agents tell that themselves.

use belfry_configs::plan::Stage;
use serde::{Deserialize, Serialize};

/// The durable part of a scheduler.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Queue {
    /// The plan's name.
    pub plan: String,
    /// In the order of their submission.
    pub stages: Vec<Queued>,
    /// An agent's number is its place here; it never changes, worker ids follow from it.
    pub agents: Vec<KnownAgent>,
}

/// A stage that was submitted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Queued {
    /// What it is.
    pub stage: Stage,
    /// Tries that failed.
    pub failures: u32,
    /// Tries that were begun anew by hand; with `failures` they number its tries.
    #[serde(default)]
    pub revivals: u32,
    /// Why the last one failed; empty: none did.
    pub last_failure: String,
    /// How it ended, when it did.
    pub end: Option<End>,
}

impl Queued {
    /// A stage that was not tried yet.
    pub fn new(stage: Stage) -> Self {
        Queued {
            stage,
            failures: 0,
            revivals: 0,
            last_failure: String::new(),
            end: None,
        }
    }

    /// Number of the present try. What an earlier one still says does not count.
    pub fn attempt(&self) -> u32 {
        self.failures + self.revivals
    }
}

/// How a stage ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// Well.
    Done,
    /// Every try failed, or a stage before it.
    Failed {
        /// In words.
        reason: String,
    },
    /// It was not wanted any more, or a stage before it.
    Cancelled {
        /// In words.
        reason: String,
    },
}

impl End {
    /// The word that people read.
    pub fn word(&self) -> &'static str {
        match self {
            End::Done => "done",
            End::Failed { .. } => "failed",
            End::Cancelled { .. } => "cancelled",
        }
    }

    /// Why, where it did not end well.
    pub fn reason(&self) -> &str {
        match self {
            End::Done => "",
            End::Failed { reason } | End::Cancelled { reason } => reason,
        }
    }
}

/// An agent that was heard once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnownAgent {
    /// Its own name.
    pub name: String,
}
