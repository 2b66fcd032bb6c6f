//! A cluster in one thread: the production cores of coordinator and workers, with network, store,
//! devices and clocks replaced by a queue of happenings in virtual time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use belfry_configs::Timeouts;
use belfry_coordinator::core as lead;
use belfry_coordinator::outgoing::Outgoing;
use belfry_proto::v1::{self, coordinator_message as down, worker_message as up};
use belfry_proto::{Digest, LaneRange, Schedule};
use belfry_worker::core as work;
use xxhash_rust::xxh3::xxh3_64;

use super::arithmetic::{State, reference};

/// Sizes of a simulated run.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub workers: usize,
    pub lanes: u32,
    pub steps: u64,
    pub checkpoint_every: u64,
    pub parts: u32,
    pub stall_ms: u64,
    pub links: lead::LinkPolicy,
    /// Whether some workers have no device links.
    pub lacks_links: bool,
    pub quarantine_shards_max: u32,
    pub horizon_steps: u64,
    /// Steps between lane audits; 0: none.
    pub audit_every: u64,
}

impl Sizes {
    /// The times of a run with this stall.
    pub fn timeouts(&self) -> Timeouts {
        Timeouts::new(Duration::from_millis(self.stall_ms))
    }
}

/// What may go wrong.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    KillWorker(usize),
    KillCoordinator,
    /// SIGSTOP for so many milliseconds.
    PauseWorker(usize, u64),
    PauseCoordinator(u64),
    /// The worker's connection to the coordinator breaks.
    CutSession(usize),
    /// A running exchange of this worker breaks, though everybody lives.
    BreakExchange(usize),
    /// The worker is asked to leave, and started again later.
    Terminate(usize),
    /// A shard stays unreadable from now on: for this worker, or for all.
    LoseShard(Option<usize>, u32),
}

pub(super) enum Happening {
    Up(u64, up::Body),
    Gone(u64),
    Down(u64, down::Body),
    Closed(u64),
    Connect(usize, u64),
    Tick(u64),
    Heartbeat(usize, u64),
    Worker(usize, u64, work::Event),
    Arrived(usize, u64, u64, u64, Option<Vec<String>>),
    Stored(u64, Job),
    /// A write of this coordinator is durable.
    Written(u64, lead::Effect),
    StartTimeout(u64, u64),
    StartWorker(usize),
    StartCoordinator,
    Fault(Fault),
}

pub(super) enum Job {
    Receipts(Vec<v1::StepRecord>),
    Checkpoint(u64, Vec<v1::StepRecord>),
}

pub(super) struct Worker {
    pub(super) life: u64,
    pub(super) core: Option<work::Core>,
    pub(super) state: Option<State>,
    pub(super) session: Option<u64>,
    pub(super) acquisition: u64,
    pub(super) device_free_at: u64,
    pub(super) paused_until: u64,
    /// The shard that each lane was computed from.
    pub(super) shards_read: BTreeMap<u32, u32>,
}

pub(super) struct Session {
    pub(super) worker: usize,
    pub(super) life: u64,
    pub(super) coordinator_life: u64,
    pub(super) up_at: u64,
    pub(super) down_at: u64,
    pub(super) open: bool,
}

#[derive(Default)]
pub(super) struct Exchange {
    pub(super) members: Vec<(String, Vec<LaneRange>)>,
    pub(super) joined: BTreeMap<usize, (usize, u64)>,
    pub(super) parts: BTreeMap<LaneRange, Arc<Vec<f32>>>,
    pub(super) failed: bool,
    pub(super) links: Option<ExchangeLinks>,
}

/// What the first member of an exchange said of its links.
pub(super) struct ExchangeLinks {
    pub(super) groups: Option<Vec<Vec<usize>>>,
    /// By a group's first rank.
    pub(super) ids: BTreeMap<usize, Vec<u8>>,
}

/// See the module.
pub struct World {
    pub sizes: Sizes,
    pub(super) now: u64,
    pub(super) number: u64,
    pub(super) random: u64,
    pub(super) queue: BTreeMap<(u64, u64), Happening>,
    pub(super) coordinator: Option<lead::Core>,
    pub(super) outgoing: Outgoing,
    /// Journal entries so far.
    pub(super) entries: u64,
    /// When the write that was begun last is done: they are done in their order.
    pub(super) written_at: u64,
    pub(super) coordinator_life: u64,
    pub(super) coordinator_paused_until: u64,
    pub(super) durable: lead::Durable,
    pub(super) workers: Vec<Worker>,
    pub(super) sessions: BTreeMap<u64, Session>,
    pub(super) exchanges: BTreeMap<(u64, u64), Exchange>,
    pub(super) reference: Vec<(State, Digest)>,
    /// Shards that cannot be read, for one worker or for all.
    pub(super) lost_shards: BTreeSet<(Option<usize>, u32)>,
    /// Choices of a quarantine.
    pub quarantines: u64,
    /// Runs that stopped until people brought a shard back.
    pub restored: u64,
    /// How the run ended.
    pub outcome: Option<(bool, String)>,
    pub result: Option<v1::Exported>,
    /// Commits seen by watchers, by step.
    pub commits: BTreeMap<u64, u32>,
    /// Lanes computed.
    pub lanes_computed: u64,
    pub log: Vec<String>,
}

pub(super) fn address(worker: usize, life: u64) -> String {
    format!("worker-{worker}:{life}")
}

impl World {
    pub fn new(seed: u64, sizes: Sizes) -> Self {
        let mut world = World {
            reference: reference(sizes, &Schedule::default()),
            lost_shards: BTreeSet::new(),
            quarantines: 0,
            restored: 0,
            sizes,
            now: 0,
            number: 0,
            random: seed,
            queue: BTreeMap::new(),
            coordinator: None,
            outgoing: Outgoing::default(),
            entries: 0,
            written_at: 0,
            coordinator_life: 0,
            coordinator_paused_until: 0,
            durable: lead::Durable::default(),
            workers: Vec::new(),
            sessions: BTreeMap::new(),
            exchanges: BTreeMap::new(),
            outcome: None,
            result: None,
            commits: BTreeMap::new(),
            lanes_computed: 0,
            log: Vec::new(),
        };
        world.after(0, Happening::StartCoordinator);
        for worker in 0..sizes.workers {
            world.workers.push(Worker {
                life: 0,
                core: None,
                state: None,
                session: None,
                acquisition: 0,
                device_free_at: 0,
                paused_until: 0,
                shards_read: BTreeMap::new(),
            });
            let delay = world.below(300);
            world.after(delay, Happening::StartWorker(worker));
        }
        world
    }

    /// A fault at this time.
    pub fn schedule(&mut self, at: u64, fault: Fault) {
        self.after(at, Happening::Fault(fault));
    }

    /// A uniform number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        xxh3_64(&self.random.to_le_bytes()) % bound.max(1)
    }

    pub(super) fn after(&mut self, delay: u64, happening: Happening) {
        self.number += 1;
        self.queue
            .insert((self.now + delay, self.number), happening);
    }

    pub(super) fn say(&mut self, text: String) {
        self.log.push(format!("{:>7} {text}", self.now));
    }

    /// Lets things happen until the run ends; false when it has not by `deadline`.
    pub fn run(&mut self, deadline: u64) -> bool {
        while self.outcome.is_none() {
            let Some(((at, number), happening)) = self.queue.pop_first() else {
                return false;
            };
            if at > deadline {
                return false;
            }
            self.now = at;
            let resumes = self.paused_until(&happening);
            if resumes > at {
                self.queue.insert((resumes, number), happening);
                continue;
            }
            self.happen(happening);
            self.restore_shards();
        }
        true
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
        self.say(format!("RESTORED after: {reason}"));
        self.lost_shards.clear();
        self.restored += 1;
        self.coordinator = None;
        for worker in 0..self.workers.len() {
            self.kill_worker(worker);
        }
        self.after(500, Happening::StartCoordinator);
    }

    /// A stopped process gets what happened to it when it goes on.
    fn paused_until(&self, happening: &Happening) -> u64 {
        match happening {
            Happening::Up(..)
            | Happening::Gone(_)
            | Happening::Tick(_)
            | Happening::Stored(..)
            | Happening::Written(..) => self.coordinator_paused_until,
            Happening::Down(s, _) | Happening::Closed(s) => {
                let session = &self.sessions[s];
                self.workers[session.worker].paused_until
            }
            Happening::Connect(w, _)
            | Happening::Heartbeat(w, _)
            | Happening::Worker(w, ..)
            | Happening::Arrived(w, ..) => self.workers[*w].paused_until,
            _ => 0,
        }
    }

    pub(super) fn alive(&self, worker: usize, life: u64) -> bool {
        self.workers[worker].life == life && self.workers[worker].core.is_some()
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Up(session, body) => {
                let event = match body {
                    up::Body::Hello(hello) => lead::Event::Hello(session, hello),
                    body => lead::Event::Message(session, body),
                };
                self.tell_coordinator(Some(session), event);
            }
            Happening::Gone(session) => {
                self.tell_coordinator(Some(session), lead::Event::Gone(session));
            }
            Happening::Down(session, body) => {
                let worker = self.sessions[&session].worker;
                if self.workers[worker].session == Some(session) {
                    self.tell_worker(worker, work::Event::Message(body));
                }
            }
            Happening::Closed(session) => {
                let worker = self.sessions[&session].worker;
                if self.workers[worker].session == Some(session) {
                    self.end_session(worker);
                }
            }
            Happening::Connect(worker, life) => self.connect(worker, life),
            Happening::Tick(life) => {
                if life == self.coordinator_life && self.coordinator.is_some() {
                    self.tell_coordinator(None, lead::Event::Tick);
                    let pause = self.sizes.timeouts().silence.as_millis() as u64 / 20;
                    self.after(pause, Happening::Tick(life));
                }
            }
            Happening::Heartbeat(worker, life) => {
                if self.alive(worker, life) {
                    let core = self.workers[worker].core.as_ref().expect("is alive");
                    let beat = up::Body::Heartbeat(core.heartbeat());
                    self.send_up(worker, beat);
                    let pause = self.sizes.timeouts().heartbeat.as_millis() as u64;
                    self.after(pause, Happening::Heartbeat(worker, life));
                }
            }
            Happening::Worker(worker, life, event) => {
                if self.alive(worker, life) {
                    self.tell_worker(worker, event);
                }
            }
            Happening::Arrived(worker, life, acquisition, step, sources) => {
                if self.alive(worker, life) && self.workers[worker].acquisition == acquisition {
                    self.arrive(worker, step, sources);
                }
            }
            Happening::Stored(life, job) => self.stored(life, job),
            Happening::Written(life, effect) => self.written(life, effect),
            Happening::StartTimeout(generation, step) => {
                self.fail_exchange((generation, step), Vec::new());
            }
            Happening::StartWorker(worker) => self.start_worker(worker),
            Happening::StartCoordinator => self.start_coordinator(),
            Happening::Fault(fault) => self.fault(fault),
        }
    }

    pub(super) fn kill_worker(&mut self, worker: usize) {
        self.workers[worker].core = None;
        self.workers[worker].state = None;
        self.leave_exchanges(worker, Vec::new());
        self.end_session(worker);
        if self.outcome.is_none() {
            let delay = 200 + self.below(2_000);
            self.after(delay, Happening::StartWorker(worker));
        }
    }

    pub(super) fn fault(&mut self, fault: Fault) {
        self.say(format!("FAULT {fault:?}"));
        match fault {
            Fault::KillWorker(worker) => {
                if self.workers[worker].core.is_some() {
                    self.kill_worker(worker);
                }
            }
            Fault::KillCoordinator => {
                if self.coordinator.take().is_none() {
                    return;
                }
                self.coordinator_paused_until = 0;
                for worker in 0..self.workers.len() {
                    if let Some(session) = self.workers[worker].session {
                        let delay = self.below(30);
                        self.after(delay, Happening::Closed(session));
                    }
                }
                let delay = 200 + self.below(3_000);
                self.after(delay, Happening::StartCoordinator);
            }
            Fault::LoseShard(whose, shard) => {
                self.lost_shards.insert((whose, shard));
            }
            Fault::PauseWorker(worker, time) => {
                self.workers[worker].paused_until = self.now + time;
            }
            Fault::PauseCoordinator(time) => self.coordinator_paused_until = self.now + time,
            Fault::CutSession(worker) => self.end_session(worker),
            Fault::BreakExchange(worker) => {
                let mine = |e: &Exchange| e.joined.values().any(|(w, _)| *w == worker);
                let found = self.exchanges.iter().find(|(_, e)| mine(e));
                if let Some(id) = found.map(|(id, _)| *id) {
                    self.fail_exchange(id, Vec::new());
                }
            }
            Fault::Terminate(worker) => {
                let life = self.workers[worker].life;
                if self.alive(worker, life) {
                    self.tell_worker(worker, work::Event::Shutdown);
                    let goodbye = down::Body::Finished(v1::Finished {
                        success: true,
                        reason: "left".into(),
                    });
                    let event = work::Event::Message(goodbye);
                    self.after(3_000, Happening::Worker(worker, life, event));
                }
            }
        }
    }

    /// What must hold at the end of a run that ended well.
    pub fn check_end(&self) {
        let steps = self.sizes.steps;
        assert_eq!(
            self.outcome,
            Some((true, "trained to the last step".into()))
        );
        let last = self.reference[steps as usize].0;
        let result = self.result.as_ref().expect("a result");
        assert_eq!(result.parameters_sha256, last.value.to_string());
        assert!(self.durable.manifests.contains(&steps), "a last checkpoint");
        let receipts: Vec<u64> = self.durable.receipts.keys().copied().collect();
        assert_eq!(
            receipts,
            (0..steps).collect::<Vec<_>>(),
            "every step's receipt"
        );
        let mut known = 0;
        for receipt in self.durable.receipts.values() {
            assert!(receipt.quarantine.len() >= known, "a quarantine grows only");
            known = receipt.quarantine.len();
        }
    }
}
