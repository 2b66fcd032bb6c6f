//! Checkpoints and receipts as the coordinator sees them: who stores which part, and when all are
//! there.

use super::*;

/// Durable receipts kept for watchers that come late, and known from the ledger at a start: no worker
/// keeps older ones.
pub const RECEIPTS_KEPT: u64 = 2048;

/// A durable receipt, as far as it is remembered: a hundred thousand of them stay small.
pub fn without_lanes(receipt: &v1::StepRecord) -> v1::StepRecord {
    v1::StepRecord {
        lane_digests: Vec::new(),
        ..receipt.clone()
    }
}

/// Checkpoints whose parts are all stored and whose manifests wait for the store. Beyond them none is
/// begun.
const CLOSING_MAX: usize = 4;

/// A checkpoint whose parts are being stored.
#[derive(Debug)]
pub(super) struct OpenCheckpoint {
    pub(super) step: u64,
    since: Millis,
    stored: BTreeMap<u32, v1::PartStored>,
    /// Workers that were told to store a part and have not said how it went.
    storing: BTreeMap<u32, BTreeSet<u64>>,
    /// The longest that an update waited for it.
    stall_seconds: Option<f64>,
    /// Writes that failed and are tried again.
    retries: u32,
    /// Since when a store has refused what only people can mend.
    refused_since: Option<Millis>,
}

impl OpenCheckpoint {
    /// Whether a part is with nobody.
    fn is_lost(&self) -> bool {
        let mut parts = self.storing.iter();
        parts.any(|(part, storing)| storing.is_empty() && !self.stored.contains_key(part))
    }

    /// How far it is.
    pub(super) fn status(&self) -> v1::CheckpointStatus {
        v1::CheckpointStatus {
            step: self.step,
            parts: self.storing.len() as u32,
            stored: self.stored.len() as u32,
        }
    }
}

/// A checkpoint whose receipts and manifest are being written.
#[derive(Debug)]
pub(super) struct Closing {
    open: OpenCheckpoint,
    receipts: Vec<v1::StepRecord>,
}

impl Closing {
    fn effect(&self) -> Effect {
        Effect::StoreCheckpoint {
            step: self.open.step,
            receipts: self.receipts.clone(),
            parts: self.open.stored.values().cloned().collect(),
        }
    }
}

fn durable_text(step: u64, made: &v1::CheckpointMade) -> String {
    let megabytes = made.bytes as f64 / 1e6;
    let mut text = format!(
        "checkpoint of step {step} is durable: {megabytes:.1} MB in {:.1} s",
        made.seconds
    );
    if let Some(stall) = made.stall_seconds {
        text += &format!(", {}", waited_text(stall));
    }
    if made.retries > 0 {
        text += &format!(", {} writes were tried again", made.retries);
    }
    text
}

fn waited_text(stall_seconds: f64) -> String {
    format!("training waited {:.0} ms", stall_seconds * 1000.0)
}

impl Core {
    /// Parts for each member when the state of `step` is to be stored: each part by two workers
    /// where there are two, so that a death does not lose it.
    pub(super) fn snapshot_parts(
        &mut self,
        step: u64,
        fx: &mut Vec<Effect>,
    ) -> BTreeMap<u64, Vec<u32>> {
        let last = step == self.stop_at;
        let due = self.s.checkpoint.is_due(step, self.s.rhythm) || last;
        if !due || self.is_made(step) || !self.make_way(step, fx) {
            return BTreeMap::new();
        }
        self.open_checkpoint(step);
        self.assign_parts()
    }

    /// Whether all parts of a step's checkpoint are stored.
    pub(super) fn is_made(&self, step: u64) -> bool {
        self.durable.manifests.contains(&step) || self.closing.contains_key(&step)
    }

    /// Whether a checkpoint of `step` may begin. One is open at a time: a worker holds one old state
    /// at most. Of two the one is given up that loses less: the older one if nothing of it is stored
    /// and the store refuses it, or if it cannot be completed, or if the run ends; else the newer
    /// one, since what is stored already would be lost.
    fn make_way(&mut self, step: u64, fx: &mut Vec<Effect>) -> bool {
        if self.closing.len() >= CLOSING_MAX {
            let text =
                format!("no checkpoint of step {step}: {CLOSING_MAX} manifests wait for the store");
            self.notice(Reason::CheckpointDelayed, text, fx);
            return false;
        }
        let Some(open) = &self.checkpoint else {
            return true;
        };
        let (older, stored, parts) = (open.step, open.stored.len(), open.storing.len());
        let why = if step == self.stop_at {
            "the run ends and its last state is stored instead"
        } else if open.is_lost() {
            "a part is with nobody"
        } else if stored == 0 && open.retries > 0 {
            "nothing of it could be stored; a newer state takes its place"
        } else {
            let text = format!(
                "no checkpoint of step {step}: that of step {older} is still being stored, {stored} \
                 of {parts} parts are"
            );
            self.notice(Reason::CheckpointDelayed, text, fx);
            return false;
        };
        self.give_up(why, fx);
        true
    }

    fn give_up(&mut self, why: &str, fx: &mut Vec<Effect>) {
        if let Some(open) = self.checkpoint.take() {
            let step = open.step;
            self.checkpoints_closed = self.checkpoints_closed.max(step);
            self.refuse.insert(step);
            let text = format!("the checkpoint of step {step} is given up: {why}");
            self.notice(Reason::CheckpointGivenUp, text, fx);
        }
    }

    pub(super) fn open_checkpoint(&mut self, step: u64) {
        self.checkpoint = Some(OpenCheckpoint {
            step,
            since: self.last_tick,
            stored: BTreeMap::new(),
            storing: (0..self.s.checkpoint.parts)
                .map(|part| (part, BTreeSet::new()))
                .collect(),
            stall_seconds: None,
            retries: 0,
            refused_since: None,
        });
    }

    /// Hands out the parts that nobody stores; returns them by member. A member's list begins with
    /// those that another has later in his, so that two do not write the same at the same time.
    pub(super) fn assign_parts(&mut self) -> BTreeMap<u64, Vec<u32>> {
        let mut by_member: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
        let Some(open) = &mut self.checkpoint else {
            return by_member;
        };
        let nobodys = |(part, storing): &(&u32, &BTreeSet<u64>)| {
            storing.is_empty() && !open.stored.contains_key(part)
        };
        let parts = open.storing.iter().filter(nobodys);
        let parts: Vec<u32> = parts.map(|(part, _)| *part).collect();
        let members = &self.members;
        for copy in 0..members.len().min(2) {
            for part in &parts {
                let member = members[(*part as usize + copy) % members.len()];
                open.storing.entry(*part).or_default().insert(member);
                by_member.entry(member).or_default().push(*part);
            }
        }
        by_member
    }

    /// A worker is gone with the parts that it had not stored. The last state is still held by
    /// others; an earlier one is not, so its checkpoint is given up.
    pub(super) fn lose_parts_of(&mut self, id: u64, fx: &mut Vec<Effect>) {
        let last = self.stop_at;
        self.forget_storing(id);
        let lost = |open: &OpenCheckpoint| open.step != last && open.is_lost();
        if self.checkpoint.as_ref().is_some_and(lost) {
            self.give_up(&format!("a part died with {id}"), fx);
        }
    }

    /// What a worker was told to store may not have reached it. What it stores it says again.
    pub(super) fn forget_storing(&mut self, id: u64) {
        if let Some(open) = &mut self.checkpoint {
            for storing in open.storing.values_mut() {
                storing.remove(&id);
            }
        }
    }

    /// What a worker says in a new session of the snapshot that it stores. A new term goes on with the
    /// checkpoint that another began.
    pub(super) fn learn_snapshot(&mut self, id: u64, held: v1::SnapshotHeld, fx: &mut Vec<Effect>) {
        let step = held.parts.first().map_or(0, |part| part.step);
        let newest = self.durable.manifests.last().copied().unwrap_or(0);
        let wanted = step > newest.max(self.checkpoints_closed) && !self.is_made(step);
        // A ring's bits follow the membership: parts of two pasts must not meet.
        if wanted && self.checkpoint.is_none() && self.same_bits() {
            self.open_checkpoint(step);
            let text = format!("the checkpoint of step {step} goes on");
            self.notice(Reason::CheckpointDelayed, text, fx);
        }
        if self.checkpoint.as_ref().is_none_or(|c| c.step != step) {
            return;
        }
        for part in held.parts {
            let open = self.checkpoint.as_mut();
            if !part.file.is_empty() || !part.error.is_empty() {
                self.part_stored(id, part, fx);
            } else if let Some(storing) = open.and_then(|o| o.storing.get_mut(&part.part)) {
                storing.insert(id);
            }
        }
    }

    pub(super) fn part_stored(&mut self, id: u64, part: v1::PartStored, fx: &mut Vec<Effect>) {
        let current =
            |c: &&mut OpenCheckpoint| c.step == part.step && c.storing.contains_key(&part.part);
        let Some(open) = self.checkpoint.as_mut().filter(current) else {
            return;
        };
        if !part.error.is_empty() {
            self.part_failed(id, part, fx);
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
        open.refused_since = None;
        open.stored.insert(part.part, part);
        self.close_checkpoint(fx);
    }

    /// When all parts are stored and the receipts before them are known, the manifest follows.
    pub(super) fn close_checkpoint(&mut self, fx: &mut Vec<Effect>) {
        let receipts = &self.receipts;
        let early = usize::from(self.has(Planted::ManifestEarly));
        let ready = |open: &mut OpenCheckpoint| {
            let mut missing = self.receipts_durable..open.step;
            let stored = open.stored.len() + early >= open.storing.len();
            stored && missing.all(|step| receipts.contains_key(&step))
        };
        let Some(open) = self.checkpoint.take_if(ready) else {
            return;
        };
        let step = open.step;
        self.checkpoints_closed = self.checkpoints_closed.max(step);
        let closing = Closing {
            receipts: self.receipts_to_store(step),
            open,
        };
        fx.push(closing.effect());
        self.closing.insert(step, closing);
    }

    /// A worker that tries again is waited for. What it cannot make at all another may have.
    fn part_failed(&mut self, id: u64, part: v1::PartStored, fx: &mut Vec<Effect>) {
        let (step, now) = (part.step, self.last_tick);
        let last = step == self.stop_at;
        let Some(open) = self.checkpoint.as_mut() else {
            return;
        };
        if !part.tries_again {
            if let Some(storing) = open.storing.get_mut(&part.part) {
                storing.remove(&id);
            }
            if last {
                self.fail(part.error, fx);
            } else if open.is_lost() {
                self.give_up(&part.error, fx);
            }
            return;
        }
        open.retries += 1;
        // What passes by itself is waited for. What only people can mend is waited for while
        // training goes on, and at its end as long as a start waits for workers.
        let since = *open.refused_since.get_or_insert(now);
        if part.may_pass {
            open.refused_since = None;
        } else if last && now.saturating_sub(since) > millis(self.s.timeouts.gather) {
            self.fail(part.error, fx);
            return;
        }
        if open.retries == 1 {
            let text = format!(
                "the checkpoint of step {step} is delayed, its parts are tried again: {}",
                part.error
            );
            self.about(id, Reason::CheckpointDelayed, text, fx);
        }
    }

    /// What an update waited for the snapshot of its step. A fast store is done before that is known;
    /// then it is said afterwards.
    pub(super) fn learn_stall(&mut self, applied: &v1::Applied, fx: &mut Vec<Effect>) {
        let Some(stall) = applied.stall_seconds else {
            return;
        };
        let step = applied.step;
        let longest = |before: Option<f64>| Some(before.unwrap_or(0.0).max(stall));
        let closing = self.closing.get_mut(&step).map(|c| &mut c.open);
        let open = self.checkpoint.as_mut().filter(|c| c.step == step);
        if let Some(open) = open.or(closing) {
            open.stall_seconds = longest(open.stall_seconds);
        } else if let Some((_, made)) = self.made_last.as_mut().filter(|(s, _)| *s == step) {
            let before = made.stall_seconds;
            made.stall_seconds = longest(before);
            if made.stall_seconds == before {
                return;
            }
            let made = *made;
            fx.push(Effect::StoreCost(step, made));
            let waited = waited_text(stall);
            let fill = |e: &mut v1::RunEvent| {
                e.set_reason(Reason::CheckpointDurable);
                e.notice = format!("checkpoint of step {step}: {waited}");
                e.checkpoint = step;
                e.made = Some(made);
            };
            self.emit(fill, fx);
        }
    }

    pub(super) fn checkpoint_durable(&mut self, step: u64, fx: &mut Vec<Effect>) {
        self.receipts_are_durable(step);
        self.durable.manifests.insert(step);
        self.durable.corrupt.remove(&step);
        let Some(closing) = self.closing.remove(&step) else {
            return;
        };
        let open = closing.open;
        let made = v1::CheckpointMade {
            bytes: open.stored.values().map(|part| part.bytes).sum(),
            seconds: self.last_tick.saturating_sub(open.since) as f64 / 1000.0,
            stall_seconds: open.stall_seconds,
            retries: open.retries,
        };
        self.made_last = Some((step, made));
        let fill = |e: &mut v1::RunEvent| {
            e.checkpoint = step;
            e.set_reason(Reason::CheckpointDurable);
            e.notice = durable_text(step, &made);
            e.made = Some(made);
        };
        self.emit(fill, fx);
        fx.push(Effect::StoreCost(step, made));
        self.prune(fx);
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
        let receipts = match self.has(Planted::ForgetsReceipts) {
            true => &[],
            false => receipts,
        };
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
