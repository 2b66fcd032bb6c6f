//! `belfry checkpoint`: what a run has made durable, looked at, checked and tidied from outside.
//!
//! Reads the run's root alone; it needs neither a coordinator nor a worker, and trains nothing.

mod ls;
mod prune;
mod verify;

use clap::Subcommand;

pub use verify::verify_with_progress;

/// The commands.
#[derive(Subcommand)]
pub enum Command {
    /// List checkpoints: step, time, size, parts, evaluation, whether they were read again.
    ///
    /// Exit code 0: listed; 2: an error. Example: belfry checkpoint ls runs/quickstart
    Ls(ls::Arguments),
    /// Read checkpoints again, byte by byte, and name what is wrong by file and place.
    ///
    /// What is found is marked beside the checkpoint: no run begins from one that is corrupt. Exit
    /// code 0: all is right; 1: something is wrong; 2: an error, such as a store that does not answer.
    ///
    /// Example: belfry checkpoint verify s3://bucket/run --all
    Verify(verify::Arguments),
    /// Delete checkpoints that are not to be kept, and parts that belong to none.
    ///
    /// Keeps what [checkpoint] of the run's configuration says, and always the newest that is usable.
    /// Refuses while a coordinator leads the run, which prunes by itself. Exit code 0: done; 2: an
    /// error or a refusal. Example: belfry checkpoint prune runs/quickstart --keep-last 1 --dry-run
    Prune(prune::Arguments),
}

/// Runs one; says whether all is right.
pub async fn run(command: Command) -> anyhow::Result<bool> {
    match command {
        Command::Ls(arguments) => ls::ls(&arguments).await.map(|()| true),
        Command::Verify(arguments) => verify::run(&arguments).await,
        Command::Prune(arguments) => prune::prune(&arguments).await.map(|()| true),
    }
}

/// Steps as people read them.
pub fn steps_of(steps: impl IntoIterator<Item = u64>) -> String {
    let steps: Vec<String> = steps.into_iter().map(|step| step.to_string()).collect();
    match steps.is_empty() {
        true => "none".into(),
        false => steps.join(", "),
    }
}
