//! What a worker decides: a pure state machine between the coordinator's words and the worker's
//! hands.
//!
//! [`Core::apply`] takes one event and returns effects; it knows no socket, clock, thread or
//! device. State changes only when a commit is applied, so between two applies everything may be
//! repeated: lanes kept, exchanges retried, generations changed. The rules are DESIGN 6's: a worker
//! applies step s only if s = applied and its own ready for s was given, or if a generation opens
//! at s + 1 and it holds the reduced gradient of s.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use belfry_data::Quarantine;
use belfry_model::Gradient;
use belfry_proto::v1::{self, coordinator_message as down, worker_message as up};
use belfry_proto::{Digest, LaneRange, Schedule, lanes};

use crate::partials::Partials;

mod audit;
mod commit;
mod features;
mod generation;
mod interface;
mod lanes_of_step;
mod links;
mod planted;

pub use audit::Attempt;
use audit::Audited;
pub use features::{Features, Gathering};
pub use interface::{Copied, Digests, Effect, Event, Exchange, Identity, LateReports};
pub use links::Linked;
use links::Links;
#[doc(hidden)]
pub use planted::Planted;

/// Messages that may wait while an update is being applied.
const DEFERRED_MAX: usize = 64;

/// The reduced gradient of the open step.
#[derive(Debug)]
struct Pending {
    step: u64,
    sum: Arc<Vec<f32>>,
    digest: Digest,
    finite: bool,
}

#[derive(Debug)]
struct Membership {
    generation: u64,
    rank: usize,
    members: Vec<v1::Member>,
    /// The step for which `nodes_now` is the assignment.
    step: u64,
    nodes_now: Vec<LaneRange>,
    links: Links,
}

impl Membership {
    /// Addresses and nodes by rank.
    fn addresses(&self) -> Vec<(String, Vec<LaneRange>)> {
        let members = self.members.iter();
        let of = |member: &v1::Member| {
            let nodes = member.nodes_now.iter().map(|n| (*n).into()).collect();
            (member.data_address.clone(), nodes)
        };
        members.map(of).collect()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// No state, or none that counts.
    Empty,
    /// Init, load or copy is under way for this step.
    Acquiring(u64),
    /// State is there; no generation asks for anything.
    Idle,
    /// Features of lanes are being computed: everybody's are needed before any gradient.
    Featuring,
    /// All own lanes' features are there; everybody's are being gathered.
    Gathering,
    /// Lanes are being computed.
    Computing,
    /// All lanes are done; the id of the device links is awaited.
    Linking,
    /// The all-reduce runs.
    Reducing,
    /// The sum is reported; the commit is awaited.
    Ready,
    /// The optimizer runs.
    Applying,
}

/// The lane that is being computed.
#[derive(Debug)]
struct InFlight {
    step: u64,
    lane: u32,
    quarantine: Quarantine,
    /// Of the features that it is computed from, or is to have.
    round: u64,
    of: Of,
}

/// What of a lane is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Of {
    /// Its features.
    Features,
    /// Its gradient.
    Gradient,
    /// Its gradient for this attempt of an audit: it is hashed and dropped.
    Audit(u32),
}

/// The worker's side of the step transaction.
#[derive(Debug)]
pub struct Core {
    me: Identity,
    phase: Phase,
    term: u64,
    generation: u64,
    applied: u64,
    applied_digest: Option<Digest>,
    pending: Option<Pending>,
    membership: Option<Membership>,
    partials: Partials,
    /// Of the open step, where gradients need everybody's.
    features: features::Known,
    in_flight: Option<InFlight>,
    /// The open step's audit, as far as it is this worker's.
    audited: Audited,
    /// The audit of the step behind the one that is being applied.
    next_audit: Option<v1::Audit>,
    /// All shards under quarantine, each from its step on.
    quarantine: Schedule,
    compute_seconds: f64,
    lanes_done: u32,
    deferred: VecDeque<down::Body>,
    last: bool,
    applying_digest: Option<Digest>,
    /// Of committed steps that are not known to be durable: a new coordinator asks for them.
    receipts: BTreeMap<u64, v1::StepRecord>,
    /// A session stands whose hello waits for the update that is being applied.
    hello_due: bool,
    /// Number of the load or copy that was asked for last.
    request: u64,
    /// The process was asked to stop.
    leaving: bool,
    planted: Option<Planted>,
}

impl Core {
    /// A worker without state.
    pub fn new(me: Identity) -> Self {
        Core {
            partials: Partials::new(me.lanes),
            me,
            phase: Phase::Empty,
            term: 0,
            generation: 0,
            applied: 0,
            applied_digest: None,
            pending: None,
            membership: None,
            features: features::Known::default(),
            in_flight: None,
            audited: Audited::default(),
            next_audit: None,
            quarantine: Schedule::default(),
            compute_seconds: 0.0,
            lanes_done: 0,
            deferred: VecDeque::new(),
            last: false,
            applying_digest: None,
            receipts: BTreeMap::new(),
            hello_due: false,
            request: 0,
            leaving: false,
            planted: None,
        }
    }

    /// Present phase, step and progress, for heartbeats and logs.
    pub fn heartbeat(&self) -> v1::Heartbeat {
        let phase = match self.phase {
            Phase::Empty | Phase::Idle => "idle",
            Phase::Acquiring(_) => "acquiring state",
            Phase::Featuring => "computing features",
            Phase::Gathering => "gathering",
            Phase::Computing => "computing",
            Phase::Linking => "linking",
            Phase::Reducing => "reducing",
            Phase::Ready => "ready",
            Phase::Applying => "applying",
        };
        v1::Heartbeat {
            generation: self.generation,
            step: self.applied,
            lanes_done: self.lanes_done,
            phase: phase.into(),
            ..Default::default()
        }
    }

    /// One event in, effects out, to be executed in order.
    pub fn apply(&mut self, event: Event) -> Vec<Effect> {
        let mut effects = Vec::new();
        match event {
            // Whom it would say good-bye to may be another coordinator than the one it worked for.
            Event::LinkUp | Event::LinkDown if self.leaving => effects.push(Effect::Exit {
                success: true,
                reason: "left".into(),
            }),
            // What is held is only half true while an update is being applied.
            Event::LinkUp if self.phase == Phase::Applying => self.hello_due = true,
            Event::LinkUp => effects.push(Effect::Send(up::Body::Hello(self.hello()))),
            Event::LinkDown => {
                self.hello_due = false;
                // What the old session still had to say was meant for another past.
                self.deferred.clear();
            }
            Event::Message(body) => self.message(body, &mut effects),
            Event::FeaturesDone {
                step,
                lane,
                features,
                seconds,
            } => self.features_done((step, lane), features, seconds, &mut effects),
            Event::Gathered {
                generation,
                step,
                features,
            } => self.gathered(generation, step, features, &mut effects),
            Event::LaneDone {
                step,
                report,
                gradient,
                seconds,
            } => self.lane_done(step, report, gradient, seconds, &mut effects),
            Event::LaneDigest {
                attempt,
                digest,
                seconds,
            } => self.lane_digest(attempt, digest, seconds, &mut effects),
            Event::StateDigest {
                step,
                digest,
                seconds,
            } => effects.push(Effect::Send(up::Body::StateDigest(v1::StateDigest {
                term: self.term,
                step,
                digest: digest.map(Digest::to_bytes).unwrap_or_default(),
                seconds,
            }))),
            Event::Unreadable {
                step,
                lane,
                shards,
                detail,
            } => self.unreadable((step, lane), shards, detail, &mut effects),
            Event::Reduced {
                generation,
                step,
                sum,
                digest,
                finite,
                late,
                digests,
            } => {
                if self.exchanging(generation, step) {
                    self.compute_seconds += late.seconds;
                    self.partials.complete_reports(late.reports);
                    self.reduced((sum, digest, finite), digests, &mut effects);
                }
            }
            Event::ReduceFailed {
                generation,
                step,
                ranks,
                detail,
            } => {
                if self.exchanging(generation, step) || self.is_gathering(generation, step) {
                    // The coordinator answers with a new generation.
                    effects.push(Effect::Send(up::Body::PeerTrouble(v1::PeerTrouble {
                        generation,
                        step,
                        ranks,
                        detail,
                    })));
                }
            }
            Event::IdMade { generation, id } => self.id_made(generation, id, &mut effects),
            Event::Applied { step } => self.was_applied(step, &mut effects),
            Event::StateArrived {
                step,
                digest,
                copied,
            } => self.state_arrived(step, digest, copied, &mut effects),
            Event::StateFailed {
                step,
                error,
                copied,
            } => {
                if self.phase == Phase::Acquiring(step) {
                    self.phase = Phase::Empty;
                    effects.push(self.state_ready(step, None, error, copied));
                }
            }
            Event::Report(body) => effects.push(Effect::Send(body)),
            Event::Failed(error) => {
                effects.push(Effect::Send(up::Body::Fatal(v1::Fatal {
                    error: error.clone(),
                })));
                effects.push(Effect::Exit {
                    success: false,
                    reason: error,
                });
            }
            Event::Shutdown => {
                self.leaving = true;
                let reason = "asked to stop".to_owned();
                effects.push(Effect::Send(up::Body::Leaving(v1::Leaving { reason })));
            }
        }
        effects
    }

    fn has_state(&self) -> bool {
        !matches!(self.phase, Phase::Empty | Phase::Acquiring(_))
    }

    fn holds(&self, step: u64) -> bool {
        self.has_state() && self.applied == step
    }

    fn hello(&self) -> v1::Hello {
        let bytes = |digest: Option<Digest>| digest.map(Digest::to_bytes).unwrap_or_default();
        v1::Hello {
            run_id: self.me.run_id.clone(),
            worker_id: self.me.worker_id,
            incarnation: self.me.incarnation,
            fingerprint: self.me.fingerprint.clone(),
            data_address: self.me.data_address.clone(),
            term: self.term,
            generation: self.generation,
            has_state: self.has_state(),
            applied: self.applied,
            applied_digest: bytes(self.applied_digest),
            pending_digest: bytes(self.pending.as_ref().map(|p| p.digest)),
            nodes: self.partials.nodes().map(Into::into).collect(),
            receipts: self.receipts.values().cloned().collect(),
            device: Some(self.me.device.clone()),
            data: self.me.data.clone(),
        }
    }

    fn keep_receipt(&mut self, receipt: Option<v1::StepRecord>) {
        if let Some(receipt) = receipt {
            self.receipts.insert(receipt.step, receipt);
        }
    }

    fn message(&mut self, body: down::Body, effects: &mut Vec<Effect>) {
        if self.phase == Phase::Applying && !matches!(body, down::Body::Refused(_)) {
            if self.deferred.len() < DEFERRED_MAX {
                self.deferred.push_back(body);
            } else {
                // A coordinator that talks this much to a busy worker is not one of ours.
                effects.push(Effect::Reconnect);
            }
            return;
        }
        match body {
            down::Body::Welcome(w) => {
                if self.accepts(w.term) {
                    let step = Duration::from_micros(w.step_us);
                    let round_trip = Duration::from_micros(w.round_trip_us);
                    effects.push(Effect::Measured { step, round_trip });
                }
            }
            // The shell measures round trips, and says what is waited for.
            down::Body::Echo(_) | down::Body::Wait(_) => {}
            down::Body::Refused(r) => effects.push(Effect::Exit {
                success: false,
                reason: format!("refused by the coordinator: {}", r.reason),
            }),
            down::Body::LoadState(m) => {
                if self.accepts(m.term) {
                    self.begin_acquiring(m.step, m.request, effects);
                    self.receipts.clear();
                    let (step, manifest) = (m.step, m.manifest);
                    effects.push(Effect::Load { step, manifest });
                }
            }
            down::Body::CopyState(m) => {
                if self.accepts(m.term) {
                    self.begin_acquiring(m.step, m.request, effects);
                    self.receipts = m.receipts.into_iter().map(|r| (r.step, r)).collect();
                    let (step, sources) = (m.step, m.sources);
                    effects.push(Effect::Copy { step, sources });
                }
            }
            down::Body::OpenGeneration(m) => self.open_generation(m, effects),
            down::Body::LinkId(m) => self.link_id(m, effects),
            down::Body::Audit(m) => self.compute_once_more(m, effects),
            down::Body::DigestState(m) if self.holds(m.step) => {
                effects.push(Effect::DigestState { step: m.step });
            }
            down::Body::DigestState(m) => {
                effects.extend(self.apply(Event::StateDigest {
                    step: m.step,
                    digest: None,
                    seconds: 0.0,
                }));
            }
            down::Body::Commit(m) => self.commit(m, effects),
            down::Body::StoreParts(m) if self.holds(m.step) => {
                let (step, parts) = (m.step, m.parts);
                effects.push(Effect::StoreParts { step, parts });
            }
            down::Body::Evaluate(m) if self.holds(m.step) => {
                effects.push(Effect::Evaluate(m));
            }
            down::Body::Export(m) if self.holds(m.step) => {
                effects.push(Effect::Export { step: m.step });
            }
            down::Body::StoreParts(_) | down::Body::Evaluate(_) | down::Body::Export(_) => {
                // Asked of a state that is gone: let the coordinator see what is held.
                effects.push(Effect::Reconnect);
            }
            down::Body::Finished(m) => effects.push(Effect::Exit {
                success: m.success,
                reason: m.reason,
            }),
        }
    }

    /// Fencing: a lower term is an old coordinator.
    fn accepts(&mut self, term: u64) -> bool {
        let current = term >= self.term;
        self.term = self.term.max(term);
        current
    }

    fn begin_acquiring(&mut self, step: u64, request: u64, effects: &mut Vec<Effect>) {
        self.request = request;
        self.leave_exchange(effects);
        self.phase = Phase::Acquiring(step);
        self.membership = None;
        self.pending = None;
        self.applied_digest = None;
        self.partials.clear();
        self.features.clear();
        self.audited.clear();
    }

    /// Leaves the gathering or the all-reduce that is under way.
    fn leave_exchange(&self, effects: &mut Vec<Effect>) {
        if matches!(self.phase, Phase::Gathering | Phase::Reducing) {
            effects.push(Effect::AbortReduce);
        }
    }

    fn state_ready(
        &self,
        step: u64,
        digest: Option<Digest>,
        error: String,
        copied: Copied,
    ) -> Effect {
        Effect::Send(up::Body::StateReady(v1::StateReady {
            term: self.term,
            step,
            digest: digest.map(Digest::to_bytes).unwrap_or_default(),
            error,
            request: self.request,
            bytes: copied.bytes,
            bytes_total: copied.bytes_total,
            seconds: copied.seconds,
            liars: copied.liars,
        }))
    }

    fn state_arrived(
        &mut self,
        step: u64,
        digest: Digest,
        copied: Copied,
        effects: &mut Vec<Effect>,
    ) {
        if self.phase != Phase::Acquiring(step) {
            return;
        }
        self.phase = Phase::Idle;
        self.applied = step;
        effects.push(self.state_ready(step, Some(digest), String::new(), copied));
    }

    fn exchanging(&self, generation: u64, step: u64) -> bool {
        let current = generation == self.generation && step == self.applied;
        self.phase == Phase::Reducing && (current || self.has(Planted::TakesOldSums))
    }

    /// The sum is there. Another generation of the step may have given other bits; the coordinator
    /// hears of both, and of the other workers'.
    fn reduced(
        &mut self,
        (sum, digest, finite): (Vec<f32>, Digest, bool),
        digests: Digests,
        fx: &mut Vec<Effect>,
    ) {
        let step = self.applied;
        let Some(m) = &self.membership else { return };
        let ready = v1::Ready {
            term: self.term,
            generation: self.generation,
            step,
            sum_digest: digest.to_bytes(),
            finite,
            lanes: self.partials.reports(&m.nodes_now),
            compute_seconds: self.compute_seconds,
            nodes: digests.nodes.into_iter().map(node_digest).collect(),
            sum_parts: digests.sum_parts,
            state_digest: digests.state.map(Digest::to_bytes).unwrap_or_default(),
        };
        self.pending = Some(Pending {
            step,
            sum: Arc::new(sum),
            digest,
            finite,
        });
        self.phase = Phase::Ready;
        fx.push(Effect::Send(up::Body::Ready(ready)));
    }
}

fn node_digest((node, digest): (LaneRange, u64)) -> v1::NodeDigest {
    v1::NodeDigest {
        node: Some(node.into()),
        digest,
    }
}

#[cfg(test)]
mod tests;
