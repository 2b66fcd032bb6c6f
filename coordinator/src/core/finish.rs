//! Export, the last checkpoint, and the end of the run.

use super::*;

impl Core {
    pub(super) fn take_exported(&mut self, id: u64, exported: v1::Exported, fx: &mut Vec<Effect>) {
        if self.exporter != Some(id) {
            return;
        }
        self.exporter = None;
        if exported.error.is_empty() {
            self.exported = Some(exported);
        } else {
            self.fail(format!("the export failed: {}", exported.error), fx);
        }
    }

    fn ask_exporter(&mut self, fx: &mut Vec<Effect>) {
        if self.exporter.is_none()
            && let Some(first) = self.members.first().copied()
        {
            self.exporter = Some(first);
            let step = self.committed;
            self.send(first, down::Body::Export(v1::Export { step }), fx);
        }
    }

    /// After the last commit: evaluation, export, and the last checkpoint's manifest.
    pub(super) fn advance_finishing(&mut self, fx: &mut Vec<Effect>) {
        let total = self.stop_at;
        if !self.is_made(total) {
            self.store_last_state(fx);
        }
        if self.is_draining() {
            if self.durable.manifests.contains(&total) {
                self.end_drained(fx);
            } else {
                self.wait_for(
                    format!("the checkpoint of step {total}, before the run ends"),
                    fx,
                );
            }
            return;
        }
        if self.s.evaluates && !self.durable.evaluations.contains_key(&total) {
            self.evaluate(fx);
        } else if self.exported.is_none() {
            self.ask_exporter(fx);
        } else if self.durable.manifests.contains(&total) {
            self.end(true, "trained to the last step".into(), fx);
        } else {
            self.wait_for("the last checkpoint's parts".into(), fx);
        }
    }

    /// The members hold the last state until the end, so that parts which died with a worker are
    /// stored by another.
    fn store_last_state(&mut self, fx: &mut Vec<Effect>) {
        let (term, step) = (self.s.term, self.stop_at);
        if self.checkpoint.as_ref().is_none_or(|c| c.step != step) {
            self.open_checkpoint(step);
        }
        for (member, parts) in self.assign_parts() {
            let store = v1::StoreParts { term, step, parts };
            self.send(member, down::Body::StoreParts(store), fx);
        }
    }

    /// Whether the run ends before its last step, because it was asked to.
    pub(super) fn is_draining(&self) -> bool {
        self.stop_at < self.s.steps_total
    }

    /// Whether it was asked to end, and has.
    pub fn has_drained(&self) -> bool {
        self.phase == Phase::Over && self.is_draining()
    }

    /// The open step is the last one for now; then a checkpoint, then the end.
    pub(super) fn drain(&mut self, fx: &mut Vec<Effect>) {
        if self.is_draining() || self.phase == Phase::Finishing {
            return;
        }
        self.stop_at = self.committed + u64::from(self.phase == Phase::Training);
        let text = match self.is_draining() {
            true => "asked to stop: the open step is finished and a checkpoint written first",
            false => "asked to stop in the last step: the run is finished",
        };
        self.notice(Reason::Draining, text.into(), fx);
    }

    /// All that was committed is durable, or nobody is left to make it so.
    pub(super) fn end_drained(&mut self, fx: &mut Vec<Effect>) {
        let newest = self.durable.manifests.last();
        let from = match newest {
            Some(step) => format!("the checkpoint of step {step} is durable"),
            None => "no checkpoint was written yet".into(),
        };
        let text = format!("stopped as asked, {from}; start it again with --resume to go on");
        self.phase = Phase::Over;
        self.farewell(true, &text, fx);
        let reason = text.clone();
        self.emit(
            |e| {
                e.phase = "drained".into();
                e.set_reason(Reason::Draining);
                e.notice = text;
            },
            fx,
        );
        let success = false;
        fx.push(Effect::Finish { success, reason });
    }

    fn farewell(&self, success: bool, reason: &str, fx: &mut Vec<Effect>) {
        let finished = v1::Finished {
            success,
            reason: reason.to_owned(),
        };
        self.send_all(self.workers.keys(), down::Body::Finished(finished), fx);
    }

    /// The run is over, one way or the other.
    pub(super) fn end(&mut self, success: bool, reason: String, fx: &mut Vec<Effect>) {
        self.phase = Phase::Over;
        self.farewell(success, &reason, fx);
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
