//! How long a worker computes one lane of a step: given, measured here, or assumed from the model's
//! arithmetic. It always says which.

use std::str::FromStr;
use std::time::Instant;

use anyhow::ensure;
use belfry_configs::ValidConfig;
use clap::Args;
use serde::Serialize;

use crate::bench::Rehearsal;
use crate::size::step_macs;

/// What a data centre's GPU reaches with f32 products in frameworks of today, and what two cores of
/// a server do; only for plans that nobody measured anything for.
const GPU_TFLOPS: f64 = 30.0;
const CPU_TFLOPS: f64 = 0.1;
/// Steps of a measurement, after one that pays for fresh memory.
const MEASURED: u32 = 3;

/// Where a step's time comes from.
#[derive(Args, Clone, Default)]
pub struct LaneTimeArguments {
    /// Seconds that a step computes, without the exchange of gradients: 2.5@64 is 2.5 s with 64
    /// workers.
    #[arg(long, value_name = "SECONDS[@WORKERS]")]
    pub step_seconds: Option<StepSeconds>,
    /// Measure a lane on this machine, as `belfry bench step` does.
    #[arg(long, conflicts_with_all = ["step_seconds", "tflops"])]
    pub measure: bool,
    /// Arithmetic that a worker reaches, where no time is given; two operations per
    /// multiply-accumulate. Default: 30 for GPUs, 0.1 for CPUs: a guess.
    #[arg(long, value_name = "X", conflicts_with = "step_seconds")]
    pub tflops: Option<f64>,
}

/// A step's time at some number of workers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepSeconds {
    seconds: f64,
    workers: Option<u32>,
}

impl FromStr for StepSeconds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (seconds, workers) = match text.split_once('@') {
            Some((seconds, workers)) => (seconds, Some(workers)),
            None => (text, None),
        };
        let seconds: f64 = seconds.parse().map_err(|e| format!("{e}"))?;
        let workers: Option<u32> = match workers.map(str::parse).transpose() {
            Ok(workers) => workers,
            Err(e) => return Err(format!("{e}")),
        };
        if !(1e-6..=1e6).contains(&seconds) || workers == Some(0) {
            return Err("needs seconds above zero, and after @ a number of workers".into());
        }
        Ok(StepSeconds { seconds, workers })
    }
}

/// The time of one lane on one worker.
#[derive(Clone, Debug, Serialize)]
pub struct LaneTime {
    /// Of all its micro-batches, forward and backward.
    pub seconds: f64,
    /// Where it comes from, in words.
    pub origin: String,
}

impl LaneTimeArguments {
    /// The time of a lane; a time without a number of workers is of `workers`, whose largest share
    /// of the lanes `share` says.
    ///
    /// # Errors
    /// What cannot be measured, or is not positive.
    pub fn lane(
        &self,
        config: &ValidConfig,
        workers: u32,
        share: impl Fn(u32) -> u32,
    ) -> anyhow::Result<LaneTime> {
        if let Some(given) = self.step_seconds {
            let workers = given.workers.unwrap_or(workers);
            let seconds = given.seconds / f64::from(share(workers));
            let origin = match workers {
                1 => format!("given: {} s a step with one worker", given.seconds),
                _ => format!("given: {} s a step with {workers} workers", given.seconds),
            };
            return Ok(LaneTime { seconds, origin });
        }
        if self.measure {
            return measured(config);
        }
        let gpu = config.run.device.starts_with("cuda");
        let guess = if gpu { GPU_TFLOPS } else { CPU_TFLOPS };
        let tflops = self.tflops.unwrap_or(guess);
        ensure!(tflops > 0.0, "--tflops: must be above zero");
        let said = match self.tflops {
            Some(_) => "as given",
            None => "a guess; --measure or --step-seconds tell better",
        };
        let origin = format!("assumed: {tflops} TFLOP/s per worker, {said}");
        let seconds = lane_operations(config) / (tflops * 1e12);
        Ok(LaneTime { seconds, origin })
    }
}

/// Operations of one lane of a step, two per multiply-accumulate.
pub fn lane_operations(config: &ValidConfig) -> f64 {
    let pairs = u64::from(config.batch.global_batch / config.batch.lanes);
    let words = pairs as f64 * f64::from(config.data.text_len);
    let masked = words * f64::from(config.data.mlm_probability);
    2.0 * step_macs(config, pairs, masked as u64)
}

fn measured(config: &ValidConfig) -> anyhow::Result<LaneTime> {
    belfry_worker::memory::keep_freed();
    let mut worker = Rehearsal::new(config, 1)?;
    eprintln!("measuring a lane on {} ...", config.run.device);
    worker.step()?;
    let mut times = Vec::new();
    for _ in 0..MEASURED {
        let begun = Instant::now();
        worker.step()?;
        times.push(begun.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(LaneTime {
        seconds: times[times.len() / 2],
        origin: format!(
            "measured: {MEASURED} steps of one lane on this machine's {}, the optimizer included",
            config.run.device
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_names_its_workers_or_leaves_it() {
        let parsed = |text: &str| text.parse::<StepSeconds>();
        let of = |seconds, workers| Ok(StepSeconds { seconds, workers });
        assert_eq!(parsed("2.5@64"), of(2.5, Some(64)));
        assert_eq!(parsed("2.5"), of(2.5, None));
        for wrong in ["", "0", "-1", "2@0", "2@x", "nan", "1e9"] {
            assert!(parsed(wrong).is_err(), "{wrong}");
        }
    }
}
