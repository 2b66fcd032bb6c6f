//! The contrast of a whole global batch, on the compute thread (DESIGN 5, "contrastive groups").
//!
//! First the features of a lane's rows, without graph; then, when everybody's are gathered, the
//! lane's gradient against all of them, micro-batch by micro-batch. Hard negatives lie in any lane:
//! their texts and images come from the lanes that are at hand, else from the data plane, which
//! gives anybody the numbers of any row. Draws are keyed by the row's place in the global batch, so
//! neither the lane, nor the micro-batch, nor the worker matters. It refuses to know how features
//! are gathered.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use belfry_configs::ValidConfig;
use belfry_configs::rng::{Key, Purpose};
use belfry_data::{DataError, DataPlane, HostBatch, Quarantine};
use belfry_model::{
    GatheredBatch, GradientSum, HardNegatives, ManagerTower, ModelError, RetrievalBatch, Weights,
    WholeBatch,
};
use bytes::Bytes;

use crate::core::Features;
use crate::task::{Reports, RetrievalRows};

/// Bytes of a feature's element, and of an image's id.
const FLOAT_BYTES: usize = size_of::<f32>();
const ID_BYTES: usize = size_of::<u64>();

/// Why a lane has no features or no gradient.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ContrastError {
    /// Its rows, or those of its hard negatives, could not be read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The model did not take them.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// What was gathered is not what the run's lanes have.
    #[error(
        "the gathered features of lane {lane} are {found} bytes, {expected} are needed; do the \
         workers run one program?"
    )]
    Features {
        /// Whose.
        lane: u32,
        /// As they came.
        found: usize,
        /// As the configuration says.
        expected: usize,
    },
}

/// A lane of the open step, and what its passes read.
#[derive(Clone, Copy)]
pub(crate) struct LaneOfStep<'a> {
    pub config: &'a ValidConfig,
    pub model: &'a ManagerTower,
    pub data: &'a DataPlane,
    pub weights: &'a Weights,
    pub step: u64,
    pub lane: u32,
    pub quarantine: &'a Quarantine,
}

/// What the compute thread keeps of the open step between its two passes.
#[derive(Default)]
pub(crate) struct GlobalContrast {
    step: u64,
    quarantine: Quarantine,
    /// Batches of lanes whose features were computed here, as many as `data.prefetch_bytes_max`
    /// holds; others are read again.
    batches: BTreeMap<u32, Vec<HostBatch>>,
    bytes: u64,
    /// The contrast, and the features that it is of.
    whole: Option<(Arc<Features>, WholeBatch)>,
}

/// Bytes of a lane's features: of text and image for every row, and every row's image.
pub(crate) fn block_bytes(config: &ValidConfig) -> usize {
    let width = config.model.head.contrastive_hidden as usize;
    rows_per_lane(config) * (2 * width * FLOAT_BYTES + ID_BYTES)
}

fn rows_per_lane(config: &ValidConfig) -> usize {
    (config.batch.global_batch / config.batch.lanes) as usize
}

impl LaneOfStep<'_> {
    /// The place of the lane's first row in the global batch.
    fn first(&self) -> usize {
        self.lane as usize * rows_per_lane(self.config)
    }

    fn keys(&self, places: impl Iterator<Item = usize>) -> Vec<Key> {
        let key = Key::new(self.config.run.seed, Purpose::Dropout).with(self.step);
        places.map(|place| key.with(place as u64)).collect()
    }
}

impl GlobalContrast {
    /// The lane's features, as they are gathered: of text, then of image, `[rows, contrastive]`
    /// each, then the image of every row; little-endian.
    pub fn features(&mut self, at: LaneOfStep) -> Result<Bytes, ContrastError> {
        let batches = self.batches(at)?;
        let (mut sides, mut images) = ([Vec::new(), Vec::new()], Vec::new());
        let mut first = at.first();
        for batch in &batches {
            images.extend(&batch.image_ids);
            let rows = RetrievalRows::new(batch.clone()).batch;
            let keys = at.keys(first..first + rows.pairs);
            first += rows.pairs;
            let found = at
                .model
                .contrastive_features(at.weights, &rows, Some(&keys))?;
            for (side, found) in sides.iter_mut().zip(found) {
                side.extend(found);
            }
        }
        self.keep(at, batches);
        let floats = sides.iter().flatten().flat_map(|value| value.to_le_bytes());
        let ids = images.iter().flat_map(|id: &u64| id.to_le_bytes());
        Ok(floats.chain(ids).collect())
    }

    /// The lane's batches: kept, or read.
    pub fn batches(&mut self, at: LaneOfStep) -> Result<Vec<HostBatch>, DataError> {
        if self.step != at.step || self.quarantine != *at.quarantine {
            *self = GlobalContrast {
                step: at.step,
                quarantine: at.quarantine.clone(),
                ..GlobalContrast::default()
            };
        }
        match self.batches.get(&at.lane) {
            Some(batches) => Ok(batches.clone()),
            None => at.data.lane_step(at.step, at.lane, at.quarantine),
        }
    }

    fn keep(&mut self, at: LaneOfStep, batches: Vec<HostBatch>) {
        let bytes: u64 = batches.iter().map(HostBatch::bytes).sum();
        let known = self.batches.contains_key(&at.lane);
        if !known && self.bytes + bytes <= at.config.data.prefetch_bytes_max {
            self.bytes += bytes;
            self.batches.insert(at.lane, batches);
        }
    }

    /// Adds the gradient of the lane's micro-batches to `sum`; their reports, in order.
    pub fn gradient(
        &mut self,
        at: LaneOfStep,
        features: &Arc<Features>,
        batches: Vec<HostBatch>,
        sum: &mut GradientSum,
    ) -> Result<Vec<Reports>, ContrastError> {
        let whole = match self.whole.take() {
            Some((of, whole)) if Arc::ptr_eq(&of, features) => whole,
            _ => whole_batch(at, features)?,
        };
        let mut reports = Vec::with_capacity(batches.len());
        let mut first = at.first();
        for batch in batches {
            let rows = first..first + batch.pairs;
            first = rows.end;
            let negatives = whole.negatives(rows.clone());
            let own = RetrievalRows::new(batch).batch;
            let (batch, keys) = self.with_negatives(at, rows.clone(), own, &negatives)?;
            let slopes = whole.slopes(rows);
            let target = &mut *sum;
            reports.push(at.model.gathered_gradient(
                at.weights,
                &batch,
                &slopes,
                Some(&keys),
                target,
            )?);
        }
        self.whole = Some((Arc::clone(features), whole));
        let words = at.model.predicts_words();
        Ok(vec![Reports::Contrast { words, reports }])
    }

    /// A micro-batch with the texts and images of its hard negatives, and a key for every text.
    fn with_negatives(
        &self,
        at: LaneOfStep,
        own: Range<usize>,
        batch: RetrievalBatch,
        negatives: &HardNegatives,
    ) -> Result<(GatheredBatch, Vec<Key>), DataError> {
        let texts = Rows::new(own.clone(), &negatives.texts);
        let images = Rows::new(own, &negatives.images);
        let away = texts.others.iter().chain(&images.others);
        let mut away: Vec<usize> = away
            .filter(|place| self.at_hand(at, **place).is_none())
            .copied()
            .collect();
        away.sort_unstable();
        away.dedup();
        let fetched = match away[..] {
            [] => HostBatch::default(),
            _ => at.data.rows(at.step, &away, at.quarantine)?,
        };
        let row = |place: &usize| {
            self.at_hand(at, *place).unwrap_or_else(|| {
                let row = away.binary_search(place);
                (&fetched, row.expect("what is not at hand was fetched"))
            })
        };
        let mut gathered = GatheredBatch {
            own: batch,
            hard_texts: texts.hard.clone(),
            hard_images: images.hard.clone(),
            ..GatheredBatch::default()
        };
        for (batch, row) in texts.others.iter().map(row) {
            let tokens = row * batch.text_len..(row + 1) * batch.text_len;
            gathered.other_ids.extend(&batch.ids[tokens.clone()]);
            let mask = batch.text_mask[tokens].iter().copied().map(f32::from);
            gathered.other_text_mask.extend(mask);
        }
        for (batch, row) in images.others.iter().map(row) {
            let size = 3 * batch.image_side * batch.image_side;
            let pixels = &batch.images[row * size..(row + 1) * size];
            gathered.other_images.extend(pixels);
        }
        let keys = at.keys(texts.all());
        Ok((gathered, keys))
    }

    /// The batch and the row of a place in the global batch, if its lane is kept.
    fn at_hand(&self, at: LaneOfStep, place: usize) -> Option<(&HostBatch, usize)> {
        let per_lane = rows_per_lane(at.config);
        let batches = self.batches.get(&((place / per_lane) as u32))?;
        let micro_batch = at.config.batch.micro_batch as usize;
        let row = place % per_lane;
        Some((batches.get(row / micro_batch)?, row % micro_batch))
    }
}

/// Own rows and, behind them, others, each once.
struct Rows {
    own: Range<usize>,
    others: Vec<usize>,
    /// For each own row, where its hard negative stands among all.
    hard: Vec<usize>,
}

impl Rows {
    fn new(own: Range<usize>, negatives: &[usize]) -> Self {
        let mut others: Vec<usize> = Vec::new();
        let hard = negatives.iter().map(|place| {
            if own.contains(place) {
                return place - own.start;
            }
            let known = others.iter().position(|other| other == place);
            own.len()
                + known.unwrap_or_else(|| {
                    others.push(*place);
                    others.len() - 1
                })
        });
        let hard = hard.collect();
        Rows { own, others, hard }
    }

    /// Their places, in order.
    fn all(&self) -> impl Iterator<Item = usize> + '_ {
        self.own.clone().chain(self.others.iter().copied())
    }
}

/// The contrast of everybody's features, lane by lane.
fn whole_batch(at: LaneOfStep, features: &Features) -> Result<WholeBatch, ContrastError> {
    let rows = rows_per_lane(at.config);
    let side_bytes = rows * at.config.model.head.contrastive_hidden as usize * FLOAT_BYTES;
    let expected = block_bytes(at.config);
    let (mut sides, mut images) = ([Vec::new(), Vec::new()], Vec::new());
    for lane in 0..at.config.batch.lanes {
        let block = features.get(&lane).map(Bytes::as_ref).unwrap_or_default();
        let found = block.len();
        if found != expected {
            return Err(ContrastError::Features {
                lane,
                found,
                expected,
            });
        }
        let (floats, ids) = block.split_at(2 * side_bytes);
        for (side, bytes) in sides.iter_mut().zip(floats.chunks_exact(side_bytes)) {
            let (words, _) = bytes.as_chunks::<FLOAT_BYTES>();
            side.extend(words.iter().map(|word| f32::from_le_bytes(*word)));
        }
        let (words, _) = ids.as_chunks::<ID_BYTES>();
        images.extend(words.iter().map(|word| u64::from_le_bytes(*word)));
    }
    let key = Key::new(at.config.run.seed, Purpose::Negatives).with(at.step);
    Ok(at.model.whole_batch(at.weights, sides, images, key)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_that_is_several_negatives_stands_there_once() {
        let rows = Rows::new(4..7, &[9, 5, 9]);
        assert_eq!(
            (&rows.others[..], &rows.hard[..]),
            (&[9][..], &[3, 1, 3][..])
        );
        assert!(rows.all().eq([4, 5, 6, 9]));
    }
}
