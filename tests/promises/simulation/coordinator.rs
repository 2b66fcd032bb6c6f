//! The coordinator's shell in the simulation: its effects become messages and durable files.

use belfry_coordinator::core as lead;
use belfry_proto::v1;

use super::arithmetic::part_hash;
use super::world::{Happening, Job, World};

impl World {
    pub(super) fn start_coordinator(&mut self) {
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
            links: self.sizes.links,
            term: self.coordinator_life,
        };
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
        for effect in core.apply(self.now, event) {
            self.lead(effect);
        }
    }

    pub(super) fn lead(&mut self, effect: lead::Effect) {
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
