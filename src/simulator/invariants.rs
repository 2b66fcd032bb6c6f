//! What must hold whatever fails, each with its name, checked at the moment at which it could be
//! broken. Knows what is seen from outside, never what a core believes.

use std::collections::BTreeMap;

use belfry_proto::{LaneRange, Schedule, lanes, v1, v1::coordinator_message as down};

use super::arithmetic::{first_choice, lane_digest, part_hash, quarantine_at, shard_read};
use super::store::Entry;
use super::world::World;

/// Every commit of a step is of the same gradient: the one that a serial run gives.
pub(super) const ONE_COMMIT: &str = "no two different commits of a step";
/// A committed step used every lane exactly once.
pub(super) const LANES_ONCE: &str = "a committed step used every lane exactly once";
/// A step is committed with the ready of every member of its generation.
pub(super) const ALL_READY: &str = "a commit has the ready of every member";
/// Generations and terms are announced in ascending order, each once.
pub(super) const GENERATION_GROWS: &str = "generation only grows";
/// What is announced is in the journal.
pub(super) const JOURNALED_FIRST: &str = "nothing is announced before its journal entry";
/// One process writes the entries of a term, and terms only grow.
pub(super) const ONE_LEADER: &str = "one leader per term";
/// A visible checkpoint has all parts and all receipts before it.
pub(super) const CHECKPOINT_COMPLETE: &str = "a visible checkpoint is complete";
/// The newest checkpoint is never deleted.
pub(super) const CHECKPOINT_KEPT: &str = "the newest checkpoint stays";
/// A worker's state is a function of its step.
pub(super) const STATE_OF_STEP: &str = "a worker's state is its step's";
/// Old leaders are not obeyed.
pub(super) const FENCED: &str = "a lower term is refused";
/// A receipt in the ledger stays as it is, and outlives its leader.
pub(super) const RECEIPTS_FIXED: &str = "receipts never change";
/// Shards are put under quarantine and none comes out; no committed step is touched.
pub(super) const QUARANTINE_GROWS: &str = "quarantine only grows";
/// No worker ends because of a coordinator that is away.
pub(super) const NOBODY_EXITS: &str = "nobody exits for a coordinator's absence";
/// A run that ended well has everything.
pub(super) const RUN_COMPLETE: &str = "a finished run is complete";
/// Members of one exchange agree on it.
pub(super) const MEMBERS_AGREE: &str = "members of an exchange agree";

/// Holds, or the simulation ends with the invariant's name.
#[track_caller]
pub(super) fn hold(holds: bool, invariant: &str, text: impl FnOnce() -> String) {
    assert!(holds, "invariant `{invariant}` is violated: {}", text());
}

/// What was seen so far.
#[derive(Default)]
pub(super) struct Witness {
    /// Commits of each step.
    pub(super) commits: BTreeMap<u64, u32>,
    last_commit_at: Option<u64>,
    /// Members of the generations announced, the newest few, and the highest.
    announced: BTreeMap<u64, (u64, Vec<u64>)>,
    /// Readies sent: step by generation and worker, of the newest few generations.
    readies: BTreeMap<(u64, u64), u64>,
    /// Who wrote each term's entries.
    terms: BTreeMap<u64, u64>,
    /// The highest term that each worker's process heard of.
    heard: BTreeMap<(usize, u64), u64>,
}

/// Generations of which members and readies are remembered: a leader that overslept may still commit
/// in its own when many have followed.
const GENERATIONS_KEPT: u64 = 64;

impl World {
    /// An entry is about to stand.
    pub(super) fn check_entry(&mut self, entry: &Entry) {
        let last = self.store.newest();
        let (term, generation) = last.map_or((0, 0), |e| (e.term, e.generation));
        hold(entry.term >= term, ONE_LEADER, || {
            format!("term {} after term {term}", entry.term)
        });
        hold(entry.generation >= generation, GENERATION_GROWS, || {
            format!("generation {} after {generation}", entry.generation)
        });
        let writer = *self.witness.terms.entry(entry.term).or_insert(entry.nonce);
        hold(writer == entry.nonce, ONE_LEADER, || {
            format!(
                "processes {writer} and {} in term {}",
                entry.nonce, entry.term
            )
        });
        let known = entry.committed.max(entry.horizon);
        let last = self.witness.commits.keys().next_back();
        hold(last.is_none_or(|s| *s < known), JOURNALED_FIRST, || {
            format!("step {last:?} is committed, the entry knows of {known}")
        });
        let before = last_quarantine(self.store.newest());
        if entry.quarantine != before {
            self.check_quarantine(&before, &entry.quarantine);
        }
    }

    /// From its first step on the choice is part of what the bits must be.
    fn check_quarantine(&mut self, before: &Schedule, chosen: &Schedule) {
        let kept = before.all().all(|shard| chosen.find(shard) == Some(shard));
        let few = chosen.len() <= self.setup.quarantine_shards_max as usize;
        hold(kept && few, QUARANTINE_GROWS, || {
            format!("{before:?} became {chosen:?}")
        });
        let new: Vec<u64> = chosen
            .all()
            .filter(|s| before.find(s).is_none())
            .map(|s| s.from_step)
            .collect();
        let from = new.iter().copied().min().unwrap_or(0);
        let stored = self.store.receipts.range(from..).next();
        let committed = self.witness.commits.range(from..).next();
        hold(
            stored.is_none() && committed.is_none(),
            QUARANTINE_GROWS,
            || format!("from step {from} on, which was committed"),
        );
        self.reference.set_quarantine(chosen, from);
        self.counts.quarantines += 1;
    }

    /// A commit is told.
    pub(super) fn check_commit(&mut self, record: &v1::StepRecord) {
        let step = record.step;
        let expected = self.reference.digest(step).to_string();
        hold(record.sum_digest == expected, ONE_COMMIT, || {
            format!("step {step} is {}, not {expected}", record.sum_digest)
        });
        let lanes = u64::from(self.setup.lanes);
        hold(record.pairs == lanes, LANES_ONCE, || {
            format!("step {step} has {} of {lanes} lanes", record.pairs)
        });
        let newest = self.store.newest();
        let (quarantine, horizon) = newest.map_or((Schedule::default(), 0), |e| {
            (e.quarantine.clone(), e.horizon)
        });
        let lost = quarantine_at(&quarantine, step);
        let all = 0..self.setup.lanes;
        let digests: Vec<u8> = all
            .clone()
            .flat_map(|lane| {
                lane_digest(lane, shard_read(step, lane, &lost))
                    .0
                    .to_le_bytes()
            })
            .enumerate()
            .filter(|(i, _)| i % 16 < 8)
            .map(|(_, byte)| byte)
            .collect();
        hold(record.lane_digests == digests, LANES_ONCE, || {
            format!("step {step} trained other pairs")
        });
        let journaled: Vec<v1::Shard> = quarantine.at(step).cloned().collect();
        let replaced =
            all.filter(|lane| shard_read(step, *lane, &lost) != first_choice(step, *lane));
        let same = record.quarantine == journaled && record.substituted == replaced.count() as u64;
        hold(same, QUARANTINE_GROWS, || {
            format!("step {step} was committed under another quarantine than the journal's")
        });
        hold(step < horizon, JOURNALED_FIRST, || {
            format!("step {step} is committed, the journal's horizon is {horizon}")
        });
        let n = self.witness.commits.entry(step).or_default();
        *n += 1;
        if *n > 1 {
            self.counts.steps_again += 1;
            return;
        }
        self.counts.steps += 1;
        let longest = self.costs.step_longest_ms(&self.setup);
        if let Some(last) = self.witness.last_commit_at.replace(self.now) {
            let stall = (self.now - last).saturating_sub(longest);
            self.counts.stall_ms += stall;
            self.counts.stall_most_ms = self.counts.stall_most_ms.max(stall);
        }
    }

    /// A coordinator says something.
    pub(super) fn check_said(&mut self, lead: usize, body: &down::Body) {
        match body {
            down::Body::OpenGeneration(open) => self.check_announcement(lead, open),
            down::Body::Commit(commit) => {
                let announced = self.witness.announced.get(&commit.generation);
                let members = announced.map(|(_, members)| members.clone());
                let ready = |m: &u64| {
                    self.witness.readies.get(&(commit.generation, *m)) == Some(&commit.step)
                };
                let all = members.is_some_and(|members| members.iter().all(ready));
                hold(all, ALL_READY, || {
                    format!("step {} of generation {}", commit.step, commit.generation)
                });
            }
            _ => {}
        }
    }

    fn check_announcement(&mut self, lead: usize, open: &v1::OpenGeneration) {
        let members: Vec<u64> = open.members.iter().map(|m| m.worker_id).collect();
        let nodes = open.members.iter().flat_map(|m| &m.nodes_now);
        let nodes = nodes.map(|n| LaneRange::from(*n));
        let tiled = lanes::tiles_exactly(self.setup.lanes, nodes);
        hold(tiled.is_ok(), LANES_ONCE, || format!("{tiled:?}"));
        let journaled = self
            .store
            .newest()
            .is_some_and(|e| e.generation >= open.generation);
        hold(journaled, JOURNALED_FIRST, || {
            format!("generation {} of coordinator {lead}", open.generation)
        });
        let newest = self
            .witness
            .announced
            .keys()
            .next_back()
            .copied()
            .unwrap_or(0);
        let known = self.witness.announced.get(&open.generation);
        let (term, generation) = (open.term, open.generation);
        match known {
            Some(known) => {
                let same = *known == (term, members);
                hold(same, GENERATION_GROWS, || {
                    format!("generation {generation} is announced twice, with other members")
                });
            }
            None => {
                let late = self.store.newest().is_some_and(|e| e.term > term);
                hold(generation > newest || late, GENERATION_GROWS, || {
                    format!("generation {generation} after {newest}")
                });
                self.counts.generations += 1;
                self.witness.announced.insert(generation, (term, members));
                let kept = generation.saturating_sub(GENERATIONS_KEPT);
                self.witness.announced = self.witness.announced.split_off(&kept);
                self.witness.readies = self.witness.readies.split_off(&(kept, 0));
            }
        }
    }

    /// A worker's core says that it is ready.
    pub(super) fn saw_ready(&mut self, worker: usize, ready: &v1::Ready) {
        let key = (ready.generation, worker as u64);
        self.witness.readies.insert(key, ready.step);
    }

    /// Whether a worker's process must refuse what it hears: it has heard of a higher term.
    pub(super) fn is_stale(&mut self, worker: usize, body: &down::Body) -> bool {
        let term = match body {
            down::Body::Welcome(m) => m.term,
            down::Body::LoadState(m) => m.term,
            down::Body::CopyState(m) => m.term,
            down::Body::OpenGeneration(m) => m.term,
            down::Body::Commit(m) => m.term,
            _ => return false,
        };
        let key = (worker, self.workers[worker].life);
        let heard = self.witness.heard.entry(key).or_default();
        let stale = term < *heard;
        *heard = (*heard).max(term);
        stale && !matches!(body, down::Body::Welcome(_))
    }

    /// A manifest is about to stand.
    pub(super) fn check_manifest(&mut self, step: u64, parts: &[v1::PartStored]) {
        let state = self.reference.state(step);
        let complete = parts.len() == self.setup.parts as usize
            && (0..self.setup.parts).zip(parts).all(|(number, part)| {
                let right = part_hash(state, number);
                let stands = self.store.parts.get(&(step, number));
                part.part == number && part.sha256 == right && stands == Some(&right)
            });
        hold(complete, CHECKPOINT_COMPLETE, || {
            format!("the manifest of step {step} names {parts:?}")
        });
        let receipts = self.store.receipts.range(..step).count() as u64;
        hold(receipts == step, CHECKPOINT_COMPLETE, || {
            format!("the ledger holds {receipts} receipts before step {step}")
        });
    }

    pub(super) fn check_result(&self, last: Option<v1::StepRecord>, evaluations: &[v1::Evaluated]) {
        let last = last.map(|r| r.step + 1);
        let judged: Vec<u64> = evaluations.iter().map(|e| e.step).collect();
        let (rhythm, steps) = (self.setup.rhythm(), self.setup.steps);
        let due = |step: &u64| *step == 0 || *step == steps || rhythm.is_due(*step);
        let evaluates = |_: &u64| self.setup.evaluates;
        let expected: Vec<u64> = (0..=steps).filter(evaluates).filter(due).collect();
        let complete = last == Some(self.setup.steps) && judged == expected;
        hold(complete, RUN_COMPLETE, || {
            format!("last receipt {last:?}, evaluations of {judged:?}")
        });
    }

    /// What must hold at the end of a run that ended well.
    ///
    /// # Panics
    /// When it does not.
    pub fn check_end(&mut self) {
        let steps = self.setup.steps;
        let outcome = self.outcome.clone();
        let well = outcome.as_ref().is_some_and(|(success, _)| *success);
        hold(well, RUN_COMPLETE, || format!("it ended with {outcome:?}"));
        let last = self.reference.state(steps).value.to_string();
        let result = self.store.result.as_ref();
        let right = result.is_some_and(|r| r.parameters_sha256 == last);
        hold(right, RUN_COMPLETE, || format!("the result is {result:?}"));
        let there = self.store.manifests.contains(&steps);
        hold(there, RUN_COMPLETE, || {
            "the last checkpoint is missing".into()
        });
        let receipts = self.store.receipts.keys().copied();
        hold(receipts.eq(0..steps), RUN_COMPLETE, || {
            "a step's receipt is missing".into()
        });
        let mut known = 0;
        for receipt in self.store.receipts.values() {
            let grows = receipt.quarantine.len() >= known;
            hold(grows, QUARANTINE_GROWS, || {
                format!("at step {}", receipt.step)
            });
            known = receipt.quarantine.len();
        }
    }

    /// How often each step was committed.
    pub fn commits(&self) -> impl Iterator<Item = (u64, u32)> + '_ {
        self.witness.commits.iter().map(|(step, n)| (*step, *n))
    }
}

fn last_quarantine(entry: Option<&Entry>) -> Schedule {
    entry.map(|e| e.quarantine.clone()).unwrap_or_default()
}
