//! The command line of `shard_tools`, also reached as `belfry shards`.

use clap::Subcommand;

use crate::looks::{diff, index, info, ls, sample, stats, verify};
use crate::pack;
use crate::pack::cli::{MixArguments, PackArguments};

/// What to do with a dataset.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Pack a publisher's files, a folder of images and captions, or webdataset tars into shards.
    Pack(PackArguments),
    /// Shuffle several packed datasets into one, each a source of its own.
    Mix(MixArguments),
    /// Write manifest and indexes beside webdataset tars that another program wrote.
    ///
    /// Example: shard_tools index s3://bucket/tars --name cc3m
    Index(index::IndexArguments),
    /// Check every hash, hold indexes against tars and decode every image; lists all that is wrong.
    ///
    /// Example: shard_tools verify s3://bucket/coco
    Verify(verify::VerifyArguments),
    /// List samples with their pairs.
    ///
    /// Example: shard_tools ls packed/vqav2 --key 262148 --json
    Ls(ls::LsArguments),
    /// Totals of a dataset, from its manifest alone.
    Info(info::InfoArguments),
    /// Distributions of sizes, texts and labels, and what comes twice.
    Stats(stats::StatsArguments),
    /// Draw some samples with their texts on a contact sheet.
    ///
    /// Example: shard_tools sample s3://bucket/coco --to sheet.png --count 24 --seed 1
    Sample(sample::SampleArguments),
    /// What differs between two datasets; exit code 0 for nothing, 1 for something, 2 for trouble.
    Diff(diff::DiffArguments),
}

/// Runs a command; results go to standard output.
///
/// # Errors
/// What went wrong, naming the file.
pub async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Pack(arguments) => pack::cli::pack(arguments).await?,
        Command::Mix(arguments) => pack::cli::mix(arguments).await?,
        Command::Index(arguments) => index::run(&arguments).await?,
        Command::Verify(arguments) => verify::run(&arguments).await?,
        Command::Ls(arguments) => ls::run(&arguments).await?,
        Command::Info(arguments) => info::run(&arguments).await?,
        Command::Stats(arguments) => stats::run(&arguments).await?,
        Command::Sample(arguments) => sample::run(&arguments).await?,
        Command::Diff(arguments) => diff::run(&arguments).await?,
    }
    Ok(())
}
