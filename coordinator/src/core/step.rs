//! One step, from readiness to its commit.

use super::*;

impl Core {
    pub(super) fn advance_training(&mut self, now: Millis, fx: &mut Vec<Effect>) {
        let looks = std::mem::take(&mut self.look);
        if self.settle_copies(now, fx) {
            return;
        }
        if self.recompute || looks && self.somebody_joins() {
            self.open_generation(now, fx);
            return;
        }
        if looks {
            self.copy_to_newcomers(now, fx);
            self.store_waiting_receipts(fx);
            self.write_ahead(now, fx);
            self.tell_waiting(fx);
        }
        if self.settle_trouble(now, fx) || self.settle_links(now, fx) || !self.evaluate_due(fx) {
            return;
        }
        let heard = std::mem::take(&mut self.heard_ready);
        let early = usize::from(self.has(Planted::CommitsEarly));
        if self.ready.len() + early >= self.members.len() && (heard || looks) {
            self.agree(now, fx);
        }
    }

    /// Somebody holds the open step's state, is no member yet, and there is room.
    fn somebody_joins(&self) -> bool {
        let room = self.members.len() < self.members_max();
        let able = |id: u64, w: &Worker| !w.leaving && !self.is_member(id) && self.eligible(w);
        let lacking = self.members.len() < self.members_least();
        room && self
            .workers
            .iter()
            .any(|(id, w)| able(*id, w) && (lacking || !self.is_aside(*id)))
    }

    /// All are ready: the same bits are committed, other bits are named.
    fn agree(&mut self, now: Millis, fx: &mut Vec<Effect>) {
        let step = self.committed;
        if !self.digests_agree(now, fx) {
            return;
        }
        if self.members.len() < self.s.min_workers && !self.is_draining() {
            let (here, min) = (self.members.len(), self.s.min_workers);
            self.wait_for(
                format!(
                    "{here} of {min} workers are here; cluster.min_workers commits no step with fewer"
                ),
                fx,
            );
            return;
        }
        let odd = self.ready.iter().find(|(_, r)| !r.finite);
        if let Some((id, _)) = odd.filter(|_| !self.s.skip_non_finite) {
            let text = format!(
                "step {step}: the gradient is not finite (seen by worker {id}); lower \
                 optim.learning_rate, look at this step's pairs in the ledger, or set \
                 optim.non_finite = \"skip\""
            );
            self.fail(text, fx);
            return;
        }
        if !self.audit_allows(now, fx) {
            return;
        }
        let mut copying = self.workers.values().filter_map(|w| w.copying);
        if !copying.any(|c| c.step == step && now < c.until) && self.store_allows_commit() {
            self.wait_for(String::new(), fx);
            self.commit(now, fx);
        }
    }

    /// Tells every member; some are told to store parts of the next state too.
    fn tell_commit(
        &mut self,
        now: Millis,
        receipt: &v1::StepRecord,
        digest: &[u8],
        fx: &mut Vec<Effect>,
    ) {
        let step = receipt.step;
        let parts = self.snapshot_parts(step + 1, fx);
        let last = step + 1 == self.stop_at;
        let audit = match last {
            true => None,
            false => self.plan_audit(now, step + 1),
        };
        let commit = |snapshot_parts: Vec<u32>| {
            down::Body::Commit(v1::Commit {
                term: self.s.term,
                generation: self.generation,
                step,
                sum_digest: digest.to_vec(),
                snapshot_parts,
                last,
                receipt: Some(receipt.clone()),
                durable: self.receipts_durable,
                closed: self.checkpoints_closed,
                audit,
            })
        };
        let others = self.members.iter().filter(|id| !parts.contains_key(id));
        let others: Vec<u64> = others.copied().collect();
        for (id, parts) in parts {
            self.send(id, commit(parts), fx);
        }
        self.send_all(&others, commit(Vec::new()), fx);
    }

    fn commit(&mut self, now: Millis, fx: &mut Vec<Effect>) {
        let step = self.committed;
        let receipt = match self.receipt() {
            Ok(receipt) => receipt,
            Err(text) => return self.fail(text, fx),
        };
        if self.same_bits()
            && let Some(text) = self.differs(&receipt)
        {
            return self.fail(text, fx);
        }
        let first = self.ready.values().next();
        let digest = first.map(|r| r.sum_digest.clone()).unwrap_or_default();
        let last = step + 1 == self.stop_at;
        self.tell_commit(now, &receipt, &digest, fx);
        self.committed = step + 1;
        self.decided = self.decided.max(self.committed);
        self.committed_digest = Digest::from_bytes(&digest);
        self.ready.clear();
        self.evidence = Evidence::default();
        self.failures.clear();
        self.troubles = Troubles::default();
        self.links_work();
        self.measure_step(now);
        for id in &self.members {
            if let Some(worker) = self.workers.get_mut(id) {
                worker.applied = Some(self.committed);
                worker.pending_digest = None;
            }
        }
        if self.nodes_now != self.nodes_next {
            self.nodes_now.clone_from(&self.nodes_next);
            self.check_assignment();
        }
        self.look = true;
        if receipt.skipped {
            let text = format!(
                "step {step} is skipped: its gradient is not finite; parameters and moments stay"
            );
            self.notice(Reason::StepSkipped, text, fx);
        }
        self.receipts.insert(step, receipt.clone());
        self.emit(|e| e.committed = Some(receipt), fx);
        if last {
            self.phase = Phase::Finishing;
            return;
        }
        let leaves = |id: &&u64| self.workers.get(id).is_some_and(|w| w.leaving);
        let leaving = self.members.iter().filter(leaves).count();
        if leaving > 0 && leaving < self.members.len() {
            // Nothing is computed of the next step yet: whoever leaves has finished its own.
            self.nodes_now.clear();
            self.open_generation(now, fx);
        } else {
            self.move_lanes(now, fx);
        }
    }
}
