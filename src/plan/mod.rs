//! `belfry plan`: what a run takes before it starts, for whoever decides and whoever pays.
//!
//! Pure arithmetic over the configuration and the datasets' manifests; nothing is started and
//! nothing written. The report's figures are those that the run itself uses: the same cut of lanes,
//! the same order of pairs, the same derived timeouts.

mod crew;
mod data;
mod footprint;
mod lane_time;
mod report;

#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::ensure;
use belfry_configs::{Timeouts, ValidConfig};
use clap::Args;
use serde_json::{Value, json};

pub use crew::{Crew, largest_share};
pub use footprint::Footprint;
pub use lane_time::{LaneTime, LaneTimeArguments};
pub use report::{duration, percent, table};

use crate::synthetic::Synthetic;
use data::DataPlan;

/// Bandwidths at which the exchange is shown, in Gbit/s per worker each way.
const GIGABITS: [f64; 3] = [10.0, 25.0, 100.0];

/// Arguments of `belfry plan`.
#[derive(Args)]
pub struct PlanArguments {
    /// The run file.
    config: PathBuf,
    /// Numbers of workers to compare; default: powers of two from cluster.min_workers to the lanes.
    #[arg(long, value_name = "N,M,…", value_delimiter = ',')]
    workers: Vec<u32>,
    /// A --step-seconds without @ is of one worker that computes all lanes.
    #[command(flatten)]
    lane: LaneTimeArguments,
    /// Gbit/s of each worker to the others, each way, for the times of steps.
    #[arg(long, value_name = "GBIT/S", default_value_t = 25.0)]
    bandwidth: f64,
    /// Gbit/s of each worker to the object store.
    #[arg(long, value_name = "GBIT/S", default_value_t = 5.0)]
    store_bandwidth: f64,
    /// Price of one worker for one hour, to show what the run costs.
    #[arg(long, value_name = "DOLLARS")]
    price_worker: Option<f64>,
    /// Made-up datasets in place of data.train, with so many samples, pairs and shards together:
    /// 4000000,9000000,4000 is the paper's pre-training.
    #[arg(long, value_name = "SAMPLES,PAIRS,SHARDS")]
    synthetic: Option<Synthetic>,
    /// Override a key; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
    /// One JSON object instead of the report; sizes in bytes, times in seconds.
    #[arg(long)]
    json: bool,
}

/// What is known of a run before it starts.
pub struct Plan {
    config: ValidConfig,
    footprint: Footprint,
    lane: LaneTime,
    crews: Vec<Crew>,
    /// Or why it is unknown.
    data: Result<DataPlan, String>,
    bandwidth: f64,
    store_bandwidth: f64,
    price_worker: Option<f64>,
}

/// Prints the plan; an error if the run could not start as it is configured.
pub async fn plan(arguments: PlanArguments) -> anyhow::Result<()> {
    let config = belfry_configs::load(&arguments.config, &arguments.settings)?;
    let plan = Plan::of(config, &arguments).await?;
    if arguments.json {
        println!("{}", plan.json());
    } else {
        print!("{}", plan.text());
    }
    let refusals = plan.refusals();
    ensure!(
        refusals.is_empty(),
        "this run cannot start as it is configured: {}",
        refusals.join("; ")
    );
    Ok(())
}

impl Plan {
    async fn of(config: ValidConfig, arguments: &PlanArguments) -> anyhow::Result<Self> {
        let config = data::with_length(config, arguments.synthetic).await?;
        for (name, value) in [
            ("--bandwidth", Some(arguments.bandwidth)),
            ("--store-bandwidth", Some(arguments.store_bandwidth)),
            ("--price-worker", arguments.price_worker),
        ] {
            let fits = value.is_none_or(|v| v > 0.0 && v.is_finite());
            ensure!(fits, "{name}: must be above zero");
        }
        let share = |workers| largest_share(&config, workers);
        let lane = arguments.lane.lane(&config, 1, share)?;
        let footprint = Footprint::of(&config)?;
        let mut workers = arguments.workers.clone();
        ensure!(
            workers.iter().all(|w| (1..=WORKERS_MAX).contains(w)),
            "--workers: each must lie in 1..={WORKERS_MAX}"
        );
        if workers.is_empty() {
            workers = usual_workers(&config);
        }
        let crew = |workers: &u32| Crew::of(&config, footprint.gradient_bytes, *workers);
        let crews = workers.iter().map(crew).collect();
        let data = DataPlan::read(&config, arguments.synthetic).await;
        Ok(Plan {
            footprint,
            lane,
            crews,
            data: data.map_err(|e| crate::told(&e)),
            bandwidth: arguments.bandwidth,
            store_bandwidth: arguments.store_bandwidth,
            price_worker: arguments.price_worker,
            config,
        })
    }

    /// Seconds of a step of so many workers.
    fn step_seconds(&self, crew: &Crew) -> f64 {
        crew.step_seconds(self.lane.seconds, self.bandwidth)
    }

    /// Seconds of the whole run; evaluations and failures aside.
    fn run_seconds(&self, crew: &Crew) -> f64 {
        self.step_seconds(crew) * self.config.run.steps as f64
    }

    /// The time in which all workers compute at once and nobody waits, over the time of a step.
    fn efficiency(&self, crew: &Crew) -> f64 {
        let alone = f64::from(self.config.batch.lanes) * self.lane.seconds;
        alone / (f64::from(crew.workers) * self.step_seconds(crew))
    }

    /// Parts of a checkpoint that the busiest worker stores: each goes to two where there are two.
    fn parts_each(&self, crew: &Crew) -> u32 {
        let copies = crew.workers.min(2);
        (self.config.checkpoint.parts * copies).div_ceil(crew.workers)
    }

    /// Seconds until the busiest worker has stored its parts.
    fn store_seconds(&self, crew: &Crew) -> f64 {
        let parts = f64::from(self.config.checkpoint.parts);
        let bytes = self.footprint.state_bytes as f64 * f64::from(self.parts_each(crew)) / parts;
        8.0 * bytes / (self.store_bandwidth * 1e9)
    }

    /// Every derived time, with the longest step that is shown.
    fn timeouts(&self) -> Timeouts {
        let setting = Duration::from_secs_f64(self.config.cluster.max_stall_seconds);
        let longest = self.crews.iter().map(|crew| self.step_seconds(crew));
        let longest = longest.fold(0.0, f64::max);
        Timeouts::new(setting).measured(Duration::from_secs_f64(longest), Duration::ZERO)
    }

    /// Evaluations of the run, its first and last state included.
    fn evaluations(&self) -> u64 {
        let (config, steps) = (&self.config, self.config.run.steps);
        let between = config.rhythm().completed(steps.saturating_sub(1));
        match config.data.validation.is_empty() {
            true => 0,
            false => between + 2,
        }
    }

    /// What keeps the run from starting.
    fn refusals(&self) -> &[String] {
        self.data.as_ref().map_or(&[], |data| &data.refusals)
    }

    fn json(&self) -> Value {
        let crew = |crew: &Crew| {
            let mut value = json!(crew);
            value["step_seconds"] = json!(self.step_seconds(crew));
            value["exchange_seconds"] = json!(crew.exchange_seconds(self.bandwidth));
            value["run_seconds"] = json!(self.run_seconds(crew));
            value["worker_hours"] = json!(self.worker_hours(crew));
            value["efficiency"] = json!(self.efficiency(crew));
            value["checkpoint_store_seconds"] = json!(self.store_seconds(crew));
            value
        };
        let config = &self.config;
        let timeouts = self.timeouts().listed();
        let timeouts = timeouts.map(|(name, time)| (name.to_owned(), json!(time.as_secs_f64())));
        json!({
            "run": config.run.name, "sha256": config.sha256(), "steps": config.run.steps,
            "evaluations": self.evaluations(),
            "global_batch": config.batch.global_batch, "lanes": config.batch.lanes,
            "micro_batches_per_lane": config.micro_batches_per_lane(),
            "micro_batch": config.batch.micro_batch, "device_batch": config.batch.device_batch,
            "footprint": self.footprint, "lane": self.lane,
            "bandwidth_gigabits": self.bandwidth,
            "workers": self.crews.iter().map(crew).collect::<Vec<_>>(),
            "data": self.data.as_ref().ok(), "data_unknown": self.data.as_ref().err(),
            "timeouts_seconds": serde_json::Map::from_iter(timeouts),
            "refusals": self.refusals(),
        })
    }

    fn worker_hours(&self, crew: &Crew) -> f64 {
        self.run_seconds(crew) * f64::from(crew.workers) / 3600.0
    }
}

/// More workers than lanes are spares; so many are a typing error.
const WORKERS_MAX: u32 = 65_536;

/// Powers of two from the fewest workers to one per lane.
fn usual_workers(config: &ValidConfig) -> Vec<u32> {
    let (fewest, lanes) = (config.cluster.min_workers, config.batch.lanes);
    let powers = (0..32).map(|power| 1u32 << power);
    let between = powers.filter(|w| *w > fewest && *w < lanes);
    let mut all: Vec<u32> = std::iter::once(fewest).chain(between).collect();
    all.push(lanes);
    all.dedup();
    all
}
