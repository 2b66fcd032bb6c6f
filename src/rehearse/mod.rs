//! `belfry rehearse`: what failures will cost a run, before money is spent.
//!
//! The coordinator's and the workers' production cores run in virtual time with the run's own lanes,
//! timeouts, checkpoints and sizes; processes die at random and come back. Left out are the data
//! plane and evaluations.

mod curve;
mod outcome;
mod report;
mod scenario;

#[cfg(test)]
mod tests;

use std::path::PathBuf;

use anyhow::ensure;
use belfry_configs::ValidConfig;
use belfry_simulator::Mtbf;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use rayon::prelude::*;

use crate::plan::{Footprint, LaneTime, LaneTimeArguments, largest_share};
use crate::{files, resolve};
use outcome::Outcome;
use scenario::{Cluster, Scenario, Time};

/// Arguments of `belfry rehearse`.
#[derive(Args)]
pub struct RehearseArguments {
    /// The run file.
    config: PathBuf,
    /// Workers, each started again when it dies.
    #[arg(long, value_name = "N")]
    workers: u32,
    /// Mean time between two deaths of workers anywhere in the whole run: 10m is a death every ten
    /// minutes, whatever the number of workers. Default: nothing dies.
    #[arg(long, value_name = "TIME")]
    mtbf: Option<Time>,
    /// Mean time between two deaths of the same worker: with 64 workers, 10m here is a death every
    /// nine seconds.
    #[arg(long, value_name = "TIME", conflicts_with = "mtbf")]
    mtbf_worker: Option<Time>,
    /// Mean time between two deaths of the same coordinator. Default: as a worker's.
    #[arg(long, value_name = "TIME")]
    mtbf_coordinator: Option<Time>,
    /// Time from a process's death to the next process: what the cluster takes for it.
    #[arg(long, value_name = "TIME", default_value = "30s")]
    restart: Time,
    /// Coordinators: one leads, the others stand by.
    #[arg(long, value_name = "N", default_value_t = 1)]
    coordinators: u32,
    /// Simulated hours.
    #[arg(long, value_name = "N", default_value_t = 24.0)]
    hours: f64,
    /// A --step-seconds without @ is of a step with --workers.
    #[command(flatten)]
    lane: LaneTimeArguments,
    /// Gbit/s of each worker to the others, each way.
    #[arg(long, value_name = "GBIT/S", default_value_t = 25.0)]
    bandwidth: f64,
    /// Gbit/s of each worker to the object store.
    #[arg(long, value_name = "GBIT/S", default_value_t = 5.0)]
    store_bandwidth: f64,
    /// Seed of the first run.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Runs, each with a seed of its own, for the spread.
    #[arg(long, value_name = "N", default_value_t = 3)]
    runs: u64,
    #[command(flatten)]
    prices: Prices,
    /// Draw goodput over times between failures from a minute to a day as SVG.
    #[arg(long, value_name = "FILE.svg")]
    curve: Option<PathBuf>,
    /// Override a key; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
    /// One JSON object instead of the report; sizes in bytes, times in seconds.
    #[arg(long, conflicts_with = "curve")]
    json: bool,
}

/// In dollars. The defaults are the public prices of S3 Standard in us-east-1.
#[derive(Args, Clone, Copy, Debug)]
struct Prices {
    /// Dollars for 1,000 PUT and LIST requests; default: S3 Standard's.
    #[arg(long, value_name = "DOLLARS", default_value_t = 0.005)]
    price_put: f64,
    /// Dollars for 1,000 GET requests; default: S3 Standard's.
    #[arg(long, value_name = "DOLLARS", default_value_t = 0.0004)]
    price_get: f64,
    /// Dollars for a GB stored for a month; default: S3 Standard's.
    #[arg(long, value_name = "DOLLARS", default_value_t = 0.023)]
    price_storage: f64,
}

/// Everything that was rehearsed, and what came of it.
struct Rehearsal {
    config: ValidConfig,
    footprint: Footprint,
    lane: LaneTime,
    cluster: Cluster,
    scenario: Scenario,
    prices: Prices,
    seed: u64,
    outcomes: Vec<Outcome>,
}

/// Rehearses and prints.
pub fn rehearse(arguments: &RehearseArguments) -> anyhow::Result<()> {
    check(arguments)?;
    let config = belfry_configs::load(&arguments.config, &arguments.settings)?;
    let counting = resolve::length::resolve(config);
    let config = tokio::runtime::Handle::current().block_on(counting)?;
    let footprint = Footprint::of(&config)?;
    let share = |workers| largest_share(&config, workers);
    let lane = arguments.lane.lane(&config, arguments.workers, share)?;
    let cluster = Cluster {
        workers: arguments.workers,
        coordinators: arguments.coordinators,
        lane_seconds: lane.seconds,
        bandwidth: arguments.bandwidth,
        store_bandwidth: arguments.store_bandwidth,
        restart: arguments.restart,
    };
    let length = Time(arguments.hours * 3600.0);
    let scenario = Scenario::new(&config, &footprint, cluster, mtbf(arguments), length);
    if let Some(file) = &arguments.curve {
        let title = format!(
            "{}: {} workers, restart {}, {} Gbit/s",
            config.run.name,
            arguments.workers,
            arguments.restart.text(),
            arguments.bandwidth
        );
        let points = curve::sweep(&scenario, arguments)?;
        print!("{}", curve::table(&points));
        files::replace(file, &curve::svg(&title, &points)?)?;
        eprintln!("wrote {}", file.display());
        return Ok(());
    }
    let outcomes = run_all(&scenario, arguments.seed, arguments.runs, "")?;
    let rehearsal = Rehearsal {
        config,
        footprint,
        lane,
        cluster,
        scenario,
        prices: arguments.prices,
        seed: arguments.seed,
        outcomes,
    };
    if arguments.json {
        println!("{}", rehearsal.json());
    } else {
        print!("{}", rehearsal.text());
    }
    Ok(())
}

fn check(arguments: &RehearseArguments) -> anyhow::Result<()> {
    ensure!(
        (1..=4096).contains(&arguments.workers),
        "--workers: must lie in 1..=4096"
    );
    ensure!(
        (1..=16).contains(&arguments.coordinators),
        "--coordinators: must lie in 1..=16"
    );
    ensure!(
        (1..=1000).contains(&arguments.runs),
        "--runs: must lie in 1..=1000"
    );
    let hours = arguments.hours;
    ensure!(
        hours > 0.0 && hours <= 10_000.0,
        "--hours: must lie in 0..=10000"
    );
    let prices = arguments.prices;
    for (name, value) in [
        ("--bandwidth", arguments.bandwidth),
        ("--store-bandwidth", arguments.store_bandwidth),
    ] {
        ensure!(
            value > 0.0 && value.is_finite(),
            "{name}: must be above zero"
        );
    }
    for (name, value) in [
        ("--price-put", prices.price_put),
        ("--price-get", prices.price_get),
        ("--price-storage", prices.price_storage),
    ] {
        ensure!(
            value >= 0.0 && value.is_finite(),
            "{name}: must not be negative"
        );
    }
    Ok(())
}

/// Per process, as the simulator wants it.
fn mtbf(arguments: &RehearseArguments) -> Mtbf {
    let of_run = arguments
        .mtbf
        .map(|time| time.millis() * u64::from(arguments.workers));
    let of_worker = arguments.mtbf_worker.map(Time::millis);
    let worker_ms = of_run.or(of_worker).unwrap_or(0);
    let coordinator_ms = arguments.mtbf_coordinator.map_or(worker_ms, Time::millis);
    Mtbf {
        worker_ms,
        coordinator_ms,
    }
}

/// So many runs with consecutive seeds, side by side; the same in every order.
fn run_all(scenario: &Scenario, seed: u64, runs: u64, what: &str) -> anyhow::Result<Vec<Outcome>> {
    const LOOK: &str = "{prefix}{bar:30} {percent} % of the simulated time, {eta} left";
    let all = scenario.millis * runs;
    let bar = ProgressBar::new(all).with_style(ProgressStyle::with_template(LOOK)?);
    let bar = bar.with_prefix(what.to_owned());
    let outcomes: anyhow::Result<Vec<Outcome>> = (seed..seed + runs)
        .into_par_iter()
        .map(|seed| {
            let told = std::cell::Cell::new(0);
            let progress = |now: u64| {
                // Whole minutes: the bar is shared, commits are many.
                if now >= told.get() + 60_000 {
                    bar.inc(now - told.replace(now));
                }
            };
            Outcome::of(scenario, seed, progress)
        })
        .collect();
    bar.finish_and_clear();
    outcomes
}
