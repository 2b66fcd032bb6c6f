//! What a run's data means for it: epochs, the unused tail, and the disk that shuffle windows take.
//!
//! Reads manifests and nothing else; where there is none yet, what is going to be packed, or what
//! the user makes up.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use belfry_configs::{RunConfig, ValidConfig};
use belfry_data::{Sequence, ShardRef, WARM_STEPS, contents_of};
use belfry_proto::lanes::cut;
use serde::Serialize;
use shard_tools::manifest::Manifest;
use shard_tools::pack::{Place, Texts};
use shard_tools::store::Root;
use shard_tools::verify;

use crate::run::prepare;
use crate::synthetic::Synthetic;

/// Steps at which the open shards are counted, spread over the run.
const LOOKS: u64 = 24;

/// One dataset of `data.train`.
#[derive(Clone, Debug, Serialize)]
pub struct DatasetPlan {
    pub path: String,
    pub pairs: u64,
    pub shards: u64,
    pub bytes: u64,
    /// Passes over it in the whole run.
    pub epochs: f64,
}

/// Shards that one host must hold at a time.
#[derive(Clone, Debug, Serialize)]
pub struct Disk {
    /// The number of workers, each on a host of its own: the fewest that may go on.
    pub workers: u32,
    /// Shards of the open windows and of those that are fetched behind them.
    pub shards: u64,
    pub bytes: u64,
    /// What the cache may hold.
    pub cache_bytes_max: u64,
    /// What is free where the cache would lie on this machine, if the system tells.
    pub free_bytes: Option<u64>,
}

/// See the module.
#[derive(Clone, Debug, Serialize)]
pub struct DataPlan {
    /// Where the numbers come from.
    pub origin: String,
    pub datasets: Vec<DatasetPlan>,
    /// Pairs of the last epoch begun that the run does not reach.
    pub unused_tail_pairs: u64,
    /// None where all data is read in place.
    pub disk: Option<Disk>,
    /// What does not fit, and the nearest choices that do.
    #[serde(skip)]
    pub refusals: Vec<String>,
}

impl DataPlan {
    /// Of the datasets of `config`, or of made-up ones.
    ///
    /// # Errors
    /// What keeps the manifests from being read, or the datasets from being trained on.
    pub async fn read(config: &ValidConfig, made_up: Option<Synthetic>) -> anyhow::Result<Self> {
        let (manifests, origin) = manifests(config, made_up).await?;
        let sequence = Sequence::open(config, manifests.clone())?;
        let steps = config.run.steps;
        let mut trained = vec![0; manifests.len()];
        for lane in 0..config.batch.lanes {
            let of_lane = sequence.trained(steps, lane);
            trained
                .iter_mut()
                .zip(of_lane)
                .for_each(|(sum, n)| *sum += n);
        }
        let datasets = config.data.train.paths().zip(&manifests).zip(trained);
        let datasets = datasets.map(|((path, manifest), trained)| DatasetPlan {
            path: path.to_owned(),
            pairs: manifest.pairs,
            shards: manifest.shards.len() as u64,
            bytes: manifest.shards.iter().map(|s| s.bytes).sum(),
            epochs: trained as f64 / manifest.pairs as f64,
        });
        let tails = sequence.tails(steps).into_iter();
        let mut plan = DataPlan {
            origin,
            datasets: datasets.collect(),
            unused_tail_pairs: tails.map(|t| t.positions.end - t.positions.start).sum(),
            disk: None,
            refusals: Vec::new(),
        };
        let remote = config.data.train.paths().any(is_remote);
        if remote {
            plan.disk = Some(disk(config, &manifests, config.cluster.min_workers)?);
            plan.refuse(config, &manifests)?;
        }
        Ok(plan)
    }

    /// Says what would fit where the disk does not.
    fn refuse(&mut self, config: &ValidConfig, manifests: &[Manifest]) -> anyhow::Result<()> {
        let Some(disk) = &self.disk else {
            return Ok(());
        };
        if disk.bytes <= disk.cache_bytes_max {
            return Ok(());
        }
        let mut choices = vec![format!("data.cache_bytes_max = {}", disk.bytes)];
        let most = disk.cache_bytes_max;
        for window in (1..config.data.window_shards).rev() {
            let mut smaller = RunConfig::clone(config);
            smaller.data.window_shards = window;
            let smaller = smaller.validate()?;
            if self::disk(&smaller, manifests, disk.workers)?.bytes <= most {
                choices.push(format!("data.window_shards = {window}"));
                break;
            }
        }
        for workers in disk.workers + 1..=config.batch.lanes {
            if self::disk(config, manifests, workers)?.bytes <= most {
                choices.push(format!("cluster.min_workers = {workers}"));
                break;
            }
        }
        self.refusals.push(format!(
            "data.cache_bytes_max: with {} workers, a host each, the shards that a host holds open are \
             {} bytes, its cache may hold {most}; nearest that fit: {}",
            disk.workers,
            disk.bytes,
            choices.join(", or ")
        ));
        Ok(())
    }
}

/// The configuration with its steps, where it counts in epochs: of the datasets that are there, are
/// going to be packed, or are made up.
///
/// # Errors
/// What keeps the manifests from being read: without them there is no length to plan.
pub async fn with_length(
    config: ValidConfig,
    made_up: Option<Synthetic>,
) -> anyhow::Result<ValidConfig> {
    if !config.needs_epoch_pairs() {
        return Ok(config);
    }
    let manifests = manifests(&config, made_up).await;
    let (manifests, _) = manifests.context(
        "run.epochs: the steps hang on the data; pack it first, or name its size: --synthetic \
         SAMPLES,PAIRS,SHARDS",
    )?;
    let pairs = manifests.iter().map(|manifest| manifest.pairs).sum();
    Ok(config.with_epoch_pairs(pairs)?)
}

/// Whether a dataset's shards are fetched into the cache.
fn is_remote(path: &str) -> bool {
    path.contains("://") && !path.starts_with("file://")
}

/// Manifests in the configuration's order, and where they come from.
async fn manifests(
    config: &ValidConfig,
    made_up: Option<Synthetic>,
) -> anyhow::Result<(Vec<Manifest>, String)> {
    let contents = contents_of(config.model.task);
    let datasets = config.data.train.0.len() as u64;
    if let Some(made_up) = made_up {
        anyhow::ensure!(
            made_up.shards >= datasets,
            "--synthetic: fewer shards than the {datasets} datasets of data.train"
        );
        let manifest = || made_up.manifest(datasets, contents);
        let made = (0..datasets).map(|_| manifest()).collect();
        return Ok((made, "made up by --synthetic, shards of 105 MB".into()));
    }
    if let (Some(input), Some(output)) = (&config.data.pack_from, config.data.train.only())
        && !Path::new(output).join("manifest.json").exists()
    {
        let made = going_to_be_packed(config, Path::new(input))?;
        let origin = format!("not packed yet; counted in {input}");
        return Ok((vec![made.manifest(1, contents)], origin));
    }
    let mut manifests = Vec::new();
    for path in config.data.train.paths() {
        let root = Root::existing(path).context("data.train")?;
        let manifest = verify::manifest(&root).await;
        manifests.push(manifest.with_context(|| format!("data.train {path}"))?);
    }
    Ok((manifests, "read from the manifests".into()))
}

/// What `belfry run` is going to pack, in small shards.
fn going_to_be_packed(config: &ValidConfig, input: &Path) -> anyhow::Result<Synthetic> {
    let (keys, _) = prepare::split(config, input)?;
    let catalog = prepare::catalog(config, input, &keys)?;
    let (mut pairs, mut bytes) = (0, 0);
    for index in 0..catalog.len() {
        let found = catalog.get(index);
        for place in &found.images {
            bytes += length(input, place)?;
        }
        pairs += match &found.texts {
            Texts::Captions(captions) => captions.len() as u64,
            Texts::Pairs(several) => several.len() as u64,
            Texts::At(place) => {
                bytes += length(input, place)?;
                captions(input, place)?
            }
            Texts::InRecord => 0,
        };
    }
    let shards = pairs.div_ceil(prepare::PAIRS_PER_SHARD.into()).max(1);
    Ok(Synthetic {
        samples: catalog.len() as u64,
        pairs,
        shards,
        shard_bytes: bytes / shards,
    })
}

fn path(input: &Path, place: &Place) -> PathBuf {
    match place {
        Place::File(file) => input.join(file),
        Place::Member(_, member) => input.join(&member.name),
    }
}

fn length(input: &Path, place: &Place) -> anyhow::Result<u64> {
    let path = path(input, place);
    let found = path.metadata();
    Ok(found
        .with_context(|| format!("cannot read {}", path.display()))?
        .len())
}

/// Captions of a file, one a line.
fn captions(input: &Path, place: &Place) -> anyhow::Result<u64> {
    let path = path(input, place);
    let text = std::fs::read_to_string(&path);
    let text = text.with_context(|| format!("cannot read {}", path.display()))?;
    Ok(text.lines().filter(|line| !line.trim().is_empty()).count() as u64)
}

/// Shards that the worker with the most lanes has open or fetches ahead, at the fullest of some
/// steps: what `DataPlane::prefetch` asks for.
fn disk(config: &ValidConfig, manifests: &[Manifest], workers: u32) -> anyhow::Result<Disk> {
    let sequence = Sequence::open(config, manifests.to_vec())?;
    let speeds = vec![1.0; workers as usize];
    let ranges = cut(
        config.batch.lanes,
        &speeds,
        config.cluster.nodes_per_worker_max,
    );
    let lanes = ranges
        .into_iter()
        .max_by_key(|r| r.end - r.start)
        .unwrap_or(0..0);
    let remote: Vec<bool> = config.data.train.paths().map(is_remote).collect();
    let ahead = u64::from(config.data.prefetch_steps) + WARM_STEPS;
    let last = config.run.steps.saturating_sub(ahead);
    let (mut shards, mut bytes) = (0, 0);
    for look in 0..LOOKS.min(last + 1) {
        let step = last * look / LOOKS;
        let of_lane = |lane| sequence.shards(step..step + ahead, lane);
        let open: BTreeSet<ShardRef> = lanes.clone().flat_map(of_lane).collect();
        let fetched = open.iter().filter(|s| remote[s.dataset as usize]);
        let size = |s: &ShardRef| manifests[s.dataset as usize].shards[s.shard as usize].bytes;
        let sum: u64 = fetched.clone().map(size).sum();
        if sum > bytes {
            (shards, bytes) = (fetched.count() as u64, sum);
        }
    }
    Ok(Disk {
        workers,
        shards,
        bytes,
        cache_bytes_max: config.data.cache_bytes_max,
        free_bytes: free_bytes(config),
    })
}

/// Bytes free where the cache would lie; of the nearest folder that exists.
fn free_bytes(config: &ValidConfig) -> Option<u64> {
    let folder = config.data.cache_dir.clone().map(PathBuf::from);
    let folder = folder.unwrap_or_else(|| PathBuf::from("."));
    let there = folder.ancestors().find(|f| f.exists())?;
    let there = if there.as_os_str().is_empty() {
        Path::new(".")
    } else {
        there
    };
    let disk = rustix::fs::statvfs(there).ok()?;
    Some(disk.f_bavail * disk.f_frsize)
}
