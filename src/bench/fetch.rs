//! `belfry bench fetch`: shards from their store into the cache, hashed, beside a bare loop of ranged
//! GETs over the same bytes.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::ensure;
use belfry_data::cache::{Cache, RANGE_BYTES, RANGES_OF_SHARD};
use clap::Args;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use shard_tools::manifest::{Manifest, ShardEntry, sha256};
use shard_tools::store::Root;
use shard_tools::verify;

use super::table::{Report, gigabytes};
use super::timing::{Rounds, peak_bytes, reset_peak};

/// Arguments of `belfry bench fetch`.
#[derive(Args)]
pub struct FetchArguments {
    /// The dataset: s3://bucket/prefix or another URL of a store; its manifest names the shards.
    location: String,
    /// Rounds of each; medians are shown.
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: u32,
    /// Shards fetched at the same time, by as many threads, as a worker's prefetch does.
    #[arg(long, value_name = "N", default_value_t = 2)]
    at_once: usize,
    /// Folder below which each round makes a cache of its own; default: the system's for temporary
    /// files.
    #[arg(long, value_name = "FOLDER")]
    cache: Option<PathBuf>,
    /// The most bytes that a round fetches: whole shards, from the first one.
    #[arg(long, value_name = "BYTES", default_value_t = 1 << 30)]
    bytes: u64,
}

/// Measures and prints.
pub async fn run(arguments: FetchArguments) -> anyhow::Result<()> {
    ensure!(arguments.rounds > 0, "--rounds: must be at least 1");
    ensure!(arguments.at_once > 0, "--at-once: must be at least 1");
    let root = Root::open(&arguments.location)?;
    ensure!(
        root.local_folder().is_none(),
        "{root} is a folder, whose shards are read in place; name a store, for instance s3://…"
    );
    let manifest = Arc::new(verify::manifest(&root).await?);
    let shards = shards(&manifest, arguments.bytes);
    let bytes: u64 = shards.iter().map(|shard| shard.bytes).sum();
    let (mut bare, mut cached) = (Rounds::default(), Rounds::default());
    let (mut bare_peak, mut cached_peak, mut retries) = (0, 0, 0);
    // What the server's own cache has to learn is nobody's time.
    loose(&root, shards, arguments.at_once).await?;
    for _ in 0..arguments.rounds {
        reset_peak();
        bare.add(bytes as f64 / loose(&root, shards, arguments.at_once).await?);
        bare_peak = bare_peak.max(peak_bytes().unwrap_or(0));
        reset_peak();
        let (seconds, tried_again) = through_cache(&arguments, shards.len()).await?;
        cached.add(bytes as f64 / seconds);
        cached_peak = cached_peak.max(peak_bytes().unwrap_or(0));
        retries += tried_again;
    }
    let first = root.get(&shards[0].file).await?;
    let begun = Instant::now();
    ensure!(
        sha256(&first) == shards[0].sha256,
        "{root}: the first shard is corrupt"
    );
    let hash = first.len() as f64 / begun.elapsed().as_secs_f64();
    let made = Made {
        bare,
        cached,
        hash,
        peaks: (bare_peak, cached_peak),
        retries,
        bytes,
        shards: shards.len(),
    };
    made.print(&arguments);
    Ok(())
}

/// The first shards, as many as fit into `bytes`; one at least.
fn shards(manifest: &Manifest, bytes: u64) -> &[ShardEntry] {
    let mut total = 0;
    let fits = manifest.shards.iter().take_while(|shard| {
        total += shard.bytes;
        total <= bytes
    });
    let count = fits.count().max(1).min(manifest.shards.len());
    &manifest.shards[..count]
}

/// Seconds to get the same ranges, as many at once, and to throw them away.
async fn loose(root: &Root, shards: &[ShardEntry], at_once: usize) -> anyhow::Result<f64> {
    let begun = Instant::now();
    let gets = shards.iter().map(|shard| async move {
        let starts = (0..shard.bytes).step_by(RANGE_BYTES as usize);
        let ranges = starts.map(|start| start..(start + RANGE_BYTES).min(shard.bytes));
        let gets = ranges.map(|range| {
            let (root, file) = (root.clone(), shard.file.clone());
            // On the runtime's threads, as the cache's are.
            async move { tokio::spawn(async move { root.get_range(&file, range).await }).await }
        });
        let mut gets = stream::iter(gets).buffered(RANGES_OF_SHARD);
        let mut got = 0;
        while let Some(bytes) = gets.next().await {
            got += bytes??.len() as u64;
        }
        ensure!(got == shard.bytes, "{}: {got} bytes came", shard.file);
        anyhow::Ok(())
    });
    let gets = stream::iter(gets).buffer_unordered(at_once);
    gets.try_collect::<()>().await?;
    Ok(begun.elapsed().as_secs_f64())
}

/// Seconds to have the first `shards` in a new cache, verified; and how many requests were tried again.
async fn through_cache(arguments: &FetchArguments, shards: usize) -> anyhow::Result<(f64, u64)> {
    let folder = match &arguments.cache {
        Some(folder) => tempfile::tempdir_in(folder)?,
        None => tempfile::tempdir()?,
    };
    let (location, at_once) = (arguments.location.clone(), arguments.at_once);
    let fetch = move || -> anyhow::Result<(f64, u64)> {
        let cache = Cache::open(&location, folder.path(), u64::MAX)?;
        let begun = Instant::now();
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..at_once)
                .map(|first| {
                    let cache = &cache;
                    scope.spawn(move || {
                        let mut own = (first..shards).step_by(at_once);
                        own.try_for_each(|shard| cache.shard(shard).map(|_| ()))
                    })
                })
                .collect();
            let mut ends = threads
                .into_iter()
                .map(|t| t.join().expect("does not panic"));
            ends.try_for_each(|end| end)
        })?;
        let seconds = begun.elapsed().as_secs_f64();
        Ok((seconds, cache.counts().retries.load(Ordering::Relaxed)))
    };
    tokio::task::spawn_blocking(fetch).await?
}

struct Made {
    /// Bytes a second.
    bare: Rounds,
    cached: Rounds,
    hash: f64,
    /// Of the bare loop and of the cache, bytes.
    peaks: (u64, u64),
    retries: u64,
    bytes: u64,
    shards: usize,
}

impl Made {
    fn print(&self, arguments: &FetchArguments) {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let mut report = Report::new(
            "fetch",
            format!(
                "bench fetch: {} shards, {} from {}, {} at once, {RANGES_OF_SHARD} ranges of {} MiB \
                 each, {cores} cores",
                self.shards,
                gigabytes(self.bytes as f64),
                arguments.location.split('?').next().unwrap_or_default(),
                arguments.at_once,
                RANGE_BYTES >> 20,
            ),
        );
        report.note(format!(
            "medians of {} rounds of each in turn, with an empty cache; the loop throws away what it \
             gets; {} requests of the cache were tried again",
            arguments.rounds, self.retries
        ));
        let rate = |bytes: f64| format!("{}/s", gigabytes(bytes));
        let (cached, bare) = (self.cached.median(), self.bare.median());
        let floor = format!("bare ranged GETs: {}", rate(bare));
        report.row(
            "shards into the cache, hashed",
            rate(cached),
            floor,
            cached / bare,
        );
        let (low, high) = self.cached.range();
        report.row("its slowest and fastest", rate(low), rate(high), None);
        report.row("sha256 alone, one core", rate(self.hash), "", None);
        let memory = gigabytes(self.peaks.1 as f64);
        let floor = format!("bare ranged GETs: {}", gigabytes(self.peaks.0 as f64));
        report.row("peak memory", memory, floor, None);
        report.json("bytes_per_s", cached);
        report.json("bare_bytes_per_s", bare);
        report.json("sha256_bytes_per_s", self.hash);
        report.json("peak_bytes", self.peaks.1);
        report.json("bare_peak_bytes", self.peaks.0);
        report.json("retries", self.retries);
        report.print();
    }
}
