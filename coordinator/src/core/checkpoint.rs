//! Checkpoints and receipts as the coordinator sees them: who stores which part, and when all are
//! there.

use super::*;

/// Durable receipts kept for watchers that come late, and known from the ledger at a start: no worker
/// keeps older ones.
pub const RECEIPTS_KEPT: u64 = 2048;

/// The manifest of a step's checkpoint, relative to the run's root.
pub fn manifest_file(step: u64) -> String {
    format!("checkpoints/step-{step:09}/manifest.json")
}

/// A durable receipt, as far as it is remembered: a hundred thousand of them stay small.
pub fn without_lanes(receipt: &v1::StepRecord) -> v1::StepRecord {
    v1::StepRecord {
        lane_digests: Vec::new(),
        ..receipt.clone()
    }
}

/// A checkpoint whose parts are being stored.
#[derive(Debug)]
pub(super) struct OpenCheckpoint {
    pub(super) step: u64,
    stored: BTreeMap<u32, v1::PartStored>,
    /// Workers that were told to store a part and have not said how it went.
    storing: BTreeMap<u32, BTreeSet<u64>>,
    /// Receipts and manifest are being written.
    closing: bool,
}

impl Core {
    /// Parts for each member when the state of `step` is to be stored: each part by two workers
    /// where there are two, so that a death does not lose it.
    pub(super) fn snapshot_parts(
        &mut self,
        step: u64,
        fx: &mut Vec<Effect>,
    ) -> BTreeMap<u64, Vec<u32>> {
        let due = step.is_multiple_of(self.s.checkpoint_every) || step == self.s.steps_total;
        if !due || self.durable.manifests.contains(&step) {
            return BTreeMap::new();
        }
        if let Some(open) = &self.checkpoint {
            let text = format!(
                "the checkpoint of step {} was not finished in time",
                open.step
            );
            self.notice(Reason::CheckpointGivenUp, text, fx);
        }
        self.open_checkpoint(step);
        self.assign_parts()
    }

    pub(super) fn open_checkpoint(&mut self, step: u64) {
        self.checkpoint = Some(OpenCheckpoint {
            step,
            stored: BTreeMap::new(),
            storing: (0..self.s.checkpoint_parts)
                .map(|part| (part, BTreeSet::new()))
                .collect(),
            closing: false,
        });
    }

    /// Hands out the parts that nobody stores; returns them by member.
    pub(super) fn assign_parts(&mut self) -> BTreeMap<u64, Vec<u32>> {
        let mut by_member: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
        let Some(open) = &mut self.checkpoint else {
            return by_member;
        };
        let copies = self.members.len().min(2);
        for (part, storing) in &mut open.storing {
            if !storing.is_empty() || open.stored.contains_key(part) {
                continue;
            }
            for copy in 0..copies {
                let member = self.members[(*part as usize + copy) % self.members.len()];
                storing.insert(member);
                by_member.entry(member).or_default().push(*part);
            }
        }
        by_member
    }

    /// A worker is gone with the parts that it had not stored. The last state is still held by
    /// others; an earlier one is not, so its checkpoint is given up.
    pub(super) fn lose_parts_of(&mut self, id: u64, fx: &mut Vec<Effect>) {
        let last = self.s.steps_total;
        let Some(open) = &mut self.checkpoint else {
            return;
        };
        for storing in open.storing.values_mut() {
            storing.remove(&id);
        }
        let lost = |(part, storing): (&u32, &BTreeSet<u64>)| {
            storing.is_empty() && !open.stored.contains_key(part)
        };
        if open.step != last && !open.closing && open.storing.iter().any(lost) {
            let step = open.step;
            self.checkpoint = None;
            let text = format!("the checkpoint of step {step} is given up: a part died with {id}");
            self.about(id, Reason::CheckpointGivenUp, text, fx);
        }
    }

    pub(super) fn part_stored(&mut self, part: v1::PartStored, fx: &mut Vec<Effect>) {
        let current = |c: &&mut OpenCheckpoint| c.step == part.step && !c.closing;
        let Some(open) = self.checkpoint.as_mut().filter(current) else {
            return;
        };
        if !part.error.is_empty() {
            let text = part.error;
            if part.step == self.s.steps_total {
                self.fail(text, fx);
            } else {
                self.checkpoint = None;
                self.notice(Reason::CheckpointGivenUp, text, fx);
            }
            return;
        }
        if let Some(other) = open.stored.get(&part.part)
            && other.sha256 != part.sha256
        {
            let text = format!(
                "step {}: two workers hold different bits of checkpoint part {}",
                part.step, part.part
            );
            self.fail(text, fx);
            return;
        }
        open.stored.insert(part.part, part);
        if open.stored.len() == self.s.checkpoint_parts as usize {
            open.closing = true;
            let (step, parts) = (open.step, open.stored.values().cloned().collect());
            fx.push(Effect::StoreCheckpoint {
                step,
                receipts: self.receipts_to_store(step),
                parts,
            });
        }
    }

    pub(super) fn checkpoint_durable(&mut self, step: u64, fx: &mut Vec<Effect>) {
        if self.checkpoint.as_ref().is_some_and(|c| c.step == step) {
            self.checkpoint = None;
        }
        self.receipts_are_durable(step);
        self.durable.manifests.insert(step);
        self.emit(|e| e.checkpoint = step, fx);
    }

    /// Receipts of steps below `step` that the ledger lacks.
    fn receipts_to_store(&self, step: u64) -> Vec<v1::StepRecord> {
        let known = self.receipts.range(..step);
        let missing = known.filter(|(step, _)| !self.in_ledger(**step));
        missing.map(|(_, receipt)| receipt.clone()).collect()
    }

    pub(super) fn receipts_are_durable(&mut self, below: u64) {
        self.receipts_durable = self.receipts_durable.max(below);
        for (step, receipt) in self.receipts.range(..below) {
            let stored = self.durable.receipts.entry(*step);
            stored.or_insert_with(|| without_lanes(receipt));
        }
        let kept = self
            .receipts_durable
            .min(self.committed.saturating_sub(RECEIPTS_KEPT));
        self.receipts = self.receipts.split_off(&kept);
    }

    /// Puts receipts into the ledger when too many wait for a checkpoint.
    pub(super) fn store_waiting_receipts(&mut self, fx: &mut Vec<Effect>) {
        let waiting = self.committed.saturating_sub(self.receipts_durable);
        if waiting as usize >= self.receipts_waiting_max() && !self.storing_receipts {
            let receipts = self.receipts_to_store(self.committed);
            if !receipts.is_empty() {
                self.storing_receipts = true;
                fx.push(Effect::StoreReceipts(receipts));
            }
        }
    }

    /// Takes what workers kept of committed steps; says which step differs from what is known.
    pub(super) fn merge_receipts(&mut self, receipts: &[v1::StepRecord]) -> Option<String> {
        for receipt in receipts {
            if let Some(text) = self.differs(receipt) {
                return Some(text);
            }
            if !self.same_bits() || !self.in_ledger(receipt.step) {
                self.receipts.insert(receipt.step, receipt.clone());
            }
        }
        None
    }

    /// Whether a step came out otherwise than the first time.
    pub(super) fn differs(&self, receipt: &v1::StepRecord) -> Option<String> {
        let step = receipt.step;
        // A ring's bits follow the membership: only what living workers hold must agree.
        let stored = self.durable.receipts.get(&step);
        let stored = stored.filter(|_| self.same_bits());
        let first = stored.or_else(|| self.receipts.get(&step))?;
        let bits = |r: &v1::StepRecord| (r.sum_digest.clone(), r.pairs_digest.clone());
        (bits(first) != bits(receipt)).then(|| {
            format!(
                "step {step} was recomputed to gradient {} of pairs {}, its receipt says {} of {}: \
                 the bits differ from the first time",
                receipt.sum_digest, receipt.pairs_digest, first.sum_digest, first.pairs_digest
            )
        })
    }
}
