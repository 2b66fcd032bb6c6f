//! One number of workers: who holds which lanes, what that costs in memory and on the network, and
//! how long a step then takes.

use belfry_configs::{Transport, ValidConfig, Wire};
use belfry_proto::lanes::{cut, maximal_nodes};
use serde::Serialize;

/// Bits of a gigabit.
const GIGABIT: f64 = 1e9;

/// See the module.
#[derive(Clone, Debug, Serialize)]
pub struct Crew {
    /// Workers.
    pub workers: u32,
    /// Workers without lanes: hot spares.
    pub spares: u32,
    /// Lanes of the worker with the fewest, spares aside, and with the most.
    pub lanes: [u32; 2],
    /// Share of the workers' time that computes: lanes over workers times the largest share.
    pub utilisation: f64,
    /// Tree nodes of the worker with the most.
    pub nodes: u32,
    /// Host memory that these nodes take.
    pub node_bytes: u64,
    /// Bytes of a step that the busiest worker sends, and receives; frames' headers aside.
    pub exchange: [u64; 2],
    /// Bytes of a step on the whole network.
    pub exchange_all: u64,
}

/// The most lanes that one of so many equal workers gets.
pub fn largest_share(config: &ValidConfig, workers: u32) -> u32 {
    let ranges = equal_cut(config, workers);
    ranges.iter().map(|r| r.end - r.start).max().unwrap_or(0)
}

fn equal_cut(config: &ValidConfig, workers: u32) -> Vec<std::ops::Range<u32>> {
    let speeds = vec![1.0; workers as usize];
    let nodes_max = config.cluster.nodes_per_worker_max;
    cut(config.batch.lanes, &speeds, nodes_max)
}

impl Crew {
    /// So many workers of equal speed, cut as the coordinator does.
    pub fn of(config: &ValidConfig, gradient_bytes: u64, workers: u32) -> Self {
        let lanes = config.batch.lanes;
        let ranges = equal_cut(config, workers);
        let shares = ranges.iter().map(|r| r.end - r.start);
        let busy: Vec<u32> = shares.filter(|share| *share > 0).collect();
        let most = busy.iter().copied().max().unwrap_or(0);
        let nodes = ranges
            .iter()
            .map(|range| maximal_nodes(lanes, &range.clone().collect()).len() as u64);
        let nodes: Vec<u64> = nodes.collect();
        let nodes_max = nodes.iter().copied().max().unwrap_or(0);
        let (exchange, exchange_all) = exchange(config, &nodes, gradient_bytes);
        Crew {
            workers,
            spares: workers - busy.len() as u32,
            lanes: [busy.iter().copied().min().unwrap_or(0), most],
            utilisation: f64::from(lanes) / (f64::from(workers) * f64::from(most)),
            nodes: nodes_max as u32,
            node_bytes: nodes_max * gradient_bytes,
            exchange,
            exchange_all,
        }
    }

    /// Seconds of the exchange where every worker has so many Gbit/s each way.
    pub fn exchange_seconds(&self, gigabits: f64) -> f64 {
        let busiest = self.exchange[0].max(self.exchange[1]);
        8.0 * busiest as f64 / (gigabits * GIGABIT)
    }

    /// Seconds of a step: the largest share of lanes, then the exchange. Nothing of it is
    /// overlapped, so this is what one waits for at most.
    pub fn step_seconds(&self, lane_seconds: f64, gigabits: f64) -> f64 {
        f64::from(self.lanes[1]) * lane_seconds + self.exchange_seconds(gigabits)
    }
}

/// (what the busiest sends, what the busiest receives), and what all send. Each bucket's owner gets
/// every node of everybody else and sends the sum to them; owners are dealt evenly (DESIGN 5).
fn exchange(config: &ValidConfig, nodes: &[u64], gradient_bytes: u64) -> ([u64; 2], u64) {
    let workers = nodes.len() as u64;
    let of_others = |bytes: u64| bytes * (workers - 1) / workers;
    if config.collective.transport == Transport::NcclRing {
        let wire = match config.collective.wire {
            Wire::F32 => gradient_bytes,
            Wire::Bf16 => gradient_bytes / 2,
        };
        let each = 2 * of_others(wire);
        return ([each, each], workers * each);
    }
    let all: u64 = nodes.iter().sum();
    let sum = of_others(gradient_bytes);
    let sent = nodes
        .iter()
        .map(|own| of_others(own * gradient_bytes) + sum);
    let received = nodes
        .iter()
        .map(|own| (all - own) * gradient_bytes / workers + sum);
    let busiest = [sent.clone().max().unwrap_or(0), received.max().unwrap_or(0)];
    (busiest, sent.sum())
}
