//! What a plan's core is told and what it answers. Requests are numbered by the shell, each is
//! answered once.

use belfry_configs::plan::Plan;
use belfry_proto::v1;

use super::queue::Queue;
use crate::core::Millis;

/// Times and habits of a scheduler.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Its leadership.
    pub term: u64,
    /// The plan's root, as agents are told it.
    pub root: String,
    /// An agent that was not heard for so long is gone with all that ran there.
    pub agent_silence: Millis,
    /// Known agents get so long to come back to a new scheduler before stages move elsewhere.
    pub settle: Millis,
    /// Pause before a stage is tried again; doubles with every failure.
    pub retry_pause: Millis,
    /// That pause at most.
    pub retry_pause_max: Millis,
}

/// Something that happened.
#[derive(Debug)]
pub enum Event {
    /// An agent says what runs there.
    Report {
        /// To be answered.
        request: u64,
        /// What it says.
        report: v1::AgentReport,
    },
    /// More stages are wanted.
    Submit {
        /// To be answered.
        request: u64,
        /// All of them, or none.
        plan: Plan,
    },
    /// A stage is not wanted any more.
    Cancel {
        /// To be answered.
        request: u64,
        /// Its name.
        stage: String,
    },
    /// Stages that failed or were cancelled are to be tried again.
    Revive,
    /// What [`Effect::Prepare`] asked for is done, or cannot be.
    Prepared {
        /// Which stage.
        stage: String,
        /// Which try.
        attempt: u32,
        /// Whether it ended well already, or why it cannot begin.
        outcome: Result<Ready, String>,
    },
    /// Time passed.
    Tick,
}

/// A stage that was prepared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ready {
    /// It may begin.
    Begin {
        /// The command line of an evaluation; empty for what trains.
        arguments: Vec<String>,
    },
    /// Its root says that it ended well before.
    Over,
}

/// Something to do, in order.
#[derive(Debug, PartialEq)]
pub enum Effect {
    /// Keep an evaluation's result below the plan's root.
    StoreFigures {
        /// Which stage.
        stage: String,
        /// Its result, one line of JSON.
        figures: String,
    },
    /// Make the queue durable before anything that follows.
    Journal(Queue),
    /// Make a stage's root, so that processes can begin.
    Prepare {
        /// Which stage.
        stage: String,
        /// Which try.
        attempt: u32,
    },
    /// Answers a report.
    Assign {
        /// The request.
        request: u64,
        /// What should run there.
        assignment: v1::Assignment,
    },
    /// Answers a submission or a cancellation.
    Accept {
        /// The request.
        request: u64,
    },
    /// Answers whatever cannot be done.
    Refuse {
        /// The request.
        request: u64,
        /// Why, and what to do.
        why: String,
    },
    /// For people.
    Notice(String),
    /// Every stage ended.
    AllEnded,
}
