//! Pairs for an evaluation: any range of them by number, whole, or their texts and images apart.
//!
//! Pairs are walked dataset by dataset in the manifests' order; masks, labels and false images are
//! drawn from keys of their own. Whatever is asked for twice is the same twice, so that an
//! evaluation may be shared and repeated. It refuses to know what is made of the numbers.

use std::ops::Range;

use belfry_configs::FalseImage;
use belfry_configs::rng::{Key, Purpose};

use super::pixels::{Wish, fill};
use super::{DataPlane, Inner};
use crate::error::DataError;
use crate::host_batch::HostBatch;
use crate::order::{Nth, PairRef};
use crate::quarantine::Quarantine;

/// Stands for the epoch where evaluation draws its masks.
const EVALUATION_EPOCH: u64 = u64::MAX;

/// What is known of an evaluated pair beside its numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct About {
    /// The publisher's id of the pair, where it has one: a VQAv2 question id.
    pub id: Option<String>,
    /// Index in the split's datasets.
    pub dataset: u32,
    /// Index in the dataset's sources.
    pub source: u32,
}

/// Texts without their images.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EvaluatedTexts {
    /// Token ids `[texts, T]`, padded.
    pub ids: Vec<i32>,
    /// 1 for real tokens, 0 for padding, `[texts, T]`.
    pub text_mask: Vec<f32>,
    /// The number of the first pair of each text's image: texts of one image have the same.
    pub image_ids: Vec<u64>,
}

impl DataPlane {
    /// Micro-batches of every pair once; the last one may be short. Each is read when it is asked
    /// for.
    ///
    /// # Errors
    /// [`DataError`] of each, naming shard, member and offset.
    pub fn evaluation_batches(&self) -> impl Iterator<Item = Result<HostBatch, DataError>> + '_ {
        let (pairs, size) = (self.pairs(), self.inner.micro_batch as u64);
        (0..pairs.div_ceil(size)).map(move |group| {
            let all = group * size..((group + 1) * size).min(pairs);
            Ok(self.evaluation_batch(all, group)?.0)
        })
    }

    /// The pairs of a range as one batch. What a micro-batch draws as a whole, ITM's labels, follows
    /// its number `group`.
    ///
    /// # Errors
    /// [`DataError`], naming shard, member and offset.
    pub fn evaluation_batch(
        &self,
        pairs: Range<u64>,
        group: u64,
    ) -> Result<(HostBatch, Vec<About>), DataError> {
        let inner = &self.inner;
        let key = Key::new(inner.assembly.seed, Purpose::ItmLabels).with(EVALUATION_EPOCH);
        let wanted: Vec<PairRef> = pairs.map(|id| inner.evaluated(id)).collect();
        let labels = inner.assembly.itm_labels(key.with(group), wanted.len());
        let around = (0, FalseImage::Dataset, &Quarantine::new());
        let groups = inner.rows(vec![(wanted, labels)], around)?;
        let rows = groups.iter().flat_map(|(rows, _)| rows);
        let about = rows.map(|row| About {
            id: row.read.pair.id.clone(),
            dataset: row.place.dataset,
            source: row.read.source,
        });
        let about = about.collect();
        let mut batches = inner.assembly.batches(&inner.reading, &groups)?;
        Ok((batches.remove(0), about))
    }

    /// The texts of a range; no image is read.
    ///
    /// # Errors
    /// As [`DataPlane::evaluation_batch`].
    pub fn evaluation_texts(&self, pairs: Range<u64>) -> Result<EvaluatedTexts, DataError> {
        let inner = &self.inner;
        let wanted: Vec<PairRef> = pairs.map(|id| inner.evaluated(id)).collect();
        let held = inner.reading.hold(wanted.iter().map(PairRef::shard_ref))?;
        let read = |pair: &PairRef| {
            let (read, first) = inner.reading.text(pair.shard_ref(), pair.pair, &held)?;
            let ids = inner.assembly.text.ids(&read.text)?;
            Ok((ids, pair.id - u64::from(pair.pair - first)))
        };
        let mut texts = EvaluatedTexts::default();
        let pad = inner.assembly.text.special().pad;
        for (ids, image) in inner.reading.all(&wanted, read)? {
            let mask = ids.iter().map(|id| f32::from(u8::from(*id != pad)));
            texts.text_mask.extend(mask);
            texts.ids.extend(ids);
            texts.image_ids.push(image);
        }
        Ok(texts)
    }

    /// The images of the pairs `ids`, `[ids, 3, S, S]`; no text is read.
    ///
    /// # Errors
    /// As [`DataPlane::evaluation_batch`].
    pub fn evaluation_images(&self, ids: &[u64]) -> Result<Vec<f32>, DataError> {
        let inner = &self.inner;
        let wanted: Vec<PairRef> = ids.iter().map(|id| inner.evaluated(*id)).collect();
        let held = inner.reading.hold(wanted.iter().map(PairRef::shard_ref))?;
        let read = |pair: &PairRef| {
            let pair_of_shard = Nth::OfAll(pair.pair);
            inner
                .reading
                .image_of(pair.shard_ref(), pair_of_shard, &held)
        };
        let how = inner.assembly.how;
        let fixed = Key::new(inner.assembly.seed, Purpose::Augment);
        let wishes = inner.reading.all(&wanted, read)?.into_iter();
        let wishes: Vec<Wish> = wishes
            .map(|(place, bytes)| Wish {
                place,
                bytes,
                key: fixed,
            })
            .collect();
        let mut pixels = vec![0.0; ids.len() * 3 * how.side * how.side];
        let slots = pixels.chunks_exact_mut(3 * how.side * how.side).collect();
        fill(how, &wishes, slots)
            .map_err(|(place, reason)| inner.reading.wrong_image(place, reason))?;
        Ok(pixels)
    }
}

impl Inner {
    /// Pair number `id` of all, for an evaluation.
    fn evaluated(&self, id: u64) -> PairRef {
        let (place, pair) = self
            .sequence
            .describe(id)
            .expect("below the number of pairs");
        PairRef {
            id,
            dataset: place.dataset,
            shard: place.shard,
            pair,
            epoch: EVALUATION_EPOCH,
            round: 0,
            window: 0,
            position: 0,
            replaces: None,
        }
    }
}
