//! The data plane of one worker: the micro-batches of any lane at any step.

use std::path::Path;
use std::sync::{Arc, Mutex, mpsc};

use belfry_configs::rng::{Key, Purpose};
use belfry_configs::{FalseImage, ValidConfig};
use rayon::prelude::*;
use shard_tools::manifest::ShardIndex;
use shard_tools::{pair, reader};

use crate::cache::Cache;
use crate::error::DataError;
use crate::host_batch::HostBatch;
use crate::image::clip_transform;
use crate::mask::{self, Masking};
use crate::order::{Order, PairPlace, ShardPairs};
use crate::quarantine::Quarantine;
use crate::text::Text;

/// Steps whose shards may wait to be prefetched.
const PREFETCH_MAX: usize = 4;
/// Stands for the epoch where evaluation draws its masks.
const EVALUATION_EPOCH: u64 = u64::MAX;

/// Which dataset of the configuration.
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
    prefetch: mpsc::SyncSender<(u64, Vec<u32>)>,
}

/// Pairs of each shard in one (epoch, round).
type RoundTotals = ((u64, u32), Arc<Vec<u32>>);

struct Inner {
    config: ValidConfig,
    cache: Cache,
    order: Order,
    text: Text,
    masking: Masking,
    /// Pairs before each shard, in the manifest's order, and in all.
    before: Vec<u64>,
    /// Totals per (epoch, round), for several rounds; the newest only.
    rounds: Mutex<Vec<RoundTotals>>,
    one_round: Arc<Vec<u32>>,
    pairs_per_lane_step: u64,
}

/// One pair to be read.
#[derive(Clone)]
struct Wanted {
    shard: usize,
    /// Index among all pairs of the shard.
    pair: u32,
    epoch: u64,
    window: Option<PairPlace>,
}

impl DataPlane {
    /// Opens a dataset; refuses what could only fail later.
    ///
    /// # Errors
    /// [`DataError`], naming file or key.
    pub fn open(config: &ValidConfig, cache_dir: &Path, split: Split) -> Result<Self, DataError> {
        let location = match split {
            Split::Train => config.data.train.only(),
            Split::Validation => config.data.validation.only(),
        };
        let location = location.ok_or_else(|| DataError::Setting {
            key: "data.validation",
            reason: "is not set, and an evaluation was asked for".into(),
        })?;
        let cache = Cache::open(location, cache_dir, config.data.cache_bytes_max)?;
        let lanes = u64::from(config.batch.lanes);
        if split == Split::Train && cache.manifest.pairs < lanes * u64::from(config.data.rounds) {
            return Err(DataError::Setting {
                key: "batch.lanes",
                reason: format!(
                    "{location} holds {} pairs, fewer than {lanes} lanes x {} rounds",
                    cache.manifest.pairs, config.data.rounds
                ),
            });
        }
        if config.data.rounds > 1 {
            // The captions of a round are counted from the indexes, so all must be readable.
            for shard in 0..cache.manifest.shards.len() {
                cache.index(shard)?;
            }
        }
        let mut before = vec![0];
        for shard in &cache.manifest.shards {
            before.push(before[before.len() - 1] + u64::from(shard.pairs));
        }
        let data = &config.data;
        let text = Text::of(config)?;
        let masking = Masking::new(&text, data.mlm_probability, data.whole_word_masking)?;
        let batch = &config.batch;
        let order = Order::new(
            config.run.seed,
            batch.lanes,
            data.rounds,
            data.window_shards,
        );
        let inner = Arc::new(Inner {
            one_round: Arc::new(cache.manifest.shards.iter().map(|s| s.pairs).collect()),
            pairs_per_lane_step: u64::from(batch.global_batch / batch.lanes),
            config: config.clone(),
            rounds: Mutex::default(),
            cache,
            order,
            text,
            masking,
            before,
        });
        let (prefetch, wishes) = mpsc::sync_channel::<(u64, Vec<u32>)>(PREFETCH_MAX);
        let worker = Arc::downgrade(&inner);
        let spawned = std::thread::Builder::new()
            .name("prefetch".into())
            .spawn(move || {
                while let Ok((step, lanes)) = wishes.recv() {
                    let Some(inner) = worker.upgrade() else {
                        return;
                    };
                    inner.warm(step, &lanes);
                }
            });
        spawned.map_err(|source| DataError::Cache {
            path: "prefetch thread".into(),
            source,
        })?;
        Ok(DataPlane { inner, prefetch })
    }

    /// Pairs in the dataset.
    pub fn pairs(&self) -> u64 {
        self.inner.cache.manifest.pairs
    }

    /// The micro-batches of `lane` at `step`, in order.
    ///
    /// # Errors
    /// [`DataError`], naming shard, member and offset.
    pub fn lane_step(
        &self,
        step: u64,
        lane: u32,
        _quarantine: &Quarantine,
    ) -> Result<Vec<HostBatch>, DataError> {
        self.inner.lane_step(step, lane)
    }

    /// A hint: these lanes will be asked for. Never blocks; a full queue drops the hint.
    pub fn prefetch(&self, step: u64, lanes: &[u32]) {
        let _ = self.prefetch.try_send((step, lanes.to_vec()));
    }

    /// Micro-batches of every pair once, in the manifest's order, with masks, labels and false images
    /// drawn from keys of their own; the last one may be short. Each is read when it is asked for.
    ///
    /// # Errors
    /// [`DataError`] of each, naming shard, member and offset.
    pub fn evaluation_batches(&self) -> impl Iterator<Item = Result<HostBatch, DataError>> + '_ {
        let inner = &self.inner;
        let key = Key::new(inner.config.run.seed, Purpose::ItmLabels).with(EVALUATION_EPOCH);
        let size = u64::from(inner.config.batch.micro_batch);
        let pairs = self.pairs();
        (0..pairs.div_ceil(size)).map(move |group| {
            let all = group * size..((group + 1) * size).min(pairs);
            let wanted: Vec<Wanted> = all.map(|pair| inner.evaluated(pair)).collect();
            inner.batch(&wanted, key.with(group))
        })
    }
}

impl ShardPairs for Inner {
    fn totals(&self, epoch: u64, round: u32) -> Arc<Vec<u32>> {
        if self.config.data.rounds == 1 {
            return Arc::clone(&self.one_round);
        }
        let mut kept = self.rounds.lock().expect("no holder panics");
        if let Some((_, totals)) = kept.iter().find(|(id, _)| *id == (epoch, round)) {
            return Arc::clone(totals);
        }
        let totals: Vec<u32> = (0..self.cache.manifest.shards.len())
            .map(|shard| {
                let index = self
                    .cache
                    .index(shard)
                    .expect("indexes were read when opened");
                self.pairs_of_round(&index, epoch, round).len() as u32
            })
            .collect();
        let totals = Arc::new(totals);
        if kept.len() >= 64 {
            kept.remove(0);
        }
        kept.push(((epoch, round), Arc::clone(&totals)));
        totals
    }
}

impl Inner {
    /// Opens the shards of these lanes' windows; errors are left to the step that needs them.
    fn warm(&self, step: u64, lanes: &[u32]) {
        for lane in lanes {
            for row in 0..self.pairs_per_lane_step {
                let position = step * self.pairs_per_lane_step + row;
                let place = self.order.place(self, *lane, position);
                let _ = self.cache.shard(place.shard);
            }
        }
    }

    /// Pair number `pair` of the dataset, for an evaluation.
    fn evaluated(&self, pair: u64) -> Wanted {
        let shard = self.before.partition_point(|first| *first <= pair) - 1;
        Wanted {
            shard,
            pair: (pair - self.before[shard]) as u32,
            epoch: EVALUATION_EPOCH,
            window: None,
        }
    }

    fn lane_step(&self, step: u64, lane: u32) -> Result<Vec<HostBatch>, DataError> {
        let size = self.config.batch.micro_batch;
        let key = Key::new(self.config.run.seed, Purpose::ItmLabels)
            .with(step)
            .with(u64::from(lane));
        let first = step * self.pairs_per_lane_step;
        (0..self.config.micro_batches_per_lane())
            .map(|micro_batch| {
                let wanted = (0..size).map(|row| {
                    let position = first + u64::from(micro_batch * size + row);
                    let place = self.order.place(self, lane, position);
                    Ok(Wanted {
                        shard: place.shard,
                        pair: self.pair_in_shard(&place)?,
                        epoch: place.epoch,
                        window: Some(place),
                    })
                });
                let wanted = wanted.collect::<Result<Vec<_>, DataError>>()?;
                self.batch(&wanted, key.with(u64::from(micro_batch)))
            })
            .collect()
    }

    /// Pairs of a shard, as indices among all its pairs, that fall into (epoch, round).
    fn pairs_of_round(&self, index: &ShardIndex, epoch: u64, round: u32) -> Vec<u32> {
        let rounds = self.config.data.rounds;
        let key = Key::new(self.config.run.seed, Purpose::CaptionRound).with(epoch);
        let mut first = 0;
        let mut found = Vec::new();
        for sample in &index.samples {
            let start = key.with_name(&sample.key).below(0, u64::from(rounds)) as u32;
            let captions = (0..sample.pairs).filter(|j| (start + j) % rounds == round);
            found.extend(captions.map(|j| first + j));
            first += sample.pairs;
        }
        found
    }

    fn pair_in_shard(&self, place: &PairPlace) -> Result<u32, DataError> {
        if self.config.data.rounds == 1 {
            return Ok(place.pair);
        }
        let index = self.cache.index(place.shard)?;
        let pairs = self.pairs_of_round(&index, place.epoch, place.round);
        Ok(pairs[place.pair as usize])
    }

    fn batch(&self, wanted: &[Wanted], labels_key: Key) -> Result<HostBatch, DataError> {
        let seed = self.config.run.seed;
        let itm_labels = mask::itm_labels(labels_key, wanted.len());
        let rows: Vec<Row> = wanted
            .par_iter()
            .zip(&itm_labels)
            .map(|(pair, label)| self.row(pair, *label == 0))
            .collect::<Result<_, _>>()?;
        let mut batch = HostBatch {
            pairs: wanted.len(),
            text_len: self.config.data.text_len as usize,
            image_side: self.config.model.image.size as usize,
            itm_labels,
            ..HostBatch::default()
        };
        for (pair, row) in wanted.iter().zip(rows) {
            let id = self.before[pair.shard] + u64::from(pair.pair);
            let key = Key::new(seed, Purpose::Mask).with(pair.epoch).with(id);
            let mut masked = row.ids.clone();
            let pad = self.text.special().pad;
            batch.mlm_labels.extend(self.masking.mask(key, &mut masked));
            batch
                .text_mask
                .extend(row.ids.iter().map(|id| u8::from(*id != pad)));
            batch.ids.extend(row.ids);
            batch.masked_ids.extend(masked);
            batch
                .itm_images
                .extend(row.false_image.as_ref().unwrap_or(&row.image));
            batch.images.extend(row.image);
            batch.pair_ids.push(id);
        }
        Ok(batch)
    }

    fn row(&self, wanted: &Wanted, with_false_image: bool) -> Result<Row, DataError> {
        let shard = self.cache.shard(wanted.shard)?;
        let index = self.cache.index(wanted.shard)?;
        let (sample, caption) = sample_of(&index, wanted.pair);
        let entry = &index.samples[sample];
        let name = self.cache.name(wanted.shard);
        let text = reader::member_bytes(&shard, &name, &entry.text)?;
        let pairs = pair::pairs(&entry.text.name, text).map_err(|reason| DataError::Image {
            shard: name,
            member: entry.text.name.clone(),
            offset: entry.text.offset,
            reason,
        })?;
        let pair = pairs.get(caption).ok_or_else(|| DataError::Image {
            shard: self.cache.name(wanted.shard),
            member: entry.text.name.clone(),
            offset: entry.text.offset,
            reason: format!("has {} pairs, its index says {}", pairs.len(), entry.pairs),
        })?;
        let false_image = with_false_image
            .then(|| self.false_image(wanted))
            .transpose()?;
        Ok(Row {
            ids: self.text.ids(&pair.text)?,
            image: self.image(wanted.shard, sample)?,
            false_image,
        })
    }

    /// Uniform over the dataset's pairs (as the authors do; by chance the true image), or over the
    /// open window.
    fn false_image(&self, wanted: &Wanted) -> Result<Vec<f32>, DataError> {
        let id = self.before[wanted.shard] + u64::from(wanted.pair);
        let key = Key::new(self.config.run.seed, Purpose::FalseImage)
            .with(wanted.epoch)
            .with(id);
        let (shard, pair) = match (&wanted.window, self.config.data.false_image) {
            (Some(place), FalseImage::Window) => self.window_pair(place, key)?,
            _ => {
                let drawn = key.below(0, self.cache.manifest.pairs);
                let shard = self.before.partition_point(|b| *b <= drawn) - 1;
                (shard, (drawn - self.before[shard]) as u32)
            }
        };
        let (sample, _) = sample_of(&*self.cache.index(shard)?, pair);
        self.image(shard, sample)
    }

    fn window_pair(&self, place: &PairPlace, key: Key) -> Result<(usize, u32), DataError> {
        let held: u64 = place.window.iter().map(|(_, r)| r.len() as u64).sum();
        let mut drawn = key.below(0, held) as u32;
        for (shard, range) in place.window.iter() {
            if drawn < range.len() as u32 {
                let (shard, pair) = (*shard, range.start + drawn);
                let drawn = PairPlace {
                    shard,
                    pair,
                    ..place.clone()
                };
                return Ok((shard, self.pair_in_shard(&drawn)?));
            }
            drawn -= range.len() as u32;
        }
        unreachable!("drawn below the window's pairs")
    }

    fn image(&self, shard: usize, sample: usize) -> Result<Vec<f32>, DataError> {
        let index = self.cache.index(shard)?;
        let member = &index.samples[sample].images[0];
        let bytes = self.cache.member(shard, member)?;
        let side = self.config.model.image.size as usize;
        clip_transform(&bytes, side).map_err(|reason| DataError::Image {
            shard: self.cache.name(shard),
            member: member.name.clone(),
            offset: member.offset,
            reason,
        })
    }
}

struct Row {
    ids: Vec<i32>,
    image: Vec<f32>,
    false_image: Option<Vec<f32>>,
}

/// (sample, caption) of a shard's pair.
fn sample_of(index: &ShardIndex, pair: u32) -> (usize, usize) {
    let mut left = pair;
    for (i, sample) in index.samples.iter().enumerate() {
        if left < sample.pairs {
            return (i, left as usize);
        }
        left -= sample.pairs;
    }
    unreachable!("the index's totals were checked against the manifest")
}
