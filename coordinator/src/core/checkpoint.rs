//! Checkpoints as the coordinator sees them: who stores which part, and when all are there.

use super::*;

/// The manifest of a step's checkpoint, relative to the run's root.
pub fn manifest_file(step: u64) -> String {
    format!("checkpoints/step-{step:09}/manifest.json")
}

/// A checkpoint whose parts are being stored.
#[derive(Debug)]
pub(super) struct OpenCheckpoint {
    step: u64,
    parts: BTreeMap<u32, v1::PartStored>,
    receipts: Vec<v1::StepRecord>,
    storing: bool,
}

impl Core {
    /// Parts for each rank when the state of `step` is to be stored: each part by two workers where
    /// there are two, so that a death does not lose it.
    pub(super) fn snapshot_parts(&mut self, step: u64, fx: &mut Vec<Effect>) -> Vec<Vec<u32>> {
        let due = step.is_multiple_of(self.s.checkpoint_every) || step == self.s.steps_total;
        if !due || self.s.manifests.contains(&step) {
            return Vec::new();
        }
        if let Some(open) = &self.checkpoint {
            let text = format!(
                "the checkpoint of step {} was not finished in time",
                open.step
            );
            self.notice(text, fx);
        }
        self.checkpoint = Some(OpenCheckpoint {
            step,
            parts: BTreeMap::new(),
            receipts: Vec::new(),
            storing: false,
        });
        let ranks = self.members.len();
        let mut by_rank = vec![Vec::new(); ranks];
        for part in 0..self.s.checkpoint_parts {
            let first = part as usize % ranks;
            by_rank[first].push(part);
            if ranks > 1 {
                by_rank[(first + 1) % ranks].push(part);
            }
        }
        by_rank
    }

    pub(super) fn part_stored(&mut self, part: v1::PartStored, fx: &mut Vec<Effect>) {
        let Some(open) = self
            .checkpoint
            .as_mut()
            .filter(|c| c.step == part.step && !c.storing)
        else {
            return;
        };
        if !part.error.is_empty() {
            let text = part.error;
            if part.step == self.s.steps_total {
                self.fail(text, fx);
            } else {
                self.checkpoint = None;
                self.notice(text, fx);
            }
            return;
        }
        if let Some(other) = open.parts.get(&part.part)
            && other.sha256 != part.sha256
        {
            let text = format!(
                "step {}: two workers hold different bits of checkpoint part {}",
                part.step, part.part
            );
            self.fail(text, fx);
            return;
        }
        open.parts.insert(part.part, part);
        if open.parts.len() == self.s.checkpoint_parts as usize {
            open.storing = true;
            let step = open.step;
            let older = |r: &v1::StepRecord| r.step < step;
            open.receipts = self.receipts.iter().filter(|r| older(r)).cloned().collect();
            fx.push(Effect::StoreCheckpoint {
                step,
                receipts: open.receipts.clone(),
                parts: open.parts.values().cloned().collect(),
            });
        }
    }

    pub(super) fn checkpoint_durable(&mut self, step: u64, fx: &mut Vec<Effect>) {
        if self.checkpoint.as_ref().is_some_and(|c| c.step == step) {
            self.checkpoint = None;
        }
        self.receipts.retain(|r| r.step >= step);
        if !self.s.manifests.contains(&step) {
            self.s.manifests.push(step);
            self.s.manifests.sort_unstable();
        }
        self.emit(|e| e.checkpoint = step, fx);
    }
}
