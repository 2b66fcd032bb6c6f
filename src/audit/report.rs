//! What an audit found, for people and for programs.

use std::fmt;

use belfry_configs::ValidConfig;
use belfry_data::{EpochReport, NAMED_MAX, Replay, ShardRef, Tail};
use belfry_proto::Schedule;
use serde_json::{Value, json};
use shard_tools::manifest::Manifest;
use shard_tools::store::Root;
use shard_tools::verify;

/// Faults that are told; more are counted.
const FAULTS_MAX: usize = 1000;

/// What a fault is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Another dataset than the run's.
    Dataset,
    /// Receipts that are missing, or files that hold none.
    Ledger,
    /// A receipt that contradicts the run.
    Step,
    /// A lane that trained other pairs.
    Lane,
    /// A pair that was not trained exactly once.
    Pair,
}

impl Fault {
    fn name(self) -> &'static str {
        match self {
            Fault::Dataset => "dataset",
            Fault::Ledger => "ledger",
            Fault::Step => "step",
            Fault::Lane => "lane",
            Fault::Pair => "pair",
        }
    }
}

/// A shard that the run did without.
struct Lost {
    name: String,
    from_step: u64,
    pairs: u64,
}

/// See the module.
pub struct Report {
    root: String,
    paths: Vec<String>,
    run_lanes: u32,
    steps_total: u64,
    /// Steps that the run has committed for certain.
    pub steps: u64,
    /// Whether it has trained all its steps.
    pub finished: bool,
    /// Receipts compared.
    pub receipts: u64,
    /// Digests of lanes compared.
    pub lanes: u64,
    /// Faults in all.
    pub found: u64,
    /// The first of them.
    pub faults: Vec<(Fault, String)>,
    epochs: Vec<EpochReport>,
    open: Vec<EpochReport>,
    lost: Vec<Lost>,
    tails: Vec<Tail>,
    tail_pairs: Vec<String>,
}

impl Report {
    /// Nothing found yet about the run below `root`.
    pub fn new(root: &Root, config: &ValidConfig) -> Self {
        Report {
            root: root.to_string(),
            paths: config.data.train.paths().map(str::to_owned).collect(),
            run_lanes: config.batch.lanes,
            steps_total: config.run.steps,
            steps: 0,
            finished: false,
            receipts: 0,
            lanes: 0,
            found: 0,
            faults: Vec::new(),
            epochs: Vec::new(),
            open: Vec::new(),
            lost: Vec::new(),
            tails: Vec::new(),
            tail_pairs: Vec::new(),
        }
    }

    /// Something is not as it must be.
    pub fn fault(&mut self, about: Fault, text: String) {
        self.found += 1;
        if self.faults.len() < FAULTS_MAX {
            self.faults.push((about, text));
        }
    }

    /// Whether everything is as it must be.
    pub fn proved(&self) -> bool {
        self.found == 0
    }

    /// Epochs that all lanes have left.
    pub fn epochs(&mut self, closed: Vec<EpochReport>) {
        self.epochs.extend(closed);
    }

    /// Shards that the run did without.
    pub fn quarantine(&mut self, schedule: &Schedule, replay: &Replay) {
        for shard in schedule.all() {
            let place = ShardRef {
                dataset: shard.dataset,
                shard: shard.shard,
            };
            self.lost.push(Lost {
                name: format!("{}/{}", self.paths[shard.dataset as usize], shard.file),
                from_step: shard.from_step,
                pairs: replay.replaced().get(&place).copied().unwrap_or(0),
            });
        }
    }

    /// Names pairs that were not trained exactly once, by key and caption where their index is.
    pub async fn name_pairs(&mut self, replay: &Replay, paths: &[String], manifests: &[Manifest]) {
        let inexact = self.epochs.iter().filter(|e| !e.exact());
        for epoch in inexact.cloned().collect::<Vec<_>>() {
            let lists = [
                (epoch.missing, &epoch.missing_named, "not trained"),
                (epoch.repeated, &epoch.repeated_named, "trained again"),
            ];
            for (count, named, what) in lists {
                let at = format!("epoch {}: {what}", epoch.epoch);
                for id in named {
                    let Some((place, pair)) = replay.sequence().describe(*id) else {
                        continue;
                    };
                    let path = &paths[place.dataset as usize];
                    let entry = &manifests[place.dataset as usize].shards[place.shard as usize];
                    let name = format!("{path}/{}, pair {pair}", entry.file);
                    let key = key_of(path, entry, pair).await;
                    self.fault(Fault::Pair, format!("{at}: {name}{key} (id {id})"));
                }
                let more = count.saturating_sub(NAMED_MAX as u64);
                if more > 0 {
                    let path = &paths[epoch.dataset as usize];
                    self.fault(Fault::Pair, format!("{at}: {more} more pairs of {path}"));
                }
            }
        }
    }

    /// What the last epochs have not reached.
    pub fn finish(&mut self, replay: &Replay, list_tail: bool) {
        let sequence = replay.sequence();
        self.open = replay.unfinished().cloned().collect();
        self.tails = sequence.tails(self.steps);
        if !list_tail {
            return;
        }
        for tail in &self.tails {
            for position in tail.positions.clone() {
                let pair = sequence.pair(tail.dataset, tail.lane, position);
                let shard = sequence.datasets()[tail.dataset as usize].shard_name(pair.shard);
                let text = format!("{shard}, pair {} (id {})", pair.pair, pair.id);
                self.tail_pairs.push(text);
            }
        }
    }

    fn tail_of(&self, dataset: usize) -> u64 {
        let tails = self.tails.iter().filter(|t| t.dataset as usize == dataset);
        tails.map(|t| t.positions.end - t.positions.start).sum()
    }

    /// One object that says all.
    pub fn json(&self) -> Value {
        let faults = self.faults.iter();
        let faults = faults.map(|(about, text)| json!({"about": about.name(), "text": text}));
        let epoch = |e: &EpochReport| {
            json!({
                "dataset": self.paths[e.dataset as usize], "epoch": e.epoch, "pairs": e.pairs,
                "trained": e.trained, "substituted": e.substituted, "missing": e.missing,
                "repeated": e.repeated,
            })
        };
        let lost = self
            .lost
            .iter()
            .map(|l| json!({"shard": l.name, "from_step": l.from_step, "substituted": l.pairs}));
        let tails = self.tails.iter().map(|t| {
            json!({
                "dataset": self.paths[t.dataset as usize], "lane": t.lane,
                "positions": [t.positions.start, t.positions.end],
            })
        });
        json!({
            "run": self.root, "proved": self.proved(), "finished": self.finished,
            "steps": self.steps, "steps_total": self.steps_total, "receipts": self.receipts,
            "lanes": self.lanes, "faults_found": self.found,
            "faults": faults.collect::<Vec<_>>(),
            "epochs": self.epochs.iter().map(epoch).collect::<Vec<_>>(),
            "open_epochs": self.open.iter().map(epoch).collect::<Vec<_>>(),
            "quarantine": lost.collect::<Vec<_>>(),
            "unused_tail": tails.collect::<Vec<_>>(),
            "unused_tail_pairs": self.tail_pairs,
        })
    }
}

/// Key and caption of a shard's pair; empty where the index cannot be read.
async fn key_of(path: &str, entry: &shard_tools::manifest::ShardEntry, pair: u32) -> String {
    let Ok(root) = Root::existing(path) else {
        return String::new();
    };
    let Ok(index) = verify::index(&root, entry).await else {
        return String::new();
    };
    let mut left = pair;
    for sample in &index.samples {
        if left < sample.pairs {
            return format!(" (key {}, caption {left})", sample.key);
        }
        left -= sample.pairs;
    }
    String::new()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (done, total) = (self.steps, self.steps_total);
        writeln!(
            f,
            "run         {}: {done} of {total} steps committed",
            self.root
        )?;
        writeln!(
            f,
            "checked     {} receipts, {} digests of lanes ({} a step)",
            self.receipts, self.lanes, self.run_lanes
        )?;
        for (dataset, path) in self.paths.iter().enumerate() {
            self.write_dataset(f, dataset, path)?;
        }
        for lost in &self.lost {
            writeln!(
                f,
                "quarantine  {} from step {} on: others stood for {} pairs",
                lost.name, lost.from_step, lost.pairs
            )?;
        }
        for text in &self.tail_pairs {
            writeln!(f, "tail        {text}")?;
        }
        for (about, text) in &self.faults {
            writeln!(f, "{:<11} {text}", about.name().to_uppercase())?;
        }
        let untold = self.found - self.faults.len() as u64;
        if untold > 0 {
            writeln!(f, "and {untold} more")?;
        }
        match self.proved() {
            true => writeln!(f, "proved: every completed epoch is exact"),
            false => writeln!(f, "NOT PROVED: {} faults", self.found),
        }
    }
}

impl Report {
    fn write_dataset(&self, f: &mut fmt::Formatter<'_>, number: usize, path: &str) -> fmt::Result {
        let of = |e: &&EpochReport| e.dataset as usize == number;
        let closed: Vec<&EpochReport> = self.epochs.iter().filter(of).collect();
        let exact = closed.iter().filter(|e| e.exact()).count();
        let pairs = closed.first().map_or(0, |e| e.pairs);
        match closed.len() {
            0 => writeln!(f, "dataset     {path}: no epoch is complete")?,
            all => writeln!(
                f,
                "dataset     {path}: {exact} of {all} completed epochs exact: each of {pairs} pairs \
                 trained once, or under quarantine"
            )?,
        }
        for epoch in closed.iter().filter(|e| !e.exact()) {
            writeln!(
                f,
                "            epoch {}: {} of {} trained, {} not, {} again",
                epoch.epoch, epoch.trained, epoch.pairs, epoch.missing, epoch.repeated
            )?;
        }
        let rest = self.tail_of(number);
        let what = match self.finished {
            true => "unused tail of",
            false => "not trained yet:",
        };
        if rest > 0 {
            writeln!(f, "            {what} {rest} pairs of the last epoch")?;
        }
        Ok(())
    }
}
