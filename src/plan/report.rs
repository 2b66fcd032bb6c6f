//! The plan as a page that one shows to the colleague who pays for the machines.

use std::fmt::Write as _;

use belfry_configs::{Transport, Wire};
use shard_tools::looks::thousands;

use super::{Crew, GIGABITS, Plan};
use crate::bench::table::{gigabytes, seconds};

/// Divisors of the lanes that are named.
const EVEN_MAX: usize = 16;

impl Plan {
    /// The report, no line longer than 100 columns.
    pub(super) fn text(&self) -> String {
        let config = &self.config;
        let hash = &config.sha256()[..12];
        let mut text = format!("plan of {} (configuration {hash})\n", config.run.name);
        self.batch(&mut text);
        self.epochs(&mut text);
        self.model(&mut text);
        self.memory_and_network(&mut text);
        self.time(&mut text);
        self.checkpoints(&mut text);
        self.control(&mut text);
        text
    }

    fn batch(&self, text: &mut String) {
        let (config, batch) = (&self.config, &self.config.batch);
        let per_lane = config.micro_batches_per_lane();
        head(text, "batch");
        line(
            text,
            "a step",
            &format!(
                "{} pairs = {} lanes x {per_lane} micro-batches x {} pairs, at every number of workers",
                thousands(batch.global_batch.into()),
                batch.lanes,
                batch.micro_batch
            ),
        );
        let passes = per_lane / batch.device_batch;
        let pairs = batch.device_batch * batch.micro_batch;
        line(
            text,
            "a lane",
            &format!(
                "{} of {pairs} pairs (device_batch {})",
                counted(passes.into(), "forward pass", "es"),
                batch.device_batch
            ),
        );
        let even: Vec<String> = divisors(batch.lanes).iter().map(u32::to_string).collect();
        line(
            text,
            "even",
            &format!(
                "workers that share {} lanes evenly: {}",
                batch.lanes,
                even.join(" ")
            ),
        );
    }

    fn epochs(&self, text: &mut String) {
        let (steps, batch) = (
            self.config.run.steps,
            u64::from(self.config.batch.global_batch),
        );
        head(text, "data");
        let trained = thousands(steps * batch);
        line(
            text,
            "steps",
            &format!("{}, {trained} pairs in all", thousands(steps)),
        );
        let evaluations = thousands(self.evaluations());
        line(
            text,
            "evaluations",
            &format!("{evaluations}, the first state's and the last's included"),
        );
        let data = match &self.data {
            Ok(data) => data,
            Err(why) => {
                wrapped(
                    text,
                    "epochs",
                    &format!("unknown, and so is the disk: {why}"),
                );
                let how = "pack the data first, or name its size: --synthetic SAMPLES,PAIRS,SHARDS";
                return line(text, "", how);
            }
        };
        for dataset in &data.datasets {
            let size = gigabytes(dataset.bytes as f64);
            let (pairs, shards) = (thousands(dataset.pairs), thousands(dataset.shards));
            let what = format!(
                "{:.2} of {pairs} pairs in {shards} shards, {size}",
                dataset.epochs
            );
            line(text, "epochs", &what);
            wrapped(text, "", &format!("{} ({})", dataset.path, data.origin));
        }
        if let [only] = &data.datasets[..] {
            let ends = |epochs: f64| (epochs * only.pairs as f64 / batch as f64).floor() as u64;
            let (before, after) = (only.epochs.floor(), only.epochs.ceil());
            if before != after {
                let step = |epochs| format!("{} ({epochs})", thousands(ends(epochs)));
                let whole = format!("{} or {} steps", step(before.max(1.0)), step(after));
                line(text, "", &format!("whole epochs are {whole}"));
            }
        }
        let tail = thousands(data.unused_tail_pairs);
        line(
            text,
            "unused tail",
            &format!("{tail} pairs of the last epoch begun; the ledger lists them"),
        );
        self.disk(text);
    }

    fn disk(&self, text: &mut String) {
        let Ok(data) = &self.data else { return };
        let Some(disk) = &data.disk else {
            return line(
                text,
                "local disk",
                "none: shards of a folder are read in place",
            );
        };
        let window = self.config.data.window_shards;
        line(
            text,
            "local disk",
            &format!(
                "{} in {} shards of a host's cache, with {} (windows of {window} shards)",
                gigabytes(disk.bytes as f64),
                thousands(disk.shards),
                counted(disk.workers.into(), "worker", "s")
            ),
        );
        let free = disk
            .free_bytes
            .map_or("unknown".into(), |b| gigabytes(b as f64));
        let cache = gigabytes(disk.cache_bytes_max as f64);
        let verdict = if disk.bytes > disk.cache_bytes_max {
            "TOO SMALL"
        } else {
            "fits"
        };
        let here = match disk.free_bytes {
            Some(free) if free < disk.bytes => "; too little for it",
            _ => "",
        };
        let limits =
            format!("data.cache_bytes_max {cache}: {verdict}; free on this machine {free}{here}");
        line(text, "", &limits);
        for refusal in &data.refusals {
            wrapped(text, "REFUSED", refusal);
        }
    }

    fn model(&self, text: &mut String) {
        let footprint = &self.footprint;
        head(text, "model");
        line(text, "parameters", &thousands(footprint.parameters));
        line(
            text,
            "gradient",
            &gigabytes(footprint.gradient_bytes as f64),
        );
        let state = gigabytes(footprint.state_bytes as f64);
        line(
            text,
            "state",
            &format!("{state}: parameters and both moments, on every worker"),
        );
        let memory = gigabytes(footprint.worker_bytes as f64);
        let ahead = gigabytes(self.config.data.prefetch_bytes_max as f64);
        line(
            text,
            "a worker",
            &format!("about {memory} at the peak of a step (belfry model says of what),"),
        );
        line(
            text,
            "",
            &format!("up to {ahead} of batches made ahead, and tree nodes as below"),
        );
    }

    fn memory_and_network(&self, text: &mut String) {
        head(
            text,
            "lanes and the sum of gradients, for each number of workers",
        );
        let heads = [
            "workers", "spares", "lanes", "used", "nodes", "memory", "sends", "receives",
        ];
        let seconds_at = GIGABITS.map(|g| format!("{g} Gb/s"));
        let heads = heads.map(str::to_owned).into_iter().chain(seconds_at);
        let mut rows = vec![heads.collect::<Vec<_>>()];
        for crew in &self.crews {
            let [fewest, most] = crew.lanes;
            let lanes = if fewest == most {
                format!("{most}")
            } else {
                format!("{fewest}-{most}")
            };
            let mut row = vec![
                crew.workers.to_string(),
                crew.spares.to_string(),
                lanes,
                percent(crew.utilisation),
                crew.nodes.to_string(),
                gigabytes(crew.node_bytes as f64),
                gigabytes(crew.exchange[0] as f64),
                gigabytes(crew.exchange[1] as f64),
            ];
            row.extend(GIGABITS.map(|g| some_seconds(crew.exchange_seconds(g))));
            rows.push(row);
        }
        table(text, &rows);
        let collective = &self.config.collective;
        let how = match (collective.transport, collective.wire) {
            (Transport::Tcp, _) => "the busiest worker, over TCP along the lane tree",
            (Transport::Nccl, _) => "the busiest worker, over NCCL along the lane tree",
            (Transport::NcclRing, Wire::F32) => "every worker, NCCL's ring in f32",
            (Transport::NcclRing, Wire::Bf16) => "every worker, NCCL's ring in bf16",
        };
        wrapped(
            text,
            "",
            &format!(
                "used: share of the workers' time that computes; nodes: tree nodes of the worker with the \
             most; bytes and seconds are of {how}, per step, one worker a host"
            ),
        );
        let fewest = self.config.cluster.min_workers;
        for crew in self.crews.iter().filter(|crew| crew.workers < fewest) {
            let wait = format!(
                "{} are fewer than cluster.min_workers = {fewest}",
                crew.workers
            );
            line(text, "", &format!("{wait}: the run waits"));
        }
    }

    fn time(&self, text: &mut String) {
        head(text, "time");
        let lane = format!("{} ({})", seconds(self.lane.seconds), self.lane.origin);
        wrapped(text, "a lane", &lane);
        let mut heads = vec![
            "workers", "compute", "exchange", "a step", "pairs/s", "the run",
        ];
        heads.extend(["worker-hours", "efficiency"]);
        if self.price_worker.is_some() {
            heads.push("dollars");
        }
        let mut rows = vec![heads.into_iter().map(str::to_owned).collect::<Vec<_>>()];
        for crew in &self.crews {
            let step = self.step_seconds(crew);
            let exchange = crew.exchange_seconds(self.bandwidth);
            let hours = self.worker_hours(crew);
            let mut row = vec![
                crew.workers.to_string(),
                seconds(step - exchange),
                some_seconds(exchange),
                seconds(step),
                format!("{:.1}", f64::from(self.config.batch.global_batch) / step),
                duration(self.run_seconds(crew)),
                match hours {
                    h if h < 100.0 => format!("{h:.2}"),
                    h => thousands(h.round() as u64),
                },
                percent(self.efficiency(crew)),
            ];
            let price = self
                .price_worker
                .map(|price| thousands((price * hours).round() as u64));
            row.extend(price);
            rows.push(row);
        }
        table(text, &rows);
        wrapped(
            text,
            "",
            &format!(
                "an exchange at {} Gbit/s each way that nothing overlaps; evaluations, checkpoints and \
             failures aside: belfry rehearse shows what failures cost",
                self.bandwidth
            ),
        );
    }

    fn checkpoints(&self, text: &mut String) {
        let (footprint, checkpoint) = (&self.footprint, &self.config.checkpoint);
        head(text, "checkpoints and ledger");
        let each = gigabytes(footprint.state_bytes as f64);
        let parts = gigabytes(footprint.state_bytes as f64 / f64::from(checkpoint.parts));
        line(
            text,
            "a checkpoint",
            &format!("{each} in {} parts of {parts} on average", checkpoint.parts),
        );
        let all = footprint.checkpoints as f64 * footprint.state_bytes as f64;
        line(
            text,
            "in the run",
            &format!(
                "{} (every {} steps): {} written",
                thousands(footprint.checkpoints),
                thousands(checkpoint.every_steps),
                gigabytes(all)
            ),
        );
        for crew in ends(&self.crews) {
            let stored = seconds(self.store_seconds(crew));
            let interval = self.step_seconds(crew) * checkpoint.every_steps as f64;
            let due = duration(interval);
            line(
                text,
                "stored in",
                &format!(
                    "{stored} by {}, {} each, at {} Gbit/s; one is due every {due}",
                    counted(crew.workers.into(), "worker", "s"),
                    counted(self.parts_each(crew).into(), "part", "s"),
                    self.store_bandwidth
                ),
            );
            if self.store_seconds(crew) > interval {
                let step = self.step_seconds(crew);
                let least = (self.store_seconds(crew) / step).ceil() as u64;
                let text_of = format!(
                    "not stored before the next is due, and then given up: let \
                     checkpoint.every_steps be at least {least}, or raise the bandwidth"
                );
                wrapped(text, "WARNING", &text_of);
            }
        }
        let receipts = footprint.receipt_bytes * self.config.run.steps;
        line(
            text,
            "ledger",
            &format!(
                "{} bytes a step, {} in all",
                thousands(footprint.receipt_bytes),
                kilobytes(receipts)
            ),
        );
    }

    fn control(&self, text: &mut String) {
        let timeouts = self.timeouts();
        head(text, "coordinator");
        if let Some(crew) = self.crews.iter().max_by_key(|crew| crew.workers) {
            let [one, lane] = self.footprint.ready_bytes;
            let workers = u64::from(crew.workers);
            let lanes = u64::from(self.config.batch.lanes);
            let busy = workers - u64::from(crew.spares);
            let up = workers * one + (lanes - busy) * lane;
            let down = workers * self.footprint.commit_bytes;
            line(
                text,
                "a step",
                &format!(
                    "{workers} workers say {} (ready), are told {} (commit)",
                    kilobytes(up),
                    kilobytes(down)
                ),
            );
            let beats = crew.workers as f64 / timeouts.heartbeat.as_secs_f64();
            line(text, "between", &format!("{beats:.0} heartbeats a second"));
        }
        let said = timeouts
            .listed()
            .map(|(name, time)| format!("{name} {}", short(time.as_secs_f64())));
        let setting = self.config.cluster.max_stall_seconds;
        wrapped(
            text,
            "times",
            &format!(
                "from max_stall_seconds = {setting} and the longest step above: {}",
                said.join(", ")
            ),
        );
    }
}

/// The first and the last, once each.
fn ends(crews: &[Crew]) -> impl Iterator<Item = &Crew> {
    let last = crews.last().filter(|_| crews.len() > 1);
    crews.first().into_iter().chain(last)
}

fn head(text: &mut String, title: &str) {
    let _ = writeln!(text, "\n{title}");
}

/// Columns of a label.
const LABEL: usize = 14;
/// Longest line.
const COLUMNS: usize = 100;

fn line(text: &mut String, label: &str, what: &str) {
    let _ = writeln!(text, "  {}", format!("{label:<LABEL$}{what}").trim_end());
}

/// The same over as many lines as it takes.
fn wrapped(text: &mut String, label: &str, what: &str) {
    let mut row = String::new();
    let mut label = label;
    for word in what.split_whitespace() {
        if !row.is_empty() && 2 + LABEL + row.chars().count() + 1 + word.chars().count() > COLUMNS {
            line(text, label, &row);
            (label, row) = ("", String::new());
        }
        if !row.is_empty() {
            row.push(' ');
        }
        row.push_str(word);
    }
    line(text, label, &row);
}

/// Right-aligned columns, two blanks apart.
pub fn table(text: &mut String, rows: &[Vec<String>]) {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for row in rows {
        let cells = row.iter().zip(&widths);
        let cells: Vec<String> = cells
            .map(|(cell, width)| format!("{cell:>width$}"))
            .collect();
        let _ = writeln!(text, "  {}", cells.join("  "));
    }
}

/// All divisors; the smallest and the largest where there are many.
fn divisors(lanes: u32) -> Vec<u32> {
    let mut all: Vec<u32> = (1..=lanes).filter(|w| lanes.is_multiple_of(*w)).collect();
    if all.len() > EVEN_MAX {
        all.drain(EVEN_MAX / 2..all.len() - EVEN_MAX / 2);
    }
    all
}

pub fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// `1 part`, `2 parts`.
fn counted(count: u64, noun: &str, plural: &str) -> String {
    let ending = if count == 1 { "" } else { plural };
    format!("{} {noun}{ending}", thousands(count))
}

fn kilobytes(bytes: u64) -> String {
    match bytes {
        b if b < 1_000_000 => format!("{:.1} kB", b as f64 / 1e3),
        b => gigabytes(b as f64),
    }
}

/// Seconds, if any.
fn some_seconds(s: f64) -> String {
    if s > 0.0 { seconds(s) } else { "-".into() }
}

/// Seconds without needless digits.
fn short(s: f64) -> String {
    let text = format!("{s:.2}");
    format!("{} s", text.trim_end_matches('0').trim_end_matches('.'))
}

/// Seconds, minutes, hours or days, whatever is read most easily.
pub fn duration(s: f64) -> String {
    const MINUTE: f64 = 60.0;
    const HOUR: f64 = 3600.0;
    const DAY: f64 = 86_400.0;
    match s {
        s if s < 2.0 * MINUTE => seconds(s),
        s if s < 2.0 * HOUR => format!("{:.1} min", s / MINUTE),
        s if s < 2.0 * DAY => format!("{:.1} h", s / HOUR),
        s => format!("{:.1} days", s / DAY),
    }
}
