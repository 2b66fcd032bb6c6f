//! Which pair stands where: the exact, seekable order of every lane (DESIGN 5, "Order").
//!
//! Pure: from the validated configuration and the training manifests to the pairs of any lane at
//! any step, in O(1), without an index, a shard or a cache. Whoever asks again, at any worker
//! count, gets the same pairs; `belfry audit` replays a whole run from it.

mod dataset;
mod draws;
mod mixture;
mod windows;

#[cfg(test)]
mod tests;

use std::ops::Range;

use belfry_configs::{Datasets, Task, ValidConfig};
use shard_tools::manifest::{ANSWERS_FILE, Manifest};
use shard_tools::pair::Contents;

pub use dataset::Dataset;
pub use draws::{FalsePair, Nth};

use crate::error::DataError;
use crate::quarantine::{Quarantine, ShardRef};
use dataset::Shape;
use mixture::Mixture;
use windows::Windows;

/// A pair of a lane's stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PairRef {
    /// Its number over all training datasets, in their order and their manifests' order.
    pub id: u64,
    /// Index in `data.train`.
    pub dataset: u32,
    /// Index in the dataset's manifest.
    pub shard: u32,
    /// Index among all pairs of the shard.
    pub pair: u32,
    /// Pass over the dataset.
    pub epoch: u64,
    /// Pass within the epoch.
    pub round: u32,
    /// Number of the shuffle window in the lane's slice of the round.
    pub window: u32,
    /// Position in the lane's stream of this dataset.
    pub position: u64,
    /// The id of the pair under quarantine that this one stands for.
    pub replaces: Option<u64>,
}

impl PairRef {
    /// The shard it lies in.
    pub fn shard_ref(&self) -> ShardRef {
        ShardRef {
            dataset: self.dataset,
            shard: self.shard,
        }
    }
}

/// Pairs of a dataset's last epoch that a lane has not reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tail {
    /// Index in `data.train`.
    pub dataset: u32,
    /// The lane.
    pub lane: u32,
    /// Positions in the lane's stream of the dataset: see [`Sequence::pair`].
    pub positions: Range<u64>,
}

/// The order of a run's training pairs.
pub struct Sequence {
    seed: u64,
    lanes: u32,
    pairs_per_lane_step: u64,
    datasets: Vec<Dataset>,
    /// Pairs before each dataset, and in all.
    first_ids: Vec<u64>,
    mixture: Mixture,
    windows: Windows,
}

impl Sequence {
    /// The order of `config` over the datasets of `data.train`, whose manifests are given in order.
    ///
    /// # Errors
    /// [`DataError::Setting`]: datasets that do not fit the lanes, the task or each other.
    pub fn open(config: &ValidConfig, manifests: Vec<Manifest>) -> Result<Self, DataError> {
        let named = named(("data.train", &config.data.train), &manifests)?;
        check(config, &named)?;
        let shape = Shape {
            seed: config.run.seed,
            lanes: config.batch.lanes,
            rounds: config.data.rounds,
            window_shards: config.data.window_shards,
        };
        Ok(Self::over(config, &named, shape))
    }

    /// Totals and draws of `data.validation`, whose pairs are walked by their ids.
    pub(crate) fn of_validation(
        config: &ValidConfig,
        manifests: Vec<Manifest>,
    ) -> Result<Self, DataError> {
        let key = "data.validation";
        let named = named((key, &config.data.validation), &manifests)?;
        check_contents(key, config.model.task, &named)?;
        let shape = Shape {
            seed: config.run.seed,
            lanes: 1,
            rounds: 1,
            window_shards: 1,
        };
        Ok(Self::over(config, &named, shape))
    }

    fn over(config: &ValidConfig, named: &[(&str, &Manifest)], shape: Shape) -> Self {
        let numbered = named.iter().zip(0..);
        let datasets: Vec<Dataset> = numbered
            .map(|((path, manifest), number)| Dataset::new(shape, number, path, manifest))
            .collect();
        let mut first_ids = vec![0];
        for dataset in &datasets {
            first_ids.push(first_ids[first_ids.len() - 1] + dataset.pairs());
        }
        Sequence {
            seed: shape.seed,
            lanes: shape.lanes,
            pairs_per_lane_step: u64::from(config.batch.global_batch / config.batch.lanes),
            datasets,
            first_ids,
            mixture: Mixture::new(shape.seed, shape.lanes, &config.data.train),
            windows: Windows::default(),
        }
    }

    /// The datasets, in the configuration's order.
    pub fn datasets(&self) -> &[Dataset] {
        &self.datasets
    }

    /// Lanes of the run.
    pub fn lanes(&self) -> u32 {
        self.lanes
    }

    /// Pairs of one lane in one step.
    pub fn pairs_per_lane_step(&self) -> u64 {
        self.pairs_per_lane_step
    }

    /// The pairs of `lane` at `step`, in order, those under quarantine replaced.
    pub fn pairs(&self, step: u64, lane: u32, quarantine: &Quarantine) -> Vec<PairRef> {
        let mixed = (step, lane);
        let mixed = self
            .mixture
            .step(mixed, self.pairs_per_lane_step, &self.epoch_pairs(lane));
        let pairs = mixed.into_iter().map(|(dataset, position)| {
            let pair = self.pair(dataset as u32, lane, position);
            self.replaced(pair, quarantine)
        });
        pairs.collect()
    }

    /// The pair at `position` of `lane`'s stream of one dataset, quarantine or not.
    pub fn pair(&self, dataset: u32, lane: u32, position: u64) -> PairRef {
        let place = self.datasets[dataset as usize].place(&self.windows, lane, position);
        PairRef {
            id: self.id(dataset, place.shard, place.pair),
            dataset,
            shard: place.shard,
            pair: place.pair,
            epoch: place.epoch,
            round: place.round,
            window: place.window,
            position,
            replaces: None,
        }
    }

    /// The id of a pair.
    pub fn id(&self, dataset: u32, shard: u32, pair: u32) -> u64 {
        let before = self.datasets[dataset as usize].pairs_before(shard);
        self.first_ids[dataset as usize] + before + u64::from(pair)
    }

    /// (dataset, shard, pair in the shard) of a pair's id; none beyond the last.
    pub fn describe(&self, id: u64) -> Option<(ShardRef, u32)> {
        let dataset = self.first_ids.partition_point(|first| *first <= id) - 1;
        let (shard, pair) = self
            .datasets
            .get(dataset)?
            .locate(id - self.first_ids[dataset]);
        let dataset = dataset as u32;
        Some((ShardRef { dataset, shard }, pair))
    }

    /// The ids of a dataset's pairs.
    pub fn ids(&self, dataset: u32) -> Range<u64> {
        self.first_ids[dataset as usize]..self.first_ids[dataset as usize + 1]
    }

    /// Pairs in all datasets.
    pub fn all_pairs(&self) -> u64 {
        self.first_ids[self.datasets.len()]
    }

    /// Shards of the windows that `lane` reads in these steps, dataset by dataset, in the order in
    /// which they are opened.
    pub fn shards(&self, steps: Range<u64>, lane: u32) -> Vec<ShardRef> {
        let (from, to) = (
            self.trained(steps.start, lane),
            self.trained(steps.end, lane),
        );
        let mut shards = Vec::new();
        for (number, dataset) in self.datasets.iter().enumerate() {
            let touched = dataset.shards_of(lane, from[number]..to[number]);
            let place = |shard| ShardRef {
                dataset: number as u32,
                shard,
            };
            shards.extend(touched.into_iter().map(place));
        }
        shards
    }

    /// Positions of each dataset's stream that `lane` has trained after `steps` steps.
    pub fn trained(&self, steps: u64, lane: u32) -> Vec<u64> {
        let position = steps * self.pairs_per_lane_step;
        self.mixture.counts(lane, position, &self.epoch_pairs(lane))
    }

    /// Epochs of each dataset that all lanes have completed after `steps` steps.
    pub fn completed(&self, steps: u64) -> Vec<u64> {
        let epochs = (0..self.lanes).map(|lane| self.epochs(steps, lane));
        let fewest =
            |a: Vec<u64>, b: Vec<u64>| a.into_iter().zip(b).map(|(a, b)| a.min(b)).collect();
        epochs.reduce(fewest).unwrap_or_default()
    }

    /// What lanes have not trained, after `steps` steps, of the last epoch that any lane has begun.
    pub fn tails(&self, steps: u64) -> Vec<Tail> {
        let lanes = || (0..self.lanes).map(|lane| (lane, self.trained(steps, lane)));
        let mut tails = Vec::new();
        for (number, dataset) in self.datasets.iter().enumerate() {
            let begun = lanes().map(|(l, t)| t[number].div_ceil(dataset.epoch_pairs(l)));
            let begun = begun.max().unwrap_or(0);
            for (lane, trained) in lanes() {
                let positions = trained[number]..begun * dataset.epoch_pairs(lane);
                if !positions.is_empty() {
                    let dataset = number as u32;
                    tails.push(Tail {
                        dataset,
                        lane,
                        positions,
                    });
                }
            }
        }
        tails
    }

    /// Bytes held for the order: totals and names of shards, and the permutations kept.
    pub fn bytes(&self) -> usize {
        self.datasets.iter().map(Dataset::bytes).sum::<usize>() + self.windows.bytes()
    }

    fn epochs(&self, steps: u64, lane: u32) -> Vec<u64> {
        let trained = self.trained(steps, lane);
        let epochs = trained.iter().zip(&self.datasets);
        epochs
            .map(|(trained, dataset)| trained / dataset.epoch_pairs(lane))
            .collect()
    }

    fn epoch_pairs(&self, lane: u32) -> Vec<u64> {
        self.datasets
            .iter()
            .map(|dataset| dataset.epoch_pairs(lane))
            .collect()
    }
}

/// Paths with their manifests.
fn named<'a>(
    (key, datasets): (&'static str, &'a Datasets),
    manifests: &'a [Manifest],
) -> Result<Vec<(&'a str, &'a Manifest)>, DataError> {
    let named = datasets.0.len();
    if named != manifests.len() {
        let found = manifests.len();
        let reason = format!("names {named} datasets, and {found} manifests were read");
        return Err(DataError::Setting { key, reason });
    }
    Ok(datasets.paths().zip(manifests).collect())
}

/// What the pairs of a task's datasets must carry.
pub fn contents_of(task: Task) -> Contents {
    match task {
        Task::Pretrain | Task::PretrainItc | Task::Retrieval => Contents::Captions,
        Task::Vqa => Contents::Vqa,
        Task::SnliVe => Contents::SnliVe,
        Task::Nlvr2 => Contents::Nlvr2,
    }
}

/// Refuses datasets whose contents are not the task's, or whose answers are not the first one's.
pub(crate) fn check_contents(
    key: &'static str,
    task: Task,
    datasets: &[(&str, &Manifest)],
) -> Result<(), DataError> {
    let refuse = |reason| Err(DataError::Setting { key, reason });
    let wanted = contents_of(task);
    for (path, manifest) in datasets {
        let found = manifest.contents;
        if found != wanted {
            return refuse(format!(
                "{path} holds {found:?}, and model.task = {task:?} trains on {wanted:?}; name \
                 datasets packed for it, or another task"
            ));
        }
        if found != Contents::Vqa {
            continue;
        }
        let (first, of_first) = datasets[0];
        match (answers(of_first), answers(manifest)) {
            (Some(a), Some(b)) if a == b => {}
            (Some(_), Some(_)) => {
                return refuse(format!(
                    "{path} and {first} have different {ANSWERS_FILE}, so a class would mean two \
                     answers; pack both with one answer file"
                ));
            }
            _ => {
                return refuse(format!(
                    "{path} or {first} has no {ANSWERS_FILE}; pack it again"
                ));
            }
        }
    }
    Ok(())
}

fn answers(manifest: &Manifest) -> Option<&str> {
    let file = manifest.files.iter().find(|f| f.file == ANSWERS_FILE)?;
    Some(&file.sha256)
}

fn check(config: &ValidConfig, datasets: &[(&str, &Manifest)]) -> Result<(), DataError> {
    check_contents("data.train", config.model.task, datasets)?;
    let (lanes, rounds) = (config.batch.lanes, config.data.rounds);
    for (path, manifest) in datasets {
        // Then at least one round gives every lane a pair, so no lane's epoch is empty.
        if manifest.pairs < u64::from(lanes) * u64::from(rounds) {
            let pairs = manifest.pairs;
            return Err(DataError::Setting {
                key: "batch.lanes",
                reason: format!(
                    "{path} holds {pairs} pairs, fewer than {lanes} lanes x {rounds} rounds"
                ),
            });
        }
    }
    Ok(())
}
