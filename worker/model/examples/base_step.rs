//! How long one micro-batch of the BASE model takes, over the time of its matrix products alone.
//!
//! `cargo run --release -p belfry-model --example base_step -- [pairs] [dropout]`. The floor is
//! measured in the same run: the forward products (model_spec 16's count, scaled to 288 pixels),
//! times three for forward and backward, times two passes, at the rate of one large product.

use std::time::Instant;

use belfry_configs::rng::{Key, Purpose};
use belfry_configs::{
    Head, ImageKind, ImageTower, Manager, ManagerQuery, ManagerWeight, Model, System, Task,
    TextKind, TextTower,
};
use belfry_model::{Device, Draws, ManagerTower, PretrainBatch, Weights};
use burn::tensor::{Tensor, TensorData};

/// Multiply-accumulates of one pair's forward pass at 288 pixels: linear layers by tokens (325 of
/// 577), the rest of the count at 384 pixels taken alike.
const FORWARD_MACS: f64 = 105.5e9 * 325.0 / 577.0;
const TEXT_LEN: usize = 50;
const SIDE: usize = 288;

fn base(dropout: f32) -> Model {
    Model {
        system: System::ManagerTower,
        task: Task::Pretrain,
        manager: Manager::Aaue,
        manager_query: ManagerQuery::Fused,
        manager_weight: ManagerWeight::Vector,
        manager_noise: dropout > 0.0,
        meter_fusion: false,
        hidden: 768,
        heads: 12,
        cross_layers: 6,
        mlp_ratio: 4,
        dropout,
        text: TextTower {
            kind: TextKind::Roberta,
            layers: 12,
            managed: 6,
            hidden: 768,
            heads: 12,
            intermediate: 3072,
            vocab: 50_265,
            positions: 514,
        },
        image: ImageTower {
            kind: ImageKind::Clip,
            layers: 12,
            managed: 6,
            hidden: 768,
            heads: 12,
            size: SIDE as u32,
            patch: 16,
        },
        head: Head::default(),
    }
}

fn batch(pairs: usize) -> PretrainBatch {
    let key = Key::new(1, Purpose::Pack);
    let ids: Vec<i32> = (0..(pairs * TEXT_LEN) as u64)
        .map(|i| 3 + key.below(i, 50_000) as i32)
        .collect();
    let pixels = (pairs * 3 * SIDE * SIDE) as u64;
    let images: Vec<f32> = (0..pixels).map(|i| key.with(1).normal(i)).collect();
    let label = |(i, id): (usize, &i32)| if i % 7 == 1 { *id } else { -100 };
    PretrainBatch {
        micro_batches: 1,
        pairs,
        text_len: TEXT_LEN,
        masked_ids: ids.clone(),
        mlm_labels: ids.iter().enumerate().map(label).collect(),
        text_mask: vec![1.0; ids.len()],
        ids,
        itm_images: images.clone(),
        images,
        itm_labels: (0..pairs).map(|i| (i % 2) as i32).collect(),
    }
}

/// Multiply-accumulates per second of one large product.
fn product_rate(device: &Device) -> f64 {
    let (rows, inner, columns) = (650usize, 768usize, 3072usize);
    let matrix = |rows: usize, columns: usize| {
        let data = TensorData::new(vec![0.5f32; rows * columns], [rows, columns]);
        Tensor::<2>::from_data(data, device)
    };
    let (a, b) = (matrix(rows, inner), matrix(inner, columns));
    let mut best = f64::INFINITY;
    for _ in 0..10 {
        let start = Instant::now();
        let product = a.clone().matmul(b.clone()).into_data();
        best = best.min(start.elapsed().as_secs_f64());
        assert_eq!(product.shape().num_elements(), rows * columns);
    }
    (rows * inner * columns) as f64 / best
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let pairs: usize = arguments
        .next()
        .map_or(2, |a| a.parse().expect("pairs is a count"));
    let dropout: f32 = arguments
        .next()
        .map_or(0.1, |a| a.parse().expect("dropout is a rate"));
    let tower = ManagerTower::new(&base(dropout), TEXT_LEN).expect("BASE is a valid model");
    let start = Instant::now();
    let params = tower.table().init(1);
    println!("init      {:8.2} s", start.elapsed().as_secs_f64());
    let device = Device::flex().autodiff();
    let start = Instant::now();
    let weights = Weights::load(tower.table(), &params, &device).expect("the table fits itself");
    println!("load      {:8.2} s", start.elapsed().as_secs_f64());
    let batch = batch(pairs);
    let mut gradient = vec![0.0f32; tower.table().elements()];
    let keys = [Key::new(1, Purpose::Dropout)];
    let floor = 6.0 * pairs as f64 * FORWARD_MACS / product_rate(&Device::flex());
    for _ in 0..2 {
        let start = Instant::now();
        let draws = Draws::Keys(&keys);
        let reports = tower.pretrain_gradient(&weights, &batch, draws, &mut gradient);
        let seconds = start.elapsed().as_secs_f64();
        let report = reports.expect("the batch fits")[0];
        println!(
            "gradient  {seconds:8.2} s for {pairs} pairs, {:.2} x its products ({floor:.1} s); {report:?}",
            seconds / floor
        );
    }
}
