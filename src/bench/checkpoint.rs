//! `belfry bench checkpoint`: a state of the configured size on its way to the store and back,
//! beside raw puts and gets of the same bytes and a copy in memory; and what training waits for.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use belfry_model::ParamTable;
use belfry_proto::v1::PartStored;
use belfry_worker::checkpoint::{encode_part, folder, load};
use belfry_worker::duplicate::Duplicates;
use belfry_worker::held::{HeldState, Place};
use belfry_worker::open_device;
use belfry_worker::optimizer::AdamW;
use belfry_worker::state::{TrainState, optimizer};
use bytes::Bytes;
use clap::Args;
use serde_json::json;
use shard_tools::store::Root;

use super::Case;
use super::step::on_host;
use super::table::{Report, gigabytes, seconds};
use super::timing::{Rounds, peak_bytes, reset_peak};
use super::worker::synthetic_state;

/// Folder under the given root that this benchmark alone writes in.
const FOLDER: &str = "belfry-bench";

/// Arguments of `belfry bench checkpoint`.
#[derive(Args)]
pub struct CheckpointArguments {
    #[command(flatten)]
    case: Case,
    /// Folder or s3:// URL to write in, under belfry-bench/; default: a temporary folder.
    /// Nothing is deleted from a bucket.
    #[arg(long, value_name = "FOLDER_OR_URL")]
    root: Option<String>,
    /// Rounds of store, load and their floors.
    #[arg(long, value_name = "N", default_value_t = 3)]
    rounds: u32,
}

#[derive(Default)]
struct Times {
    store: Rounds,
    load: Rounds,
    put: Rounds,
    get: Rounds,
    copy: Rounds,
    fetch: Rounds,
    update: Updates,
}

/// What an update takes.
#[derive(Default)]
struct Updates {
    /// With no checkpoint open.
    in_place: Rounds,
    /// A snapshot's copy, beside training: the first of a run, and each later one.
    copy_first: Rounds,
    copy: Rounds,
    /// The next update where the step took longer than the copy.
    behind: Rounds,
    /// The same where it came at once.
    at_once: Rounds,
    /// A copy made by the update: what all this replaces.
    by_itself: Rounds,
    /// Memory of the process: otherwise, and while a checkpoint is open.
    peaks: (u64, u64),
}

impl Updates {
    /// How much longer than usual.
    fn over(&self, rounds: &Rounds) -> f64 {
        (rounds.median() - self.in_place.median()).max(0.0)
    }
}

/// Measures and prints.
pub async fn run(arguments: CheckpointArguments) -> anyhow::Result<()> {
    ensure!(arguments.rounds > 0, "--rounds: must be at least 1");
    let config = arguments.case.load(&[])?;
    let temporary = tempfile::tempdir()?;
    let given = arguments.root.clone();
    let given = given.unwrap_or_else(|| temporary.path().display().to_string());
    let location = format!("{}/{FOLDER}", given.trim_end_matches('/'));
    let root = Root::open(&location)?;
    let (tower, state) = synthetic_state(&config)?;
    let apart = match on_host(&config) {
        true => None,
        false => Some(Place::new(&open_device(&config.run.device)?, false)),
    };
    let bench = Store {
        root,
        table: tower.table(),
        optimizer: optimizer(&config, &tower),
        state: Arc::new(HeldState::Host(state)),
        apart,
        parts: config.checkpoint.parts,
    };
    let mut times = Times::default();
    // Unmeasured: memory is touched, connections are made.
    let mut bytes = bench.round(&mut Times::default()).await?;
    for _ in 0..arguments.rounds {
        bytes = bench.round(&mut times).await?;
    }
    print(&times, bytes, &arguments, &bench);
    match bench.root.local_folder() {
        Some(local) => clean(&local)?,
        None => eprintln!("left behind: {location}"),
    }
    Ok(())
}

/// Removes what the benchmark wrote.
fn clean(folder: &Path) -> anyhow::Result<()> {
    std::fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))
}

struct Store<'a> {
    root: Root,
    table: &'a ParamTable,
    optimizer: AdamW,
    /// In host memory.
    state: Arc<HeldState>,
    /// The device, if it has a memory of its own.
    apart: Option<Place>,
    parts: u32,
}

impl Store<'_> {
    /// One round of all measurements; returns the bytes of the parts.
    async fn round(&self, times: &mut Times) -> anyhow::Result<u64> {
        let host = self.state.host()?;
        let held = match &self.apart {
            Some(place) => Arc::new(place.hold(host.clone())),
            None => Arc::clone(&self.state),
        };
        let begun = Instant::now();
        held.host()?;
        times.fetch.add(begun.elapsed().as_secs_f64());
        let begun = Instant::now();
        let stored = self.store(&held).await?;
        times.store.add(begun.elapsed().as_secs_f64());
        let begun = Instant::now();
        let manifest = format!("{}/manifest.json", folder(host.step));
        let loaded = load(&self.root, &manifest, self.table).await?;
        times.load.add(begun.elapsed().as_secs_f64());
        ensure!(loaded == *host, "what was loaded is not what was stored");
        copy(host, loaded, times);
        self.raw(&stored, times).await?;
        if self.apart.is_none() {
            self.updates(&mut times.update).await?;
        }
        Ok(stored.iter().map(|part| part.bytes).sum())
    }

    /// As a worker does that has all parts, and the manifest as the coordinator does.
    async fn store(&self, held: &HeldState) -> anyhow::Result<Vec<PartStored>> {
        let mut stored = Vec::new();
        for part in 0..self.parts {
            let encoded =
                tokio::task::block_in_place(|| encode_part(held, self.table, part, self.parts))?;
            let file = format!("{}/{}", folder(held.step()), encoded.stored.file);
            self.root.put_large(&file, encoded.bytes).await?;
            stored.push(encoded.stored);
        }
        let parts: Vec<_> = stored
            .iter()
            .map(|p| json!({"part": p.part, "file": p.file, "sha256": p.sha256, "bytes": p.bytes}))
            .collect();
        let step = held.step();
        let manifest = json!({"step": step, "parts": parts}).to_string();
        let file = format!("{}/manifest.json", folder(step));
        self.root.put(&file, Bytes::from(manifest)).await?;
        Ok(stored)
    }

    /// The update behind a snapshot beside the usual one, on a state of its own.
    async fn updates(&self, times: &mut Updates) -> anyhow::Result<()> {
        let gradient = vec![1e-3; self.table.elements()];
        let mut held = Arc::new(HeldState::Host(self.state.host()?.clone()));
        let update = |held: &mut Arc<HeldState>, duplicates: &mut Duplicates| {
            let begun = Instant::now();
            tokio::task::block_in_place(|| {
                duplicates.wait();
                HeldState::update(held, &self.optimizer, &gradient);
            });
            begun.elapsed().as_secs_f64()
        };
        reset_peak();
        let mut duplicates = Duplicates::default();
        times.in_place.add(update(&mut held, &mut duplicates));
        times.peaks.0 = peak_bytes().unwrap_or(0);
        for first in [true, false] {
            let begun = Instant::now();
            let copy = duplicates.begin(&held).await?;
            let copied = begun.elapsed().as_secs_f64();
            match first {
                true => times.copy_first.add(copied),
                false => times.copy.add(copied),
            }
            let before = copy.host()?.digest();
            let time = update(&mut held, &mut duplicates);
            ensure!(copy.host()?.digest() == before, "a snapshot has changed");
            if !first {
                times.behind.add(time);
            }
            duplicates.buffers().give(copy);
        }
        let coming = duplicates.begin(&held);
        times.at_once.add(update(&mut held, &mut duplicates));
        ensure!(coming.await?.step() + 1 == held.step(), "another snapshot");
        times.peaks.1 = peak_bytes().unwrap_or(0);
        drop(duplicates);
        let read = Arc::clone(&held);
        times
            .by_itself
            .add(update(&mut held, &mut Duplicates::default()));
        drop(read);
        Ok(())
    }

    /// The same bytes, part by part, without hash, names or order.
    async fn raw(&self, stored: &[PartStored], times: &mut Times) -> anyhow::Result<()> {
        let (mut put, mut get) = (0.0, 0.0);
        for part in stored {
            let file = format!("{}/{}", folder(self.state.step()), part.file);
            let begun = Instant::now();
            let bytes = self.root.get(&file).await?;
            get += begun.elapsed().as_secs_f64();
            let begun = Instant::now();
            self.root.put(&format!("raw/{}", part.part), bytes).await?;
            put += begun.elapsed().as_secs_f64();
        }
        times.get.add(get);
        times.put.add(put);
        Ok(())
    }
}

/// A copy into memory that is there.
fn copy(state: &TrainState, mut target: TrainState, times: &mut Times) {
    let begun = Instant::now();
    target.parameters.copy_from_slice(&state.parameters);
    target.exp_avg.copy_from_slice(&state.exp_avg);
    target.exp_avg_sq.copy_from_slice(&state.exp_avg_sq);
    std::hint::black_box(&target);
    times.copy.add(begun.elapsed().as_secs_f64());
}

fn print(times: &Times, bytes: u64, arguments: &CheckpointArguments, bench: &Store<'_>) {
    let mut report = Report::new(
        "checkpoint",
        format!(
            "bench checkpoint: {}, {} parameters with both moments, {} in {} parts, under {}",
            arguments.case.config.display(),
            bench.table.elements(),
            gigabytes(bytes as f64),
            bench.parts,
            bench.root
        ),
    );
    report.note(format!(
        "medians of {} rounds, figure and floor in turn; one unmeasured before them",
        arguments.rounds
    ));
    let rate = |time: f64| gigabytes(bytes as f64 / time) + "/s";
    let copy = times.copy.median();
    let rows = [
        ("store", &times.store, times.put.median(), "raw puts"),
        (
            "load, verified",
            &times.load,
            times.get.median(),
            "raw gets",
        ),
        ("raw puts", &times.put, copy, "memcpy"),
        ("raw gets", &times.get, copy, "memcpy"),
    ];
    for (what, rounds, floor, name) in rows {
        let time = rounds.median();
        let words = format!("{}, {name}", rate(floor));
        report.row(what, rate(time), words, floor / time);
    }
    match bench.apart {
        None => print_stall(&times.update, copy, &mut report),
        Some(_) => {
            let (fetched, floor) = (times.fetch.median(), format!("{}, memcpy", seconds(copy)));
            report.row("device to host", seconds(fetched), floor, fetched / copy);
            report.note(
                "device to host: the device's queue waits while the state is read, once per \
                 checkpoint and part by part; all else runs beside training",
            );
            report.json("stall_seconds", fetched);
        }
    }
    report.json("bytes", bytes);
    for (key, rounds) in [
        ("store_seconds", &times.store),
        ("load_seconds", &times.load),
        ("put_seconds", &times.put),
        ("get_seconds", &times.get),
        ("memcpy_seconds", &times.copy),
    ] {
        report.json(key, rounds.median());
    }
    report.print();
}

/// What the update behind a snapshot takes longer.
fn print_stall(times: &Updates, copy: f64, report: &mut Report) {
    let floor = format!("{}, memcpy", seconds(copy));
    let rows = [
        ("update", times.in_place.median()),
        ("snapshot, beside training", times.copy.median()),
        ("the first snapshot of a run", times.copy_first.median()),
        ("stall of a step", times.over(&times.behind)),
        ("stall if it comes at once", times.over(&times.at_once)),
        ("stall by copying in it", times.over(&times.by_itself)),
    ];
    for (what, time) in rows {
        report.row(what, seconds(time), floor.clone(), time / copy);
    }
    report.note(
        "stall: how much longer than usual the update behind a snapshot takes. The snapshot is copied \
         by one thread while the next step is computed; an update that comes sooner waits for the \
         rest of the copy. All else runs beside training",
    );
    let (before, open) = (times.peaks.0 as f64, times.peaks.1 as f64);
    let memory = format!("{} while a checkpoint is open", gigabytes(open));
    report.note(format!(
        "memory of this process, which keeps another state: {memory}, {} otherwise",
        gigabytes(before)
    ));
    for (key, value) in [
        ("stall_seconds", times.over(&times.behind)),
        ("stall_at_once_seconds", times.over(&times.at_once)),
        ("stall_by_itself_seconds", times.over(&times.by_itself)),
        ("update_seconds", times.in_place.median()),
        ("snapshot_seconds", times.copy.median()),
        ("first_snapshot_seconds", times.copy_first.median()),
        ("peak_bytes", open),
    ] {
        report.json(key, value);
    }
}
