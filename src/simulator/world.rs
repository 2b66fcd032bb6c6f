//! A cluster in one thread: the production cores of coordinators and workers, with network, store,
//! devices and clocks replaced by a queue of happenings in virtual time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use belfry_proto::v1::{coordinator_message as down, worker_message as up};
use belfry_worker::core as work;
use xxhash_rust::xxh3::xxh3_64;

use super::arithmetic::{Reference, State};
use super::coordinator::Lead;
use super::counts::Counts;
use super::exchange::{Exchange, Id};
use super::faults::{Fault, Mtbf, Process};
use super::invariants::Witness;
use super::network::{Network, Session};
use super::setup::{Costs, Setup, Span};
use super::store::{Store, Write};

/// Lines of the log that are kept.
const LOG_LINES_MAX: usize = 20_000;

/// Something that comes to pass at its time. A process is named with its life: what was meant for
/// an earlier one is dropped.
pub(super) enum Happening {
    /// A message reaches the coordinator's end of a session.
    Up(u64, up::Body),
    /// The coordinator's end of a session ends.
    Gone(u64),
    /// A message reaches the worker's end.
    Down(u64, down::Body),
    /// The worker's end ends.
    Closed(u64),
    /// Both ends would have noticed by now that nothing passes.
    Keepalive(u64),
    Connect(usize, u64),
    Tick(usize, u64),
    /// A standby looks at the journal.
    Watch(usize, u64),
    /// A coordinator's request reaches the store.
    Lands(usize, u64, Box<Write>),
    /// Its answer reaches the coordinator.
    Answer(usize, u64, Box<Write>, Answer),
    /// The coordinator tries a write again.
    Retry(usize, u64, Box<Write>),
    Heartbeat(usize, u64),
    Worker(usize, u64, work::Event),
    /// A worker's part reaches the store; tries so far.
    Part(usize, u64, State, u32),
    Arrived(usize, u64, u64, u64, Option<Vec<String>>),
    ExchangeDue(Id),
    ExchangeSilent(Id),
    StartWorker(usize),
    StartLead(usize),
    Fault(Fault),
    /// A process dies at random: a worker, or a coordinator.
    Failure(bool),
}

/// What the store says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Done,
    /// What stands there is another's.
    Others,
    Error,
}

pub(super) struct Worker {
    /// Numbers its processes; 0 before the first.
    pub(super) life: u64,
    pub(super) core: Option<work::Core>,
    pub(super) state: Option<State>,
    pub(super) session: Option<u64>,
    pub(super) acquisition: u64,
    pub(super) device_free_at: u64,
    pub(super) paused_until: u64,
    /// So many times slower, until then.
    pub(super) slow: (u64, u64),
    /// The process is killed after so many more effects.
    pub(super) dies_after: Option<u32>,
    /// The outcome of the next exchange comes so much later.
    pub(super) outcome_late: u64,
    /// Asked to leave.
    pub(super) leaving: bool,
    /// The shard that each lane was computed from.
    pub(super) shards_read: BTreeMap<u32, u32>,
}

/// See the module. A world is a function of its seed, setup, costs and faults.
pub struct World {
    /// The run.
    pub setup: Setup,
    /// What things cost.
    pub costs: Costs,
    /// Totals so far.
    pub counts: Counts,
    /// How the run ended: whether well, and in words.
    pub outcome: Option<(bool, String)>,
    /// What happened, as a log; the last lines only. Empty if `silent`.
    pub log: VecDeque<String>,
    /// Keeps no log: for long runs.
    pub silent: bool,
    pub(super) now: u64,
    number: u64,
    random: u64,
    queue: BTreeMap<(u64, u64), Happening>,
    pub(super) mtbf: Mtbf,
    pub(super) lives: u64,
    pub(super) leads: Vec<Lead>,
    pub(super) workers: Vec<Worker>,
    pub(super) network: Network,
    pub(super) sessions: BTreeMap<u64, Session>,
    pub(super) sessions_begun: u64,
    pub(super) exchanges: BTreeMap<Id, Exchange>,
    pub(super) store: Store,
    pub(super) reference: Reference,
    pub(super) witness: Witness,
    /// Shards that cannot be read, for one worker or for all.
    pub(super) lost_shards: BTreeSet<(Option<usize>, u32)>,
}

impl World {
    /// A world at rest; its processes start at once.
    pub fn new(seed: u64, setup: Setup, costs: Costs) -> Self {
        let mut world = World {
            reference: Reference::new(setup.lanes, setup.gathers),
            counts: Counts::default(),
            outcome: None,
            log: VecDeque::new(),
            silent: false,
            now: 0,
            number: 0,
            random: seed,
            queue: BTreeMap::new(),
            mtbf: Mtbf::default(),
            lives: 0,
            leads: Vec::new(),
            workers: Vec::new(),
            network: Network::default(),
            sessions: BTreeMap::new(),
            sessions_begun: 0,
            exchanges: BTreeMap::new(),
            store: Store::default(),
            witness: Witness::default(),
            lost_shards: BTreeSet::new(),
            setup,
            costs,
        };
        for lead in 0..world.setup.coordinators {
            world.leads.push(Lead::default());
            world.after(lead as u64, Happening::StartLead(lead));
        }
        for worker in 0..world.setup.workers {
            world.workers.push(Worker {
                life: 0,
                core: None,
                state: None,
                session: None,
                acquisition: 0,
                device_free_at: 0,
                paused_until: 0,
                slow: (1, 0),
                dies_after: None,
                outcome_late: 0,
                leaving: false,
                shards_read: BTreeMap::new(),
            });
            let delay = world.below(400);
            world.after(delay, Happening::StartWorker(worker));
        }
        world
    }

    /// A uniform number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        xxh3_64(&self.random.to_le_bytes()) % bound.max(1)
    }

    /// Virtual milliseconds since the beginning.
    pub fn now(&self) -> u64 {
        self.now
    }

    /// Lets things happen until the run ends, or until `deadline`; says whether it ended.
    ///
    /// # Panics
    /// When an invariant is violated, naming it.
    pub fn run(&mut self, deadline: u64) -> bool {
        while self.outcome.is_none() {
            match self.queue.first_key_value() {
                Some(((at, _), _)) if *at <= deadline => {}
                _ => return false,
            }
            let Some(((at, number), happening)) = self.queue.pop_first() else {
                return false;
            };
            self.now = at;
            let resumes = self.held_until(&happening);
            if resumes > at {
                self.queue.insert((resumes, number), happening);
                continue;
            }
            self.counts.happenings += 1;
            self.happen(happening);
            self.restore_shards();
        }
        true
    }

    pub(super) fn draw(&mut self, span: Span) -> u64 {
        span.least + self.below(span.most.saturating_sub(span.least) + 1)
    }

    pub(super) fn after(&mut self, delay: u64, happening: Happening) {
        self.number += 1;
        self.queue
            .insert((self.now + delay, self.number), happening);
    }

    /// Puts off what is under way to the coordinator in this session, in its order.
    pub(super) fn put_off(&mut self, session: u64, time: u64) {
        let mine =
            |h: &Happening| matches!(h, Happening::Up(s, _) | Happening::Gone(s) if *s == session);
        let due: Vec<(u64, u64)> = self
            .queue
            .iter()
            .filter(|(_, h)| mine(h))
            .map(|(key, _)| *key)
            .collect();
        for (at, number) in due {
            if let Some(happening) = self.queue.remove(&(at, number)) {
                self.queue.insert((at + time, number), happening);
            }
        }
    }

    pub(super) fn say(&mut self, text: impl FnOnce() -> String) {
        if self.silent {
            return;
        }
        if self.log.len() >= LOG_LINES_MAX {
            self.log.pop_front();
        }
        self.log.push_back(format!("{:>7} {}", self.now, text()));
    }

    pub(super) fn is_lost(&self, worker: usize, shard: u32) -> bool {
        let who = [None, Some(worker)];
        who.iter().any(|w| self.lost_shards.contains(&(*w, shard)))
    }

    /// A run that cannot do without a shard says so and ends; people bring it back and go on.
    fn restore_shards(&mut self) {
        let stopped = |(success, reason): &(bool, String)| !success && reason.contains("restore");
        if !self.outcome.as_ref().is_some_and(stopped) || self.lost_shards.is_empty() {
            return;
        }
        let (_, reason) = self.outcome.take().expect("it ended");
        self.say(|| format!("RESTORED after: {reason}"));
        self.lost_shards.clear();
        self.counts.restored += 1;
        for lead in 0..self.leads.len() {
            self.kill_lead(lead);
        }
        for worker in 0..self.workers.len() {
            self.kill_worker(worker);
        }
    }

    /// A stopped process gets what happened to it when it goes on; what a cut holds back comes
    /// when it heals, unless the connection is gone by then.
    fn held_until(&self, happening: &Happening) -> u64 {
        let (to, from) = match happening {
            Happening::Up(s, _) | Happening::Gone(s) => match self.sessions.get(s) {
                Some(s) => (
                    Process::Coordinator(s.lead),
                    Some(Process::Worker(s.worker)),
                ),
                None => return 0,
            },
            Happening::Down(s, _) | Happening::Closed(s) => match self.sessions.get(s) {
                Some(s) => (
                    Process::Worker(s.worker),
                    Some(Process::Coordinator(s.lead)),
                ),
                None => return 0,
            },
            Happening::Tick(lead, life)
            | Happening::Watch(lead, life)
            | Happening::Answer(lead, life, ..)
            | Happening::Retry(lead, life, _) => match self.lead_lives(*lead, *life) {
                true => (Process::Coordinator(*lead), None),
                false => return 0,
            },
            Happening::Connect(w, _)
            | Happening::Heartbeat(w, _)
            | Happening::Worker(w, ..)
            | Happening::Arrived(w, ..) => (Process::Worker(*w), None),
            _ => return 0,
        };
        let paused = match to {
            Process::Worker(w) => self.workers[w].paused_until,
            Process::Coordinator(c) => self.leads[c].paused_until,
        };
        let cut = from.map_or(0, |from| self.network.cut_until(self.now, from, to));
        paused.max(cut)
    }

    pub(super) fn alive(&self, worker: usize, life: u64) -> bool {
        self.workers[worker].life == life && self.workers[worker].core.is_some()
    }

    fn happen(&mut self, happening: Happening) {
        use Happening as H;
        match happening {
            H::Up(session, body) => self.up(session, body),
            H::Gone(session) => self.gone(session),
            H::Down(session, body) => self.down(session, body),
            H::Closed(session) => self.closed(session),
            H::Keepalive(session) => self.keepalive(session),
            H::Connect(worker, life) => self.connect(worker, life),
            H::Tick(lead, life) => self.tick(lead, life),
            H::Watch(lead, life) => self.watch(lead, life),
            H::Lands(lead, life, write) => self.lands(lead, life, write),
            H::Answer(lead, life, write, answer) => self.answered(lead, life, write, answer),
            H::Retry(lead, life, write) => self.try_write(lead, life, write),
            H::Heartbeat(worker, life) => self.heartbeat(worker, life),
            H::Worker(worker, life, event) => {
                if self.alive(worker, life) {
                    self.tell_worker(worker, event);
                }
            }
            H::Part(worker, life, state, part) => self.part_lands(worker, life, state, part),
            H::Arrived(worker, life, acquisition, step, sources) => {
                if self.alive(worker, life) && self.workers[worker].acquisition == acquisition {
                    self.arrive(worker, step, sources);
                }
            }
            H::ExchangeDue(id) => self.exchange_due(id),
            H::ExchangeSilent(id) => self.exchange_silent(id),
            H::StartWorker(worker) => self.start_worker(worker),
            H::StartLead(lead) => self.start_lead(lead),
            H::Fault(fault) => self.fault(fault),
            H::Failure(worker) => self.failure(worker),
        }
    }
}
