//! From a run's configuration to the world that is simulated: what each thing costs, and how often
//! what fails.

use std::str::FromStr;
use std::time::Duration;

use belfry_configs::{Timeouts, ValidConfig};
use belfry_simulator::{Costs, Mtbf, Setup, Span, World};

use crate::plan::{Crew, Footprint};

/// Bytes per millisecond of a Gbit/s.
const BYTES_PER_MS: f64 = 125_000.0;
/// A message between two machines of one cluster, in milliseconds.
const NETWORK: Span = Span::new(1, 2);
/// A small request to an object store: what S3 takes.
const STORE: Span = Span::new(20, 100);
/// Heartbeat periods per simulated heartbeat, so that a day is simulated in seconds.
const HEARTBEATS_APART: u64 = 4;
/// A restart takes up to so much longer or shorter.
const RESTART_SPREAD: f64 = 0.25;
/// More steps than any rehearsal reaches: it ends by its time.
const STEPS: u64 = 1 << 40;
/// Steps by which the undisturbed one is measured, and looks at the world in each.
const UNDISTURBED: u64 = 64;
const UNDISTURBED_LOOKS: u64 = 1_000;
/// By then the first step has begun, whatever the network.
const START_MS: u64 = 36_000_000;
/// As `belfry coordinator` journals.
const HORIZON_STEPS: u64 = 64;

/// A time as people write it: `90s`, `10m`, `24h`, `2d`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Time(pub f64);

impl FromStr for Time {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let units = [
            ("ms", 1e-3),
            ("s", 1.0),
            ("m", 60.0),
            ("h", 3600.0),
            ("d", 86_400.0),
        ];
        let unit = units.iter().find_map(|(unit, seconds)| {
            let number = text.strip_suffix(unit)?.parse::<f64>().ok()?;
            Some(number * seconds)
        });
        match unit {
            Some(seconds) if seconds > 0.0 && seconds.is_finite() => Ok(Time(seconds)),
            _ => Err("needs a number above zero with s, m, h or d, for instance 10m".into()),
        }
    }
}

impl Time {
    /// In whole milliseconds, at least one.
    pub fn millis(self) -> u64 {
        (self.0 * 1e3).round().max(1.0) as u64
    }

    /// As people write it.
    pub fn text(self) -> String {
        let units = [("d", 86_400.0), ("h", 3600.0), ("m", 60.0)];
        let whole = |(_, seconds): &(&str, f64)| self.0 >= *seconds && self.0 % seconds == 0.0;
        match units.into_iter().find(whole) {
            Some((unit, seconds)) => format!("{}{unit}", self.0 / seconds),
            None => format!("{}s", self.0),
        }
    }
}

/// What is rehearsed; everything but the seed.
#[derive(Clone, Debug)]
pub struct Scenario {
    pub setup: Setup,
    pub costs: Costs,
    pub mtbf: Mtbf,
    /// Simulated milliseconds.
    pub millis: u64,
    /// Milliseconds of an undisturbed step of all workers, as simulated.
    pub step_ms: f64,
}

/// What the cluster is like.
#[derive(Clone, Copy, Debug)]
pub struct Cluster {
    pub workers: u32,
    pub coordinators: u32,
    pub lane_seconds: f64,
    /// Gbit/s of each worker to the others, and to the store.
    pub bandwidth: f64,
    pub store_bandwidth: f64,
    pub restart: Time,
}

impl Scenario {
    /// The run of `config` on this cluster, so long and with so many failures.
    pub fn new(
        config: &ValidConfig,
        footprint: &Footprint,
        cluster: Cluster,
        mtbf: Mtbf,
        length: Time,
    ) -> Self {
        let stall = Duration::from_secs_f64(config.cluster.max_stall_seconds);
        let workers = cluster.workers as usize;
        let setup = Setup {
            coordinators: cluster.coordinators as usize,
            min_workers: config.cluster.min_workers as usize,
            checkpoint_every: config.checkpoint.every_steps,
            parts: config.checkpoint.parts,
            nodes_max: config.cluster.nodes_per_worker_max,
            timeouts: Timeouts::new(stall),
            horizon_steps: HORIZON_STEPS,
            audit_every: config.cluster.audit_every_steps,
            evaluates: false,
            gathers: config.gathers(),
            ..Setup::new(workers, config.batch.lanes, STEPS, stall)
        };
        let crew = Crew::of(config, footprint.gradient_bytes, cluster.workers);
        let rate = |gigabits: f64| ((gigabits * BYTES_PER_MS) as u64).max(1);
        let restart = |factor: f64| (cluster.restart.0 * 1e3 * factor) as u64;
        let restart = Span::new(restart(1.0 - RESTART_SPREAD), restart(1.0 + RESTART_SPREAD));
        let lane = (cluster.lane_seconds * 1e3).round().max(1.0) as u64;
        let costs = Costs {
            lane: Span::new(lane, lane),
            apply: Span::new(0, 0),
            gradient_bytes: moved_as(&crew),
            state_bytes: footprint.state_bytes,
            peer_bytes_per_ms: rate(cluster.bandwidth),
            store_bytes_per_ms: rate(cluster.store_bandwidth),
            store: STORE,
            network: NETWORK,
            worker_restart: restart,
            coordinator_restart: restart,
            heartbeats_apart: HEARTBEATS_APART,
            ..Costs::default()
        };
        Scenario {
            step_ms: undisturbed(&setup, &costs),
            millis: length.millis(),
            setup,
            costs,
            mtbf,
        }
    }
}

/// The mean time of a step in a world without failures.
fn undisturbed(setup: &Setup, costs: &Costs) -> f64 {
    let expected = costs.step_ms(setup, setup.workers).max(1);
    let look = (expected / UNDISTURBED_LOOKS).max(1);
    let mut world = World::new(0, setup.clone(), costs.clone());
    world.silent = true;
    let mut now = 0;
    let mut reach = |steps| {
        while world.counts.steps < steps && now < 20 * UNDISTURBED * expected + START_MS {
            now += look;
            world.run(now);
        }
        now
    };
    let first = reach(1);
    (reach(1 + UNDISTURBED) - first) as f64 / UNDISTURBED as f64
}

/// The gradient whose exchange over a single tree node per worker moves what the busiest moves.
fn moved_as(crew: &Crew) -> u64 {
    let busiest = crew.exchange[0].max(crew.exchange[1]);
    match u64::from(crew.workers) {
        0 | 1 => 0,
        workers => busiest * workers / (2 * (workers - 1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_people_do() {
        for (text, seconds) in [
            ("90s", 90.0),
            ("10m", 600.0),
            ("24h", 86_400.0),
            ("0.5d", 43_200.0),
        ] {
            assert_eq!(text.parse(), Ok(Time(seconds)), "{text}");
        }
        assert_eq!("1500ms".parse::<Time>().map(Time::millis), Ok(1500));
        for wrong in ["", "10", "m", "-1m", "0s", "10 m", "infm"] {
            assert!(wrong.parse::<Time>().is_err(), "{wrong}");
        }
        assert_eq!(
            [Time(600.0).text(), Time(86_400.0).text(), Time(90.0).text()],
            ["10m", "1d", "90s"]
        );
    }
}
