//! What becomes of older checkpoints once a newer one is durable, and of those that rot.

use super::*;
use crate::stored::retention::kept;

impl Core {
    /// Deletes what the settings do not keep. Called when a manifest has become durable, so the
    /// newest is never among them.
    pub(super) fn prune(&mut self, fx: &mut Vec<Effect>) {
        let (settings, evaluations) = (&self.s.checkpoint, &self.durable.evaluations);
        let mut kept = kept(&self.durable.manifests, settings, evaluations);
        if let Phase::Loading { step, .. } = &self.phase {
            kept.insert(*step);
        }
        let old = self.durable.manifests.difference(&kept).copied();
        let old: Vec<u64> = old.collect();
        self.durable.manifests = kept;
        if !old.is_empty() {
            let steps: Vec<String> = old.iter().map(u64::to_string).collect();
            let text = format!(
                "checkpoints that are no longer kept are deleted: of step {}",
                steps.join(", ")
            );
            self.notice(Reason::CheckpointPruned, text, fx);
        }
        let mut steps = std::mem::take(&mut self.refuse);
        steps.extend(old);
        // What was given up may have been begun again meanwhile.
        let open = self.checkpoint.as_ref().map(|open| open.step);
        steps.retain(|step| !self.is_made(*step) && open != Some(*step));
        if !steps.is_empty() {
            fx.push(Effect::Prune(steps.into_iter().collect()));
        }
    }

    /// A checkpoint that is not what its manifest says is used and counted no more. It is left where
    /// it is: somebody may want to see.
    pub(super) fn checkpoint_corrupt(
        &mut self,
        step: u64,
        faults: &[String],
        fx: &mut Vec<Effect>,
    ) {
        self.durable.manifests.remove(&step);
        self.durable.corrupt.insert(step);
        let usable = match self.durable.manifests.last() {
            Some(newest) => format!("the newest that is right is of step {newest}"),
            None => "there is no other".into(),
        };
        let text = format!(
            "the checkpoint of step {step} is corrupt and will not be used, {usable}: {}",
            faults.join("; ")
        );
        self.notice(Reason::CheckpointCorrupt, text, fx);
    }
}
