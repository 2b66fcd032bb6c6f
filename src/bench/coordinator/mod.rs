//! `belfry bench coordinator`: how fast the coordinator decides among very many workers: its core
//! alone, or all of it over real sockets.

mod crowd;
mod sessions;

use std::time::{Duration, Instant};

use anyhow::{anyhow, ensure};
use belfry_configs::{Rhythm, Timeouts};
use belfry_coordinator::core::{LinkPolicy, Settings};
use clap::Args;

use super::table::{Report, gigabytes, seconds};
use super::timing::{Rounds, peak_bytes, reset_peak};
use crowd::Crowd;

/// Longest commit decision that the design allows among ten thousand workers, in seconds.
const DECISION_MAX: f64 = 0.050;
/// Memory that it allows.
const MEMORY_MAX: f64 = 500e6;
/// Every so many steps a worker dies in the middle of one, and another joins two steps later.
const DEATH_EVERY: u64 = 5;

/// Arguments of `belfry bench coordinator`.
#[derive(Args)]
pub struct CoordinatorArguments {
    /// Workers of the core alone, in virtual time.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    workers: u64,
    /// Lanes; workers beyond them are spares. Default: 4096, the most there may be, or one a worker.
    #[arg(long, value_name = "N")]
    lanes: Option<u32>,
    /// Steps to commit.
    #[arg(long, value_name = "N", default_value_t = 20)]
    steps: u64,
    /// Instead: the whole coordinator over gRPC on this machine, with so many workers, each with a
    /// connection of its own.
    #[arg(long, value_name = "N", conflicts_with = "workers")]
    sessions: Option<u32>,
}

/// Measures and prints.
pub async fn run(arguments: CoordinatorArguments) -> anyhow::Result<()> {
    ensure!(arguments.steps > 0, "--steps: must be at least 1");
    ensure!(arguments.lanes != Some(0), "--lanes: must be at least 1");
    match arguments.sessions {
        Some(sessions) => sessions::run(sessions, arguments.lanes, arguments.steps).await,
        None => core(&arguments),
    }
}

fn settings(workers: u64, lanes: u32) -> Settings {
    Settings {
        run_id: "bench".into(),
        lanes,
        micro_batches: lanes,
        pairs_per_lane: 32,
        steps_total: u64::from(u32::MAX),
        min_workers: 1,
        max_workers: 0,
        // Everybody follows, with or without lanes.
        spares: workers as usize,
        skip_non_finite: false,
        expected_workers: workers as usize,
        timeouts: Timeouts::new(Duration::from_secs(10)),
        checkpoint: belfry_configs::Checkpoint {
            every_steps: 1000,
            parts: 16,
            ..Default::default()
        },
        nodes_max: 4,
        audit_every: 0,
        evaluates: false,
        rhythm: Rhythm::Never,
        links: LinkPolicy::Tcp,
        quarantine_shards_max: 0,
        horizon_steps: 64,
        term: 1,
    }
}

fn core(arguments: &CoordinatorArguments) -> anyhow::Result<()> {
    let workers = arguments.workers;
    ensure!(
        (2..=1_000_000).contains(&workers),
        "--workers: must lie in 2..=1000000"
    );
    let lanes = arguments.lanes.unwrap_or(4096.min(workers as u32));
    reset_peak();
    let before = peak_bytes();
    let mut crowd = Crowd::new(settings(workers, lanes));
    let begun = Instant::now();
    drive(&mut crowd, workers, arguments.steps)
        .map_err(|reason| anyhow!("the run ended: {reason}"))?;
    let took = begun.elapsed().as_secs_f64();
    let memory = peak_bytes().zip(before);
    let memory = memory.map(|(after, before)| after.saturating_sub(before) as f64);
    ensure!(
        crowd.commits == arguments.steps,
        "{} steps were committed",
        crowd.commits
    );

    let title = format!(
        "bench coordinator: the core, {workers} workers, {lanes} lanes, {} steps, {} generations",
        crowd.commits, crowd.generations
    );
    let mut report = Report::new("coordinator", title);
    report
        .note("time of one event in the core: median, 99 of 100, worst; virtual time, no sockets");
    for (kind, times) in &crowd.times {
        let limit = (*kind == "commit decision").then_some(DECISION_MAX);
        row(&mut report, kind, times, limit);
    }
    let floor = format!("{} allowed", gigabytes(MEMORY_MAX));
    let said = memory.map_or("unknown".into(), gigabytes);
    report.row(
        "memory, workers included",
        said,
        floor,
        memory.map(|m| m / MEMORY_MAX),
    );
    report.row("everything", seconds(took), "", None);
    report.json("workers", workers);
    report.json("lanes", lanes);
    report.json("memory_bytes", memory);
    report.print();
    Ok(())
}

/// Two rounds of heartbeats a step; now and then a death in the middle of one, later a newcomer.
fn drive(crowd: &mut Crowd, workers: u64, steps: u64) -> Result<(), String> {
    (0..workers).try_for_each(|id| crowd.arrive(id))?;
    crowd.load()?;
    for step in 0..steps {
        crowd.beat()?;
        if step % DEATH_EVERY == 1 {
            crowd.ready(0.5)?;
            crowd.die(step)?;
        }
        if step % DEATH_EVERY == 3 {
            crowd.arrive(workers + step)?;
            crowd.load()?;
        }
        crowd.beat()?;
        crowd.ready(1.0)?;
    }
    Ok(())
}

/// Median, 99 of 100 and the worst; beside a limit of the second, where there is one.
fn row(report: &mut Report, kind: &str, times: &Rounds, limit: Option<f64>) {
    let (p99, worst) = (times.quantile(0.99), times.range().1);
    let said = format!(
        "{} / {} / {} ({})",
        seconds(times.median()),
        seconds(p99),
        seconds(worst),
        times.count()
    );
    let floor = limit.map_or(String::new(), |limit| format!("{} allowed", seconds(limit)));
    report.row(kind, said, floor, limit.map(|limit| p99 / limit));
    let key = kind.replace([' ', ':', ','], "_");
    report.json(&format!("{key}_p50_seconds"), times.median());
    report.json(&format!("{key}_p99_seconds"), p99);
    report.json(&format!("{key}_worst_seconds"), worst);
}
