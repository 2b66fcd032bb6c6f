//! A coordinator's core with a crowd of workers that do what they are told at once: every event's
//! time by kind. No socket, no thread; the clock is virtual and only the core's own work is timed.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use belfry_coordinator::core::{Core, Durable, Effect, Event, Settings};
use belfry_proto::v1::{self, coordinator_message as down, worker_message as up};
use belfry_proto::{Digest, LaneRange, objective};

use super::super::timing::Rounds;

/// Virtual time between two steps.
const STEP_MS: u64 = 1_000;

/// What a worker of the crowd knows.
#[derive(Clone, Default)]
struct Worker {
    session: u64,
    generation: u64,
    /// Lanes of the open step, and of the steps behind it.
    now: Vec<LaneRange>,
    next: Vec<LaneRange>,
}

/// See the module.
pub struct Crowd {
    core: Core,
    run_id: String,
    now: u64,
    step: u64,
    pairs_per_lane: u64,
    /// By id.
    workers: BTreeMap<u64, Worker>,
    sessions: u64,
    /// Journal entries so far.
    entry: u64,
    /// Who was asked to load or copy: the answers that are due.
    asked: Vec<(u64, up::Body)>,
    /// Commits so far.
    pub commits: u64,
    /// Generations so far.
    pub generations: u64,
    /// Seconds of `apply`, by what it decided.
    pub times: BTreeMap<&'static str, Rounds>,
}

impl Crowd {
    /// A leader that nobody has spoken to yet.
    pub fn new(settings: Settings) -> Self {
        Crowd {
            run_id: settings.run_id.clone(),
            pairs_per_lane: settings.pairs_per_lane,
            core: Core::new(0, settings, Durable::default()),
            now: 0,
            step: 0,
            workers: BTreeMap::new(),
            sessions: 0,
            entry: 0,
            asked: Vec::new(),
            commits: 0,
            generations: 0,
            times: BTreeMap::new(),
        }
    }

    /// A new worker says hello.
    pub fn arrive(&mut self, id: u64) -> Result<(), String> {
        self.sessions += 1;
        let session = self.sessions;
        let worker = Worker {
            session,
            ..Worker::default()
        };
        self.workers.insert(id, worker);
        let hello = v1::Hello {
            run_id: self.run_id.clone(),
            worker_id: id,
            incarnation: session,
            fingerprint: "a crowd".into(),
            data_address: format!("10.{}.{}.{}:4000", id >> 16, (id >> 8) & 255, id & 255),
            ..Default::default()
        };
        self.tell("hello", Event::Hello(session, hello))
    }

    /// A worker's connection ends.
    pub fn die(&mut self, id: u64) -> Result<(), String> {
        match self.workers.remove(&id) {
            Some(worker) => self.tell("death: a generation", Event::Gone(worker.session)),
            None => Ok(()),
        }
    }

    /// Whoever was asked for a state has it.
    pub fn load(&mut self) -> Result<(), String> {
        for (session, answer) in std::mem::take(&mut self.asked) {
            let before = self.generations;
            let event = Event::Message(session, answer);
            self.tell("state ready", event)?;
            if self.generations > before {
                self.last_was("state ready", "join: a generation");
            }
        }
        Ok(())
    }

    /// A heartbeat of everybody.
    pub fn beat(&mut self) -> Result<(), String> {
        self.now += STEP_MS / 4;
        let beats: Vec<(u64, v1::Heartbeat)> = self
            .workers
            .values()
            .map(|worker| {
                let beat = v1::Heartbeat {
                    generation: worker.generation,
                    step: self.step,
                    phase: "computing".into(),
                    ..Default::default()
                };
                (worker.session, beat)
            })
            .collect();
        for (session, beat) in beats {
            self.tell(
                "heartbeat",
                Event::Message(session, up::Body::Heartbeat(beat)),
            )?;
        }
        self.tell("tick", Event::Tick)
    }

    /// The first `share` of the members are ready.
    pub fn ready(&mut self, share: f64) -> Result<(), String> {
        self.now += STEP_MS / 4;
        let members: Vec<u64> = self.members();
        let some = (members.len() as f64 * share) as usize;
        for id in members.into_iter().take(some) {
            let worker = &self.workers[&id];
            let event = up::Body::Ready(self.readiness(worker));
            let before = self.commits;
            self.tell("ready", Event::Message(worker.session, event))?;
            if self.commits > before {
                self.last_was("ready", "commit decision");
            }
        }
        Ok(())
    }

    /// Workers of the open generation.
    fn members(&self) -> Vec<u64> {
        let open = self.workers.values().map(|w| w.generation).max();
        let of_it = self
            .workers
            .iter()
            .filter(|(_, w)| Some(w.generation) == open);
        of_it.map(|(id, _)| *id).collect()
    }

    fn readiness(&self, worker: &Worker) -> v1::Ready {
        let report = |lane| v1::LaneReport {
            lane,
            pairs: self.pairs_per_lane,
            objectives: ["mlm", "itm"]
                .map(|name| objective::sum_of(name, 1.0))
                .to_vec(),
            pairs_digest: Digest(u128::from(lane)).to_bytes(),
            ..Default::default()
        };
        v1::Ready {
            term: 1,
            generation: worker.generation,
            step: self.step,
            sum_digest: Digest(self.step.into()).to_bytes(),
            finite: true,
            lanes: worker
                .now
                .iter()
                .flat_map(|n| n.start..n.end)
                .map(report)
                .collect(),
            compute_seconds: 1.0,
            ..Default::default()
        }
    }

    /// The last event was of another kind than it seemed before.
    fn last_was(&mut self, seemed: &'static str, was: &'static str) {
        if let Some(time) = self.times.get_mut(seemed).and_then(Rounds::take_last) {
            self.times.entry(was).or_default().add(time);
        }
    }

    /// One event, and everything that it leads to, of which only the core's work is timed.
    fn tell(&mut self, kind: &'static str, event: Event) -> Result<(), String> {
        let begun = Instant::now();
        let effects = self.core.apply(self.now, event);
        let time = begun.elapsed().as_secs_f64();
        self.times.entry(kind).or_default().add(time);
        let mut opened = None;
        let sessions: BTreeMap<u64, u64> = match effects.len() {
            // Looking every session up is worth it only for what goes to all.
            0..=8 => BTreeMap::new(),
            _ => self
                .workers
                .iter()
                .map(|(id, w)| (w.session, *id))
                .collect(),
        };
        let mut committed = BTreeSet::new();
        let (mut entries, mut below) = (0, None);
        for effect in effects {
            match effect {
                Effect::Send(session, body) => {
                    let id = self.whose(&sessions, session);
                    self.take(id, session, &body, &mut committed);
                }
                Effect::SendAll(all, body) => match *body {
                    down::Body::OpenGeneration(open) => opened = Some(open),
                    body => {
                        for session in all {
                            let id = self.whose(&sessions, session);
                            self.take(id, session, &body, &mut committed);
                        }
                    }
                },
                Effect::Journal { .. } => entries += 1,
                Effect::StoreReceipts(receipts) => {
                    below = receipts.last().map(|receipt| receipt.step + 1);
                }
                Effect::Finish { reason, .. } => return Err(reason),
                _ => {}
            }
        }
        if let Some(open) = opened {
            self.generations += 1;
            self.open(&open);
        }
        if !committed.is_empty() {
            self.commits += 1;
            self.step += 1;
        }
        // A store that writes at once.
        for _ in 0..entries {
            self.entry += 1;
            let seq = self.entry;
            self.tell("journaled", Event::Journaled { seq })?;
        }
        if let Some(below) = below {
            self.tell("receipts durable", Event::ReceiptsDurable { below })?;
        }
        Ok(())
    }

    fn whose(&self, sessions: &BTreeMap<u64, u64>, session: u64) -> Option<u64> {
        if !sessions.is_empty() {
            return sessions.get(&session).copied();
        }
        let mut workers = self.workers.iter();
        workers
            .find(|(_, w)| w.session == session)
            .map(|(id, _)| *id)
    }

    fn take(
        &mut self,
        id: Option<u64>,
        session: u64,
        body: &down::Body,
        committed: &mut BTreeSet<u64>,
    ) {
        let loaded = |step, request| {
            up::Body::StateReady(v1::StateReady {
                term: 1,
                step,
                digest: Digest(step.into()).to_bytes(),
                request,
                ..Default::default()
            })
        };
        let held = |step: u64| {
            up::Body::StateDigest(v1::StateDigest {
                term: 1,
                step,
                digest: Digest(step.into()).to_bytes(),
                seconds: 0.0,
            })
        };
        match body {
            down::Body::LoadState(m) => self.asked.push((session, loaded(m.step, m.request))),
            down::Body::DigestState(m) => self.asked.push((session, held(m.step))),
            down::Body::CopyState(m) => self.asked.push((session, loaded(m.step, m.request))),
            down::Body::Commit(commit) => {
                committed.insert(commit.step);
                if let Some(worker) = id.and_then(|id| self.workers.get_mut(&id)) {
                    worker.now = worker.next.clone();
                }
            }
            _ => {}
        }
    }

    fn open(&mut self, open: &v1::OpenGeneration) {
        self.step = open.step;
        for member in &open.members {
            if let Some(worker) = self.workers.get_mut(&member.worker_id) {
                worker.generation = open.generation;
                worker.now = member.nodes_now.iter().map(|n| (*n).into()).collect();
                worker.next = vec![LaneRange {
                    start: member.lanes_start,
                    end: member.lanes_end,
                }];
            }
        }
    }
}
