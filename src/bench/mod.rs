//! `belfry bench`: what this machine does, each figure beside its floor measured in the same run.
//!
//! `step` is a worker's training step, `reduce` the all-reduce, `data` the way from shards to host
//! batches, `pack` the way from images to shards, `checkpoint` the way of a state to the store and
//! back. Rounds of figure and floor alternate, so that what else the machine does meets both; medians
//! are shown.

mod checkpoint;
mod data;
mod fit;
mod ladder;
mod pack;
mod reduce;
mod run_file;
mod step;
mod table;
mod timing;
mod trace;
mod worker;

use std::path::PathBuf;

use belfry_configs::ValidConfig;
use clap::{Args, Subcommand};

/// What is measured.
#[derive(Subcommand)]
pub enum Bench {
    /// A worker's training step on random pairs, beside the device's own matrix products.
    ///
    /// Prints time, samples/s, TFLOP/s (two operations per multiply-accumulate; what the passes
    /// share is counted for both), their share of the rate of large matrix products on the same
    /// device (MFU), and peak memory beside what `belfry model` predicts.
    ///
    /// Examples:
    ///
    /// belfry bench step configs/pretrain-4m.toml --set batch.micro_batch=2 --set
    /// batch.device_batch=1 --pairs 2 --device cpu
    ///
    /// belfry bench step configs/pretrain-4m.toml --fit --write
    ///
    /// belfry bench step configs/pretrain-4m.toml --trace --out trace.json
    #[command(verbatim_doc_comment)]
    Step(step::StepArguments),
    /// The all-reduce over TCP on this machine, beside a raw copy of the same bytes over sockets,
    /// and the way between device and host, beside memcpy.
    ///
    /// Example: belfry bench reduce --workers 4 --millions 64
    Reduce(reduce::ReduceArguments),
    /// The data plane from shards to host batches, beside raw reads of the same shards.
    ///
    /// Example: belfry bench data configs/quickstart.toml --steps 20
    Data(data::DataArguments),
    /// Packing a folder of images, beside copying the same files.
    ///
    /// Example: belfry bench pack data/stamps --megabytes 100
    Pack(pack::PackArguments),
    /// Storing and loading a checkpoint, beside raw puts and gets of the same bytes and memcpy.
    ///
    /// Example: belfry bench checkpoint configs/pretrain-4m.toml --root s3://bucket/prefix
    Checkpoint(checkpoint::CheckpointArguments),
}

impl Bench {
    /// Whether it trains, so that the allocator should behave as in a worker.
    pub fn trains(&self) -> bool {
        matches!(self, Bench::Step(_))
    }
}

/// The run file and what is laid over it.
#[derive(Args, Clone)]
pub struct Case {
    /// The run file.
    config: PathBuf,
    /// Override a key, for instance --set model.image.size=384; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
    /// cpu or cuda:N, instead of the run file's run.device.
    #[arg(long)]
    device: Option<String>,
}

impl Case {
    /// The configuration with `more` laid over everything.
    fn load(&self, more: &[String]) -> anyhow::Result<ValidConfig> {
        Ok(belfry_configs::load(&self.config, &self.all(more))?)
    }

    fn all(&self, more: &[String]) -> Vec<String> {
        let device = self.device.iter().map(|name| format!("run.device={name}"));
        let settings = self.settings.iter().cloned();
        settings.chain(device).chain(more.iter().cloned()).collect()
    }
}

/// Measures and prints.
pub async fn run(bench: Bench) -> anyhow::Result<()> {
    // What blocks does so on a thread that may: the data plane has a runtime of its own.
    match bench {
        Bench::Step(arguments) => {
            tokio::task::spawn_blocking(move || step::run(&arguments)).await?
        }
        Bench::Data(arguments) => data::run(arguments).await,
        Bench::Pack(arguments) => pack::run(arguments).await,
        Bench::Reduce(arguments) => reduce::run(arguments).await,
        Bench::Checkpoint(arguments) => checkpoint::run(arguments).await,
    }
}
