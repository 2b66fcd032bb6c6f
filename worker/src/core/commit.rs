//! From the commit of a step to the lanes of the next.

use super::*;

impl Core {
    pub(super) fn commit(&mut self, m: v1::Commit, effects: &mut Vec<Effect>) {
        let agreed = self.pending.as_ref().is_some_and(|p| {
            p.step == m.step && Some(p.digest) == Digest::from_bytes(&m.sum_digest)
        });
        if !self.accepts(m.term)
            || m.generation != self.generation
            || m.step != self.applied
            || self.phase != Phase::Ready
        {
            return;
        }
        if !agreed {
            effects.extend(self.apply(Event::Failed(format!(
                "step {}: the committed gradient is not the one this worker reduced",
                m.step
            ))));
            return;
        }
        self.last = m.last;
        self.next_audit = m.audit;
        self.keep_receipt(m.receipt);
        self.receipts = self.receipts.split_off(&m.durable);
        self.start_apply(m.snapshot_parts, effects);
    }

    pub(super) fn start_apply(&mut self, snapshot_parts: Vec<u32>, effects: &mut Vec<Effect>) {
        if let Some(pending) = self.pending.take() {
            self.phase = Phase::Applying;
            self.applying_digest = Some(pending.digest);
            if !self.has(Planted::KeepsPartials) {
                self.partials.clear();
            }
            if !self.has(Planted::KeepsFeatures) {
                self.features.clear();
            }
            effects.push(Effect::Apply {
                step: pending.step,
                sum: pending.sum,
                snapshot_parts,
                skip: !pending.finite,
            });
        }
    }

    pub(super) fn was_applied(&mut self, step: u64, effects: &mut Vec<Effect>) {
        assert_eq!(step, self.applied, "updates are applied one by one");
        self.applied = step + 1;
        self.applied_digest = self.applying_digest.take();
        self.compute_seconds = 0.0;
        self.lanes_done = 0;
        self.phase = Phase::Idle;
        if std::mem::take(&mut self.hello_due) {
            effects.push(Effect::Send(up::Body::Hello(self.hello())));
        }
        effects.push(Effect::Send(up::Body::Applied(v1::Applied {
            generation: self.generation,
            step,
            ..Default::default()
        })));
        if self.last {
            self.membership = None;
        }
        if let Some(m) = &mut self.membership
            && m.step == step
        {
            m.step = step + 1;
            for member in &mut m.members {
                let range = member.lanes_start..member.lanes_end;
                let nodes = lanes::range_nodes(self.me.lanes, &range);
                member.nodes_now = nodes.into_iter().map(Into::into).collect();
            }
            m.nodes_now = m.members[m.rank]
                .nodes_now
                .iter()
                .map(|n| (*n).into())
                .collect();
        }
        let audit = self.next_audit.take();
        self.begin_audit(audit, effects);
        self.proceed(effects);
        while self.phase != Phase::Applying {
            let Some(body) = self.deferred.pop_front() else {
                break;
            };
            self.message(body, effects);
        }
    }
}
