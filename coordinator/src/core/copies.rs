//! Newcomers copy the open step's state from the members, and are compared with what all hold.
//!
//! While a newcomer copies, every member tells the digest of its whole state. What most of them tell
//! is agreed on; a newcomer joins with it or tries again, and a member that holds something else is
//! removed. The commit is withheld for a bounded time only. A copy that does not end in time is tried
//! again with more: twice as much each time, and at least what its speed so far asks for, so that a
//! newcomer joins over any network. Knows nothing of how states travel.

use super::evidence::{Vote, vote};
use super::*;

/// Doublings of the pause after failed copies, and of the time that the next one gets.
const COPY_DOUBLINGS_MAX: u32 = 6;
/// Members that a newcomer copies from at once.
const SOURCES_MAX: usize = 32;

/// What the members hold, as far as they were asked.
#[derive(Debug, Default)]
pub(super) struct Held {
    step: u64,
    /// Who was asked and has not answered.
    asked: BTreeSet<u64>,
    told: BTreeMap<u64, Digest>,
}

impl Held {
    /// What was asked of a worker in an older session may be lost.
    pub(super) fn forget(&mut self, id: u64) {
        self.asked.remove(&id);
        self.told.remove(&id);
    }
}

impl Core {
    /// Newcomers copy the open step's state from all members at once.
    pub(super) fn copy_to_newcomers(&mut self, now: Millis, fx: &mut Vec<Effect>) {
        let newcomers = self.newcomers(now);
        if newcomers.is_empty() {
            return;
        }
        // Some of many, evenly spread.
        let members = self.members.iter();
        let members = members.step_by(self.members.len().div_ceil(SOURCES_MAX).max(1));
        let sources: Vec<String> = members.map(|id| self.workers[id].address.clone()).collect();
        let (term, step) = (self.s.term, self.committed);
        let usual = millis(self.timeouts().copy);
        for id in newcomers {
            // Numbers never repeat in a term, so an answer cannot be taken for another's.
            self.requests += 1;
            let request = self.requests;
            let copy = v1::CopyState {
                term,
                step,
                sources: sources.clone(),
                receipts: self.receipts_from(self.receipts_durable).cloned().collect(),
                request,
            };
            if let Some(worker) = self.workers.get_mut(&id) {
                let doublings = worker.copies_failed.min(COPY_DOUBLINGS_MAX);
                worker.copying = Some(Copying {
                    step,
                    request,
                    until: now + (usual << doublings).max(worker.copy_needs),
                    arrived: None,
                });
                // What it held of its own state goes with it.
                worker.applied = None;
                worker.pending_digest = None;
                worker.nodes.clear();
                worker.waits_for.clear();
            }
            self.send(id, down::Body::CopyState(copy), fx);
        }
        self.ask_what_is_held(fx);
    }

    fn ask_what_is_held(&mut self, fx: &mut Vec<Effect>) {
        let (term, step) = (self.s.term, self.committed);
        if self.held.step != step {
            self.held = Held {
                step,
                ..Held::default()
            };
        }
        if self.held.told.len() + self.held.asked.len() >= self.members.len() {
            return;
        }
        let (held, mut new) = (&mut self.held, Vec::new());
        for id in &self.members {
            if !held.told.contains_key(id) && held.asked.insert(*id) {
                new.push(*id);
            }
        }
        let ask = v1::DigestState { term, step };
        self.send_all(&new, down::Body::DigestState(ask), fx);
    }

    pub(super) fn take_state_digest(&mut self, id: u64, told: &v1::StateDigest) {
        let current = told.term == self.s.term && told.step == self.held.step;
        if current
            && self.held.asked.remove(&id)
            && let Some(digest) = Digest::from_bytes(&told.digest)
        {
            self.held.told.insert(id, digest);
        }
    }

    /// A newcomer's copy ended.
    pub(super) fn copied(
        &mut self,
        now: Millis,
        id: u64,
        digest: Option<Digest>,
        ready: v1::StateReady,
        fx: &mut Vec<Effect>,
    ) {
        for address in &ready.liars {
            let source = self.workers.iter().find(|(_, w)| w.address == *address);
            if let Some((source, _)) = source {
                let step = ready.step;
                let text = format!(
                    "worker {id} copied the state of step {step} from others than worker {source}, \
                     which holds or sent other bits"
                );
                self.about(*source, Reason::StateDiffers, text, fx);
            }
        }
        let committed = self.committed;
        let Some(worker) = self.workers.get_mut(&id) else {
            return;
        };
        let Some(copying) = worker
            .copying
            .as_mut()
            .filter(|c| c.request == ready.request)
        else {
            return;
        };
        let needs = ready.seconds * ready.bytes_total as f64 / ready.bytes.max(1) as f64;
        // Half as much again: a network is not equally fast all the time.
        worker.copy_needs = (needs.clamp(0.0, 1e6) * 1500.0) as Millis;
        if ready.error.is_empty() && ready.step == committed && digest.is_some() {
            copying.arrived = digest;
            return;
        }
        let why = if ready.error.is_empty() {
            format!("it copied step {}, the run is at {committed}", ready.step)
        } else {
            ready.error
        };
        self.copy_failed(now, id, &why, fx);
    }

    fn copy_failed(&mut self, now: Millis, id: u64, why: &str, fx: &mut Vec<Effect>) {
        let pause = millis(self.timeouts().silence) / 4;
        let Some(worker) = self.workers.get_mut(&id) else {
            return;
        };
        worker.copying = None;
        let doublings = worker.copies_failed.min(COPY_DOUBLINGS_MAX);
        worker.copies_failed += 1;
        worker.copy_after = now + (pause << doublings);
        let text = format!("worker {id} could not copy the state: {why}");
        self.about(id, Reason::StateCopyFailed, text, fx);
    }

    /// Copies that arrived are compared with what the members agree on. Returns whether members do
    /// not agree, and something was done about it.
    pub(super) fn settle_copies(&mut self, now: Millis, fx: &mut Vec<Effect>) -> bool {
        let step = self.committed;
        let arrived = self.workers.iter().filter_map(|(id, w)| {
            let copying = w.copying?;
            Some((*id, copying, copying.arrived?))
        });
        let arrived: Vec<(u64, Copying, Digest)> = arrived.collect();
        if arrived.iter().any(|(_, copying, _)| copying.step == step) {
            self.ask_what_is_held(fx);
        }
        for (id, copying, digest) in arrived {
            if copying.step != step {
                let why = format!("it copied step {}, the run is at {step}", copying.step);
                self.copy_failed(now, id, &why, fx);
                continue;
            }
            if !self.held.asked.is_empty() && now < copying.until {
                continue;
            }
            let told = self
                .held
                .told
                .iter()
                .filter(|(who, _)| self.is_member(**who));
            let told: Vec<(u64, Digest)> = told.map(|(who, digest)| (*who, *digest)).collect();
            match vote(told.iter().copied()) {
                Vote::Unanimous if told.is_empty() => {
                    self.copy_failed(now, id, "no member told what it should hold", fx);
                }
                Vote::Unanimous if told[0].1 == digest => {
                    if let Some(worker) = self.workers.get_mut(&id) {
                        worker.copying = None;
                        worker.copies_failed = 0;
                        worker.applied = Some(step);
                    }
                }
                Vote::Unanimous => {
                    let agreed = told[0].1;
                    let why =
                        format!("its copy has digest {digest}, the members agree on {agreed}");
                    self.copy_failed(now, id, &why, fx);
                }
                Vote::Minority(odd) => {
                    let why = "its whole state differs from that of most others".to_owned();
                    let odd = odd.into_iter().map(|who| (who, why.clone()));
                    self.expel(now, odd.collect(), fx);
                    return true;
                }
                Vote::Split => {
                    let ids: Vec<u64> = told.iter().map(|(who, _)| *who).collect();
                    self.load_again(now, &ids, fx);
                    return true;
                }
            }
        }
        false
    }
}
