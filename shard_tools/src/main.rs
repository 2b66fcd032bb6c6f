//! `shard_tools`: packs, checks and lists shards. Light: no training code in it.

use clap::Parser;

/// Packs, checks and lists shards of image-caption pairs.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: shard_tools::cli::Command,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    shard_tools::cli::run(Arguments::parse().command).await
}
