//! `belfry bench data`: how fast the data plane makes host batches, beside raw reads of the same
//! shards from the same store.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use belfry_configs::ValidConfig;
use belfry_data::{DataPlane, Quarantine, Split};
use clap::Args;
use shard_tools::manifest::Manifest;
use shard_tools::store::Root;
use shard_tools::verify;

use super::Case;
use super::table::{Report, gigabytes, seconds};
use super::timing::Rounds;

/// Arguments of `belfry bench data`.
#[derive(Args)]
pub struct DataArguments {
    #[command(flatten)]
    case: Case,
    /// Steps of the lane that are timed.
    #[arg(long, value_name = "N", default_value_t = 10)]
    steps: u64,
    /// Steps before them, which fill the shard cache.
    #[arg(long, value_name = "N", default_value_t = 1)]
    warm_up: u64,
    /// The lane whose stream is read.
    #[arg(long, value_name = "L", default_value_t = 0)]
    lane: u32,
    /// Folder of the shard cache; default: a temporary one.
    #[arg(long, value_name = "FOLDER")]
    cache: Option<PathBuf>,
}

/// Measures and prints.
pub async fn run(arguments: DataArguments) -> anyhow::Result<()> {
    ensure!(arguments.steps > 0, "--steps: must be at least 1");
    let config = arguments.case.load(&[])?;
    let lanes = config.batch.lanes;
    ensure!(
        arguments.lane < lanes,
        "--lane {}: the run has lanes 0 to {}",
        arguments.lane,
        lanes - 1
    );
    crate::run::prepare::pack(&config).await?;
    let train = config
        .data
        .train
        .only()
        .context("data.train names several datasets")?;
    let root = Root::existing(train).context("data.train")?;
    let manifest = verify::manifest(&root).await.context("data.train")?;
    let temporary = tempfile::tempdir()?;
    let cache = arguments.cache.clone();
    let cache = cache.unwrap_or_else(|| temporary.path().to_owned());
    let planes = {
        let config = config.clone();
        move || -> anyhow::Result<_> {
            let plane = DataPlane::open(&config, &cache, Split::Train)?;
            Ok(plane)
        }
    };
    let plane = tokio::task::spawn_blocking(planes).await??;
    let plane = Arc::new(plane);
    let (warm_up, steps, lane) = (arguments.warm_up, arguments.steps, arguments.lane);
    let (mut times, mut alone, mut raws) = Default::default();
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
    let one = Arc::new(one);
    let mut pairs = 0;
    raw(&root, &manifest).await?;
    for step in 0..warm_up + steps {
        let again = Arc::clone(&plane);
        let plane = Arc::clone(&plane);
        let begun = Instant::now();
        let batches =
            tokio::task::spawn_blocking(move || plane.lane_step(step, lane, &Quarantine::new()))
                .await??;
        if step >= warm_up {
            Rounds::add(&mut times, begun.elapsed().as_secs_f64());
            pairs = batches.iter().map(|batch| batch.pairs).sum();
            let (plane, one) = (Arc::clone(&again), Arc::clone(&one));
            let begun = Instant::now();
            let single = move || one.install(|| plane.lane_step(step, lane, &Quarantine::new()));
            let same = tokio::task::spawn_blocking(single).await??;
            Rounds::add(&mut alone, begun.elapsed().as_secs_f64());
            ensure!(
                same == batches,
                "step {step}: read again, a lane has other pairs"
            );
            Rounds::add(&mut raws, raw(&root, &manifest).await?);
        }
    }
    let made = Made {
        times,
        alone,
        raws,
        pairs,
        bytes: manifest.shards.iter().map(|shard| shard.bytes).sum(),
        held: manifest.pairs,
    };
    made.print(&arguments, &config);
    // A runtime inside it must not be dropped where futures run.
    tokio::task::spawn_blocking(move || drop(plane)).await?;
    Ok(())
}

/// Seconds to read every shard whole, one GET at a time, without looking inside.
async fn raw(root: &Root, manifest: &Manifest) -> anyhow::Result<f64> {
    let begun = Instant::now();
    for shard in &manifest.shards {
        let bytes = root.get(&shard.file).await?;
        ensure!(
            bytes.len() as u64 == shard.bytes,
            "{root}/{} has {} bytes, its manifest says {}",
            shard.file,
            bytes.len(),
            shard.bytes
        );
    }
    Ok(begun.elapsed().as_secs_f64())
}

struct Made {
    /// Seconds of a lane's step.
    times: Rounds,
    /// The same with one thread.
    alone: Rounds,
    /// Seconds of reading all shards.
    raws: Rounds,
    /// Of a lane's step.
    pairs: usize,
    /// Of the dataset.
    bytes: u64,
    held: u64,
}

impl Made {
    fn print(&self, arguments: &DataArguments, config: &ValidConfig) {
        let cores = rayon::current_num_threads();
        let mut report = Report::new(
            "data",
            format!(
                "bench data: {}, lane {}, {} pairs a step with one image each and one false one \
                 for half of them, {} pixels, {} tokens, {cores} cores",
                config.data.train.paths().collect::<Vec<_>>().join(" + "),
                arguments.lane,
                self.pairs,
                config.model.image.size,
                config.data.text_len
            ),
        );
        report.note(format!(
            "medians of {} steps, each with all cores, with one, and a raw read in turn; {} \
             unmeasured before them fill the cache; a shard is read from memory once it was opened",
            arguments.steps, arguments.warm_up
        ));
        let time = self.times.median();
        let samples = self.pairs as f64 / time;
        let raw = self.raws.median();
        let raw_samples = self.held as f64 / raw;
        report.row("a lane's step", seconds(time), "", None);
        let floor = format!("{raw_samples:.0} /s, raw GETs of the shards");
        report.row(
            "samples",
            format!("{samples:.1} /s"),
            floor,
            samples / raw_samples,
        );
        let per_core = self.pairs as f64 / self.alone.median();
        report.row("samples, one core", format!("{per_core:.1} /s"), "", None);
        let rate = self.bytes as f64 / raw;
        report.row(
            "bytes of shards",
            "-".into(),
            gigabytes(rate) + "/s, raw GETs",
            None,
        );
        report.json("seconds", time);
        report.json("pairs", self.pairs as u64);
        report.json("samples_per_second", samples);
        report.json("samples_per_second_per_core", per_core);
        report.json("raw_samples_per_second", raw_samples);
        report.json("raw_bytes_per_second", rate);
        report.json("cores", cores as u64);
        report.print();
    }
}
