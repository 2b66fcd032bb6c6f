//! From a pair's place to the bytes of its text and images: the only room that asks the cache.
//!
//! It refuses to know lanes, steps and what the bytes mean.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use rayon::prelude::*;
use shard_tools::manifest::{Manifest, Member};
use shard_tools::pair::{self, Pair};

use crate::cache::{Cache, Index, Shard};
use crate::error::DataError;
use crate::order::Nth;
use crate::quarantine::ShardRef;

/// Reads at a time: most of a lane's false images are ranged GETs, which are waiting, not work.
const READS_MAX: usize = 16;

/// An image in the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ImagePlace {
    pub shard: ShardRef,
    pub sample: usize,
    /// Of the sample's images.
    pub image: usize,
}

/// A pair as it was read.
pub struct PairRead {
    pub pair: Pair,
    /// Which of the dataset's sources it comes from.
    pub source: u32,
    /// The first pair of its sample, as a number of the shard's pairs.
    pub first: u32,
    pub sample: usize,
    /// The sample's images.
    pub images: Vec<Bytes>,
}

/// Shards that are held while a step's pairs are read.
pub type Held = BTreeMap<ShardRef, Arc<Shard>>;

/// The datasets of a run.
pub struct Reading {
    caches: Vec<Cache>,
    /// Whether a shard that cannot be read may be put under quarantine.
    training: bool,
    threads: rayon::ThreadPool,
}

impl Reading {
    /// Opens all datasets at `paths`.
    pub fn open<'a>(
        paths: impl Iterator<Item = &'a str>,
        (folder, bytes_max): (&Path, u64),
        training: bool,
    ) -> Result<Self, DataError> {
        let caches = paths.map(|path| Cache::open(path, folder, bytes_max));
        let threads = rayon::ThreadPoolBuilder::new()
            .num_threads(READS_MAX)
            .thread_name(|number| format!("reads-{number}"));
        let no_threads = |error| DataError::Cache {
            path: "threads that read".into(),
            source: std::io::Error::other(error),
        };
        Ok(Reading {
            caches: caches.collect::<Result<_, _>>()?,
            training,
            threads: threads.build().map_err(no_threads)?,
        })
    }

    /// The datasets' manifests.
    pub fn manifests(&self) -> Vec<Manifest> {
        self.caches.iter().map(|c| c.manifest.clone()).collect()
    }

    /// Runs `read` for all items, as many at a time as may be.
    pub fn all<T: Sync, R: Send>(
        &self,
        items: &[T],
        read: impl Fn(&T) -> Result<R, DataError> + Sync + Send,
    ) -> Result<Vec<R>, DataError> {
        self.threads
            .install(|| items.par_iter().map(read).collect())
    }

    /// Whole shards, fetched where they are not at hand.
    pub fn hold(&self, shards: impl Iterator<Item = ShardRef>) -> Result<Held, DataError> {
        let distinct: BTreeMap<ShardRef, ()> = shards.map(|shard| (shard, ())).collect();
        let distinct: Vec<ShardRef> = distinct.into_keys().collect();
        let held = self.all(&distinct, |shard| Ok((*shard, self.shard(*shard)?)))?;
        Ok(held.into_iter().collect())
    }

    /// A whole shard.
    pub fn shard(&self, shard: ShardRef) -> Result<Arc<Shard>, DataError> {
        let bytes = self.cache(shard).shard(shard.shard as usize);
        self.readable(shard, bytes)
    }

    /// Pair number `pair` of a shard: from `held` where it is there, else member by member.
    pub fn pair(&self, shard: ShardRef, pair: u32, held: &Held) -> Result<PairRead, DataError> {
        let index = self.index(shard)?;
        let (sample, _) = index.sample_of(pair);
        let (read, first) = self.text(shard, pair, held)?;
        let images = (0..index.images(sample)).map(|image| index.image(sample, image));
        let images = images.map(|image| self.member(shard, &image, held));
        Ok(PairRead {
            pair: read,
            source: index.source(sample),
            first,
            sample,
            images: images.collect::<Result<_, _>>()?,
        })
    }

    /// The pair without its images, and the first pair of its sample.
    pub fn text(&self, shard: ShardRef, pair: u32, held: &Held) -> Result<(Pair, u32), DataError> {
        let index = self.index(shard)?;
        let (sample, nth) = index.sample_of(pair);
        let member = index.text(sample);
        let text = self.member(shard, &member, held)?;
        let pairs = pair::pairs(&member.name, &text);
        let mut pairs = pairs.map_err(|reason| self.wrong(shard, &member, reason))?;
        let (found, expected) = (pairs.len(), index.pairs(sample) as usize);
        if found != expected {
            let reason = format!("has {found} pairs, its index says {expected}");
            return Err(self.wrong(shard, &member, reason));
        }
        Ok((pairs.swap_remove(nth), pair - nth as u32))
    }

    /// The first image of a pair's sample.
    pub fn image_of(
        &self,
        shard: ShardRef,
        pair: Nth,
        held: &Held,
    ) -> Result<(ImagePlace, Bytes), DataError> {
        let index = self.index(shard)?;
        let sample = match pair {
            Nth::OfAll(pair) => Some(index.sample_of(pair).0),
            Nth::OfSource { source, nth } => sample_of_source(&index, source, nth),
        };
        let sample = sample.ok_or_else(|| DataError::Setting {
            key: "data.train",
            reason: format!(
                "{}: its index has fewer pairs of a source than its manifest says; \
                             run `belfry shards verify`",
                self.name(shard)
            ),
        })?;
        let image = ImagePlace {
            shard,
            sample,
            image: 0,
        };
        Ok((image, self.member(shard, &index.image(sample, 0), held)?))
    }

    /// What is wrong with a pair's text.
    pub fn wrong_text(&self, shard: ShardRef, sample: usize, reason: String) -> DataError {
        match self.index(shard) {
            Ok(index) => self.wrong(shard, &index.text(sample), reason),
            Err(error) => error,
        }
    }

    /// What is wrong with an image.
    pub fn wrong_image(&self, place: ImagePlace, reason: String) -> DataError {
        match self.index(place.shard) {
            Ok(index) => {
                let member = index.image(place.sample, place.image);
                self.wrong(place.shard, &member, reason)
            }
            Err(error) => error,
        }
    }

    fn wrong(&self, shard: ShardRef, member: &Member, reason: String) -> DataError {
        DataError::Image {
            shard: self.name(shard),
            member: member.name.clone(),
            offset: member.offset,
            reason,
        }
    }

    fn name(&self, shard: ShardRef) -> String {
        self.cache(shard).name(shard.shard as usize)
    }

    fn cache(&self, shard: ShardRef) -> &Cache {
        &self.caches[shard.dataset as usize]
    }

    fn index(&self, shard: ShardRef) -> Result<Arc<Index>, DataError> {
        let index = self.cache(shard).index(shard.shard as usize);
        self.readable(shard, index)
    }

    fn member(&self, shard: ShardRef, member: &Member, held: &Held) -> Result<Bytes, DataError> {
        let bytes = match held.get(&shard) {
            Some(open) => open.member(member),
            None => self.cache(shard).member(shard.shard as usize, member),
        };
        self.readable(shard, bytes)
    }

    fn readable<T>(&self, shard: ShardRef, read: Result<T, DataError>) -> Result<T, DataError> {
        read.map_err(|error| match error {
            error @ DataError::GivenUp { .. } if self.training => DataError::Unreadable {
                shard,
                source: Box::new(error),
            },
            error => error,
        })
    }
}

/// The sample that holds the `nth` pair of a source.
fn sample_of_source(index: &Index, source: u32, nth: u32) -> Option<usize> {
    let mut before = 0;
    let mut of_source = (0..index.samples()).filter(|sample| index.source(*sample) == source);
    of_source.find(|sample| {
        before += index.pairs(*sample);
        before > nth
    })
}
