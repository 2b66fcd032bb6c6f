//! A model small enough to be differentiated by hand, and what its tests share.

// Each test binary uses its own part of this.
#![allow(dead_code)]

use belfry_configs::rng::{Key, Purpose};
use belfry_configs::{
    Head, ImageKind, ImageTower, Manager, ManagerQuery, ManagerWeight, Model, System, Task,
    TextKind, TextTower,
};
use belfry_model::{ClassifyBatch, Labels, PretrainBatch, RetrievalBatch};

/// Tokens per caption.
pub const TEXT_LEN: usize = 7;
/// Answers of VQA.
pub const ANSWERS: u32 = 5;
/// Pairs per micro-batch.
pub const PAIRS: usize = 2;

/// Unequal depths, unequal numbers of experts.
pub fn model() -> Model {
    Model {
        system: System::ManagerTower,
        task: Task::Pretrain,
        manager: Manager::Aaue,
        manager_query: ManagerQuery::Fused,
        manager_weight: ManagerWeight::Vector,
        manager_noise: true,
        meter_fusion: false,
        hidden: 16,
        heads: 2,
        cross_layers: 2,
        mlp_ratio: 2,
        dropout: 0.1,
        text: TextTower {
            kind: TextKind::Roberta,
            layers: 3,
            managed: 2,
            hidden: 16,
            heads: 4,
            intermediate: 24,
            vocab: 40,
            positions: 12,
        },
        image: ImageTower {
            kind: ImageKind::Clip,
            layers: 2,
            managed: 2,
            hidden: 16,
            heads: 2,
            size: 12,
            patch: 4,
        },
        head: Head::default(),
    }
}

/// One key per micro-batch number.
pub fn keys(numbers: &[u64]) -> Vec<Key> {
    let key = |n: &u64| Key::new(5, Purpose::Dropout).with(*n);
    numbers.iter().map(key).collect()
}

/// `rows` captions with a pad at the end of the first, and their mask.
pub fn texts(key: Key, rows: usize) -> (Vec<i32>, Vec<f32>) {
    let tokens = (rows * TEXT_LEN) as u64;
    let mut ids: Vec<i32> = (0..tokens).map(|i| 3 + key.below(i, 37) as i32).collect();
    let mut mask = vec![1.0; ids.len()];
    ids[TEXT_LEN - 1] = 1;
    mask[TEXT_LEN - 1] = 0.0;
    (ids, mask)
}

/// `rows` images.
pub fn images(key: Key, rows: usize) -> Vec<f32> {
    let pixels = (rows * 3 * 12 * 12) as u64;
    (0..pixels).map(|i| key.normal(i)).collect()
}

/// Larger weights, so that no part of a gradient is lost beside the others.
pub fn enlarge(params: &mut [f32]) {
    params
        .iter_mut()
        .for_each(|p| *p *= if p.abs() < 0.2 { 8.0 } else { 1.0 });
}

/// Largest difference over the largest value.
pub fn relative(a: &[f32], b: &[f32]) -> f32 {
    let largest = b.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    let pairs = a.iter().zip(b);
    pairs.fold(0.0f32, |max, (x, y)| max.max((x - y).abs())) / largest
}

/// Checks along the gradient of every parameter whose name contains `part` that `loss` has that
/// slope.
pub fn check_slope(
    what: &str,
    table: &belfry_model::ParamTable,
    params: &[f32],
    slope: &[f32],
    part: &str,
    loss: impl Fn(&[f32]) -> f64,
) {
    let mut direction = vec![0.0f32; slope.len()];
    for entry in table.entries().iter().filter(|e| e.name.contains(part)) {
        let range = entry.offset..entry.offset + entry.len;
        direction[range.clone()].copy_from_slice(&slope[range]);
    }
    let squares = direction.iter().map(|d| f64::from(*d).powi(2));
    let norm = squares.sum::<f64>().sqrt();
    assert!(norm > 0.0, "{what} `{part}`: no gradient");
    let at = |along: f64| {
        let moved = params.iter().zip(&direction);
        let moved = moved.map(|(p, d)| (f64::from(*p) + along * f64::from(*d) / norm) as f32);
        loss(&moved.collect::<Vec<f32>>())
    };
    let step = 5e-3 / norm.max(1.0);
    let quotient = (at(step) - at(-step)) / (2.0 * step);
    let tolerance = 1e-2 * norm + 3e-4;
    println!("{what} `{part}`: slope {quotient:.6}, gradient {norm:.6}");
    assert!(
        (quotient - norm).abs() < tolerance,
        "{what} `{part}`: {quotient} against {norm}"
    );
}

/// A head whose sizes are its own.
pub fn head() -> Head {
    Head {
        answers: ANSWERS,
        contrastive_hidden: 6,
        temperature: 0.2,
        ..Head::default()
    }
}

/// A model for a classifier task.
pub fn vqa() -> Model {
    Model {
        task: Task::Vqa,
        head: head(),
        ..model()
    }
}

/// The widths of text tower, image tower and cross-modal encoder need not be equal.
pub fn uneven(model: Model) -> Model {
    let mut model = model;
    (model.text.hidden, model.text.heads) = (12, 3);
    (model.image.hidden, model.image.heads) = (20, 5);
    model.head.hidden_scale = 2;
    model
}

/// The bits of a gradient, computed by this many threads.
pub fn with_threads(threads: usize, run: &(dyn Fn() -> Vec<f32> + Sync)) -> Vec<u32> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
    let gradient = pool.build().unwrap().install(run);
    gradient.iter().map(|g| g.to_bits()).collect()
}

/// Wide enough that every product and reduction is cut up for threads.
pub fn wide(model: Model) -> Model {
    let mut model = Model {
        hidden: 256,
        ..model
    };
    (model.text.hidden, model.image.hidden) = (256, 256);
    model.image.patch = 1;
    model
}

/// Micro-batch number `seed`.
pub fn micro_batch(seed: u64) -> PretrainBatch {
    let key = Key::new(seed, Purpose::Pack);
    let (ids, text_mask) = texts(key, PAIRS);
    let chosen = |i: &usize| i % 4 == 1;
    let label = |i: usize| if chosen(&i) { ids[i] } else { -100 };
    let true_images = images(key.with(1), PAIRS);
    // The first pair matches.
    let mut itm_images = images(key.with(2), PAIRS);
    let size = itm_images.len() / PAIRS;
    itm_images[..size].copy_from_slice(&true_images[..size]);
    PretrainBatch {
        micro_batches: 1,
        pairs: PAIRS,
        text_len: TEXT_LEN,
        mlm_labels: (0..ids.len()).map(label).collect(),
        masked_ids: (0..ids.len())
            .map(|i| if chosen(&i) { 39 } else { ids[i] })
            .collect(),
        ids,
        text_mask,
        images: true_images,
        itm_images,
        itm_labels: vec![1, 0],
    }
}

/// Micro-batches number `seed`, `seed + 1`, … for the model's task.
pub fn classify_batch(task: Task, seed: u64, micro_batches: usize) -> ClassifyBatch {
    let mut batch = ClassifyBatch {
        micro_batches,
        pairs: PAIRS,
        text_len: TEXT_LEN,
        ids: Vec::new(),
        text_mask: Vec::new(),
        images: vec![Vec::new(); if task == Task::Nlvr2 { 2 } else { 1 }],
        labels: Labels::Classes(Vec::new()),
    };
    let (mut classes, mut scores) = (Vec::new(), Vec::new());
    for micro in 0..micro_batches as u64 {
        let key = Key::new(seed + micro, Purpose::Pack);
        let (ids, mask) = texts(key, PAIRS);
        batch.ids.extend(ids);
        batch.text_mask.extend(mask);
        for (k, all) in batch.images.iter_mut().enumerate() {
            all.extend(images(key.with(k as u64), PAIRS));
        }
        classes.extend((0..PAIRS as u64).map(|i| key.with(9).below(i, 2) as i32));
        let soft = |i| [0.0, 0.3, 1.0][key.with(8).below(i, 3) as usize];
        scores.extend((0..PAIRS as u64 * u64::from(ANSWERS)).map(soft));
    }
    batch.labels = match task {
        Task::Vqa => Labels::Scores(scores),
        _ => Labels::Classes(classes),
    };
    batch
}

/// Rows `first..first + pairs` of an endless batch; with words for `pretrain_itc`.
pub fn retrieval_batch(first: usize, pairs: usize, words: bool) -> RetrievalBatch {
    let mut batch = RetrievalBatch {
        pairs,
        text_len: TEXT_LEN,
        ..RetrievalBatch::default()
    };
    for row in first..first + pairs {
        let key = Key::new(row as u64, Purpose::Pack);
        let (ids, mask) = texts(key, 1);
        if words {
            batch
                .masked_ids
                .extend(ids.iter().map(|id| if *id == ids[2] { 39 } else { *id }));
            batch
                .mlm_labels
                .extend(ids.iter().map(|id| if *id == ids[2] { *id } else { -100 }));
        }
        batch.ids.extend(ids);
        batch.text_mask.extend(mask);
        batch.images.extend(images(key.with(1), 1));
    }
    batch
}
