//! The pure heart: [`Core::apply`]`(now, event) -> effects`.
//!
//! No async, clock, randomness, logging or unordered iteration. Conditions are level-triggered:
//! every event changes facts, then [`Core::advance`] does what the facts allow. The shell executes
//! effects in order, a journal entry before what follows it, so that nothing is announced that is
//! not written.

mod checkpoint;
mod step;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use belfry_proto::v1::{self, coordinator_message as down, worker_message as up};
use belfry_proto::{Digest, LaneRange, lanes};

use checkpoint::OpenCheckpoint;
pub use checkpoint::manifest_file;

/// Exchanges of one step that may fail between living workers before the accused is removed.
const TROUBLES_MAX: u32 = 3;
/// Failed copies of one newcomer before it is left alone until it connects again.
const COPIES_MAX: u32 = 5;

/// Milliseconds on the shell's monotonic clock.
pub type Millis = u64;

/// What never changes in a term.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Hash of configuration and root.
    pub run_id: String,
    /// Lanes of the run.
    pub lanes: u32,
    /// Micro-batches of a step, by which losses are divided.
    pub micro_batches: u32,
    /// Optimizer updates in total.
    pub steps_total: u64,
    /// Below this the run waits.
    pub min_workers: usize,
    /// So many are expected; gathering ends early when they are there.
    pub expected_workers: usize,
    /// Longest silence that is taken for life.
    pub stall_ms: Millis,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Parts of a checkpoint.
    pub checkpoint_parts: u32,
    /// Tree nodes a worker may hold.
    pub nodes_max: u32,
    /// Whether the run evaluates.
    pub evaluates: bool,
    /// Digests of steps whose receipts are durable already, by step, in hex.
    pub receipts: BTreeMap<u64, String>,
    /// Steps of checkpoints whose manifests exist, ascending.
    pub manifests: Vec<u64>,
    /// This leadership.
    pub term: u64,
    /// Highest generation journaled.
    pub generation: u64,
}

/// Something happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// A worker's session began.
    Hello(v1::Hello),
    /// A worker said something.
    Message(u64, up::Body),
    /// A worker's session ended.
    Gone {
        /// Who.
        worker_id: u64,
        /// Which process of it.
        incarnation: u64,
    },
    /// Receipts and manifest of a checkpoint are durable.
    CheckpointDurable {
        /// Its step.
        step: u64,
    },
    /// They could not be made so.
    CheckpointFailed {
        /// Its step.
        step: u64,
        /// Why.
        error: String,
        /// Whether stored receipts differ from this run's, which ends it.
        alarm: bool,
    },
    /// Time passed.
    Tick,
}

/// Something to do.
#[derive(Clone, Debug)]
pub enum Effect {
    /// Write a journal entry; what follows waits for it.
    Journal {
        /// The generation from now on.
        generation: u64,
        /// Committed updates.
        committed: u64,
        /// Its members.
        members: Vec<u64>,
    },
    /// Say this to a worker.
    Send(u64, down::Body),
    /// End a worker's session.
    Close(u64),
    /// Make receipts, then the manifest durable.
    StoreCheckpoint {
        /// Its step.
        step: u64,
        /// Receipts since the last checkpoint.
        receipts: Vec<v1::StepRecord>,
        /// Its parts, ascending.
        parts: Vec<v1::PartStored>,
    },
    /// Tell watchers.
    Emit(Box<v1::RunEvent>),
    /// The run is over.
    Finish {
        /// Whether it trained to its end.
        success: bool,
        /// In words.
        reason: String,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    Gathering {
        since: Millis,
    },
    Loading {
        step: u64,
        asked: BTreeSet<u64>,
        digests: BTreeMap<u64, Digest>,
    },
    Training,
    Finishing {
        since: Millis,
    },
    Over,
}

#[derive(Clone, Debug)]
struct Worker {
    incarnation: u64,
    address: String,
    fingerprint: String,
    last_seen: Millis,
    applied: Option<u64>,
    applied_digest: Option<Digest>,
    pending_digest: Option<Digest>,
    nodes: Vec<LaneRange>,
    copying: Option<(u64, Millis)>,
    copies: u32,
    leaving: bool,
}

/// The coordinator's state.
#[derive(Debug)]
pub struct Core {
    s: Settings,
    phase: Phase,
    workers: BTreeMap<u64, Worker>,
    /// Committed updates: the open step.
    committed: u64,
    /// Digest of the gradient committed last, if this term saw it.
    committed_digest: Option<Digest>,
    members: Vec<u64>,
    nodes_now: BTreeMap<u64, Vec<LaneRange>>,
    lanes_next: BTreeMap<u64, Range<u32>>,
    ready: BTreeMap<u64, v1::Ready>,
    trouble: Option<(Millis, Vec<u64>)>,
    troubles: u32,
    evaluator: Option<u64>,
    evaluated: BTreeMap<u64, v1::Evaluated>,
    exported: Option<v1::Exported>,
    checkpoint: Option<OpenCheckpoint>,
    receipts: Vec<v1::StepRecord>,
    waiting_for: String,
}

impl Core {
    /// A leader at `now` that has heard of nobody yet.
    pub fn new(now: Millis, settings: Settings) -> Self {
        Core {
            phase: Phase::Gathering { since: now },
            workers: BTreeMap::new(),
            committed: 0,
            committed_digest: None,
            members: Vec::new(),
            nodes_now: BTreeMap::new(),
            lanes_next: BTreeMap::new(),
            ready: BTreeMap::new(),
            trouble: None,
            troubles: 0,
            evaluator: None,
            evaluated: BTreeMap::new(),
            exported: None,
            checkpoint: None,
            receipts: Vec::new(),
            waiting_for: String::new(),
            s: settings,
        }
    }

    /// What a new watcher is told first.
    pub fn status(&self) -> v1::RunEvent {
        let phase = match self.phase {
            Phase::Gathering { .. } => "gathering",
            Phase::Loading { .. } => "loading",
            Phase::Training => "training",
            Phase::Finishing { .. } => "finishing",
            Phase::Over => "finished",
        };
        v1::RunEvent {
            term: self.s.term,
            generation: self.s.generation,
            step: self.committed,
            steps_total: self.s.steps_total,
            phase: phase.into(),
            waiting_for: self.waiting_for.clone(),
            workers: self.workers.len() as u32,
            ..Default::default()
        }
    }

    /// One event in, effects out.
    pub fn apply(&mut self, now: Millis, event: Event) -> Vec<Effect> {
        let mut fx = Vec::new();
        if self.phase == Phase::Over {
            return fx;
        }
        match event {
            Event::Hello(hello) => self.hello(now, hello, &mut fx),
            Event::Message(id, body) => self.message(now, id, body, &mut fx),
            Event::Gone {
                worker_id,
                incarnation,
            } => {
                if self
                    .workers
                    .get(&worker_id)
                    .is_some_and(|w| w.incarnation == incarnation)
                {
                    self.lose(now, worker_id, "its connection closed", &mut fx);
                }
            }
            Event::CheckpointDurable { step } => self.checkpoint_durable(step, &mut fx),
            Event::CheckpointFailed { step, error, alarm } => {
                self.checkpoint = None;
                let text = format!("the checkpoint of step {step} failed: {error}");
                if alarm || step == self.s.steps_total {
                    self.fail(text, &mut fx);
                } else {
                    self.notice(text, &mut fx);
                }
            }
            Event::Tick => self.silence(now, &mut fx),
        }
        self.advance(now, &mut fx);
        self.check_invariants();
        fx
    }

    /// What must hold after every event.
    ///
    /// # Panics
    /// When it does not: going on would commit something wrong.
    fn check_invariants(&self) {
        if self.phase == Phase::Training {
            let nodes = self.nodes_now.values().flatten().copied();
            let tiled = lanes::tiles_exactly(self.s.lanes, nodes);
            assert!(tiled.is_ok(), "step {}: {tiled:?}", self.committed);
            assert!(
                self.committed < self.s.steps_total,
                "training beyond the last step"
            );
            let known = self.members.iter().all(|m| self.workers.contains_key(m));
            assert!(known, "a member without a session");
        }
        let fenced = self
            .ready
            .values()
            .all(|r| r.step == self.committed && r.generation == self.s.generation);
        assert!(fenced, "a ready of another step or generation is kept");
    }

    fn emit(&self, fill: impl FnOnce(&mut v1::RunEvent), fx: &mut Vec<Effect>) {
        let mut event = self.status();
        fill(&mut event);
        fx.push(Effect::Emit(Box::new(event)));
    }

    fn notice(&self, text: String, fx: &mut Vec<Effect>) {
        self.emit(|e| e.notice = text, fx);
    }

    fn wait_for(&mut self, what: String, fx: &mut Vec<Effect>) {
        if self.waiting_for != what {
            self.waiting_for = what;
            self.emit(|_| {}, fx);
        }
    }

    fn fail(&mut self, reason: String, fx: &mut Vec<Effect>) {
        self.end(false, reason, fx);
    }

    fn end(&mut self, success: bool, reason: String, fx: &mut Vec<Effect>) {
        self.phase = Phase::Over;
        for id in self.workers.keys() {
            let body = v1::Finished {
                success,
                reason: reason.clone(),
            };
            fx.push(Effect::Send(*id, down::Body::Finished(body)));
        }
        let exported = self.exported.clone();
        let text = reason.clone();
        self.emit(
            |e| {
                e.phase = if success { "finished" } else { "failed" }.into();
                e.exported = exported;
                e.notice = text;
            },
            fx,
        );
        fx.push(Effect::Finish { success, reason });
    }

    fn hello(&mut self, now: Millis, hello: v1::Hello, fx: &mut Vec<Effect>) {
        let id = hello.worker_id;
        let refusal =
            if hello.run_id != self.s.run_id {
                Some("it belongs to another run: configuration or root differ".to_owned())
            } else {
                self.workers.values().find(|w| w.fingerprint != hello.fingerprint).map(|w| {
                let (a, b) = (&hello.fingerprint, &w.fingerprint);
                format!("its numeric fingerprint `{a}` is not the run's `{b}`: bits would differ")
            })
            };
        if let Some(reason) = refusal {
            fx.push(Effect::Send(
                id,
                down::Body::Refused(v1::Refused {
                    reason: reason.clone(),
                }),
            ));
            self.notice(format!("worker {id} is refused: {reason}"), fx);
            return;
        }
        if self.workers.contains_key(&id) {
            self.lose(now, id, "it connected again", fx);
        }
        let range = |n: &v1::Node| LaneRange {
            start: n.start,
            end: n.end,
        };
        let worker = Worker {
            incarnation: hello.incarnation,
            address: hello.data_address,
            fingerprint: hello.fingerprint,
            last_seen: now,
            applied: hello.has_state.then_some(hello.applied),
            applied_digest: Digest::from_bytes(&hello.applied_digest),
            pending_digest: Digest::from_bytes(&hello.pending_digest),
            nodes: hello.nodes.iter().map(range).collect(),
            copying: None,
            copies: 0,
            leaving: false,
        };
        self.workers.insert(id, worker);
        let welcome = v1::Welcome {
            term: self.s.term,
            heartbeat_ms: (self.s.stall_ms / 10) as u32,
            silence_ms: self.s.stall_ms as u32,
        };
        fx.push(Effect::Send(id, down::Body::Welcome(welcome)));
        self.notice(format!("worker {id} is here"), fx);
    }

    fn message(&mut self, now: Millis, id: u64, body: up::Body, fx: &mut Vec<Effect>) {
        let Some(worker) = self.workers.get_mut(&id) else {
            return;
        };
        worker.last_seen = now;
        match body {
            up::Body::Hello(_) | up::Body::Heartbeat(_) | up::Body::Applied(_) => {}
            up::Body::Ready(ready) => {
                let fenced = ready.term == self.s.term
                    && ready.generation == self.s.generation
                    && ready.step == self.committed;
                if fenced && self.phase == Phase::Training && self.members.contains(&id) {
                    worker.pending_digest = Digest::from_bytes(&ready.sum_digest);
                    self.ready.insert(id, ready);
                }
            }
            up::Body::PeerTrouble(t) => {
                if t.generation == self.s.generation && self.trouble.is_none() {
                    let accused = t.ranks.iter().filter_map(|r| self.members.get(*r as usize));
                    self.trouble = Some((now, accused.copied().collect()));
                    self.notice(format!("worker {id} reports trouble: {}", t.detail), fx);
                }
            }
            up::Body::StateReady(ready) => self.state_ready(id, ready, fx),
            up::Body::PartStored(part) => self.part_stored(part, fx),
            up::Body::Evaluated(evaluated) => {
                if self.evaluator == Some(id) {
                    self.evaluator = None;
                    if evaluated.error.is_empty() {
                        self.evaluated.insert(evaluated.step, evaluated.clone());
                        self.emit(|e| e.evaluated = Some(evaluated), fx);
                    } else {
                        self.fail(format!("evaluation failed: {}", evaluated.error), fx);
                    }
                }
            }
            up::Body::Exported(exported) => {
                if self.evaluator == Some(id) {
                    self.evaluator = None;
                    if exported.error.is_empty() {
                        self.exported = Some(exported);
                    } else {
                        self.fail(format!("the export failed: {}", exported.error), fx);
                    }
                }
            }
            up::Body::Leaving(leaving) => {
                worker.leaving = true;
                self.notice(format!("worker {id} leaves: {}", leaving.reason), fx);
            }
            up::Body::Fatal(fatal) => self.fail(format!("worker {id}: {}", fatal.error), fx),
        }
    }

    fn silence(&mut self, now: Millis, fx: &mut Vec<Effect>) {
        let limit = self.s.stall_ms;
        let quiet = |w: &Worker| now.saturating_sub(w.last_seen) > limit;
        let silent: Vec<u64> = self
            .workers
            .iter()
            .filter(|(_, w)| quiet(w))
            .map(|(id, _)| *id)
            .collect();
        for id in silent {
            self.lose(now, id, "nothing was heard from it in time", fx);
            fx.push(Effect::Close(id));
        }
    }

    fn lose(&mut self, now: Millis, id: u64, why: &str, fx: &mut Vec<Effect>) {
        self.workers.remove(&id);
        if self.evaluator == Some(id) {
            self.evaluator = None;
        }
        self.notice(format!("worker {id} is lost: {why}"), fx);
        let Some(place) = self.members.iter().position(|m| *m == id) else {
            if let Phase::Loading { asked, digests, .. } = &mut self.phase {
                asked.remove(&id);
                digests.remove(&id);
            }
            return;
        };
        self.members.remove(place);
        match self.phase {
            Phase::Training if !self.members.is_empty() => self.open_generation(fx),
            Phase::Training | Phase::Finishing { .. } if self.members.is_empty() => {
                self.gather(now);
            }
            _ => {}
        }
    }

    /// Back to the beginning: nobody who is a member is left.
    fn gather(&mut self, now: Millis) {
        self.phase = Phase::Gathering { since: now };
        self.members.clear();
        self.nodes_now.clear();
        self.ready.clear();
        self.trouble = None;
        self.checkpoint = None;
    }

    /// Does what the facts allow.
    fn advance(&mut self, now: Millis, fx: &mut Vec<Effect>) {
        match &self.phase {
            Phase::Gathering { since } => {
                let waited = now.saturating_sub(*since);
                self.advance_gathering(waited, fx);
            }
            Phase::Loading { .. } => self.advance_loading(now, fx),
            Phase::Training => self.advance_training(now, fx),
            Phase::Finishing { since } => {
                let waited = now.saturating_sub(*since);
                self.advance_finishing(waited, fx);
            }
            Phase::Over => {}
        }
    }

    fn advance_gathering(&mut self, waited: Millis, fx: &mut Vec<Effect>) {
        let here = self.workers.len();
        let late = waited > 2 * self.s.stall_ms;
        if here < self.s.min_workers || (here < self.s.expected_workers && !late) {
            let wanted = self.s.expected_workers.max(self.s.min_workers);
            self.wait_for(format!("{here} of {wanted} workers are here"), fx);
            return;
        }
        self.wait_for(String::new(), fx);
        let newest = self.workers.values().filter_map(|w| w.applied).max();
        if let Some(step) = newest {
            // Whoever applied it proves that it was committed.
            self.committed = step;
            let holder = self.workers.values().find(|w| w.applied == Some(step));
            self.committed_digest = holder.and_then(|w| w.applied_digest);
            self.receipts.clear();
            self.open_generation(fx);
            return;
        }
        let step = self.s.manifests.last().copied().unwrap_or(0);
        let manifest = match self.s.manifests.last() {
            Some(step) => checkpoint::manifest_file(*step),
            None => String::new(),
        };
        let load = v1::LoadState {
            term: self.s.term,
            step,
            manifest,
        };
        for id in self.workers.keys() {
            fx.push(Effect::Send(*id, down::Body::LoadState(load.clone())));
        }
        let asked = self.workers.keys().copied().collect();
        self.phase = Phase::Loading {
            step,
            asked,
            digests: BTreeMap::new(),
        };
        let what = if step == 0 {
            "the initial state".into()
        } else {
            format!("step {step}")
        };
        self.notice(format!("loading {what} on {here} workers"), fx);
    }

    fn advance_loading(&mut self, now: Millis, fx: &mut Vec<Effect>) {
        let Phase::Loading {
            step,
            asked,
            digests,
        } = &self.phase
        else {
            return;
        };
        if asked.is_empty() {
            self.gather(now);
            return;
        }
        if digests.len() < asked.len() {
            return;
        }
        let distinct: BTreeSet<Digest> = digests.values().copied().collect();
        if distinct.len() > 1 {
            let told: Vec<String> = digests.iter().map(|(w, d)| format!("{w}: {d}")).collect();
            let text = format!(
                "step {step}: workers loaded different bits ({})",
                told.join(", ")
            );
            self.fail(text, fx);
            return;
        }
        self.committed = *step;
        self.committed_digest = None;
        self.receipts.clear();
        self.open_generation(fx);
    }

    fn state_ready(&mut self, id: u64, ready: v1::StateReady, fx: &mut Vec<Effect>) {
        let digest = Digest::from_bytes(&ready.digest);
        let Some(worker) = self.workers.get_mut(&id) else {
            return;
        };
        if let Phase::Loading { step, digests, .. } = &mut self.phase {
            match digest {
                Some(digest) if ready.error.is_empty() && ready.step == *step => {
                    worker.applied = Some(ready.step);
                    digests.insert(id, digest);
                }
                _ => self.load_failed(id, ready, fx),
            }
            return;
        }
        if worker.copying.take().is_none() {
            return;
        }
        if ready.error.is_empty() && ready.step == self.committed {
            worker.applied = Some(ready.step);
            worker.copies = 0;
        } else {
            worker.copies += 1;
            self.notice(
                format!("worker {id} could not copy the state: {}", ready.error),
                fx,
            );
        }
    }

    /// A checkpoint that one worker cannot load is given up for an older one, loudly.
    fn load_failed(&mut self, id: u64, ready: v1::StateReady, fx: &mut Vec<Effect>) {
        let error = format!(
            "worker {id} cannot load step {}: {}",
            ready.step, ready.error
        );
        let Some(bad) = self.s.manifests.pop() else {
            self.fail(error, fx);
            return;
        };
        if self.s.manifests.is_empty() {
            // Starting over silently would be worse than stopping.
            self.s.manifests.push(bad);
            self.fail(error, fx);
            return;
        }
        self.notice(
            format!("{error}; falling back to the checkpoint before it"),
            fx,
        );
        self.gather(0);
    }
}
