//! A plan's processes. `belfry run PLAN.toml` is a launcher of one scheduler and one agent; on a
//! cluster each host runs its own `belfry agent`. The scheduler decides (`belfry_coordinator::plan`),
//! agents start and watch coordinators, workers and evaluations; each may be killed and started again.

mod agent;
mod ask;
mod client;
mod command;
mod launch;
mod logs;
mod place;
mod prepare;
mod results;
mod rpc;
mod scheduler;
mod show;
mod tasks;
mod watched;

pub use agent::{AgentArguments, agent};
pub use ask::{CancelArguments, SubmitArguments, cancel, submit};
pub use launch::launch;
pub use logs::{LogsArguments, logs};
pub use scheduler::{SchedulerArguments, scheduler};
pub use show::show;
