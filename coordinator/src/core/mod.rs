//! The pure heart: [`Core::apply`]`(now, event) -> effects`.
//!
//! No async, clock, randomness, logging or unordered iteration. Conditions are level-triggered:
//! every event changes facts, then `advance` does what the facts allow. The shell executes
//! effects in order, a journal entry before what follows it, so that nothing is announced that is
//! not written.

mod audit;
mod checkpoint;
mod copies;
mod evaluation;
mod evidence;
mod failure;
mod finish;
mod generation;
mod hang;
mod interface;
mod links;
mod loss;
mod measured;
mod membership;
mod planted;
mod quarantine;
mod receipt;
mod report;
mod retention;
mod roster;
mod speed;
mod step;
mod store;
mod trouble;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;

use belfry_configs::Timeouts;
use belfry_proto::v1::{self, Reason, coordinator_message as down, worker_message as up};
use belfry_proto::{Digest, LaneRange, STATE_SLICES, lanes};

use audit::LaneAudits;
use checkpoint::{Closing, OpenCheckpoint};
pub use checkpoint::{RECEIPTS_KEPT, without_lanes};
use copies::Held;
use evaluation::Evaluation;
use evidence::{Distrust, Evidence};
use hang::Told;
pub use interface::{Durable, Effect, Event, Settings};
pub use links::LinkPolicy;
use links::{LinkRecord, OpenLinks};
use loss::Loss;
use measured::{Measured, RoundTrips, millis};
#[doc(hidden)]
pub use planted::Planted;
pub use receipt::LANE_DIGEST_BYTES;
use report::Decided;
use roster::Departures;
use speed::Speed;
use store::Written;
use trouble::Troubles;

/// Milliseconds on the shell's monotonic clock.
pub type Millis = u64;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    Gathering {
        since: Millis,
    },
    Loading {
        step: u64,
        request: u64,
        asked: BTreeSet<u64>,
        digests: BTreeMap<u64, Digest>,
    },
    Training,
    Finishing,
    Over,
}

/// A worker with a session.
#[derive(Clone, Debug)]
struct Worker {
    session: u64,
    incarnation: u64,
    address: String,
    fingerprint: String,
    device: v1::Device,
    last_seen: Millis,
    /// What was said then.
    last_said: &'static str,
    /// Its last heartbeat.
    beat: v1::Heartbeat,
    round_trips: RoundTrips,
    speed: Speed,
    /// What it was told that it waits for.
    waits_for: String,
    applied: Option<u64>,
    applied_digest: Option<Digest>,
    pending_digest: Option<Digest>,
    nodes: Vec<LaneRange>,
    copying: Option<Copying>,
    copies_failed: u32,
    /// What a copy takes, by the speed of the one that failed last.
    copy_needs: Millis,
    /// No copy is begun before this time.
    copy_after: Millis,
    /// Since when, and in how many heartbeats, it does nothing for the open generation.
    idle: Option<(Millis, u32)>,
    leaving: bool,
}

/// A newcomer's copy of the state.
#[derive(Clone, Copy, Debug)]
struct Copying {
    step: u64,
    request: u64,
    /// The commit of `step` is withheld until then.
    until: Millis,
    /// What it copied; it waits for what the members hold.
    arrived: Option<Digest>,
}

/// The coordinator's state.
#[derive(Debug)]
pub struct Core {
    s: Settings,
    durable: Durable,
    phase: Phase,
    workers: BTreeMap<u64, Worker>,
    /// The worker of each session.
    sessions: BTreeMap<u64, u64>,
    generation: u64,
    /// Of the event that is being applied.
    now: Millis,
    last_tick: Millis,
    measured: Measured,
    departures: BTreeMap<u64, Departures>,
    /// Who may take part may have changed.
    look: bool,
    /// A ready came that was not looked at.
    heard_ready: bool,
    /// When the open step, or its generation, began.
    step_since: Millis,
    /// Steps committed since lanes were cut.
    steps_of_cut: u64,
    /// The run ends here for now: its last step, or the end of the step in which it was asked to.
    stop_at: u64,
    decided_lately: VecDeque<Decided>,
    /// The last step of which it was said that it hangs.
    hang_told: Told,
    /// Loads and copies asked for in this term.
    requests: u64,
    /// Committed updates: the open step.
    committed: u64,
    /// Updates known to be committed, also where they are being computed again.
    decided: u64,
    /// Updates below this one may have been committed by earlier terms.
    unsure_below: u64,
    /// Journal entries, and what else the store owes.
    written: Written,
    /// Digest of the gradient committed last, if this term saw it.
    committed_digest: Option<Digest>,
    members: Vec<u64>,
    nodes_now: BTreeMap<u64, Vec<LaneRange>>,
    lanes_next: BTreeMap<u64, Range<u32>>,
    /// The tree nodes of `lanes_next`.
    nodes_next: BTreeMap<u64, Vec<LaneRange>>,
    ready: BTreeMap<u64, v1::Ready>,
    /// What the open step's bits were in all generations, and who is not believed.
    evidence: Evidence,
    distrust: Distrust,
    audits: LaneAudits,
    /// The members' states, as far as a newcomer is compared with them.
    held: Held,
    /// The next generation keeps no partials of the open step.
    recompute: bool,
    troubles: Troubles,
    /// Members that failed at the open step, and how.
    failures: BTreeMap<u64, String>,
    /// How the open generation sums, and each member's group.
    links: v1::Links,
    groups: Vec<u32>,
    open_links: OpenLinks,
    link_record: LinkRecord,
    evaluation: Evaluation,
    exporter: Option<u64>,
    exported: Option<v1::Exported>,
    checkpoint: Option<OpenCheckpoint>,
    /// Checkpoints whose manifests are being written, by step.
    closing: BTreeMap<u64, Closing>,
    /// The checkpoint that became durable last, and what it cost.
    made_last: Option<(u64, v1::CheckpointMade)>,
    /// Snapshots of steps up to this one are needed no more.
    checkpoints_closed: u64,
    /// Checkpoints that were given up: their parts are to be deleted.
    refuse: BTreeSet<u64>,
    /// Receipts that are not durable, and recent ones for watchers.
    receipts: BTreeMap<u64, v1::StepRecord>,
    /// Receipts below this step are durable.
    receipts_durable: u64,
    storing_receipts: bool,
    waiting_for: String,
    planted: Option<Planted>,
}

impl Core {
    /// A leader at `now` that has heard of nobody yet.
    pub fn new(now: Millis, settings: Settings, durable: Durable) -> Self {
        let receipts_durable = durable.receipts.keys().last().map_or(0, |s| s + 1);
        let receipts_durable = receipts_durable.max(durable.receipts_from);
        Core {
            phase: Phase::Gathering { since: now },
            workers: BTreeMap::new(),
            sessions: BTreeMap::new(),
            generation: durable.generation,
            now,
            last_tick: now,
            measured: Measured::default(),
            departures: BTreeMap::new(),
            look: true,
            heard_ready: false,
            step_since: now,
            steps_of_cut: 0,
            stop_at: settings.steps_total,
            decided_lately: VecDeque::new(),
            hang_told: Told::default(),
            requests: 0,
            committed: 0,
            decided: durable.committed.max(receipts_durable),
            unsure_below: durable.horizon,
            written: Written::new(now, &durable),
            committed_digest: None,
            members: Vec::new(),
            nodes_now: BTreeMap::new(),
            lanes_next: BTreeMap::new(),
            nodes_next: BTreeMap::new(),
            ready: BTreeMap::new(),
            evidence: Evidence::default(),
            distrust: Distrust::default(),
            audits: LaneAudits::default(),
            held: Held::default(),
            recompute: false,
            troubles: Troubles::default(),
            failures: BTreeMap::new(),
            links: v1::Links::Tcp,
            groups: Vec::new(),
            open_links: OpenLinks::default(),
            link_record: LinkRecord::default(),
            evaluation: Evaluation::default(),
            exporter: None,
            exported: None,
            checkpoint: None,
            closing: BTreeMap::new(),
            made_last: None,
            checkpoints_closed: 0,
            refuse: BTreeSet::new(),
            receipts: BTreeMap::new(),
            receipts_durable,
            storing_receipts: false,
            waiting_for: String::new(),
            planted: None,
            s: settings,
            durable,
        }
    }

    /// What a new watcher is told first.
    pub fn status(&self) -> v1::RunEvent {
        let phase = match self.phase {
            Phase::Gathering { .. } => "gathering",
            Phase::Loading { .. } => "loading",
            Phase::Training | Phase::Finishing if self.is_draining() => "draining",
            Phase::Training => "training",
            Phase::Finishing => "finishing",
            Phase::Over => "finished",
        };
        v1::RunEvent {
            term: self.s.term,
            generation: self.generation,
            step: self.committed,
            steps_total: self.s.steps_total,
            phase: phase.into(),
            waiting_for: self.waits().to_owned(),
            workers: match self.phase {
                Phase::Training | Phase::Finishing => self.members.len() as u32,
                _ => self.workers.len() as u32,
            },
            audits: Some(self.audits.counts),
            ..Default::default()
        }
    }

    /// Receipts from `step` on, as far as they are still kept.
    pub fn receipts_from(&self, step: u64) -> impl Iterator<Item = &v1::StepRecord> {
        self.receipts.range(step..).map(|(_, receipt)| receipt)
    }

    /// One event in, effects out.
    pub fn apply(&mut self, now: Millis, event: Event) -> Vec<Effect> {
        let mut fx = Vec::new();
        if self.phase == Phase::Over {
            // The result is being written: that it cannot be is still said.
            self.hear_store(now, event, &mut fx);
            return fx;
        }
        self.now = now;
        let workers = self.workers.len();
        let beat = matches!(event, Event::Message(_, up::Body::Heartbeat(_)));
        let report = matches!(
            event,
            Event::Message(_, up::Body::Ready(_) | up::Body::Applied(_))
        );
        self.look |= !beat && !report;
        match event {
            Event::Hello(session, hello) => self.hello(now, session, hello, &mut fx),
            Event::Message(session, body) => {
                if let Some(id) = self.by_session(session) {
                    self.message(now, id, body, &mut fx);
                }
            }
            Event::Gone(session) => {
                if let Some(id) = self.by_session(session) {
                    self.lose(now, id, Loss::Closed, &mut fx);
                }
            }
            Event::ReceiptsDurable { below } => {
                self.storing_receipts = false;
                self.receipts_are_durable(below);
            }
            Event::CheckpointDurable { step } => self.checkpoint_durable(step, &mut fx),
            Event::StoreDiffers { what, how } => {
                self.fail(format!("{what} cannot be stored: {how}"), &mut fx);
            }
            Event::ReceiptsRead { from, receipts } => self.receipts_read(from, receipts),
            event @ (Event::Journaled { .. }
            | Event::StoreAway { .. }
            | Event::StoreBack { .. }) => {
                self.hear_store(now, event, &mut fx);
            }
            Event::CheckpointCorrupt { step, faults } => {
                self.checkpoint_corrupt(step, &faults, &mut fx);
            }
            Event::Drain => self.drain(&mut fx),
            Event::Tick => {
                self.silence(now, &mut fx);
                self.renew(now, &mut fx);
                self.measure_round_trips(&mut fx);
                self.say_hang(&mut fx);
            }
        }
        // With ten thousand workers most events are heartbeats and readiness of some: they leave their
        // record and decide nothing, and looking at everybody for each would cost their number squared.
        let lost = self.workers.len() != workers;
        let waits = beat || report && self.ready.len() < self.members.len();
        if lost || !waits {
            self.advance(now, &mut fx);
            self.say_store_waits(&mut fx);
            self.remember_decisions(&fx);
            self.check_invariants();
        }
        fx
    }

    /// Does what the facts allow.
    fn advance(&mut self, now: Millis, fx: &mut Vec<Effect>) {
        if self.look && !matches!(self.phase, Phase::Training) {
            self.look = false;
            self.tell_waiting(fx);
        }
        match &self.phase {
            Phase::Gathering { .. } | Phase::Loading { .. } if self.is_draining() => {
                self.end_drained(fx);
            }
            Phase::Gathering { since } => self.advance_gathering(*since, now, fx),
            Phase::Loading { .. } => self.advance_loading(now, fx),
            Phase::Training => self.advance_training(now, fx),
            Phase::Finishing => self.advance_finishing(fx),
            Phase::Over => {}
        }
    }

    fn message(&mut self, now: Millis, id: u64, body: up::Body, fx: &mut Vec<Effect>) {
        let Some(worker) = self.workers.get_mut(&id) else {
            return;
        };
        worker.last_seen = now;
        worker.last_said = report::name(&body);
        match body {
            up::Body::Hello(_) => {}
            up::Body::Applied(applied) => self.learn_stall(&applied, fx),
            up::Body::StateDigest(told) => self.take_state_digest(id, &told),
            up::Body::Heartbeat(beat) => self.follow(now, id, &beat, fx),
            up::Body::Ready(ready) => self.take_ready(id, ready),
            up::Body::PeerTrouble(trouble) => self.take_trouble(now, id, &trouble, fx),
            up::Body::LaneAudited(told) => self.lane_audited(id, told, fx),
            up::Body::Unreadable(report) => self.take_unreadable(now, id, report, fx),
            up::Body::StateReady(ready) => self.state_ready(now, id, ready, fx),
            up::Body::PartStored(part) => self.part_stored(id, part, fx),
            up::Body::SnapshotHeld(held) => self.learn_snapshot(id, held, fx),
            up::Body::ShareEvaluated(told) => self.take_share(told, fx),
            up::Body::Evaluated(evaluated) => self.take_evaluated(now, id, evaluated, fx),
            up::Body::Exported(exported) => self.take_exported(id, exported, fx),
            up::Body::LinkId(link_id) => self.take_link_id(now, id, link_id, fx),
            up::Body::Leaving(leaving) => {
                worker.leaving = true;
                let text = format!("worker {id} leaves after its step: {}", leaving.reason);
                self.about(id, Reason::WorkerLeaving, text, fx);
            }
            up::Body::Fatal(fatal) => self.take_failure(now, id, fatal.error, fx),
        }
    }

    /// What must hold after every event.
    ///
    /// # Panics
    /// When it does not: going on would commit something wrong.
    fn check_invariants(&self) {
        if self.phase == Phase::Training {
            assert!(
                self.committed < self.stop_at,
                "training beyond the last step"
            );
            assert!(self.ready.len() <= self.members.len(), "a ready of nobody");
        }
        let fenced = self
            .ready
            .first_key_value()
            .is_none_or(|(_, r)| r.step == self.committed && r.generation == self.generation);
        assert!(fenced, "a ready of another step or generation is kept");
        assert_eq!(
            self.sessions.len(),
            self.workers.len(),
            "two workers in one session"
        );
    }

    /// What must hold whenever members or their lanes change.
    ///
    /// # Panics
    /// As [`Core::check_invariants`].
    fn check_assignment(&self) {
        let nodes = self.nodes_now.values().flatten().copied();
        let tiled = lanes::tiles_exactly(self.s.lanes, nodes);
        assert!(tiled.is_ok(), "step {}: {tiled:?}", self.committed);
        let known = self.members.iter().all(|m| self.workers.contains_key(m));
        assert!(known, "a member without a session");
        assert!(self.members.is_sorted(), "ranks follow ids");
    }

    fn emit(&self, fill: impl FnOnce(&mut v1::RunEvent), fx: &mut Vec<Effect>) {
        let mut event = self.status();
        fill(&mut event);
        fx.push(Effect::Emit(Box::new(event)));
    }

    /// Says what was decided and why.
    fn notice(&self, reason: Reason, text: String, fx: &mut Vec<Effect>) {
        let fill = |e: &mut v1::RunEvent| {
            e.set_reason(reason);
            e.notice = text;
        };
        self.emit(fill, fx);
    }

    /// Says what was decided about a worker and why.
    fn about(&self, worker: u64, reason: Reason, text: String, fx: &mut Vec<Effect>) {
        let fill = |e: &mut v1::RunEvent| {
            e.set_reason(reason);
            e.worker_id = Some(worker);
            e.notice = text;
        };
        self.emit(fill, fx);
    }

    fn wait_for(&mut self, what: String, fx: &mut Vec<Effect>) {
        if self.waiting_for != what {
            let before = self.waits().to_owned();
            self.waiting_for = what;
            self.say_waits(&before, fx);
        }
    }

    fn send(&self, id: u64, body: down::Body, fx: &mut Vec<Effect>) {
        if let Some(worker) = self.workers.get(&id) {
            fx.push(Effect::Send(worker.session, body));
        }
    }

    /// The same to several workers.
    fn send_all<'a>(
        &self,
        ids: impl IntoIterator<Item = &'a u64>,
        body: down::Body,
        fx: &mut Vec<Effect>,
    ) {
        let sessions = ids.into_iter().filter_map(|id| self.workers.get(id));
        let sessions: Vec<u64> = sessions.map(|w| w.session).collect();
        if !sessions.is_empty() {
            fx.push(Effect::SendAll(sessions, Box::new(body)));
        }
    }

    /// The worker takes the place of whoever has its id.
    fn insert_worker(&mut self, id: u64, worker: Worker) {
        self.remove_worker(id);
        self.sessions.insert(worker.session, id);
        self.workers.insert(id, worker);
    }

    /// A worker's session is no session of the run any more.
    fn remove_worker(&mut self, id: u64) {
        if let Some(worker) = self.workers.remove(&id) {
            self.sessions.remove(&worker.session);
        }
        self.look = true;
    }

    fn fail(&mut self, reason: String, fx: &mut Vec<Effect>) {
        self.end(false, reason, fx);
    }
}

#[cfg(test)]
mod tests;
