//! One step, from readiness to its commit.

use super::*;

/// Exchanges of one step that may fail between living workers before the accused is removed.
const TROUBLES_MAX: u32 = 3;

impl Core {
    pub(super) fn advance_training(&mut self, now: Millis, fx: &mut Vec<Effect>) {
        if self.settle_copies(now, fx) {
            return;
        }
        let member = |id: &u64| self.is_member(*id);
        // Somebody holds the open step's state and is no member yet, or a member leaves.
        let joins = self
            .workers
            .iter()
            .any(|(id, w)| !member(id) && self.eligible(w));
        let leaves = self.ready.is_empty()
            && self
                .workers
                .iter()
                .any(|(id, w)| w.leaving && member(id) && self.members.len() > 1);
        if joins || leaves || self.recompute {
            self.open_generation(now, fx);
            return;
        }
        self.copy_to_newcomers(now, fx);
        self.store_waiting_receipts(fx);
        self.write_ahead(now, fx);
        if self.settle_trouble(now, fx) || self.settle_links(now, fx) || !self.evaluate_first(fx) {
            return;
        }
        if self.members.iter().all(|id| self.ready.contains_key(id)) {
            self.agree(now, fx);
        }
    }

    /// An exchange failed between workers that live: a new generation, and after several the
    /// accused is removed. Returns whether one was opened.
    fn settle_trouble(&mut self, now: Millis, fx: &mut Vec<Effect>) -> bool {
        let Some((since, accused)) = &self.trouble else {
            return false;
        };
        // The death that caused it is usually heard of first.
        if now.saturating_sub(*since) < millis(self.timeouts().heartbeat) {
            return false;
        }
        let accused = accused.clone();
        self.trouble = None;
        self.troubles += 1;
        if accused.is_empty() && self.links_broke(fx) {
            self.troubles = 0;
        }
        let generation = self.generation;
        if self.troubles > TROUBLES_MAX {
            self.troubles = 0;
            for id in accused {
                self.remove(now, id, "its peers cannot reach it", fx);
            }
        }
        // Removing a member has opened one already.
        if self.phase == Phase::Training && self.generation == generation {
            self.open_generation(now, fx);
        }
        true
    }

    /// All are ready: the same bits are committed, other bits are named.
    fn agree(&mut self, now: Millis, fx: &mut Vec<Effect>) {
        let step = self.committed;
        if !self.digests_agree(now, fx) {
            return;
        }
        if let Some((id, _)) = self.ready.iter().find(|(_, r)| !r.finite) {
            let text = format!(
                "step {step}: the gradient is not finite (seen by worker {id}); lower \
                 optim.learning_rate or look at this step's pairs in the ledger"
            );
            self.fail(text, fx);
            return;
        }
        if !self.audit_allows(now, fx) {
            return;
        }
        let mut copying = self.workers.values().filter_map(|w| w.copying);
        if !copying.any(|c| c.step == step && now < c.until) && self.store_allows_commit() {
            self.commit(now, fx);
        }
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
        let mut parts = self.snapshot_parts(step + 1, fx);
        let last = step + 1 == self.s.steps_total;
        let audit = if last {
            None
        } else {
            self.plan_audit(now, step + 1)
        };
        let commit = |snapshot_parts| {
            down::Body::Commit(v1::Commit {
                term: self.s.term,
                generation: self.generation,
                step,
                sum_digest: digest.clone(),
                snapshot_parts,
                last,
                receipt: Some(receipt.clone()),
                durable: self.receipts_durable,
                audit,
            })
        };
        let (storing, others): (Vec<u64>, Vec<u64>) =
            self.members.iter().partition(|id| parts.contains_key(id));
        for id in storing {
            let parts = parts.remove(&id).unwrap_or_default();
            self.send(id, commit(parts), fx);
        }
        self.send_all(&others, commit(Vec::new()), fx);
        self.committed = step + 1;
        self.decided = self.decided.max(self.committed);
        self.committed_digest = Digest::from_bytes(&digest);
        self.ready.clear();
        self.evidence = Evidence::default();
        self.troubles = 0;
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
        }
        self.receipts.insert(step, receipt.clone());
        self.emit(|e| e.committed = Some(receipt), fx);
        if last {
            self.phase = Phase::Finishing;
        }
    }
}
