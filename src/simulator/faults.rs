//! What may go wrong, and when: a schedule, or failures at random with a mean time between them.

use super::world::{Happening, World};

/// A process of the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Process {
    /// By number.
    Worker(usize),
    /// By number.
    Coordinator(usize),
}

/// What may go wrong. Times are virtual milliseconds; a fault that finds nothing to break is not
/// counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL; the process is started again later.
    Kill(Process),
    /// SIGKILL after so many more effects of its core: in the middle of a list of them.
    KillMidway(Process, u32),
    /// SIGSTOP for so long.
    Pause(Process, u64),
    /// The worker computes so many times slower, for so long.
    Slow(usize, u64, u64),
    /// The worker is asked to leave, and started again later.
    Terminate(usize),
    /// The worker's connection to its coordinator breaks; both hear of it.
    CutSession(usize),
    /// The worker's end breaks and the coordinator is not told: the worker's next connection finds
    /// the old one open, and what was under way in the old one comes up to so much later.
    DuplicateSession(usize, u64),
    /// The coordinator's end breaks and the worker is not told before its keepalive.
    HalfOpen(usize),
    /// Nothing passes from these to those, for so long.
    Cut(Vec<Process>, Vec<Process>, u64),
    /// Nothing passes between these and those, for so long.
    Partition(Vec<Process>, Vec<Process>, u64),
    /// The worker's link is so many times slower, for so long.
    SlowLink(usize, u64, u64),
    /// A running exchange of this worker breaks, though everybody lives.
    BreakExchange(usize),
    /// A frame of this worker arrives with a flipped bit.
    FlipFrame(usize),
    /// The outcome of this worker's present exchange comes so much later, whatever happened since.
    LateOutcome(usize, u64),
    /// A shard stays unreadable from now on: for this worker, or for all.
    LoseShard(Option<usize>, u32),
    /// The object store answers nothing but errors, for so long.
    StoreOutage(u64),
    /// It is so many times slower, for so long.
    StoreSlow(u64, u64),
    /// The next requests, so many, fail and do nothing.
    StoreErrors(u32),
    /// The next requests, so many, are done and answered with an error.
    StoreLostAnswers(u32),
}

impl Fault {
    /// Its kind, for tables.
    pub fn kind(&self) -> &'static str {
        use Process::{Coordinator, Worker};
        match self {
            Fault::Kill(Worker(_)) => "worker killed",
            Fault::Kill(Coordinator(_)) => "coordinator killed",
            Fault::KillMidway(Worker(_), _) => "worker killed between effects",
            Fault::KillMidway(Coordinator(_), _) => "coordinator killed between effects",
            Fault::Pause(Worker(_), _) => "worker frozen",
            Fault::Pause(Coordinator(_), _) => "coordinator frozen",
            Fault::Slow(..) => "worker slow",
            Fault::Terminate(_) => "worker asked to leave",
            Fault::CutSession(_) => "connection broken",
            Fault::DuplicateSession(..) => "connection doubled",
            Fault::HalfOpen(_) => "connection half open",
            Fault::Cut(..) => "one-way cut",
            Fault::Partition(..) => "partition",
            Fault::SlowLink(..) => "slow link",
            Fault::BreakExchange(_) => "exchange broken",
            Fault::FlipFrame(_) => "frame flipped",
            Fault::LateOutcome(..) => "outcome late",
            Fault::LoseShard(Some(_), _) => "shard lost to a worker",
            Fault::LoseShard(None, _) => "shard lost to all",
            Fault::StoreOutage(_) => "store down",
            Fault::StoreSlow(..) => "store slow",
            Fault::StoreErrors(_) => "store errors",
            Fault::StoreLostAnswers(_) => "store answers lost",
        }
    }
}

/// Failures at random, as a Poisson process: each process dies with this mean time between its
/// deaths, in virtual milliseconds. Zero: never.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mtbf {
    /// Of each worker.
    pub worker_ms: u64,
    /// Of each coordinator.
    pub coordinator_ms: u64,
}

impl World {
    /// Lets a fault happen at this time.
    pub fn schedule(&mut self, at: u64, fault: Fault) {
        let delay = at.saturating_sub(self.now);
        self.after(delay, Happening::Fault(fault));
    }

    /// Lets processes die at random from now on.
    pub fn fail_at_random(&mut self, mtbf: Mtbf) {
        self.mtbf = mtbf;
        for worker in [true, false] {
            self.next_failure(worker);
        }
    }

    fn next_failure(&mut self, worker: bool) {
        let (mean, processes) = match worker {
            true => (self.mtbf.worker_ms, self.setup.workers),
            false => (self.mtbf.coordinator_ms, self.setup.coordinators),
        };
        if mean == 0 || processes == 0 {
            return;
        }
        // The first of many independent failures: their rates add.
        let uniform = (self.below(1 << 53) + 1) as f64 / (1u64 << 53) as f64;
        let wait = -uniform.ln() * mean as f64 / processes as f64;
        self.after(wait as u64, Happening::Failure(worker));
    }

    pub(super) fn failure(&mut self, worker: bool) {
        let process = match worker {
            true => Process::Worker(self.below(self.setup.workers as u64) as usize),
            false => Process::Coordinator(self.below(self.setup.coordinators as u64) as usize),
        };
        self.fault(Fault::Kill(process));
        self.next_failure(worker);
    }

    pub(super) fn fault(&mut self, fault: Fault) {
        self.last_words(&fault);
        let kind = fault.kind();
        self.say(|| format!("FAULT {fault:?}"));
        if self.strike(fault) {
            *self.counts.faults.entry(kind).or_default() += 1;
        }
    }

    /// Where heartbeats are simulated sparsely, whoever falls silent says its last just before.
    fn last_words(&mut self, fault: &Fault) {
        if self.costs.heartbeats_apart == 1 {
            return;
        }
        let (Fault::Pause(process, _) | Fault::Kill(process)) = fault else {
            return;
        };
        if let Process::Worker(worker) = *process {
            self.beat(worker);
        }
    }

    fn strike(&mut self, fault: Fault) -> bool {
        use Process::{Coordinator, Worker};
        let now = self.now;
        match fault {
            Fault::Kill(Worker(worker)) => self.kill_worker(worker),
            Fault::Kill(Coordinator(lead)) => self.kill_lead(lead),
            Fault::KillMidway(Worker(worker), n) => {
                self.workers[worker].dies_after = Some(n);
                self.workers[worker].core.is_some()
            }
            Fault::KillMidway(Coordinator(lead), n) => {
                self.leads[lead].dies_after = Some(n);
                self.leads[lead].up
            }
            Fault::Pause(Worker(worker), time) => {
                self.workers[worker].paused_until = now + time;
                self.workers[worker].core.is_some()
            }
            Fault::Pause(Coordinator(lead), time) => self.pause_lead(lead, time),
            Fault::Slow(worker, factor, time) => {
                self.workers[worker].slow = (factor, now + time);
                true
            }
            Fault::Terminate(worker) => self.terminate(worker),
            Fault::CutSession(worker) => self.end_session(worker),
            Fault::DuplicateSession(worker, late) => self.double_session(worker, late),
            Fault::HalfOpen(worker) => self.half_open(worker),
            Fault::Cut(from, to, time) => self.cut(from, to, time),
            Fault::Partition(these, those, time) => {
                self.cut(these.clone(), those.clone(), time);
                self.cut(those, these, time)
            }
            Fault::SlowLink(worker, factor, time) => {
                self.network.slow.insert(worker, (factor, now + time));
                true
            }
            Fault::BreakExchange(worker) => self.break_exchange(worker, false),
            Fault::FlipFrame(worker) => self.break_exchange(worker, true),
            Fault::LateOutcome(worker, late) => {
                self.workers[worker].outcome_late = late;
                self.workers[worker].core.is_some()
            }
            Fault::LoseShard(whose, shard) => self.lost_shards.insert((whose, shard)),
            Fault::StoreOutage(time) => {
                self.store.down_until = now + time;
                true
            }
            Fault::StoreSlow(factor, time) => {
                self.store.slow = (factor, now + time);
                true
            }
            Fault::StoreErrors(n) => {
                self.store.errors += n;
                true
            }
            Fault::StoreLostAnswers(n) => {
                self.store.lost_answers += n;
                true
            }
        }
    }
}
