//! The coordinator's shell in the simulation: its effects become messages and durable files.

use belfry_coordinator::core as lead;
use belfry_coordinator::outgoing::{Outgoing, is_barrier};
use belfry_proto::{Schedule, v1};

use super::arithmetic::{first_choice, part_hash, quarantine_at, reference};
use super::world::{Happening, Job, World};

impl World {
    pub(super) fn start_coordinator(&mut self) {
        self.coordinator_life += 1;
        let settings = lead::Settings {
            run_id: "run".into(),
            lanes: self.sizes.lanes,
            micro_batches: self.sizes.lanes,
            pairs_per_lane: 1,
            steps_total: self.sizes.steps,
            min_workers: 1,
            expected_workers: self.sizes.workers,
            timeouts: self.sizes.timeouts(),
            checkpoint_every: self.sizes.checkpoint_every,
            checkpoint_parts: self.sizes.parts,
            nodes_max: 4,
            audit_every: self.sizes.audit_every,
            evaluates: true,
            links: self.sizes.links,
            quarantine_shards_max: self.sizes.quarantine_shards_max,
            horizon_steps: self.sizes.horizon_steps,
            term: self.coordinator_life,
        };
        self.outgoing = Outgoing::default();
        self.written_at = self.now;
        let core = lead::Core::new(self.now, settings, self.durable.clone());
        self.coordinator = Some(core);
        self.say(format!("coordinator of term {}", self.coordinator_life));
        self.after(0, Happening::Tick(self.coordinator_life));
    }

    pub(super) fn tell_coordinator(&mut self, session: Option<u64>, event: lead::Event) {
        let ours =
            session.is_none_or(|s| self.sessions[&s].coordinator_life == self.coordinator_life);
        let Some(core) = self.coordinator.as_mut().filter(|_| ours) else {
            return;
        };
        let effects = core.apply(self.now, event);
        for effect in self.outgoing.push(effects) {
            self.lead(effect);
        }
    }

    /// What others wait for takes its time; it is durable in the order in which it was asked for.
    fn write(&mut self, effect: lead::Effect) {
        let at = self.now + 1 + self.below(20);
        self.written_at = self.written_at.max(at);
        let delay = self.written_at - self.now;
        self.after(delay, Happening::Written(self.coordinator_life, effect));
    }

    /// A write is durable. What a coordinator was writing when it died is lost with it.
    pub(super) fn written(&mut self, life: u64, effect: lead::Effect) {
        use lead::Effect as E;
        if life != self.coordinator_life || self.coordinator.is_none() {
            return;
        }
        let holds_back = is_barrier(&effect);
        let mut event = None;
        match effect {
            E::Journal {
                generation,
                committed,
                horizon,
                members,
                quarantine,
                ..
            } => {
                let last = self.commits.keys().last();
                let known = committed.max(horizon);
                assert!(last.is_none_or(|s| *s < known), "it forgets commits");
                self.entries += 1;
                self.durable.entry = self.entries;
                self.durable.generation = generation;
                self.durable.committed = committed;
                self.durable.horizon = horizon;
                self.durable.members = members;
                self.journal_quarantine(quarantine.into_iter().collect());
                event = Some(lead::Event::Journaled { seq: self.entries });
            }
            E::StoreData(data) => self.durable.data = Some(data),
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
            other => panic!("{other:?} is no write"),
        }
        if holds_back {
            for effect in self.outgoing.settled() {
                self.lead(effect);
            }
        }
        if let Some(event) = event {
            self.tell_coordinator(None, event);
        }
    }

    pub(super) fn lead(&mut self, effect: lead::Effect) {
        use lead::Effect as E;
        let life = self.coordinator_life;
        match effect {
            effect @ (E::Journal { .. } | E::StoreData(_) | E::StoreResult { .. }) => {
                self.write(effect);
            }
            E::Send(session, body) => self.send_down(session, body),
            E::SendAll(sessions, body) => {
                for session in sessions {
                    self.send_down(session, (*body).clone());
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
            E::Emit(event) => {
                if !event.notice.is_empty() {
                    self.say(format!("[step {}] {}", event.step, event.notice));
                }
                if let Some(record) = event.committed {
                    let expected = self.reference[record.step as usize].1;
                    assert_eq!(record.sum_digest, expected.to_string(), "a committed sum");
                    assert_eq!(record.pairs, u64::from(self.sizes.lanes), "every lane once");
                    self.check_quarantine(&record);
                    assert!(record.step < self.durable.horizon, "beyond the journal");
                    *self.commits.entry(record.step).or_default() += 1;
                }
            }
            E::Finish { success, reason } => self.outcome = Some((success, reason)),
        }
    }

    fn send_down(&mut self, session: u64, body: v1::coordinator_message::Body) {
        let delay = 1 + self.below(20);
        let session_state = self.sessions.get_mut(&session).expect("a known session");
        if session_state.open {
            session_state.down_at = (session_state.down_at + 1).max(self.now + delay);
            let delay = session_state.down_at - self.now;
            self.after(delay, Happening::Down(session, body));
        }
    }

    /// What may be chosen: shards are added, none goes, and no step that ever was committed is touched.
    /// From its first step on the choice is part of what the bits must be.
    fn journal_quarantine(&mut self, chosen: Schedule) {
        if chosen == self.durable.quarantine {
            return;
        }
        let before = &self.durable.quarantine;
        let kept = before.all().all(|shard| chosen.find(shard) == Some(shard));
        assert!(kept, "a quarantine grows only");
        assert!(chosen.len() <= self.sizes.quarantine_shards_max as usize);
        for shard in chosen.all().filter(|s| before.find(s).is_none()) {
            let step = shard.from_step;
            let stored = self.durable.receipts.range(step..).next();
            assert_eq!(stored, None, "the ledger has step {step} already");
            let committed = self.commits.range(step..).next();
            assert_eq!(committed, None, "step {step} was committed already");
        }
        let reference = reference(self.sizes, &chosen);
        let from = chosen.all().filter(|s| before.find(s).is_none());
        let from = from.map(|s| s.from_step).min().expect("it grew") as usize;
        assert_eq!(reference[from].0, self.reference[from].0, "the past stays");
        self.reference = reference;
        self.durable.quarantine = chosen;
        self.quarantines += 1;
    }

    /// The receipt names what was journaled before its commit.
    fn check_quarantine(&self, record: &v1::StepRecord) {
        let journaled: Vec<v1::Shard> = self.durable.quarantine.at(record.step).cloned().collect();
        assert_eq!(record.quarantine, journaled, "of step {}", record.step);
        let lost = quarantine_at(&self.durable.quarantine, record.step);
        let natural = (0..self.sizes.lanes).map(|lane| first_choice(record.step, lane));
        let replaced = natural.filter(|shard| lost.iter().any(|l| l.shard == *shard));
        assert_eq!(record.substituted, replaced.count() as u64);
    }

    /// A write lands whether or not who asked for it still lives.
    pub(super) fn stored(&mut self, life: u64, job: Job) {
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

    pub(super) fn keep_receipts(&mut self, receipts: Vec<v1::StepRecord>) {
        for receipt in receipts {
            let there = self.durable.receipts.insert(receipt.step, receipt.clone());
            assert!(there.is_none_or(|r| r == receipt), "a receipt changed");
        }
    }
}
