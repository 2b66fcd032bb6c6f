//! The data plane of one worker: the micro-batches of any lane at any step.
//!
//! The order says which pairs, `reading` brings their bytes, `batch` and `pixels` make numbers of
//! them, `ahead` and `warm` do so before they are asked for.

mod ahead;
mod answers;
mod batch;
mod evaluation;
mod pixels;
mod reading;
mod warm;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use belfry_configs::rng::{Key, Purpose};
use belfry_configs::{FalseImage, ValidConfig};

use crate::error::DataError;
use crate::host_batch::HostBatch;
use crate::order::{PairRef, Sequence};
use crate::quarantine::{Quarantine, ShardRef};
use ahead::{Ahead, Limits};
pub use answers::answers;
use batch::{Assembly, Row};
pub use evaluation::{About, EvaluatedTexts};
use pixels::How;
use reading::{Held, Reading};
use warm::Warm;

/// Steps, behind those whose batches are made ahead, whose windows' shards are fetched.
pub const WARM_STEPS: u64 = 16;
/// Lanes' steps made ahead, whatever their size: small ones cost bookkeeping, not bytes.
const PLACES_MAX: u64 = 4096;

/// Which datasets of the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// `data.train`.
    Train,
    /// `data.validation`.
    Validation,
}

/// See the module.
pub struct DataPlane {
    inner: Arc<Inner>,
    ahead: Ahead<Vec<HostBatch>>,
    /// Where shards are not on this machine already.
    warm: Option<Warm>,
}

struct Inner {
    sequence: Sequence,
    reading: Reading,
    assembly: Assembly,
    false_image: FalseImage,
    micro_batch: usize,
    prefetch_steps: u64,
}

impl DataPlane {
    /// Opens the datasets; refuses what could only fail later.
    ///
    /// # Errors
    /// [`DataError`], naming file or key.
    pub fn open(config: &ValidConfig, cache_dir: &Path, split: Split) -> Result<Self, DataError> {
        let data = &config.data;
        let (datasets, kind) = match split {
            Split::Train => (&data.train, data.train_transform),
            Split::Validation => (&data.validation, data.eval_transform),
        };
        if datasets.is_empty() {
            return Err(DataError::Setting {
                key: "data.validation",
                reason: "is not set, and an evaluation was asked for".into(),
            });
        }
        let training = split == Split::Train;
        let room = (cache_dir, data.cache_bytes_max);
        let reading = Reading::open(datasets.paths(), room, training)?;
        let manifests = reading.manifests();
        let answers = answers::count(config, datasets, &manifests)?;
        let sequence = match split {
            Split::Train => Sequence::open(config, manifests)?,
            Split::Validation => Sequence::of_validation(config, manifests)?,
        };
        let how = How {
            kind,
            side: config.model.image.size as usize,
            truncated: data.truncated_jpeg,
        };
        let inner = Arc::new(Inner {
            sequence,
            reading,
            assembly: Assembly::new(config, how, answers)?,
            false_image: data.false_image,
            micro_batch: config.batch.micro_batch as usize,
            prefetch_steps: data.prefetch_steps.into(),
        });
        let far = |path: &str| path.contains("://") && !path.starts_with("file://");
        let remote = datasets.paths().any(far);
        Self::around(inner, data.prefetch_bytes_max, training && remote)
    }

    fn around(inner: Arc<Inner>, bytes_max: u64, warms: bool) -> Result<Self, DataError> {
        let bytes = inner.assembly.bytes(inner.sequence.pairs_per_lane_step());
        let limits = Limits {
            steps: inner.prefetch_steps,
            places: (bytes_max / bytes).min(PLACES_MAX) as usize,
        };
        if limits.places == 0 {
            tracing::warn!(
                bytes,
                "data.prefetch_bytes_max holds no lane's step of that size: nothing is made ahead"
            );
        }
        let maker = Arc::clone(&inner);
        let make =
            move |(step, lane), quarantine: &Quarantine| maker.lane_step(step, lane, quarantine);
        let warmer = Arc::clone(&inner);
        let fetch = move |shard| {
            // The step that needs it says what is wrong with it.
            let _ = warmer.reading.shard(shard);
        };
        Ok(DataPlane {
            inner,
            ahead: Ahead::new(limits, make)?,
            warm: warms.then(|| Warm::new(fetch)).transpose()?,
        })
    }

    /// Pairs in the datasets.
    pub fn pairs(&self) -> u64 {
        self.inner.sequence.all_pairs()
    }

    /// The order of the pairs.
    pub fn sequence(&self) -> &Sequence {
        &self.inner.sequence
    }

    /// The micro-batches of `lane` at `step`, in order: ready where they were hinted at in time.
    ///
    /// # Errors
    /// [`DataError`], naming shard, member and offset.
    pub fn lane_step(
        &self,
        step: u64,
        lane: u32,
        quarantine: &Quarantine,
    ) -> Result<Vec<HostBatch>, DataError> {
        self.ahead.take((step, lane), quarantine)
    }

    /// The pairs at these places of the global batch of `step`, as one batch in this order. A place
    /// counts the pairs of all lanes: those of lane 0 first, in the order of its stream. Whatever
    /// worker asks gets the same numbers, the very ones that the lane's own batch holds; what is in
    /// no shard at hand comes member by member.
    ///
    /// # Errors
    /// [`DataError`], naming shard, member and offset.
    pub fn rows(
        &self,
        step: u64,
        places: &[usize],
        quarantine: &Quarantine,
    ) -> Result<HostBatch, DataError> {
        self.inner.rows_of_step(step, places, quarantine)
    }

    /// A hint: these lanes will be asked for at `step`, and at those behind it. Their batches are
    /// made ahead for `data.prefetch_steps` further steps within `data.prefetch_bytes_max`, and the
    /// shards of the windows behind them are fetched. Never blocks on reading; a new hint replaces
    /// the last.
    pub fn prefetch(&self, step: u64, lanes: &[u32]) {
        self.ahead.hint(step, lanes);
        if let Some(warm) = &self.warm {
            let steps = step..step + self.inner.prefetch_steps + WARM_STEPS;
            let sequence = &self.inner.sequence;
            let shards = lanes
                .iter()
                .flat_map(|lane| sequence.shards(steps.clone(), *lane));
            warm.want(&shards.collect::<Vec<ShardRef>>());
        }
    }
}

/// The pairs of a micro-batch and their labels.
type Wanted = (Vec<PairRef>, Vec<i32>);
/// The same with everything that was read for them.
type Group = (Vec<Row>, Vec<i32>);

impl Inner {
    fn lane_step(
        &self,
        step: u64,
        lane: u32,
        quarantine: &Quarantine,
    ) -> Result<Vec<HostBatch>, DataError> {
        let key = Key::new(self.assembly.seed, Purpose::ItmLabels)
            .with(step)
            .with(u64::from(lane));
        let pairs = self.sequence.pairs(step, lane, quarantine);
        let groups = pairs.chunks(self.micro_batch).zip(0..);
        let wanted = groups.map(|(pairs, micro_batch)| {
            let labels = self.assembly.itm_labels(key.with(micro_batch), pairs.len());
            (pairs.to_vec(), labels)
        });
        self.batches(wanted.collect(), (lane, self.false_image, quarantine))
    }

    fn rows_of_step(
        &self,
        step: u64,
        places: &[usize],
        quarantine: &Quarantine,
    ) -> Result<HostBatch, DataError> {
        let per_lane = self.sequence.pairs_per_lane_step() as usize;
        let mut lanes: BTreeMap<usize, Vec<PairRef>> = BTreeMap::new();
        for place in places {
            let lane = place / per_lane;
            lanes
                .entry(lane)
                .or_insert_with(|| self.sequence.pairs(step, lane as u32, quarantine));
        }
        let pairs = places
            .iter()
            .map(|place| lanes[&(place / per_lane)][place % per_lane]);
        let (pairs, held): (Vec<PairRef>, Held) = (pairs.collect(), Held::new());
        let read = |pair: &PairRef| {
            Ok(Row {
                place: *pair,
                false_image: None,
                read: self.reading.pair(pair.shard_ref(), pair.pair, &held)?,
            })
        };
        let rows = (self.reading.all(&pairs, read)?, Vec::new());
        Ok(self.assembly.batches(&self.reading, &[rows])?.remove(0))
    }

    /// Reads everything of some micro-batches, and makes them.
    fn batches(
        &self,
        wanted: Vec<Wanted>,
        around: (u32, FalseImage, &Quarantine),
    ) -> Result<Vec<HostBatch>, DataError> {
        let groups = self.rows(wanted, around)?;
        self.assembly.batches(&self.reading, &groups)
    }

    /// Reads everything of some micro-batches.
    fn rows(
        &self,
        wanted: Vec<Wanted>,
        around: (u32, FalseImage, &Quarantine),
    ) -> Result<Vec<Group>, DataError> {
        // Shards of a window are used up whole; a substitute's is not.
        let walked = wanted.iter().flat_map(|(pairs, _)| pairs);
        let walked = walked.filter(|pair| pair.replaces.is_none());
        let held = self.reading.hold(walked.map(PairRef::shard_ref))?;
        let mut flat = Vec::new();
        for (pairs, labels) in &wanted {
            let labels = labels.iter().map(|label| *label == 0);
            let labels = labels.chain(std::iter::repeat(false));
            flat.extend(pairs.iter().copied().zip(labels));
        }
        let read =
            |(pair, with_false): &(PairRef, bool)| self.row(pair, *with_false, around, &held);
        let mut rows = self.reading.all(&flat, read)?.into_iter();
        let groups = wanted.into_iter().map(|(pairs, labels)| {
            let rows = rows.by_ref().take(pairs.len()).collect();
            (rows, labels)
        });
        Ok(groups.collect())
    }

    fn row(
        &self,
        pair: &PairRef,
        with_false_image: bool,
        (lane, from, quarantine): (u32, FalseImage, &Quarantine),
        held: &Held,
    ) -> Result<Row, DataError> {
        let read = self.reading.pair(pair.shard_ref(), pair.pair, held)?;
        let false_image = with_false_image.then(|| {
            let drawn = (from, quarantine);
            let other = self.sequence.false_pair(lane, pair, read.source, drawn);
            self.reading.image_of(other.shard, other.pair, held)
        });
        Ok(Row {
            place: *pair,
            false_image: false_image.transpose()?,
            read,
        })
    }
}

/// Starts a thread.
fn thread(name: &str, run: impl FnOnce() + Send + 'static) -> Result<(), DataError> {
    let spawned = std::thread::Builder::new().name(name.to_owned()).spawn(run);
    let spawned = spawned.map_err(|source| DataError::Cache {
        path: format!("thread {name}"),
        source,
    });
    spawned.map(drop)
}
