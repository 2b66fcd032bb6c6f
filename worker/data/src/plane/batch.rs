//! From pairs and their bytes to host batches, for every task.
//!
//! Every number here is a function of (seed, epoch, pair id, micro-batch key); it refuses to know
//! where bytes come from and when they are asked for.

use belfry_configs::rng::{Key, Purpose};
use belfry_configs::{Task, ValidConfig};
use bytes::Bytes;
use rayon::prelude::*;

use super::pixels::{How, Wish, fill};
use super::reading::{ImagePlace, PairRead, Reading};
use crate::error::DataError;
use crate::host_batch::{HostBatch, Targets};
use crate::mask::{self, Masking};
use crate::order::PairRef;
use crate::quarantine::ShardRef;
use crate::text::Text;

/// What a task's batches are made of.
pub struct Assembly {
    pub seed: u64,
    pub task: Task,
    pub text: Text,
    pub text_len: usize,
    pub masking: Masking,
    pub how: How,
    /// VQA's answers.
    pub answers: usize,
}

/// A pair with everything that was read for it.
pub struct Row {
    pub place: PairRef,
    pub read: PairRead,
    /// Where the row's label is 0.
    pub false_image: Option<(ImagePlace, Bytes)>,
}

/// Ids, their masked form and the labels, of one text.
struct Words {
    ids: Vec<i32>,
    masked: Option<(Vec<i32>, Vec<i32>)>,
}

impl Assembly {
    /// What `config` asks for, with images as `how` says.
    pub fn new(config: &ValidConfig, how: How, answers: usize) -> Result<Self, DataError> {
        let data = &config.data;
        let text = Text::of(config)?;
        let masking = Masking::new(&text, data.mlm_probability, data.whole_word_masking)?;
        Ok(Assembly {
            seed: config.run.seed,
            task: config.model.task,
            text,
            text_len: data.text_len as usize,
            masking,
            how,
            answers,
        })
    }

    /// Labels of a micro-batch whose task pairs texts with drawn false images.
    pub fn itm_labels(&self, key: Key, pairs: usize) -> Vec<i32> {
        match self.task {
            Task::Pretrain => mask::itm_labels(key, pairs),
            _ => Vec::new(),
        }
    }

    /// Bytes of the batches of `pairs` pairs, as [`HostBatch::bytes`] counts them, at most.
    pub fn bytes(&self, pairs: u64) -> u64 {
        let image = 4 * 3 * (self.how.side * self.how.side) as u64;
        let text = (3 * 4 + 1) * self.text_len as u64;
        let images = match self.task {
            Task::Pretrain | Task::Nlvr2 => 2,
            _ => 1,
        };
        pairs * (images * image + text)
    }

    /// The batches of groups of rows with their labels.
    pub fn batches(
        &self,
        reading: &Reading,
        groups: &[(Vec<Row>, Vec<i32>)],
    ) -> Result<Vec<HostBatch>, DataError> {
        let mut batches = Vec::with_capacity(groups.len());
        for (rows, itm_labels) in groups {
            batches.push(self.texts(reading, rows, itm_labels)?);
        }
        let size = 3 * self.how.side * self.how.side;
        let mut slots = Vec::new();
        for batch in &mut batches {
            slots.extend(batch.images.chunks_exact_mut(size));
            slots.extend(batch.second_images.chunks_exact_mut(size));
            slots.extend(batch.false_images.chunks_exact_mut(size));
        }
        let wishes: Vec<Wish> = groups
            .iter()
            .flat_map(|(rows, _)| self.wishes(rows))
            .collect();
        fill(self.how, &wishes, slots)
            .map_err(|(place, reason)| reading.wrong_image(place, reason))?;
        Ok(batches)
    }

    /// The images of a batch, in the order of its vectors.
    fn wishes(&self, rows: &[Row]) -> Vec<Wish> {
        let images = if self.task == Task::Nlvr2 { 2 } else { 1 };
        let mut wishes = Vec::new();
        for image in 0..images {
            wishes.extend(rows.iter().map(|row| Wish {
                place: row.image(image),
                bytes: row.read.images[image].clone(),
                key: self.key(Purpose::Augment, row).with(image as u64),
            }));
        }
        for row in rows {
            // As an image behind the pair's own ones.
            let key = self.key(Purpose::Augment, row).with(images as u64);
            wishes.extend(row.false_image.iter().map(|(place, bytes)| Wish {
                place: *place,
                bytes: bytes.clone(),
                key,
            }));
        }
        wishes
    }

    /// A batch with everything but pixels, which are zero.
    fn texts(
        &self,
        reading: &Reading,
        rows: &[Row],
        itm_labels: &[i32],
    ) -> Result<HostBatch, DataError> {
        let pixels = |rows: usize| vec![0.0; rows * 3 * self.how.side * self.how.side];
        let second = if self.task == Task::Nlvr2 {
            rows.len()
        } else {
            0
        };
        let mut batch = HostBatch {
            pairs: rows.len(),
            text_len: self.text_len,
            image_side: self.how.side,
            images: pixels(rows.len()),
            second_images: pixels(second),
            itm_labels: itm_labels.to_vec(),
            false_images: pixels(rows.iter().filter(|r| r.false_image.is_some()).count()),
            targets: self.targets(reading, rows)?,
            ..HostBatch::default()
        };
        let words: Vec<Words> = rows
            .par_iter()
            .map(|row| self.words(row))
            .collect::<Result<_, _>>()?;
        for (row, words) in rows.iter().zip(words) {
            let pad = self.text.special().pad;
            let real = words.ids.iter().map(|id| u8::from(*id != pad));
            batch.text_mask.extend(real);
            batch.ids.extend(words.ids);
            if let Some((masked, labels)) = words.masked {
                batch.masked_ids.extend(masked);
                batch.mlm_labels.extend(labels);
            }
            let id = row.place.id;
            batch.pair_ids.push(id);
            batch
                .image_ids
                .push(id - u64::from(row.place.pair - row.read.first));
        }
        Ok(batch)
    }

    fn words(&self, row: &Row) -> Result<Words, DataError> {
        let ids = self.text.ids(&row.read.pair.text)?;
        let masks = matches!(self.task, Task::Pretrain | Task::PretrainItc);
        let masked = masks.then(|| {
            let mut masked = ids.clone();
            let key = self.key(Purpose::Mask, row);
            let labels = self.masking.mask(key, &mut masked);
            (masked, labels)
        });
        Ok(Words { ids, masked })
    }

    fn targets(&self, reading: &Reading, rows: &[Row]) -> Result<Targets, DataError> {
        match self.task {
            Task::Pretrain | Task::PretrainItc | Task::Retrieval => Ok(Targets::None),
            Task::SnliVe => Ok(Targets::Classes(self.classes(reading, rows, 3)?)),
            Task::Nlvr2 => Ok(Targets::Classes(self.classes(reading, rows, 2)?)),
            Task::Vqa => {
                let scores = rows.iter().map(|row| {
                    let pair = &row.read.pair;
                    let certain = pair.scores.is_empty();
                    let score = |n: usize| if certain { 1.0 } else { pair.scores[n] };
                    let scores = pair.labels.iter().enumerate();
                    if let Some(label) = pair.labels.iter().find(|l| **l as usize >= self.answers) {
                        let answers = self.answers;
                        let reason = format!("answer {label}, and its dataset has {answers}");
                        return Err(row.wrong(reading, reason));
                    }
                    Ok(scores.map(|(n, label)| (*label, score(n))).collect())
                });
                Ok(Targets::Scores {
                    answers: self.answers,
                    rows: scores.collect::<Result<_, _>>()?,
                })
            }
        }
    }

    fn classes(
        &self,
        reading: &Reading,
        rows: &[Row],
        classes: u32,
    ) -> Result<Vec<i32>, DataError> {
        let class = |row: &Row| match row.read.pair.labels[..] {
            [class] if class < classes => Ok(class as i32),
            _ => {
                let found = &row.read.pair.labels;
                let reason = format!("labels {found:?}, not one below {classes}");
                Err(row.wrong(reading, reason))
            }
        };
        rows.iter().map(class).collect()
    }

    fn key(&self, purpose: Purpose, row: &Row) -> Key {
        let (epoch, id) = (row.place.epoch, row.place.id);
        Key::new(self.seed, purpose).with(epoch).with(id)
    }
}

impl Row {
    fn shard(&self) -> ShardRef {
        self.place.shard_ref()
    }

    fn image(&self, image: usize) -> ImagePlace {
        ImagePlace {
            shard: self.shard(),
            sample: self.read.sample,
            image,
        }
    }

    fn wrong(&self, reading: &Reading, reason: String) -> DataError {
        let pair = self.place.pair - self.read.first;
        let reason = format!("pair {pair} has {reason}");
        reading.wrong_text(self.shard(), self.read.sample, reason)
    }
}
