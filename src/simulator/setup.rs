//! What a simulated run is and what its parts cost, in virtual milliseconds. Knows no event.

use std::time::Duration;

use belfry_configs::{Rhythm, Timeouts};
use belfry_coordinator::core::LinkPolicy;

/// A run. Everything that the cores are told about it.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Worker processes; each is started again when it dies.
    pub workers: usize,
    /// Coordinator processes: one leads, the others stand by.
    pub coordinators: usize,
    /// Below this the run waits.
    pub min_workers: usize,
    /// Lanes of the run.
    pub lanes: u32,
    /// Optimizer updates in total.
    pub steps: u64,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Parts of a checkpoint.
    pub parts: u32,
    /// Tree nodes that a worker may hold.
    pub nodes_max: u32,
    /// Every time by which the run decides.
    pub timeouts: Timeouts,
    /// How gradients are summed.
    pub links: LinkPolicy,
    /// Whether some workers have no device links.
    pub lacks_links: bool,
    /// Shards that the run may do without.
    pub quarantine_shards_max: u32,
    /// Steps that may be committed beyond the newest journal entry.
    pub horizon_steps: u64,
    /// Steps between lane audits; 0: none.
    pub audit_every: u64,
    /// Whether the run evaluates.
    pub evaluates: bool,
    /// Steps between evaluations; 0: only the first state and the last.
    pub evaluate_every: u64,
    /// Whether a lane's gradient needs every lane's features.
    pub gathers: bool,
    /// Bugs that a test of the simulator plants.
    #[doc(hidden)]
    pub planted: Plants,
}

/// At most one bug for each side; none in a run.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plants {
    pub lead: Option<belfry_coordinator::core::Planted>,
    pub worker: Option<belfry_worker::core::Planted>,
}

impl Setup {
    /// A run over TCP with one coordinator and the usual bounds.
    pub fn new(workers: usize, lanes: u32, steps: u64, max_stall: Duration) -> Self {
        Setup {
            workers,
            coordinators: 1,
            min_workers: 1,
            lanes,
            steps,
            checkpoint_every: steps.max(1),
            parts: 1,
            nodes_max: 4,
            timeouts: Timeouts::new(max_stall),
            links: LinkPolicy::Tcp,
            lacks_links: false,
            quarantine_shards_max: 0,
            horizon_steps: 64,
            audit_every: 0,
            evaluates: true,
            evaluate_every: 0,
            gathers: false,
            planted: Plants::default(),
        }
    }

    pub(super) fn rhythm(&self) -> Rhythm {
        Rhythm::Steps(self.evaluate_every)
    }

    pub(super) fn silence_ms(&self) -> u64 {
        millis(self.timeouts.silence)
    }

    /// How often a step goes through its lanes, with an exchange behind each time.
    fn passes(&self) -> u64 {
        if self.gathers { 2 } else { 1 }
    }

    /// Lanes of the member that has most, with `workers` members.
    fn lanes_most(&self, workers: usize) -> u64 {
        u64::from(self.lanes).div_ceil(workers.max(1) as u64)
    }
}

pub(super) fn millis(time: Duration) -> u64 {
    (time.as_millis() as u64).max(1)
}

/// Milliseconds from `least` to `most`, both included, drawn anew each time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The shortest.
    pub least: u64,
    /// The longest.
    pub most: u64,
}

impl Span {
    /// From `least` to `most` milliseconds.
    pub const fn new(least: u64, most: u64) -> Self {
        Span { least, most }
    }

    /// In the middle.
    pub const fn mean(self) -> u64 {
        (self.least + self.most) / 2
    }
}

/// What things cost. The default is a run of a few milliseconds per step, for many seeds.
#[derive(Clone, Debug)]
pub struct Costs {
    /// One lane's gradient on one worker, and its features where they are gathered.
    pub lane: Span,
    /// One optimizer update.
    pub apply: Span,
    /// One evaluation, and the export.
    pub evaluate: Span,
    /// Bytes of a gradient: an exchange moves them twice over each member's link.
    pub gradient_bytes: u64,
    /// Bytes of parameters and optimizer state, of a copy and of a checkpoint.
    pub state_bytes: u64,
    /// Of one worker's link to its peers, each way.
    pub peer_bytes_per_ms: u64,
    /// Of one worker's link to the object store.
    pub store_bytes_per_ms: u64,
    /// One request to the object store, without its bytes.
    pub store: Span,
    /// One message on its way.
    pub network: Span,
    /// From a worker's death to its next process.
    pub worker_restart: Span,
    /// From a coordinator's death to its next process.
    pub coordinator_restart: Span,
    /// Between two attempts to reach the coordinator.
    pub reconnect: Span,
    /// Heartbeat periods per simulated heartbeat: 1 simulates every one. Long runs take 4, and
    /// whoever fails says its last just before, so that no silence is noticed earlier for it.
    pub heartbeats_apart: u64,
}

impl Default for Costs {
    fn default() -> Self {
        Costs {
            lane: Span::new(5, 24),
            apply: Span::new(0, 9),
            evaluate: Span::new(5, 104),
            gradient_bytes: 10_000,
            state_bytes: 50_000,
            peer_bytes_per_ms: 2_000,
            store_bytes_per_ms: 2_000,
            store: Span::new(1, 100),
            network: Span::new(1, 20),
            worker_restart: Span::new(200, 2_200),
            coordinator_restart: Span::new(200, 3_200),
            reconnect: Span::new(50, 250),
            heartbeats_apart: 1,
        }
    }
}

impl Costs {
    /// An exchange between so many members, from its last beginning to its end.
    pub fn exchange_ms(&self, members: usize) -> u64 {
        let moved = 2 * self.gradient_bytes / self.peer_bytes_per_ms.max(1);
        moved * (members as u64).saturating_sub(1) / (members as u64).max(1)
    }

    /// A copy of the whole state from peers.
    pub fn copy_ms(&self) -> u64 {
        self.state_bytes / self.peer_bytes_per_ms.max(1)
    }

    /// A load of the whole state from the store.
    pub fn load_ms(&self) -> u64 {
        self.state_bytes / self.store_bytes_per_ms.max(1)
    }

    /// Mean time of a step with so many workers when nothing fails: the slowest member's lanes, the
    /// exchange, ready and commit on their way, the update.
    pub fn step_ms(&self, setup: &Setup, workers: usize) -> u64 {
        let lanes = setup.passes() * setup.lanes_most(workers) * self.lane.mean();
        let way = (2 + setup.passes()) * self.network.mean();
        lanes + self.exchange_ms(workers) + way + self.apply.mean()
    }

    /// The longest step when nothing fails.
    pub(super) fn step_longest_ms(&self, setup: &Setup) -> u64 {
        let lanes = setup.passes() * setup.lanes_most(setup.workers) * self.lane.most;
        let way = (2 + setup.passes()) * (self.network.most + 1);
        lanes + self.exchange_ms(setup.workers) + way + self.apply.most + 1
    }
}
