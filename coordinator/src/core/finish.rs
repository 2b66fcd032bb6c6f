//! Evaluation, export, the last checkpoint, and the end of the run.

use super::*;

impl Core {
    /// The first state is judged before it is gone. Returns whether training may go on.
    pub(super) fn evaluate_first(&mut self, fx: &mut Vec<Effect>) -> bool {
        if !self.s.evaluates || self.committed > 0 || self.durable.evaluations.contains_key(&0) {
            return true;
        }
        self.ask_evaluator(|step| down::Body::Evaluate(v1::Evaluate { step }), fx);
        false
    }

    fn ask_evaluator(&mut self, ask: impl FnOnce(u64) -> down::Body, fx: &mut Vec<Effect>) {
        if self.evaluator.is_none()
            && let Some(first) = self.members.first().copied()
        {
            self.evaluator = Some(first);
            self.send(first, ask(self.committed), fx);
        }
    }

    pub(super) fn take_evaluated(
        &mut self,
        id: u64,
        evaluated: v1::Evaluated,
        fx: &mut Vec<Effect>,
    ) {
        if self.evaluator != Some(id) {
            return;
        }
        self.evaluator = None;
        if !evaluated.error.is_empty() {
            self.fail(format!("evaluation failed: {}", evaluated.error), fx);
            return;
        }
        let step = evaluated.step;
        self.durable.evaluations.insert(step, evaluated.clone());
        fx.push(Effect::StoreEvaluation(evaluated.clone()));
        self.emit(|e| e.evaluated = Some(evaluated), fx);
    }

    pub(super) fn take_exported(&mut self, id: u64, exported: v1::Exported, fx: &mut Vec<Effect>) {
        if self.evaluator != Some(id) {
            return;
        }
        self.evaluator = None;
        if exported.error.is_empty() {
            self.exported = Some(exported);
        } else {
            self.fail(format!("the export failed: {}", exported.error), fx);
        }
    }

    /// After the last commit: evaluation, export, and the last checkpoint's manifest.
    pub(super) fn advance_finishing(&mut self, fx: &mut Vec<Effect>) {
        let total = self.s.steps_total;
        if !self.is_made(total) {
            self.store_last_state(fx);
        }
        if self.s.evaluates && !self.durable.evaluations.contains_key(&total) {
            self.ask_evaluator(|step| down::Body::Evaluate(v1::Evaluate { step }), fx);
        } else if self.exported.is_none() {
            self.ask_evaluator(|step| down::Body::Export(v1::Export { step }), fx);
        } else if self.durable.manifests.contains(&total) {
            self.end(true, "trained to the last step".into(), fx);
        } else {
            self.wait_for("the last checkpoint's parts".into(), fx);
        }
    }

    /// The members hold the last state until the end, so that parts which died with a worker are
    /// stored by another.
    fn store_last_state(&mut self, fx: &mut Vec<Effect>) {
        let (term, step) = (self.s.term, self.s.steps_total);
        if self.checkpoint.as_ref().is_none_or(|c| c.step != step) {
            self.open_checkpoint(step);
        }
        for (member, parts) in self.assign_parts() {
            let store = v1::StoreParts { term, step, parts };
            self.send(member, down::Body::StoreParts(store), fx);
        }
    }

    /// The run is over, one way or the other.
    pub(super) fn end(&mut self, success: bool, reason: String, fx: &mut Vec<Effect>) {
        self.phase = Phase::Over;
        for id in self.workers.keys() {
            let body = v1::Finished {
                success,
                reason: reason.clone(),
            };
            self.send(*id, down::Body::Finished(body), fx);
        }
        let exported = self.exported.clone();
        if success && let Some(exported) = &exported {
            let last = self.committed.checked_sub(1);
            let last = last.and_then(|step| {
                let recent = self.receipts.get(&step);
                recent.or_else(|| self.durable.receipts.get(&step)).cloned()
            });
            fx.push(Effect::StoreResult {
                exported: exported.clone(),
                last,
                evaluations: self.durable.evaluations.values().cloned().collect(),
            });
        }
        let text = reason.clone();
        self.emit(
            |e| {
                e.phase = if success { "finished" } else { "failed" }.into();
                e.exported = exported;
                e.set_reason(if success {
                    Reason::RunFinished
                } else {
                    Reason::RunFailed
                });
                e.notice = text;
            },
            fx,
        );
        fx.push(Effect::Finish { success, reason });
    }
}
