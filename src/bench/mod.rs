//! `belfry bench`: what this machine does, each figure beside its floor measured in the same run.
//!
//! `step` is a worker's training step, `reduce` the all-reduce, `heal` a newcomer's copy of the
//! state, `pack` the way from files to shards, `fetch` from a store to the cache, `decode` an image's
//! cost beside Python's, `data` all of it up to host batches, `order` which pairs they are,
//! `checkpoint` the way of a state to the store and back, `eval` a ranking of images and texts.
//! Rounds of figure and floor alternate, so that what else the machine does meets both; medians are
//! shown.

mod checkpoint;
mod coordinator;
mod data;
mod decode;
mod eval;
mod fetch;
mod fit;
mod heal;
mod ladder;
mod order;
mod pack;
mod reduce;
mod run_file;
mod step;
pub mod table;
mod timing;
mod trace;
mod worker;

use std::path::PathBuf;

use belfry_configs::ValidConfig;
use clap::{Args, Subcommand};

pub use worker::Rehearsal;

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
    /// A newcomer's copy of the training state from its peers, beside raw sockets, and the digest of
    /// a state, beside memcpy.
    ///
    /// Example: belfry bench heal --millions 339 --sources 3
    Heal(heal::HealArguments),
    /// The data plane from shards to host batches, beside raw reads of the same shards.
    ///
    /// Example: belfry bench data configs/quickstart.toml --steps 20
    Data(data::DataArguments),
    /// The order of training pairs: its plan time and memory, how fast it seeks, and how well windows
    /// of several sizes shuffle, beside a uniform shuffle. Reads manifests only.
    ///
    /// Example: belfry bench order configs/pretrain-4m.toml --synthetic 4000000,9000000,4000
    Order(order::OrderArguments),
    /// From the bytes of shards to batches on one core, beside webdataset and Pillow in Python.
    ///
    /// Example: belfry bench decode configs/quickstart.toml --photos 96 --set model.image.size=288
    Decode(decode::DecodeArguments),
    /// Shards from their store into the cache, hashed, beside a bare loop of ranged GETs over the
    /// same bytes.
    ///
    /// Example: belfry bench fetch s3://bucket/coco/train
    Fetch(fetch::FetchArguments),
    /// Packing a folder of images, beside copying the same files.
    ///
    /// Example: belfry bench pack data/stamps --megabytes 100
    Pack(pack::PackArguments),
    /// How fast the coordinator decides among very many workers.
    ///
    /// Examples:
    ///
    /// belfry bench coordinator --workers 10000 --lanes 4096 --steps 20
    ///
    /// belfry bench coordinator --sessions 1000 --steps 20
    #[command(verbatim_doc_comment)]
    Coordinator(coordinator::CoordinatorArguments),
    /// A retrieval evaluation of made-up images and captions, beside its fusion passes alone.
    ///
    /// Example: belfry bench eval configs/tiny.toml --images 1000 --set eval.pairs_per_batch=64
    Eval(eval::EvalArguments),
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

/// The length of a run that is counted in epochs, for figures that do not hang on it: longer than any
/// warm-up.
const ANY_STEPS: u64 = 1_000_000;

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
        let mut settings = self.all(more);
        let config = belfry_configs::load(&self.config, &settings)?;
        if !config.needs_epoch_pairs() {
            return Ok(config);
        }
        // No figure here hangs on the length of the run, and the data need not be there.
        settings.push(format!("run.steps={ANY_STEPS}"));
        Ok(belfry_configs::load(&self.config, &settings)?)
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
        Bench::Order(arguments) => order::run(arguments).await,
        Bench::Decode(arguments) => {
            tokio::task::spawn_blocking(move || decode::run(&arguments)).await?
        }
        Bench::Fetch(arguments) => fetch::run(arguments).await,
        Bench::Pack(arguments) => pack::run(arguments).await,
        Bench::Reduce(arguments) => reduce::run(arguments).await,
        Bench::Heal(arguments) => heal::run(arguments).await,
        Bench::Coordinator(arguments) => coordinator::run(arguments).await,
        Bench::Eval(arguments) => eval::run(arguments).await,
        Bench::Checkpoint(arguments) => checkpoint::run(arguments).await,
    }
}
