//! The command line of `shard_tools`, also reached as `belfry shards`.

use std::path::PathBuf;

use clap::Subcommand;

use crate::looks::{diff, index, info, ls, sample, stats, verify};
use crate::pack::{PackOptions, pack_folder};

/// What to do with a dataset.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Pack a folder of key.jpg|png|webp + key.txt (one caption a line) into shards.
    Pack {
        /// Folder of images and captions.
        input: PathBuf,
        /// Folder or s3:// URL of the new dataset.
        output: String,
        /// A name for people.
        #[arg(long, default_value = "dataset")]
        dataset: String,
        /// A shard is closed when it holds this many pairs.
        #[arg(long, default_value_t = 2000)]
        pairs_per_shard: u32,
        /// Seeds the shuffle of samples over shards.
        #[arg(long, default_value_t = 0)]
        seed: u64,
        /// Go on with an unfinished dataset.
        #[arg(long)]
        resume: bool,
    },
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
        Command::Pack {
            input,
            output,
            dataset,
            pairs_per_shard,
            seed,
            resume,
        } => {
            let options = PackOptions {
                input,
                output,
                dataset,
                pairs_per_shard: pairs_per_shard.max(1),
                seed,
                keys: None,
                resume,
                progress: true,
            };
            let manifest = pack_folder(&options).await?;
            println!(
                "{}: {} samples, {} pairs in {} shards",
                options.output,
                manifest.samples,
                manifest.pairs,
                manifest.shards.len()
            );
        }
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
