//! `belfry bench order`: what the order of pairs costs, and how well it shuffles, beside a uniform
//! shuffle of the same data.
//!
//! Reads manifests only, or makes one up of any size.

use std::collections::BTreeSet;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use belfry_configs::ValidConfig;
use belfry_configs::rng::{Key, Purpose};
use belfry_data::{PairRef, Quarantine, Sequence, contents_of};
use clap::Args;
use shard_tools::manifest::{Manifest, ShardEntry};
use shard_tools::store::Root;
use shard_tools::verify;

use super::Case;
use super::table::{Report, seconds};
use crate::synthetic::Synthetic;

/// Arguments of `belfry bench order`.
#[derive(Args)]
pub struct OrderArguments {
    #[command(flatten)]
    case: Case,
    /// Made-up datasets in place of data.train, with so many samples, pairs and shards together:
    /// 4000000,9000000,4000 is the paper's pre-training.
    #[arg(long, value_name = "SAMPLES,PAIRS,SHARDS")]
    synthetic: Option<Synthetic>,
    /// Window sizes to compare, in shards.
    #[arg(
        long,
        value_name = "K,K,…",
        value_delimiter = ',',
        default_value = "1,2,4,8,16"
    )]
    windows: Vec<u32>,
    /// Steps of all lanes that are looked at, drawn from the first epoch.
    #[arg(long, value_name = "N", default_value_t = 16)]
    steps: u64,
}

/// Measures and prints.
pub async fn run(arguments: OrderArguments) -> anyhow::Result<()> {
    ensure!(arguments.steps > 0, "--steps: must be at least 1");
    let config = arguments.case.load(&[])?;
    let count = config.data.train.0.len() as u64;
    let mut files = Vec::new();
    let mut of_manifests = 0.0;
    let mut manifests = Vec::new();
    for path in config.data.train.paths() {
        let begun = Instant::now();
        match arguments.synthetic {
            Some(made_up) => {
                ensure!(
                    made_up.shards >= count,
                    "--synthetic: fewer shards than datasets"
                );
                let manifest = made_up.manifest(count, contents_of(config.model.task));
                files.push(serde_json::to_vec(&manifest)?);
            }
            None => {
                let root = Root::existing(path).context("data.train")?;
                manifests.push(verify::manifest(&root).await.context("data.train")?);
                of_manifests += begun.elapsed().as_secs_f64();
            }
        }
    }
    // Memory is measured around what a worker does: parse, open, plan a step of all lanes.
    let before = resident_bytes();
    let begun = Instant::now();
    for bytes in &files {
        manifests.push(Manifest::parse(bytes, "synthetic")?);
    }
    of_manifests += begun.elapsed().as_secs_f64();
    let begun = Instant::now();
    let sequence = Sequence::open(&config, manifests.clone())?;
    let opened = begun.elapsed().as_secs_f64();
    let begun = Instant::now();
    let first = step(&sequence, 0);
    let planned = begun.elapsed().as_secs_f64();
    let resident = resident_bytes()
        .zip(before)
        .map(|(now, before)| now.saturating_sub(before));
    let cost = Cost {
        of_manifests,
        opened,
        planned,
        resident,
        counted: sequence.bytes(),
        pairs: sequence.ids(count as u32 - 1).end,
        first: first.len(),
        seeks: seeks(&sequence),
        walks: walks(&sequence),
    };
    let mut report = cost.report(&config, &manifests);
    for window in &arguments.windows {
        let setting = format!("data.window_shards={window}");
        let config = arguments.case.load(&[setting])?;
        let sequence = Sequence::open(&config, manifests.clone())?;
        let shuffle = Shuffle::of(&sequence, &manifests, arguments.steps);
        shuffle.print(&mut report, *window);
    }
    report.print();
    Ok(())
}

fn step(sequence: &Sequence, step: u64) -> Vec<PairRef> {
    let lanes = 0..sequence.lanes();
    lanes
        .flat_map(|lane| sequence.pairs(step, lane, &Quarantine::new()))
        .collect()
}

/// Pairs per second when lanes and steps are asked for at random.
fn seeks(sequence: &Sequence) -> f64 {
    let key = Key::new(1, Purpose::Mixture);
    let per_step = sequence.pairs_per_lane_step();
    let asked = 2000;
    let begun = Instant::now();
    for number in 0..asked {
        let step = key.below(2 * number, 1_000_000);
        let lane = key.below(2 * number + 1, sequence.lanes().into()) as u32;
        std::hint::black_box(sequence.pairs(step, lane, &Quarantine::new()));
    }
    (asked * per_step) as f64 / begun.elapsed().as_secs_f64()
}

/// The same when one lane is walked.
fn walks(sequence: &Sequence) -> f64 {
    let per_step = sequence.pairs_per_lane_step();
    let steps = 2000;
    let begun = Instant::now();
    for step in 0..steps {
        std::hint::black_box(sequence.pairs(step, 0, &Quarantine::new()));
    }
    (steps * per_step) as f64 / begun.elapsed().as_secs_f64()
}

fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    // Pages of other sizes are rounded to by no system that this is run on.
    Some(pages * 4096)
}

/// What planning costs.
struct Cost {
    of_manifests: f64,
    opened: f64,
    planned: f64,
    resident: Option<u64>,
    counted: usize,
    pairs: u64,
    /// Pairs of a step.
    first: usize,
    seeks: f64,
    walks: f64,
}

impl Cost {
    fn report(&self, config: &ValidConfig, manifests: &[Manifest]) -> Report {
        let shards: usize = manifests.iter().map(|m| m.shards.len()).sum();
        let samples: u64 = manifests.iter().map(|m| m.samples).sum();
        let (lanes, rounds) = (config.batch.lanes, config.data.rounds);
        let mut report = Report::new(
            "order",
            format!(
                "bench order: {samples} samples, {} pairs, {shards} shards in {} datasets; {lanes} \
                 lanes, {rounds} rounds",
                self.pairs,
                manifests.len()
            ),
        );
        report.note(
            "opening checks the manifests and counts rounds; planning names all pairs of the first \
             step of all lanes; what is said of windows is of steps drawn from the first epoch",
        );
        let plan = self.of_manifests + self.opened + self.planned;
        let thousands = self.pairs as f64 / 1e3;
        report.row("read the manifests", seconds(self.of_manifests), "", None);
        report.row("open the order", seconds(self.opened), "", None);
        report.row("plan the first step", seconds(self.planned), "", None);
        report.row(
            "until the first step",
            seconds(plan),
            "2 s allowed",
            plan / 2.0,
        );
        let counted = self.counted as f64 / thousands;
        let allowed = "1024 B allowed";
        let per = |bytes: f64| format!("{bytes:.0} B per 1000 pairs");
        report.row(
            "the order's tables",
            per(counted),
            allowed,
            counted / 1024.0,
        );
        if let Some(resident) = self.resident {
            let resident = resident as f64 / thousands;
            report.row(
                "memory, with manifests",
                per(resident),
                allowed,
                resident / 1024.0,
            );
            report.json("resident_bytes_per_thousand_pairs", resident);
        }
        let rate = |pairs: f64| format!("{:.2} M pairs/s", pairs / 1e6);
        let walks = rate(self.walks) + ", one lane walked";
        report.row(
            "seeks at random",
            rate(self.seeks),
            walks,
            self.seeks / self.walks,
        );
        report.json("pairs", self.pairs);
        report.json("shards", shards as u64);
        report.json("pairs_per_step", self.first as u64);
        report.json("plan_seconds", plan);
        report.json("order_bytes_per_thousand_pairs", counted);
        report.json("seeks_per_second", self.seeks);
        report
    }
}

/// How far apart neighbours are.
struct Shuffle {
    /// Share of a lane's neighbours that come from one shard, and what a uniform shuffle gives.
    neighbours: [f64; 2],
    /// Correlation of neighbours' shards, as numbers in the manifests; a uniform shuffle has 0.
    correlation: f64,
    /// Distinct shards of a global batch.
    shards: [f64; 2],
    /// Pairs of a global batch whose image stands in it before.
    images: [f64; 2],
}

impl Shuffle {
    fn of(sequence: &Sequence, manifests: &[Manifest], steps: u64) -> Self {
        let pairs: u64 = manifests.iter().map(|m| m.pairs).sum();
        let epoch = pairs / (u64::from(sequence.lanes()) * sequence.pairs_per_lane_step());
        // At random: equal distances could all fall on the ends of rounds, where windows are short.
        let key = Key::new(0, Purpose::Mixture);
        let entries: Vec<&ShardEntry> = manifests.iter().flat_map(|m| &m.shards).collect();
        let share = |shard: &&ShardEntry| f64::from(shard.pairs) / pairs as f64;
        let (mut batch, mut neighbours) = (0, Neighbours::default());
        let (mut shards, mut images) = (0, 0);
        for number in 0..steps {
            let all = step(sequence, key.below(number, epoch.max(1)));
            batch = all.len();
            let per_lane = sequence.pairs_per_lane_step() as usize;
            all.chunks(per_lane)
                .for_each(|lane| neighbours.add(lane, manifests));
            let distinct = |key: fn(&PairRef, &[Manifest]) -> (usize, u64)| {
                all.iter()
                    .map(|pair| key(pair, manifests))
                    .collect::<BTreeSet<_>>()
                    .len()
            };
            shards += distinct(|pair, manifests| (shard_number(pair, manifests), 0));
            images += all.len() - distinct(image_number);
        }
        let met = |shard: &&ShardEntry| 1.0 - (1.0 - share(shard)).powi(batch as i32);
        let squares = entries.iter().map(|shard| share(shard).powi(2));
        let samples: u64 = manifests.iter().map(|m| m.samples).sum();
        let captions = pairs as f64 / samples as f64;
        let (batch, steps) = (batch as f64, steps as f64);
        // Two places of a batch, and another pair of the same image.
        let again = batch * (batch - 1.0) / 2.0 * (captions - 1.0) / (pairs as f64 - 1.0);
        Shuffle {
            neighbours: [neighbours.same(), squares.sum()],
            correlation: neighbours.correlation(),
            shards: [shards as f64 / steps, entries.iter().map(met).sum()],
            images: [images as f64 / steps, again],
        }
    }

    fn print(&self, report: &mut Report, window: u32) {
        let ratio = |[found, ideal]: [f64; 2]| (ideal > 0.0).then_some(found / ideal);
        let percent = |share: f64| format!("{:.3} %", share * 100.0);
        let name = |what: &str| format!("window {window}: {what}");
        let [found, ideal] = self.neighbours.map(percent);
        let uniform = |ideal: String| ideal + ", uniform shuffle";
        let ratios = ratio(self.neighbours);
        report.row(
            &name("neighbours of one shard"),
            found,
            uniform(ideal),
            ratios,
        );
        let correlation = format!("{:.3}", self.correlation);
        let zero = uniform("0".into());
        report.row(&name("correlation of neighbours"), correlation, zero, None);
        let [found, ideal] = self.shards.map(|shards| format!("{shards:.0}"));
        let ratios = ratio(self.shards);
        report.row(&name("shards in a batch"), found, uniform(ideal), ratios);
        let [found, ideal] = self.images.map(|images| format!("{images:.2}"));
        let ratios = ratio(self.images);
        report.row(
            &name("images again in a batch"),
            found,
            uniform(ideal),
            ratios,
        );
        let key = |what: &str| format!("window_{window}_{what}");
        report.json(&key("same_shard"), self.neighbours[0]);
        report.json(&key("correlation"), self.correlation);
        report.json(&key("shards"), self.shards[0]);
        report.json(&key("images_again"), self.images[0]);
    }
}

/// Number of a pair's shard over all datasets.
fn shard_number(pair: &PairRef, manifests: &[Manifest]) -> usize {
    let before = manifests[..pair.dataset as usize]
        .iter()
        .map(|m| m.shards.len());
    before.sum::<usize>() + pair.shard as usize
}

/// Shard and image of a pair, if a shard's images have equally many pairs.
fn image_number(pair: &PairRef, manifests: &[Manifest]) -> (usize, u64) {
    let entry = &manifests[pair.dataset as usize].shards[pair.shard as usize];
    let (samples, pairs) = (u64::from(entry.samples), u64::from(entry.pairs));
    (
        shard_number(pair, manifests),
        u64::from(pair.pair) * samples / pairs,
    )
}

/// Sums over neighbours' shards.
#[derive(Default)]
struct Neighbours {
    count: f64,
    same: f64,
    sum: [f64; 2],
    squares: [f64; 2],
    product: f64,
}

impl Neighbours {
    fn add(&mut self, lane: &[PairRef], manifests: &[Manifest]) {
        for pair in lane.windows(2) {
            let [a, b] = [&pair[0], &pair[1]].map(|p| shard_number(p, manifests) as f64);
            self.count += 1.0;
            self.same += f64::from(u8::from(a == b));
            for (place, value) in [a, b].into_iter().enumerate() {
                self.sum[place] += value;
                self.squares[place] += value * value;
            }
            self.product += a * b;
        }
    }

    fn same(&self) -> f64 {
        self.same / self.count.max(1.0)
    }

    fn correlation(&self) -> f64 {
        let n = self.count.max(1.0);
        let mean = self.sum.map(|sum| sum / n);
        let spread = |place: usize| (self.squares[place] / n - mean[place].powi(2)).max(0.0);
        let spread = (spread(0) * spread(1)).sqrt();
        if spread > 0.0 {
            (self.product / n - mean[0] * mean[1]) / spread
        } else {
            0.0
        }
    }
}
