//! Retrieval in two stages (model_spec 14): every text and every image goes through its tower once,
//! then each one's nearest go through fusion and are scored by the match logit.
//!
//! A unit of work is one query: first all images, then all texts. It looks at all features, and at
//! nothing that another query found, so queries may be shared in any way. It refuses to know what is
//! made of the scores.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use belfry_configs::Eval;
use belfry_data::{DataPlane, EvaluatedTexts};
use belfry_model::{ManagerTower, Weights, best, similarity};

use super::experts::{Encoded, ExpertStore};
use crate::error::WorkerError;

/// Texts that are tokenised together.
const TEXTS_READ: u64 = 1024;
/// Scores of all pairs are held in memory, two of them.
const PAIRS_MAX: u64 = 1 << 30;
/// Looks for chunks that other processes encode.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// How often an encoder ran, in rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EncoderRuns {
    /// Images through the image tower.
    pub images: u64,
    /// Texts through the text tower.
    pub texts: u64,
}

/// Processes that evaluate together and share what they encode.
#[derive(Clone, Debug)]
pub struct Together<'a> {
    /// Where encoded chunks lie.
    pub folder: &'a Path,
    /// This process, and how many there are; with (0, 1) nobody is waited for.
    pub share: (usize, usize),
    /// So long without a new chunk, and what others were to encode is encoded here.
    pub patience: Duration,
}

/// What is known before anything is encoded.
pub struct Retrieval {
    texts: EvaluatedTexts,
    text_len: usize,
    /// The first pair of each image.
    images: Vec<u64>,
    /// Of each text.
    pub image_of_text: Vec<u32>,
}

/// Everything encoded.
pub struct Sides {
    images: ExpertStore,
    texts: ExpertStore,
    features: [Vec<f32>; 2],
    /// What it took in this process.
    pub runs: EncoderRuns,
}

/// Who encodes with what.
pub struct Encoder<'a> {
    pub data: &'a DataPlane,
    pub model: &'a ManagerTower,
    pub weights: &'a Weights,
    pub settings: &'a Eval,
}

impl Retrieval {
    /// Reads all texts, and which images they are of.
    pub fn read(data: &DataPlane, text_len: usize) -> Result<Self, WorkerError> {
        let mut texts = EvaluatedTexts::default();
        let all = data.pairs();
        for first in (0..all).step_by(TEXTS_READ as usize) {
            let more = data.evaluation_texts(first..(first + TEXTS_READ).min(all))?;
            texts.ids.extend(more.ids);
            texts.text_mask.extend(more.text_mask);
            texts.image_ids.extend(more.image_ids);
        }
        // Pairs of one image stand together, so images come in the order of their first pairs.
        let mut images = texts.image_ids.clone();
        images.dedup();
        let place: BTreeMap<u64, u32> = images.iter().copied().zip(0..).collect();
        let image_of_text: Vec<u32> = texts.image_ids.iter().map(|id| place[id]).collect();
        let pairs = images.len() as u64 * image_of_text.len() as u64;
        if pairs > PAIRS_MAX {
            return Err(WorkerError::Evaluation(format!(
                "data.validation: {} images x {} texts are more than {PAIRS_MAX} scores; evaluate \
                 a part of them",
                images.len(),
                image_of_text.len()
            )));
        }
        Ok(Retrieval {
            texts,
            text_len,
            images,
            image_of_text,
        })
    }

    /// Images and texts.
    pub fn sizes(&self) -> [usize; 2] {
        [self.images.len(), self.image_of_text.len()]
    }

    /// Runs both towers over everything once; with `together` this process encodes its share and
    /// takes the rest from the others.
    pub fn encode(
        &self,
        encoder: &Encoder,
        cache_dir: &Path,
        owner: &str,
        together: Option<&Together>,
    ) -> Result<Sides, WorkerError> {
        let size = encoder.settings.pairs_per_batch as usize;
        let places = (together.map(|t| t.folder), cache_dir);
        let bytes_max = encoder.settings.experts_bytes_max;
        let [images, texts] = self.sizes();
        // Texts are small and asked for more often: what is left of the room is for images.
        let mut texts = ExpertStore::new("texts", owner, (texts, size), bytes_max / 2, places);
        let mut images = ExpertStore::new("images", owner, (images, size), bytes_max / 2, places);
        let mut runs = EncoderRuns::default();
        let mut text = |number| self.encode_texts(encoder, number, &mut runs.texts);
        fill(&mut texts, together, &mut text)?;
        let mut image = |number| self.encode_images(encoder, number, &mut runs.images);
        fill(&mut images, together, &mut image)?;
        let features = [images.features(), texts.features()];
        Ok(Sides {
            images,
            texts,
            features,
            runs,
        })
    }

    fn encode_texts(
        &self,
        encoder: &Encoder,
        number: usize,
        runs: &mut u64,
    ) -> Result<Encoded, WorkerError> {
        let size = encoder.settings.pairs_per_batch as usize;
        let rows = number * size..((number + 1) * size).min(self.image_of_text.len());
        let tokens = rows.start * self.text_len..rows.end * self.text_len;
        let (ids, mask) = (&self.texts.ids, &self.texts.text_mask);
        let encoded =
            encoder
                .model
                .encode_texts(encoder.weights, &ids[tokens.clone()], &mask[tokens])?;
        *runs += rows.len() as u64;
        Ok(Encoded {
            features: encoded.features().to_vec(),
            experts: encoded.to_host()?,
        })
    }

    fn encode_images(
        &self,
        encoder: &Encoder,
        number: usize,
        runs: &mut u64,
    ) -> Result<Encoded, WorkerError> {
        let size = encoder.settings.pairs_per_batch as usize;
        let rows = &self.images[number * size..((number + 1) * size).min(self.images.len())];
        let pixels = encoder.data.evaluation_images(rows)?;
        let encoded = encoder.model.encode_images(encoder.weights, &pixels)?;
        *runs += rows.len() as u64;
        Ok(Encoded {
            features: encoded.features().to_vec(),
            experts: encoded.to_host()?,
        })
    }

    /// Query `unit`: the nearest of the other side with their match logits, nearest first.
    pub fn query(
        &self,
        encoder: &Encoder,
        sides: &Sides,
        unit: usize,
    ) -> Result<Vec<(u32, f32)>, WorkerError> {
        let [images, texts] = self.sizes();
        let of_image = unit < images;
        let own = if of_image { unit } else { unit - images };
        let (asking, asked, rows) = match of_image {
            true => (&sides.features[0], &sides.features[1], texts),
            false => (&sides.features[1], &sides.features[0], images),
        };
        let width = asked.len() / rows.max(1);
        let feature = &asking[own * width..][..width];
        let near: Vec<f32> = asked
            .chunks_exact(width)
            .map(|other| similarity(feature, other))
            .collect();
        let nearest = best(&near, encoder.settings.top_k as usize);
        let mut scored = Vec::with_capacity(nearest.len());
        for batch in nearest.chunks(encoder.settings.pairs_per_batch as usize) {
            let others: Vec<usize> = batch.iter().map(|(other, _)| *other).collect();
            let own = [own];
            let (images, texts) = match of_image {
                true => (&own[..], &others[..]),
                false => (&others[..], &own[..]),
            };
            let logits = self.fuse(encoder, sides, images, texts)?;
            scored.extend(others.iter().zip(logits).map(|(o, l)| (*o as u32, l)));
        }
        if let Some((other, _)) = scored.iter().find(|(_, logit)| !logit.is_finite()) {
            let (asking, asked) = if of_image {
                ("image", "text")
            } else {
                ("text", "image")
            };
            return Err(WorkerError::Evaluation(format!(
                "the match logit of {asking} {own} and {asked} {other} is no finite number: these \
                 weights cannot be ranked"
            )));
        }
        Ok(scored)
    }

    /// Match logits of all pairs of one of `images` and one of `texts`; one of both has one row.
    fn fuse<'s>(
        &self,
        encoder: &Encoder,
        sides: &'s Sides,
        images: &[usize],
        texts: &[usize],
    ) -> Result<Vec<f32>, WorkerError> {
        let rows = |store: &'s ExpertStore, wanted: &[usize]| {
            let rows = wanted.iter().map(|row| store.row(*row));
            rows.collect::<Result<Vec<Cow<'s, [f32]>>, WorkerError>>()
        };
        let (text_rows, image_rows) = (rows(&sides.texts, texts)?, rows(&sides.images, images)?);
        let text_rows: Vec<&[f32]> = text_rows.iter().map(|row| &**row).collect();
        let image_rows: Vec<&[f32]> = image_rows.iter().map(|row| &**row).collect();
        let mask = texts
            .iter()
            .map(|t| &self.texts.text_mask[t * self.text_len..][..self.text_len]);
        let mask: Vec<f32> = mask.flatten().copied().collect();
        let (model, weights) = (encoder.model, encoder.weights);
        let of_texts = (sides.texts.shape(), &text_rows[..]);
        let of_images = (sides.images.shape(), &image_rows[..]);
        let encoded_texts = model.texts_from_host(weights, of_texts, &mask)?;
        let encoded_images = model.images_from_host(weights, of_images)?;
        let pairs: Vec<(usize, usize)> = (0..texts.len())
            .flat_map(|text| (0..images.len()).map(move |image| (text, image)))
            .collect();
        Ok(model.match_logits(weights, &encoded_texts, &encoded_images, &pairs)?)
    }
}

/// Fills a store: own chunks, then those of the others as they come, or by itself when they do not.
fn fill(
    store: &mut ExpertStore,
    together: Option<&Together>,
    encode: &mut dyn FnMut(usize) -> Result<Encoded, WorkerError>,
) -> Result<(), WorkerError> {
    let (own, all) = together.map_or((0, 1), |t| t.share);
    for number in (0..store.chunks()).filter(|number| number % all == own) {
        if !store.take(number)? {
            store.keep(number, encode(number)?)?;
        }
    }
    let patience = together.map_or(Duration::ZERO, |t| t.patience);
    let mut waited = Instant::now();
    for number in 0..store.chunks() {
        while !store.has(number) {
            if store.take(number)? {
                waited = Instant::now();
            } else if waited.elapsed() >= patience {
                store.keep(number, encode(number)?)?;
            } else {
                std::thread::sleep(LOOK_INTERVAL);
            }
        }
    }
    Ok(())
}
