//! `belfry run`: the launcher for one machine.
//!
//! Packs data if needed, starts coordinator and workers as children of the same binary, starts
//! again what dies, shows progress, and ends with one line of JSON on standard output. A plan is
//! handed on to [`crate::stages`].

pub mod child;
mod children;
pub mod metrics;
pub mod prepare;
mod progress;
pub mod watch;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use belfry_configs::Timeouts;
use belfry_coordinator::{evaluation_told, parse_evaluation};
use clap::Args;
use shard_tools::manifest::sha256;
use shard_tools::store::Root;
use tokio::signal::unix::{Signal, SignalKind, signal};

use children::Children;
use metrics::Metrics;
use progress::{Ended, Progress};

use crate::resolve;

/// How often children are looked after when none of them ended.
const TEND_INTERVAL: Duration = Duration::from_millis(100);

/// Arguments of `belfry run`.
#[derive(Args)]
pub struct RunArguments {
    /// The run file, for instance configs/quickstart.toml, or a plan.
    pub config: PathBuf,
    /// Worker processes on this machine.
    #[arg(long, default_value_t = 2)]
    pub workers: u32,
    /// Folder or s3:// URL for checkpoints, ledger and export; default runs/NAME.
    #[arg(long)]
    pub root: Option<String>,
    /// Folder for this machine's logs, cache and metrics; default: the root where that is a folder,
    /// else runs/NAME-HASH.
    #[arg(long)]
    pub local: Option<PathBuf>,
    /// Override a key, for instance --set run.steps=20; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub settings: Vec<String>,
    /// Start two coordinators: one leads, the other takes over when the first one freezes, and each is
    /// started again when it dies.
    #[arg(long)]
    pub standby: bool,
    /// Go on with the run that stands under the root.
    #[arg(long)]
    pub resume: bool,
}

/// Trains; see the module.
pub async fn run(arguments: RunArguments) -> anyhow::Result<()> {
    let begun = Instant::now();
    // What cannot be read is told by whoever loads it.
    let text = std::fs::read_to_string(&arguments.config).unwrap_or_default();
    if belfry_configs::plan::is_plan(&text) {
        return crate::stages::launch(arguments).await;
    }
    let config = belfry_configs::load(&arguments.config, &arguments.settings)?;
    let lanes = config.batch.lanes;
    if arguments.workers == 0 || arguments.workers < config.cluster.min_workers {
        bail!(
            "--workers {}: the run needs at least {}",
            arguments.workers,
            config.cluster.min_workers
        );
    }
    if arguments.workers > lanes {
        eprintln!(
            "{} workers for {lanes} lanes: the rest are spares",
            arguments.workers
        );
    }
    let runs = PathBuf::from("runs");
    let location = arguments
        .root
        .clone()
        .unwrap_or_else(|| runs.join(&config.run.name).display().to_string());
    let root = Root::open(&location)?;
    let local = arguments.local.clone().or_else(|| root.local_folder());
    // Two runs of one name under different URLs must not share their logs.
    let local = local.unwrap_or_else(|| {
        let hash = sha256(root.to_string().as_bytes());
        runs.join(format!("{}-{}", config.run.name, &hash[..8]))
    });
    std::fs::create_dir_all(local.join("logs"))
        .with_context(|| format!("cannot make {}", local.join("logs").display()))?;

    prepare::pack(&config).await?;
    let config = resolve::resolve(config, &root).await?;
    if let Some(told) = resolve::length::told(&config) {
        eprintln!("{told}");
    }
    prepare::claim(&root, &config, arguments.resume).await?;
    if arguments.resume && root.exists("result.json").await? {
        eprintln!("this run was trained to its last step before");
        return finish(&root, begun, 0, 0).await;
    }

    let resolved = local.join("resolved.toml");
    std::fs::write(&resolved, config.to_toml())
        .with_context(|| format!("cannot write {}", resolved.display()))?;
    let (workers, pair) = (arguments.workers, arguments.standby);
    // Listened to before the first child is there, so that no end is missed.
    let mut child_ended = signal(SignalKind::child())?;
    let mut children = Children::start(&resolved, &location, &local, workers, pair)?;
    let setting = Duration::from_secs_f64(config.cluster.max_stall_seconds);
    let timeouts = Timeouts::new(setting);
    let mut progress = Progress::new(Metrics::open(&local), config.run.steps);
    let mut events = watch::watch(children.address_file(), progress.wanted(), timeouts.silence);
    let mut tending = tokio::time::interval(TEND_INTERVAL);
    let mut stops = Stops::listen()?;
    let mut draining = false;
    let ended = loop {
        tokio::select! {
            biased;
            Some(event) = events.recv() => {
                if let Some(ended) = progress.show(event)? {
                    break ended;
                }
            }
            () = due(&mut tending, &mut child_ended) => {
                if children.tend()? {
                    let reason = "trained to the last step".to_owned();
                    break Ended { success: true, reason };
                }
                progress.restarts(children.restarts());
            }
            () = stops.next() => {
                if std::mem::replace(&mut draining, true) {
                    children.stop().await;
                    bail!("stopped; go on with: belfry run {} --root {location} --resume",
                        arguments.config.display());
                }
                eprintln!(
                    "stopping: the open step is finished and a checkpoint written; ask again to stop at \
                     once"
                );
                if let Err(why) = crate::status::ask_to_drain(&local).await {
                    eprintln!("{why}");
                }
            }
        }
    };
    let peak = children.peak_memory_bytes();
    let restarts = children.restarts();
    children.stop().await;
    let metrics = progress.close();
    if !ended.success {
        bail!("{}", ended.reason);
    }
    metrics.complete(&root).await?;
    finish(&root, begun, restarts, peak).await
}

/// The wishes of whoever started this: ctrl-c, or a service manager's signal.
pub struct Stops {
    interrupt: Signal,
    terminate: Signal,
}

impl Stops {
    /// Listens from now on.
    pub fn listen() -> anyhow::Result<Self> {
        Ok(Stops {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    /// The next wish to stop.
    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// When children are to be looked after: at once when one ended.
pub async fn due(interval: &mut tokio::time::Interval, child_ended: &mut Signal) {
    tokio::select! {
        _ = interval.tick() => {}
        _ = child_ended.recv() => {}
    }
}

/// Prints the result: words on standard error, one JSON line on standard output.
async fn finish(root: &Root, begun: Instant, restarts: u32, peak: u64) -> anyhow::Result<()> {
    let text = root.get("result.json").await?;
    let result: serde_json::Value =
        serde_json::from_slice(&text).with_context(|| format!("{root}/result.json"))?;
    for evaluation in result["evaluations"].as_array().into_iter().flatten() {
        let parsed = parse_evaluation(evaluation.to_string().as_bytes());
        let e = parsed.map_err(|why| anyhow!("{root}/result.json: {why}"))?;
        eprintln!("validation at step {}: {}", e.step, evaluation_told(&e));
    }
    eprintln!(
        "weights            {root}/{}",
        result["export"].as_str().unwrap_or("?")
    );
    eprintln!(
        "parameters sha256  {}",
        result["parameters_sha256"].as_str().unwrap_or("?")
    );
    eprintln!(
        "optimizer sha256   {}",
        result["optimizer_sha256"].as_str().unwrap_or("?")
    );
    let line = serde_json::json!({
        "step": result["step"],
        "parameters_sha256": result["parameters_sha256"],
        "optimizer_sha256": result["optimizer_sha256"],
        "metrics": {
            "last": result["last"],
            "evaluations": result["evaluations"],
            "restarts": restarts,
            "seconds": begun.elapsed().as_secs_f64(),
            "peak_memory_bytes": peak,
        },
    });
    println!("{line}");
    Ok(())
}
