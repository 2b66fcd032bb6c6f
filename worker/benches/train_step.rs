//! One optimizer step of the BASE model on this machine: time, pairs per second, peak memory, and
//! the ratio to its matrix products alone; and how they grow with each size.
//!
//! `cargo bench --workspace --bench train_step -- base` measures the step of
//! `configs/pretrain-4m.toml` with micro-batches of two, `-- growth` one size at a time. A step is
//! what a worker does: weights to the device, gradient of one device batch, AdamW. The floor is the
//! time that the products of two forward passes and their backwards take at the rate of a large
//! product, which is measured between the steps. What the passes share is counted for both, as
//! frameworks compute it that know of no sharing.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use belfry_configs::ValidConfig;
use belfry_configs::rng::{Key, Purpose};
use belfry_model::size::{modules, state_bytes, total, training_activation_bytes};
use belfry_model::{Device, Draws, ManagerTower, PretrainBatch, Weights};
use belfry_worker::optimizer::AdamW;
use belfry_worker::state::{Parameters, TrainState, optimizer};
use burn::tensor::{Tensor, TensorData};
use divan::Bencher;
use divan::counter::ItemsCount;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Settings over the run file.
#[derive(Clone, Copy)]
struct Case(&'static [&'static str]);

const BASE: [Case; 1] = [Case(&[])];

/// One size at a time, off the base case.
const GROWTH: [Case; 17] = [
    Case(&["model.image.size=192"]),
    Case(&["model.image.size=384"]),
    Case(&["data.text_len=25"]),
    Case(&["data.text_len=100"]),
    Case(&["model.text.managed=2", "model.image.managed=2"]),
    Case(&["model.text.managed=12", "model.image.managed=12"]),
    Case(&["model.cross_layers=2"]),
    Case(&["model.cross_layers=4"]),
    Case(&["model.cross_layers=8"]),
    Case(&["batch.micro_batch=1"]),
    Case(&["batch.micro_batch=4"]),
    Case(&["batch.device_batch=2"]),
    Case(&["batch.recompute=blocks"]),
    Case(&["batch.recompute=blocks", "batch.micro_batch=4"]),
    Case(&["batch.recompute=blocks", "model.cross_layers=8"]),
    Case(&["model.system=bridgetower"]),
    Case(&["model.dropout=0", "model.manager_noise=false"]),
];

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [] => f.write_str("pretrain-4m"),
            settings => f.write_str(
                &settings
                    .join(" ")
                    .replace("model.", "")
                    .replace("batch.", ""),
            ),
        }
    }
}

/// What divan does not show.
#[derive(Default)]
struct Measured {
    pairs: usize,
    seconds: Vec<f64>,
    /// Multiply-accumulates of a step.
    products: f64,
    /// Per second, of a large product.
    rates: Vec<f64>,
    peak_bytes: Option<u64>,
    counted_bytes: u64,
}

static MEASURED: Mutex<BTreeMap<String, Measured>> = Mutex::new(BTreeMap::new());

#[divan::bench(args = BASE, sample_count = 3, sample_size = 1)]
fn base(bencher: Bencher, case: &Case) {
    measure(bencher, case);
}

#[divan::bench(args = GROWTH, sample_count = 2, sample_size = 1)]
fn growth(bencher: Bencher, case: &Case) {
    measure(bencher, case);
}

fn measure(bencher: Bencher, case: &Case) {
    let mut worker = Worker::new(case);
    let mut measured = Measured {
        pairs: worker.batch.rows(),
        products: worker.products(),
        counted_bytes: worker.counted_bytes(),
        ..Measured::default()
    };
    reset_peak();
    // The first step pays for fresh memory.
    worker.step();
    let device = Device::flex();
    let rates = Mutex::new(Vec::new());
    bencher
        .counter(ItemsCount::new(measured.pairs))
        .with_inputs(|| rates.lock().unwrap().push(product_rate(&device)))
        .bench_local_refs(|_| {
            let begun = Instant::now();
            worker.step();
            measured.seconds.push(begun.elapsed().as_secs_f64());
        });
    measured.rates = rates.into_inner().unwrap();
    measured.peak_bytes = peak();
    MEASURED.lock().unwrap().insert(case.to_string(), measured);
}

/// What a worker has for its step.
struct Worker {
    config: ValidConfig,
    tower: ManagerTower,
    optimizer: AdamW,
    state: Arc<TrainState>,
    gradient: Vec<f32>,
    batch: PretrainBatch,
}

impl Worker {
    fn new(case: &Case) -> Self {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/pretrain-4m.toml");
        let small = ["run.device=cpu", "batch.lanes=1", "batch.global_batch=8"];
        let own = ["batch.micro_batch=2", "batch.device_batch=1"];
        let settings = small.iter().chain(&own).chain(case.0);
        let settings: Vec<String> = settings.map(|s| (*s).to_owned()).collect();
        let config = belfry_configs::load(&file, &settings).expect("a valid case");
        let tower = ManagerTower::new(&config.model, config.data.text_len as usize).expect("fits");
        let tower = tower.recomputing(config.batch.recompute);
        let parameters = tower.table().init(1);
        let moments = vec![0.0; parameters.len()];
        Worker {
            optimizer: optimizer(&config, &tower),
            gradient: moments.clone(),
            batch: batch(&config),
            state: Arc::new(TrainState {
                step: 0,
                parameters,
                exp_avg: moments.clone(),
                exp_avg_sq: moments,
            }),
            tower,
            config,
        }
    }

    fn step(&mut self) {
        let keys: Vec<Key> = (0..self.batch.micro_batches as u64)
            .map(|i| Key::new(1, Purpose::Dropout).with(self.state.step).with(i))
            .collect();
        self.gradient.fill(0.0);
        let device = Device::flex().autodiff();
        let shared = Parameters(Arc::clone(&self.state));
        let weights = Weights::share(self.tower.table(), shared, &device).expect("the table fits");
        let draws = Draws::Keys(&keys);
        let reports =
            self.tower
                .pretrain_gradient(&weights, &self.batch, draws, &mut self.gradient);
        assert!(reports.expect("the batch fits")[0].mlm_loss > 0.0);
        drop(weights);
        let state = Arc::get_mut(&mut self.state).expect("the device let go of the weights");
        state.update(&self.optimizer, &self.gradient);
    }

    /// Multiply-accumulates of a step: two passes, each with a backward of twice its forward, and
    /// the vocabulary for the masked words.
    fn products(&self) -> f64 {
        let model = &self.config.model;
        let pairs = self.batch.rows() as u64;
        let forward = 2 * pairs * total(&modules(model, self.batch.text_len)).macs;
        let masked = self.batch.mlm_labels.iter().filter(|l| **l >= 0).count() as u64;
        let hidden = u64::from(model.hidden);
        let words = masked * hidden * (hidden + u64::from(model.text.vocab));
        3.0 * (forward + words) as f64
    }

    /// What `belfry model` says of the memory.
    fn counted_bytes(&self) -> u64 {
        let state = state_bytes(self.tower.table().elements() as u64);
        let state: u64 = state.iter().map(|(_, bytes)| bytes).sum();
        let pairs = self.batch.rows() as u64;
        state + training_activation_bytes(&self.config.model, self.batch.text_len, pairs)
    }
}

/// Random words and pixels; half of each micro-batch has a false image.
fn batch(config: &ValidConfig) -> PretrainBatch {
    let key = Key::new(1, Purpose::Pack);
    let (pairs, text_len) = (
        config.batch.micro_batch as usize,
        config.data.text_len as usize,
    );
    let micro_batches = config.batch.device_batch as usize;
    let rows = micro_batches * pairs;
    let vocab = u64::from(config.model.text.vocab);
    let ids: Vec<i32> = (0..(rows * text_len) as u64)
        .map(|i| 3 + key.below(i, vocab - 3) as i32)
        .collect();
    let size = 3 * (config.model.image.size as usize).pow(2);
    let noise = |name: &str| -> Vec<f32> {
        let mut pixels = vec![0.0; rows * size];
        belfry_model::fill_normal(key.with_name(name), 0, 1.0, &mut pixels);
        pixels
    };
    let images = noise("images");
    let mut itm_images = noise("false images");
    let itm_labels: Vec<i32> = (0..rows)
        .map(|row| i32::from(row % pairs < pairs / 2))
        .collect();
    for (row, label) in itm_labels.iter().enumerate() {
        if *label == 1 {
            let image = row * size..(row + 1) * size;
            itm_images[image.clone()].copy_from_slice(&images[image]);
        }
    }
    let label = |(i, id): (usize, &i32)| if i % 7 == 1 { *id } else { -100 };
    PretrainBatch {
        micro_batches,
        pairs,
        text_len,
        masked_ids: ids.clone(),
        mlm_labels: ids.iter().enumerate().map(label).collect(),
        text_mask: vec![1.0; ids.len()],
        ids,
        images,
        itm_images,
        itm_labels,
    }
}

/// Multiply-accumulates per second of one large product, with all the threads there are.
fn product_rate(device: &Device) -> f64 {
    const SIDE: usize = 1024;
    let matrix = || {
        let data = TensorData::new(vec![0.5f32; SIDE * SIDE], [SIDE, SIDE]);
        Tensor::<2>::from_data(data, device)
    };
    let (a, b) = (matrix(), matrix());
    let mut best = f64::INFINITY;
    for _ in 0..10 {
        let begun = Instant::now();
        let product = a.clone().matmul(b.clone()).into_data();
        best = best.min(begun.elapsed().as_secs_f64());
        assert_eq!(product.shape().num_elements(), SIDE * SIDE);
    }
    (SIDE * SIDE * SIDE) as f64 / best
}

/// Forgets the process's peak memory, where the system can.
fn reset_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// The process's peak memory in bytes since the last reset, where the system tells.
fn peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(1024 * kilobytes)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn main() {
    belfry_worker::memory::keep_freed();
    divan::main();
    let measured = MEASURED.lock().unwrap();
    if measured.is_empty() {
        return;
    }
    println!("\n{} threads", rayon::current_num_threads());
    println!(
        "{:<36} {:>8} {:>9} {:>9} {:>12} {:>10} {:>11}",
        "case", "s/step", "pairs/s", "TFLOP/s", "x products", "peak GB", "counted GB"
    );
    for (case, m) in measured.iter() {
        let (seconds, rate) = (median(&m.seconds), median(&m.rates));
        println!(
            "{case:<36} {seconds:>8.2} {:>9.3} {:>9.3} {:>12.2} {:>10} {:>11.2}",
            m.pairs as f64 / seconds,
            2.0 * m.products / seconds / 1e12,
            seconds / (m.products / rate),
            m.peak_bytes
                .map_or("unknown".into(), |b| format!("{:.2}", b as f64 / 1e9)),
            m.counted_bytes as f64 / 1e9,
        );
    }
}
