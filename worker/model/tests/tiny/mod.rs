//! A model small enough to be differentiated by hand, and what its tests share.

// Each test binary uses its own part of this.
#![allow(dead_code)]

use belfry_configs::rng::{Key, Purpose};
use belfry_configs::{
    Head, ImageKind, ImageTower, Manager, ManagerQuery, ManagerWeight, Model, System, Task,
    TextKind, TextTower,
};

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
