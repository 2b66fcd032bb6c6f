//! The object store: what is durable, and how its requests fail. A request that is on its way is
//! done whether or not who sent it still lives.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use belfry_coordinator::core as lead;
use belfry_proto::{Schedule, v1};

use super::arithmetic::{State, part_hash};
use super::counts::Request;
use super::invariants as inv;
use super::world::{Answer, Happening, World};

/// Journal entries that stay.
const ENTRIES_KEPT: usize = 1000;

/// A journal entry.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) seq: u64,
    pub(super) term: u64,
    /// The process that wrote it: no other has this number.
    pub(super) nonce: u64,
    /// Where it listens.
    pub(super) lead: usize,
    pub(super) generation: u64,
    pub(super) committed: u64,
    pub(super) horizon: u64,
    pub(super) members: Vec<u64>,
    pub(super) quarantine: Schedule,
}

/// What a coordinator writes.
#[derive(Clone)]
pub(super) enum Write {
    /// Created if absent; whether what follows waits for it.
    Entry(Entry, bool),
    Data(Vec<v1::Dataset>),
    Result(v1::Exported),
    Receipts(Vec<v1::StepRecord>),
    /// Whether its writer still leads is asked before the manifest is put.
    Checkpoint {
        step: u64,
        receipts: Vec<v1::StepRecord>,
        parts: Vec<v1::PartStored>,
        leads: bool,
    },
    Evaluation(v1::Evaluated),
    /// Checkpoints that are no longer kept are deleted.
    Prune(Vec<u64>),
}

impl Write {
    /// Written in the order of the journal; others by the archive.
    pub(super) fn is_of_journal(&self) -> bool {
        !matches!(
            self,
            Write::Receipts(_) | Write::Checkpoint { .. } | Write::Prune(_)
        )
    }

    pub(super) fn what(&self) -> &'static str {
        match self {
            Write::Entry(..) => "a journal entry",
            Write::Data(_) => "the data's identity",
            Write::Result(_) => "the result",
            Write::Receipts(_) => "the ledger",
            Write::Checkpoint { .. } => "a manifest",
            Write::Evaluation(_) => "an evaluation",
            Write::Prune(_) => "old checkpoints",
        }
    }
}

/// What is durable, and what is wrong with the store.
#[derive(Default)]
pub(super) struct Store {
    entries: VecDeque<Entry>,
    pub(super) data: Option<Vec<v1::Dataset>>,
    pub(super) receipts: BTreeMap<u64, v1::StepRecord>,
    pub(super) evaluations: BTreeMap<u64, v1::Evaluated>,
    pub(super) manifests: BTreeSet<u64>,
    /// Parts by step and number, with their hashes: of the last checkpoints.
    pub(super) parts: BTreeMap<(u64, u32), String>,
    pub(super) result: Option<v1::Exported>,
    /// Coordinators that it does not answer, until then.
    pub(super) cut: BTreeMap<usize, u64>,
    pub(super) down_until: u64,
    pub(super) slow: (u64, u64),
    pub(super) errors: u32,
    pub(super) lost_answers: u32,
}

/// How a request fares.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Done,
    Failed,
    AnswerLost,
}

impl Store {
    pub(super) fn newest(&self) -> Option<&Entry> {
        self.entries.back()
    }

    fn entry(&self, seq: u64) -> Option<&Entry> {
        self.entries.iter().rev().find(|e| e.seq == seq)
    }

    fn fate(&mut self, now: u64) -> Fate {
        if self.down_until > now {
            return Fate::Failed;
        }
        if self.errors > 0 {
            self.errors -= 1;
            return Fate::Failed;
        }
        if self.lost_answers > 0 {
            self.lost_answers -= 1;
            return Fate::AnswerLost;
        }
        Fate::Done
    }

    /// Whether it can be read at the moment.
    pub(super) fn answers(&self, now: u64) -> bool {
        self.down_until <= now
    }

    /// Whether a coordinator's requests reach it.
    pub(super) fn hears(&self, now: u64, lead: usize) -> bool {
        self.cut.get(&lead).is_none_or(|until| *until <= now)
    }

    /// What a new leader reads, under its own entry.
    pub(super) fn durable(&self, entry: &Entry) -> lead::Durable {
        lead::Durable {
            entry: entry.seq,
            receipts_from: 0,
            generation: entry.generation,
            committed: entry.committed,
            horizon: entry.horizon,
            members: entry.members.clone(),
            quarantine: entry.quarantine.clone(),
            data: self.data.clone(),
            receipts: self.receipts.clone(),
            evaluations: self.evaluations.clone(),
            manifests: self.manifests.clone(),
            corrupt: BTreeSet::new(),
        }
    }
}

impl World {
    /// Half of a request's time, with `bytes` on their way.
    fn store_way(&mut self, bytes: u64) -> u64 {
        let (factor, until) = self.store.slow;
        let factor = if until > self.now { factor } else { 1 };
        let time = self.draw(self.costs.store) + bytes / self.costs.store_bytes_per_ms.max(1);
        (time * factor).div_ceil(2)
    }

    pub(super) fn try_write(&mut self, lead: usize, life: u64, write: Box<Write>) {
        if self.lead_lives(lead, life) {
            let delay = self.store_way(0);
            self.after(delay, Happening::Lands(lead, life, write));
        }
    }

    pub(super) fn lands(&mut self, lead: usize, life: u64, mut write: Box<Write>) {
        let fate = match self.store.hears(self.now, lead) {
            true => self.store.fate(self.now),
            false => Fate::Failed,
        };
        let answer = match fate {
            Fate::Failed => Answer::Error,
            Fate::Done => self.do_write(lead, life, &mut write),
            Fate::AnswerLost => {
                self.do_write(lead, life, &mut write);
                Answer::Error
            }
        };
        let delay = self.store_way(0);
        self.after(delay, Happening::Answer(lead, life, write, answer));
    }

    fn do_write(&mut self, lead: usize, life: u64, write: &mut Write) -> Answer {
        match write {
            Write::Entry(entry, _) => {
                self.counts.request(Request::JournalPut, 1);
                return self.create_entry(entry.clone());
            }
            Write::Data(data) => {
                self.counts.request(Request::OtherPut, 1);
                self.store.data = Some(data.clone());
            }
            Write::Result(exported) => {
                self.counts.request(Request::OtherPut, 1);
                self.store.result = Some(exported.clone());
            }
            Write::Receipts(receipts) => self.keep_receipts(receipts),
            Write::Checkpoint {
                step,
                receipts,
                parts,
                leads,
            } => {
                if !*leads {
                    self.counts.request(Request::JournalList, 1);
                    let newest = self.store.newest();
                    *leads = newest.is_some_and(|e| e.nonce == life && e.lead == lead);
                    let answer = if *leads { Answer::Done } else { Answer::Others };
                    return answer;
                }
                self.keep_receipts(receipts);
                self.counts.request(Request::ManifestPut, 1);
                let step = *step;
                self.check_manifest(step, parts);
                if self.store.manifests.insert(step) {
                    self.counts.checkpoints += 1;
                }
                self.forget_parts(step);
            }
            Write::Evaluation(evaluated) => {
                self.counts.request(Request::OtherPut, 1);
                self.store
                    .evaluations
                    .insert(evaluated.step, evaluated.clone());
            }
            Write::Prune(steps) => {
                for step in steps {
                    // Parts of one that was given up have no manifest.
                    let whole = self.store.manifests.contains(step);
                    let newer = self.store.manifests.range(*step + 1..).next();
                    inv::hold(!whole || newer.is_some(), inv::CHECKPOINT_KEPT, || {
                        format!("the checkpoint of step {step} is deleted and none is newer")
                    });
                    self.store.manifests.remove(step);
                }
            }
        }
        Answer::Done
    }

    fn create_entry(&mut self, entry: Entry) -> Answer {
        if let Some(there) = self.store.entry(entry.seq) {
            let own = there.nonce == entry.nonce;
            return if own { Answer::Done } else { Answer::Others };
        }
        let next = self.store.newest().map_or(1, |e| e.seq + 1);
        if entry.seq != next {
            // Its place was pruned: others have written a thousand entries since.
            return Answer::Others;
        }
        self.check_entry(&entry);
        self.store.entries.push_back(entry);
        if self.store.entries.len() > ENTRIES_KEPT {
            self.store.entries.pop_front();
        }
        Answer::Done
    }

    fn keep_receipts(&mut self, receipts: &[v1::StepRecord]) {
        if !receipts.is_empty() {
            self.counts.request(Request::LedgerPut, 1);
        }
        for receipt in receipts {
            let there = self.store.receipts.get(&receipt.step);
            let same = there.is_none_or(|r| r == receipt);
            inv::hold(same, inv::RECEIPTS_FIXED, || {
                format!("the receipt of step {} changed", receipt.step)
            });
            self.store.receipts.insert(receipt.step, receipt.clone());
        }
    }

    /// Old parts are of no interest to the checks any more.
    fn forget_parts(&mut self, step: u64) {
        let kept = step.saturating_sub(4 * self.setup.checkpoint_every);
        self.store.parts = self.store.parts.split_off(&(kept, 0));
    }

    /// A worker uploads a part; it repeats until the store takes it.
    pub(super) fn upload(&mut self, worker: usize, life: u64, state: State, part: u32) {
        let bytes = self.costs.state_bytes / u64::from(self.setup.parts.max(1));
        let slow = self.network.slowness(self.now, worker);
        let delay = 2 * self.store_way(bytes) * slow;
        self.after(delay, Happening::Part(worker, life, state, part));
    }

    pub(super) fn part_lands(&mut self, worker: usize, life: u64, state: State, part: u32) {
        let fate = self.store.fate(self.now);
        let bytes = self.costs.state_bytes / u64::from(self.setup.parts.max(1));
        if fate != Fate::Failed {
            self.counts.request(Request::PartPut, 1);
            self.counts.checkpoint_bytes += bytes;
            let hash = part_hash(state, part);
            self.store.parts.insert((state.step, part), hash);
        }
        if !self.alive(worker, life) {
            return;
        }
        if fate != Fate::Done {
            self.upload(worker, life, state, part);
            return;
        }
        let stored = v1::PartStored {
            step: state.step,
            part,
            sha256: part_hash(state, part),
            bytes,
            ..Default::default()
        };
        self.report(worker, v1::worker_message::Body::PartStored(stored));
    }
}
