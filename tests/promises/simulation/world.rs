//! A cluster in one thread: the production cores of coordinator and workers, with network, store,
//! devices and clocks replaced by a queue of happenings in virtual time.

use std::collections::BTreeMap;
use std::sync::Arc;

use belfry_coordinator::core as lead;
use belfry_proto::lanes::root;
use belfry_proto::v1::{self, coordinator_message as down, worker_message as up};
use belfry_proto::{Digest, LaneRange};
use belfry_worker::core as work;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

/// Longest that a member waits for a peer that lives but does not begin.
const START_TIMEOUT_MS: u64 = 30_000;
/// Floats of a gradient: few, but their sums depend on the order of addition.
const LEN: u64 = 3;

/// Sizes of a simulated run.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub workers: usize,
    pub lanes: u32,
    pub steps: u64,
    pub checkpoint_every: u64,
    pub parts: u32,
    pub stall_ms: u64,
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
}

/// The state after some updates stands for its parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    step: u64,
    value: u64,
}

enum Happening {
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
    StartTimeout(u64, u64),
    StartWorker(usize),
    StartCoordinator,
    Fault(Fault),
}

enum Job {
    Receipts(Vec<v1::StepRecord>),
    Checkpoint(u64, Vec<v1::StepRecord>),
}

struct Worker {
    life: u64,
    core: Option<work::Core>,
    state: Option<State>,
    session: Option<u64>,
    acquisition: u64,
    device_free_at: u64,
    paused_until: u64,
}

struct Session {
    worker: usize,
    life: u64,
    coordinator_life: u64,
    up_at: u64,
    down_at: u64,
    open: bool,
}

#[derive(Default)]
struct Exchange {
    members: Vec<(String, Vec<LaneRange>)>,
    joined: BTreeMap<usize, (usize, u64)>,
    parts: BTreeMap<LaneRange, Arc<Vec<f32>>>,
    failed: bool,
}

/// See the module.
pub struct World {
    pub sizes: Sizes,
    now: u64,
    number: u64,
    random: u64,
    queue: BTreeMap<(u64, u64), Happening>,
    coordinator: Option<lead::Core>,
    coordinator_life: u64,
    coordinator_paused_until: u64,
    durable: lead::Durable,
    workers: Vec<Worker>,
    sessions: BTreeMap<u64, Session>,
    exchanges: BTreeMap<(u64, u64), Exchange>,
    reference: Vec<(State, Digest)>,
    /// How the run ended.
    pub outcome: Option<(bool, String)>,
    pub result: Option<v1::Exported>,
    /// Commits seen by watchers, by step.
    pub commits: BTreeMap<u64, u32>,
    /// Lanes computed.
    pub lanes_computed: u64,
    pub log: Vec<String>,
}

fn gradient(state: State, lane: u32) -> Vec<f32> {
    let key = xxh3_64(&[state.value.to_le_bytes(), u64::from(lane).to_le_bytes()].concat());
    (0..LEN)
        .map(|i| 0.1 + (key.rotate_left(i as u32 * 13) % 1000) as f32 * 1.000_1e-3)
        .collect()
}

fn tree_sum(node: LaneRange, parts: &BTreeMap<LaneRange, Arc<Vec<f32>>>) -> Option<Vec<f32>> {
    if let Some(part) = parts.get(&node) {
        return Some(part.to_vec());
    }
    let (left, right) = node.children()?;
    let (left, right) = (tree_sum(left, parts)?, tree_sum(right, parts)?);
    Some(left.iter().zip(right).map(|(l, r)| l + r).collect())
}

fn digest(sum: &[f32]) -> Digest {
    let bytes: Vec<u8> = sum.iter().flat_map(|x| x.to_le_bytes()).collect();
    Digest(xxh3_128(&bytes))
}

fn updated(state: State, sum: &[f32]) -> State {
    let mut bytes = state.value.to_le_bytes().to_vec();
    bytes.extend(sum.iter().flat_map(|x| x.to_le_bytes()));
    State {
        step: state.step + 1,
        value: xxh3_64(&bytes),
    }
}

fn state_digest(state: State) -> Digest {
    Digest(u128::from(state.value))
}

/// The states before every step and the digests of their gradients, computed serially.
fn reference(sizes: Sizes) -> Vec<(State, Digest)> {
    let mut state = State { step: 0, value: 1 };
    let mut all = Vec::new();
    for _ in 0..=sizes.steps {
        let leaf = |lane| LaneRange {
            start: lane,
            end: lane + 1,
        };
        let leaves = (0..sizes.lanes).map(|l| (leaf(l), Arc::new(gradient(state, l))));
        let sum = tree_sum(root(sizes.lanes), &leaves.collect()).expect("all lanes");
        all.push((state, digest(&sum)));
        state = updated(state, &sum);
    }
    all
}

fn address(worker: usize, life: u64) -> String {
    format!("worker-{worker}:{life}")
}

impl World {
    pub fn new(seed: u64, sizes: Sizes) -> Self {
        let mut world = World {
            reference: reference(sizes),
            sizes,
            now: 0,
            number: 0,
            random: seed,
            queue: BTreeMap::new(),
            coordinator: None,
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

    fn after(&mut self, delay: u64, happening: Happening) {
        self.number += 1;
        self.queue
            .insert((self.now + delay, self.number), happening);
    }

    fn say(&mut self, text: String) {
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
        }
        true
    }

    /// A stopped process gets what happened to it when it goes on.
    fn paused_until(&self, happening: &Happening) -> u64 {
        match happening {
            Happening::Up(..) | Happening::Gone(_) | Happening::Tick(_) | Happening::Stored(..) => {
                self.coordinator_paused_until
            }
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

    fn alive(&self, worker: usize, life: u64) -> bool {
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
                    self.after(self.sizes.stall_ms / 40, Happening::Tick(life));
                }
            }
            Happening::Heartbeat(worker, life) => {
                if self.alive(worker, life) {
                    let core = self.workers[worker].core.as_ref().expect("is alive");
                    let beat = up::Body::Heartbeat(core.heartbeat());
                    self.send_up(worker, beat);
                    let pause = self.sizes.stall_ms / 10;
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
            Happening::StartTimeout(generation, step) => {
                self.fail_exchange((generation, step), Vec::new());
            }
            Happening::StartWorker(worker) => self.start_worker(worker),
            Happening::StartCoordinator => self.start_coordinator(),
            Happening::Fault(fault) => self.fault(fault),
        }
    }

    // ---- coordinator ----------------------------------------------------------------------

    fn start_coordinator(&mut self) {
        self.coordinator_life += 1;
        let settings = lead::Settings {
            run_id: "run".into(),
            lanes: self.sizes.lanes,
            micro_batches: self.sizes.lanes,
            steps_total: self.sizes.steps,
            min_workers: 1,
            expected_workers: self.sizes.workers,
            stall_ms: self.sizes.stall_ms,
            checkpoint_every: self.sizes.checkpoint_every,
            checkpoint_parts: self.sizes.parts,
            nodes_max: 4,
            evaluates: true,
            term: self.coordinator_life,
        };
        let core = lead::Core::new(self.now, settings, self.durable.clone());
        self.coordinator = Some(core);
        self.say(format!("coordinator of term {}", self.coordinator_life));
        self.after(0, Happening::Tick(self.coordinator_life));
    }

    fn tell_coordinator(&mut self, session: Option<u64>, event: lead::Event) {
        let ours =
            session.is_none_or(|s| self.sessions[&s].coordinator_life == self.coordinator_life);
        let Some(core) = self.coordinator.as_mut().filter(|_| ours) else {
            return;
        };
        for effect in core.apply(self.now, event) {
            self.lead(effect);
        }
    }

    fn lead(&mut self, effect: lead::Effect) {
        use lead::Effect as E;
        let life = self.coordinator_life;
        match effect {
            E::Journal { generation, .. } => self.durable.generation = generation,
            E::Send(session, body) => {
                let delay = 1 + self.below(20);
                let session_state = self.sessions.get_mut(&session).expect("a known session");
                if session_state.open {
                    session_state.down_at = (session_state.down_at + 1).max(self.now + delay);
                    let delay = session_state.down_at - self.now;
                    self.after(delay, Happening::Down(session, body));
                }
            }
            E::Close(session) => {
                let session_state = self.sessions.get_mut(&session).expect("a known session");
                session_state.open = false;
                let delay = (session_state.down_at + 1).max(self.now) - self.now;
                self.after(delay, Happening::Closed(session));
            }
            E::StoreReceipts(receipts) => {
                let delay = self.below(200);
                self.after(delay, Happening::Stored(life, Job::Receipts(receipts)));
            }
            E::StoreCheckpoint {
                step,
                receipts,
                parts,
            } => {
                assert_eq!(parts.len(), self.sizes.parts as usize);
                let state = self.reference[step as usize].0;
                for part in &parts {
                    assert_eq!(part.sha256, part_hash(state, part.part), "a part's content");
                }
                let delay = self.below(200);
                self.after(
                    delay,
                    Happening::Stored(life, Job::Checkpoint(step, receipts)),
                );
            }
            E::StoreEvaluation(evaluated) => {
                self.durable.evaluations.insert(evaluated.step, evaluated);
            }
            E::StoreResult {
                exported,
                last,
                evaluations,
            } => {
                assert_eq!(last.map(|r| r.step + 1), Some(self.sizes.steps));
                let judged: Vec<u64> = evaluations.iter().map(|e| e.step).collect();
                assert_eq!(judged, [0, self.sizes.steps]);
                self.result = Some(exported);
            }
            E::Emit(event) => {
                if !event.notice.is_empty() {
                    self.say(format!("[step {}] {}", event.step, event.notice));
                }
                if let Some(record) = event.committed {
                    let expected = self.reference[record.step as usize].1;
                    assert_eq!(record.sum_digest, expected.to_string(), "a committed sum");
                    assert_eq!(record.pairs, u64::from(self.sizes.lanes), "every lane once");
                    *self.commits.entry(record.step).or_default() += 1;
                }
            }
            E::Finish { success, reason } => self.outcome = Some((success, reason)),
        }
    }

    /// A write lands whether or not who asked for it still lives.
    fn stored(&mut self, life: u64, job: Job) {
        let event = match job {
            Job::Receipts(receipts) => {
                let below = receipts.last().map_or(0, |r| r.step + 1);
                self.keep_receipts(receipts);
                lead::Event::ReceiptsDurable { below }
            }
            Job::Checkpoint(step, receipts) => {
                self.keep_receipts(receipts);
                self.durable.manifests.insert(step);
                lead::Event::CheckpointDurable { step }
            }
        };
        if life == self.coordinator_life {
            self.tell_coordinator(None, event);
        }
    }

    fn keep_receipts(&mut self, receipts: Vec<v1::StepRecord>) {
        for receipt in receipts {
            let there = self.durable.receipts.insert(receipt.step, receipt.clone());
            assert!(there.is_none_or(|r| r == receipt), "a receipt changed");
        }
    }

    // ---- workers --------------------------------------------------------------------------

    fn start_worker(&mut self, worker: usize) {
        if self.workers[worker].core.is_some() {
            return;
        }
        let w = &mut self.workers[worker];
        w.life += 1;
        w.state = None;
        w.session = None;
        w.paused_until = 0;
        w.device_free_at = self.now;
        let life = w.life;
        w.core = Some(work::Core::new(work::Identity {
            run_id: "run".into(),
            worker_id: worker as u64,
            incarnation: life,
            fingerprint: "simulated".into(),
            data_address: address(worker, life),
            lanes: self.sizes.lanes,
        }));
        self.after(1, Happening::Connect(worker, life));
        self.after(1, Happening::Heartbeat(worker, life));
    }

    fn connect(&mut self, worker: usize, life: u64) {
        if !self.alive(worker, life) || self.workers[worker].session.is_some() {
            return;
        }
        if self.coordinator.is_none() || self.coordinator_paused_until > self.now {
            let delay = 50 + self.below(950);
            self.after(delay, Happening::Connect(worker, life));
            return;
        }
        let number = self.sessions.len() as u64 + 1;
        let session = Session {
            worker,
            life,
            coordinator_life: self.coordinator_life,
            up_at: self.now,
            down_at: self.now,
            open: true,
        };
        self.sessions.insert(number, session);
        self.workers[worker].session = Some(number);
        self.tell_worker(worker, work::Event::LinkUp);
    }

    /// The worker's side of its session ends; the coordinator hears of it when it hears of it.
    fn end_session(&mut self, worker: usize) {
        let Some(number) = self.workers[worker].session.take() else {
            return;
        };
        let delay = self.below(60);
        let session = self.sessions.get_mut(&number).expect("is known");
        let delay = (session.up_at + 1).max(self.now + delay) - self.now;
        let life = session.life;
        self.after(delay, Happening::Gone(number));
        if self.alive(worker, life) {
            self.tell_worker(worker, work::Event::LinkDown);
            let delay = 50 + self.below(200);
            self.after(delay, Happening::Connect(worker, life));
        }
    }

    fn send_up(&mut self, worker: usize, body: up::Body) {
        let delay = 1 + self.below(20);
        let Some(number) = self.workers[worker].session else {
            return;
        };
        let session = self.sessions.get_mut(&number).expect("is known");
        session.up_at = (session.up_at + 1).max(self.now + delay);
        let delay = session.up_at - self.now;
        self.after(delay, Happening::Up(number, body));
    }

    fn tell_worker(&mut self, worker: usize, event: work::Event) {
        let Some(core) = &mut self.workers[worker].core else {
            return;
        };
        for effect in core.apply(event) {
            let last = matches!(effect, work::Effect::Exit { .. });
            self.work(worker, effect);
            if last {
                break;
            }
        }
    }

    fn held(&self, worker: usize, step: u64) -> State {
        let state = self.workers[worker].state;
        let state = state.filter(|s| s.step == step);
        state.unwrap_or_else(|| panic!("worker {worker} was asked for step {step}, which is gone"))
    }

    fn work(&mut self, worker: usize, effect: work::Effect) {
        use work::Effect as E;
        let life = self.workers[worker].life;
        match effect {
            E::Send(body) => self.send_up(worker, body),
            E::Reconnect => self.end_session(worker),
            E::Compute { step, lane } => {
                let state = self.held(worker, step);
                let cost = 5 + self.below(20);
                let done = self.workers[worker].device_free_at.max(self.now) + cost;
                self.workers[worker].device_free_at = done;
                self.lanes_computed += 1;
                let report = v1::LaneReport {
                    lane,
                    pairs: 1,
                    mlm_loss: f64::from(lane) * 0.1,
                    pairs_digest: Digest(u128::from(lane) + 1).to_bytes(),
                    ..Default::default()
                };
                let event = work::Event::LaneDone {
                    step,
                    report,
                    gradient: gradient(state, lane),
                    seconds: cost as f64 / 1000.0,
                };
                self.after(done - self.now, Happening::Worker(worker, life, event));
            }
            E::Prefetch { .. } => {}
            E::Reduce(exchange) => self.join(worker, exchange),
            E::AbortReduce => self.leave_exchanges(worker, Vec::new()),
            E::Apply {
                step,
                sum,
                snapshot_parts,
            } => {
                let state = updated(self.held(worker, step), &sum);
                let expected = self.reference[step as usize + 1].0;
                assert_eq!(
                    state, expected,
                    "the state after step {step} on worker {worker}"
                );
                self.workers[worker].state = Some(state);
                self.store_parts(worker, state, &snapshot_parts);
                let event = work::Event::Applied { step };
                let delay = self.below(10);
                self.after(delay, Happening::Worker(worker, life, event));
            }
            E::Load { step, manifest } => {
                let there = self.durable.manifests.contains(&step);
                assert_eq!(there, !manifest.is_empty(), "a manifest that stands");
                self.acquire(worker, step, None);
            }
            E::Copy { step, sources } => self.acquire(worker, step, Some(sources)),
            E::StoreParts { step, parts } => {
                let state = self.held(worker, step);
                self.store_parts(worker, state, &parts);
            }
            E::Evaluate { step } => {
                let _ = self.held(worker, step);
                let evaluated = v1::Evaluated {
                    step,
                    ..Default::default()
                };
                self.report(worker, up::Body::Evaluated(evaluated));
            }
            E::Export { step } => {
                let state = self.held(worker, step);
                let exported = v1::Exported {
                    step,
                    parameters_sha256: state.value.to_string(),
                    ..Default::default()
                };
                self.report(worker, up::Body::Exported(exported));
            }
            E::Exit { success, reason } => {
                assert!(success, "worker {worker} gave up: {reason}");
                self.kill_worker(worker);
            }
        }
    }

    fn report(&mut self, worker: usize, body: up::Body) {
        let life = self.workers[worker].life;
        let delay = 5 + self.below(100);
        self.after(
            delay,
            Happening::Worker(worker, life, work::Event::Report(body)),
        );
    }

    fn store_parts(&mut self, worker: usize, state: State, parts: &[u32]) {
        for part in parts {
            let stored = v1::PartStored {
                step: state.step,
                part: *part,
                sha256: part_hash(state, *part),
                ..Default::default()
            };
            self.report(worker, up::Body::PartStored(stored));
        }
    }

    fn acquire(&mut self, worker: usize, step: u64, sources: Option<Vec<String>>) {
        self.leave_exchanges(worker, Vec::new());
        let w = &mut self.workers[worker];
        w.state = None;
        w.acquisition += 1;
        let (life, acquisition) = (w.life, w.acquisition);
        let delay = 5 + self.below(150);
        self.after(
            delay,
            Happening::Arrived(worker, life, acquisition, step, sources),
        );
    }

    fn arrive(&mut self, worker: usize, step: u64, sources: Option<Vec<String>>) {
        let source = |address: &String| {
            self.workers.iter().enumerate().any(|(i, w)| {
                let reachable = w.core.is_some() && w.paused_until <= self.now;
                let holds = w.state.is_some_and(|s| s.step == step);
                reachable && holds && *address == self::address(i, w.life)
            })
        };
        if sources.is_some_and(|sources| !sources.iter().any(source)) {
            let error = "no source left".to_owned();
            self.tell_worker(worker, work::Event::StateFailed { step, error });
            return;
        }
        let state = self.reference[step as usize].0;
        self.workers[worker].state = Some(state);
        let digest = state_digest(state);
        self.tell_worker(worker, work::Event::StateArrived { step, digest });
    }

    // ---- exchanges ------------------------------------------------------------------------

    fn join(&mut self, worker: usize, request: work::Exchange) {
        self.leave_exchanges(worker, Vec::new());
        let id = (request.generation, request.step);
        let life = self.workers[worker].life;
        let first = !self.exchanges.contains_key(&id);
        let exchange = self.exchanges.entry(id).or_default();
        if exchange.members.is_empty() {
            exchange.members.clone_from(&request.members);
        }
        assert_eq!(exchange.members, request.members, "members agree");
        exchange.joined.insert(request.rank, (worker, life));
        exchange.parts.extend(request.partials);
        let dead: Vec<u32> = (0..exchange.members.len())
            .filter(|rank| {
                let address = &exchange.members[*rank].0;
                let there = |(i, w): (usize, &Worker)| {
                    w.core.is_some() && *address == self::address(i, w.life)
                };
                !self.workers.iter().enumerate().any(there)
            })
            .map(|rank| rank as u32)
            .collect();
        if exchange.failed || !dead.is_empty() {
            exchange.failed = true;
            self.fail_exchange(id, dead);
            return;
        }
        if exchange.joined.len() == exchange.members.len() {
            let sum = tree_sum(root(self.sizes.lanes), &exchange.parts).expect("nodes tile");
            let joined: Vec<(usize, u64)> = exchange.joined.values().copied().collect();
            for (worker, life) in joined {
                let event = work::Event::Reduced {
                    generation: id.0,
                    step: id.1,
                    digest: digest(&sum),
                    sum: sum.clone(),
                    finite: true,
                };
                let delay = 1 + self.below(40);
                self.after(delay, Happening::Worker(worker, life, event));
            }
            self.exchanges.remove(&id);
        } else if first {
            self.after(START_TIMEOUT_MS, Happening::StartTimeout(id.0, id.1));
        }
    }

    /// Everybody in an exchange hears that it failed.
    fn fail_exchange(&mut self, id: (u64, u64), ranks: Vec<u32>) {
        let Some(exchange) = self.exchanges.get_mut(&id) else {
            return;
        };
        exchange.failed = true;
        let joined: Vec<(usize, u64)> =
            std::mem::take(&mut exchange.joined).into_values().collect();
        for (worker, life) in joined {
            let event = work::Event::ReduceFailed {
                generation: id.0,
                step: id.1,
                ranks: ranks.clone(),
                detail: "broken".into(),
            };
            let delay = 1 + self.below(40);
            self.after(delay, Happening::Worker(worker, life, event));
        }
    }

    /// Leaves what `worker` had joined; the others hear of it.
    fn leave_exchanges(&mut self, worker: usize, ranks: Vec<u32>) {
        let mine = |e: &Exchange| e.joined.values().any(|(w, _)| *w == worker);
        let ids: Vec<(u64, u64)> = self
            .exchanges
            .iter()
            .filter(|(_, e)| mine(e))
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            let exchange = self.exchanges.get_mut(&id).expect("was found");
            exchange.joined.retain(|_, (w, _)| *w != worker);
            self.fail_exchange(id, ranks.clone());
        }
    }

    // ---- faults ---------------------------------------------------------------------------

    fn kill_worker(&mut self, worker: usize) {
        self.workers[worker].core = None;
        self.workers[worker].state = None;
        self.leave_exchanges(worker, Vec::new());
        self.end_session(worker);
        if self.outcome.is_none() {
            let delay = 200 + self.below(2_000);
            self.after(delay, Happening::StartWorker(worker));
        }
    }

    fn fault(&mut self, fault: Fault) {
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
    }
}

fn part_hash(state: State, part: u32) -> String {
    format!("{}/{part}", state.value)
}
