//! Micro-batches side by side, as the model wants them. The first one's vectors are taken as they
//! are; a device batch of one micro-batch copies nothing.

use belfry_configs::rng::Key;
use belfry_data::{HostBatch, Targets};
use belfry_model::{
    Alone, ClassifyBatch, Company, Labels, Negatives, PretrainBatch, RetrievalBatch,
};

/// A micro-batch of a contrastive task, and the image of each of its rows.
#[derive(Clone, Debug)]
pub struct RetrievalRows {
    /// Texts and images.
    pub batch: RetrievalBatch,
    images: Vec<u64>,
}

impl RetrievalRows {
    /// One micro-batch.
    pub fn new(batch: HostBatch) -> Self {
        RetrievalRows {
            images: batch.image_ids,
            batch: RetrievalBatch {
                pairs: batch.pairs,
                text_len: batch.text_len,
                ids: batch.ids,
                text_mask: floats(&batch.text_mask).collect(),
                images: batch.images,
                masked_ids: batch.masked_ids,
                mlm_labels: batch.mlm_labels,
            },
        }
    }

    /// The rows as a group of their own.
    pub fn alone(&self) -> Alone {
        Alone::new(self.images.clone())
    }
}

/// A group with hard negatives drawn from `key`.
pub fn company(group: &mut Alone, key: Key) -> Company<'_> {
    Company {
        group,
        negatives: Negatives::Drawn(key),
    }
}

/// Pre-training's micro-batches side by side.
pub fn pretrain(batches: impl Iterator<Item = HostBatch>) -> PretrainBatch {
    let mut all = PretrainBatch::default();
    for batch in batches {
        all.micro_batches += 1;
        (all.pairs, all.text_len) = (batch.pairs, batch.text_len);
        batch.itm_images(&mut all.itm_images);
        join(&mut all.ids, batch.ids);
        join(&mut all.masked_ids, batch.masked_ids);
        join(&mut all.mlm_labels, batch.mlm_labels);
        all.text_mask.extend(floats(&batch.text_mask));
        join(&mut all.images, batch.images);
        join(&mut all.itm_labels, batch.itm_labels);
    }
    all
}

/// A classifier's micro-batches side by side; VQA's few soft scores as a row over all answers.
pub fn classify(batches: impl Iterator<Item = HostBatch>) -> ClassifyBatch {
    let mut all = ClassifyBatch {
        micro_batches: 0,
        pairs: 0,
        text_len: 0,
        ids: Vec::new(),
        text_mask: Vec::new(),
        images: Vec::new(),
        labels: Labels::Classes(Vec::new()),
    };
    for batch in batches {
        all.micro_batches += 1;
        (all.pairs, all.text_len) = (batch.pairs, batch.text_len);
        join(&mut all.ids, batch.ids);
        all.text_mask.extend(floats(&batch.text_mask));
        let second = Some(batch.second_images).filter(|images| !images.is_empty());
        let images = [Some(batch.images), second].into_iter().flatten();
        for (place, images) in images.enumerate() {
            if all.images.len() == place {
                all.images.push(Vec::new());
            }
            join(&mut all.images[place], images);
        }
        add_targets(&mut all.labels, batch.targets);
    }
    all
}

fn add_targets(labels: &mut Labels, targets: Targets) {
    match (labels, targets) {
        (_, Targets::None) => {}
        (Labels::Classes(all), Targets::Classes(classes)) => join(all, classes),
        (labels, Targets::Scores { answers, rows }) => {
            if !matches!(labels, Labels::Scores(_)) {
                *labels = Labels::Scores(Vec::new());
            }
            let Labels::Scores(all) = labels else { return };
            for row in rows {
                let first = all.len();
                all.resize(first + answers, 0.0);
                for (answer, score) in row {
                    all[first + answer as usize] = score;
                }
            }
        }
        (Labels::Scores(_), Targets::Classes(_)) => unreachable!("a task has one kind of target"),
    }
}

fn floats(mask: &[u8]) -> impl Iterator<Item = f32> + '_ {
    mask.iter().copied().map(f32::from)
}

fn join<T>(all: &mut Vec<T>, mut more: Vec<T>) {
    if all.is_empty() {
        *all = more;
    } else {
        all.append(&mut more);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(scores: Vec<(u32, f32)>, image: f32) -> HostBatch {
        HostBatch {
            pairs: 1,
            text_len: 2,
            ids: vec![0, 2],
            text_mask: vec![1, 0],
            images: vec![image; 3],
            second_images: vec![-image; 3],
            targets: Targets::Scores {
                answers: 3,
                rows: vec![scores],
            },
            ..HostBatch::default()
        }
    }

    #[test]
    fn micro_batches_stand_side_by_side() {
        let all = classify([host(vec![(2, 0.3)], 1.0), host(vec![], 2.0)].into_iter());
        assert_eq!((all.micro_batches, all.pairs, all.text_len), (2, 1, 2));
        assert_eq!(all.text_mask, [1.0, 0.0, 1.0, 0.0]);
        let first = vec![1.0, 1.0, 1.0, 2.0, 2.0, 2.0];
        let second = first.iter().map(|v| -v).collect();
        assert_eq!(all.images, [first, second]);
        let scores = vec![0.0, 0.0, 0.3, 0.0, 0.0, 0.0];
        assert_eq!(all.labels, Labels::Scores(scores));
    }
}
