//! One step, from the opening of a generation to its commit, and the end of the run.

use super::*;

impl Core {
    /// Members of a generation at the open step: whoever holds its state, or holds the gradient that
    /// leads to it.
    fn eligible(&self, worker: &Worker) -> bool {
        if worker.copying.is_some() || worker.leaving {
            return false;
        }
        let one_behind = worker.applied.map(|a| a + 1) == Some(self.committed)
            && worker.pending_digest.is_some()
            && worker.pending_digest == self.committed_digest;
        worker.applied == Some(self.committed) || one_behind
    }

    /// Opens the next generation at the open step: survivors keep their nodes, lost lanes are handed
    /// out, new ranges begin with the next step.
    pub(super) fn open_generation(&mut self, fx: &mut Vec<Effect>) {
        let old = std::mem::take(&mut self.nodes_now);
        let chosen = self.workers.iter().filter(|(_, w)| self.eligible(w));
        self.members = chosen.map(|(id, _)| *id).collect();
        self.ready.clear();
        self.trouble = None;
        if self.members.is_empty() {
            // Nobody can go on from here: the newest checkpoint will.
            for worker in self.workers.values_mut() {
                worker.applied = None;
            }
            self.gather(0);
            return;
        }
        if self.committed >= self.s.steps_total {
            self.phase = Phase::Finishing { since: 0 };
            return;
        }
        let cut = lanes::cut(
            self.s.lanes,
            &vec![1.0; self.members.len()],
            self.s.nodes_max,
        );
        self.lanes_next = self.members.iter().copied().zip(cut).collect();
        self.nodes_now = self.assign(&old);
        self.s.generation += 1;
        self.phase = Phase::Training;
        fx.push(Effect::Journal {
            generation: self.s.generation,
            committed: self.committed,
            members: self.members.clone(),
        });
        let node = |n: &LaneRange| v1::Node {
            start: n.start,
            end: n.end,
        };
        let members: Vec<v1::Member> = self
            .members
            .iter()
            .map(|id| v1::Member {
                worker_id: *id,
                data_address: self.workers[id].address.clone(),
                nodes_now: self.nodes_now[id].iter().map(node).collect(),
                lanes_start: self.lanes_next[id].start,
                lanes_end: self.lanes_next[id].end,
            })
            .collect();
        for id in &self.members {
            let open = v1::OpenGeneration {
                term: self.s.term,
                generation: self.s.generation,
                step: self.committed,
                members: members.clone(),
            };
            fx.push(Effect::Send(*id, down::Body::OpenGeneration(open)));
        }
        for id in &self.members {
            if let Some(worker) = self.workers.get_mut(id) {
                worker.applied = Some(self.committed);
                worker.nodes.clear();
            }
        }
        let text = format!(
            "generation {} of {} workers",
            self.s.generation,
            self.members.len()
        );
        self.notice(text, fx);
    }

    /// Nodes of the open step by member; together they tile the lanes.
    fn assign(&self, old: &BTreeMap<u64, Vec<LaneRange>>) -> BTreeMap<u64, Vec<LaneRange>> {
        let mut held: BTreeMap<u64, BTreeSet<u32>> = BTreeMap::new();
        let mut free: BTreeSet<u32> = (0..self.s.lanes).collect();
        for id in &self.members {
            let worker = &self.workers[id];
            // A member of the last generation has its assignment; after a coordinator's restart it
            // has said what it holds. A worker one step behind holds nothing of this step.
            let own = match old.get(id) {
                Some(nodes) => nodes.as_slice(),
                None if worker.applied == Some(self.committed) => worker.nodes.as_slice(),
                None => &[],
            };
            let lanes = own.iter().flat_map(|n| n.start..n.end);
            let kept: BTreeSet<u32> = lanes.filter(|lane| free.remove(lane)).collect();
            held.insert(*id, kept);
        }
        if free.len() as u32 == self.s.lanes {
            for (id, range) in &self.lanes_next {
                held.insert(*id, range.clone().collect());
            }
        } else if !free.is_empty() {
            // Newcomers begin with the next step; survivors share what was lost, as evenly as may be.
            let survivors: Vec<u64> = self
                .members
                .iter()
                .copied()
                .filter(|id| !held[id].is_empty())
                .collect();
            let missing: Vec<u32> = free.into_iter().collect();
            let share = missing.len().div_ceil(survivors.len());
            for (id, lost) in survivors.iter().zip(missing.chunks(share)) {
                held.entry(*id).or_default().extend(lost);
            }
        }
        let nodes = |lanes: &BTreeSet<u32>| lanes::maximal_nodes(self.s.lanes, lanes);
        held.iter().map(|(id, lanes)| (*id, nodes(lanes))).collect()
    }

    pub(super) fn advance_training(&mut self, now: Millis, fx: &mut Vec<Effect>) {
        let member = |id: &u64| self.members.contains(id);
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
        if joins || leaves {
            self.open_generation(fx);
            return;
        }
        self.copy_to_newcomers(now, fx);
        if self.settle_trouble(now, fx) || !self.evaluate_first(fx) {
            return;
        }
        if self.members.iter().all(|id| self.ready.contains_key(id)) {
            self.agree(now, fx);
        }
    }

    fn copy_to_newcomers(&mut self, now: Millis, fx: &mut Vec<Effect>) {
        let sources: Vec<String> = self
            .members
            .iter()
            .map(|id| self.workers[id].address.clone())
            .collect();
        for (id, worker) in &mut self.workers {
            let idle = worker.copying.is_none() && worker.copies < COPIES_MAX;
            if self.members.contains(id) || worker.leaving || !idle {
                continue;
            }
            worker.copying = Some((self.committed, now + self.s.stall_ms));
            worker.applied = None;
            let (term, step) = (self.s.term, self.committed);
            let copy = v1::CopyState {
                term,
                step,
                sources: sources.clone(),
            };
            fx.push(Effect::Send(*id, down::Body::CopyState(copy)));
        }
    }

    /// An exchange failed between workers that live: a new generation, and after several the
    /// accused is removed. Returns whether one was opened.
    fn settle_trouble(&mut self, now: Millis, fx: &mut Vec<Effect>) -> bool {
        let Some((since, accused)) = &self.trouble else {
            return false;
        };
        // The death that caused it is usually heard of first.
        if now.saturating_sub(*since) < self.s.stall_ms / 10 {
            return false;
        }
        let accused = accused.clone();
        self.troubles += 1;
        if self.troubles > TROUBLES_MAX {
            self.troubles = 0;
            for id in accused {
                let reason = "its peers cannot reach it".to_owned();
                self.notice(format!("worker {id} is removed: {reason}"), fx);
                self.workers.remove(&id);
                fx.push(Effect::Close(id));
            }
        }
        self.open_generation(fx);
        true
    }

    /// The first state is judged before it is gone. Returns whether training may go on.
    fn evaluate_first(&mut self, fx: &mut Vec<Effect>) -> bool {
        if !self.s.evaluates || self.committed > 0 || self.evaluated.contains_key(&0) {
            return true;
        }
        self.ask_evaluator(|step| down::Body::Evaluate(v1::Evaluate { step }), fx);
        false
    }

    fn ask_evaluator(&mut self, ask: impl FnOnce(u64) -> down::Body, fx: &mut Vec<Effect>) {
        if self.evaluator.is_none()
            && let Some(first) = self.members.first()
        {
            self.evaluator = Some(*first);
            fx.push(Effect::Send(*first, ask(self.committed)));
        }
    }

    /// All are ready: the same bits are committed, other bits are named.
    fn agree(&mut self, now: Millis, fx: &mut Vec<Effect>) {
        let step = self.committed;
        let mut camps: BTreeMap<Vec<u8>, Vec<u64>> = BTreeMap::new();
        for (id, ready) in &self.ready {
            camps.entry(ready.sum_digest.clone()).or_default().push(*id);
        }
        if camps.len() > 1 {
            let half = self.ready.len() / 2;
            let minority: Vec<u64> = camps
                .values()
                .filter(|ids| ids.len() <= half)
                .flatten()
                .copied()
                .collect();
            let text = format!("step {step}: workers {minority:?} reduced other bits");
            if minority.len() == self.ready.len() {
                self.fail(format!("{text}, and no majority tells who is right"), fx);
                return;
            }
            for id in minority {
                let reason = text.clone();
                fx.push(Effect::Send(
                    id,
                    down::Body::Refused(v1::Refused { reason }),
                ));
                self.workers.remove(&id);
            }
            self.notice(format!("{text} and are removed"), fx);
            self.open_generation(fx);
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
        let copying = self.workers.values().filter_map(|w| w.copying);
        if copying
            .into_iter()
            .any(|(at, until)| at == step && now < until)
        {
            return;
        }
        self.commit(fx);
    }

    fn commit(&mut self, fx: &mut Vec<Effect>) {
        let step = self.committed;
        let record = self.record();
        if let Some(stored) = self.s.receipts.get(&step)
            && *stored != record.sum_digest
        {
            let text = format!(
                "step {step} was recomputed to digest {}, its receipt says {stored}: the bits \
                 differ from the first time",
                record.sum_digest
            );
            self.fail(text, fx);
            return;
        }
        let digest = self
            .ready
            .values()
            .next()
            .map(|r| r.sum_digest.clone())
            .unwrap_or_default();
        let parts = self.snapshot_parts(step + 1, fx);
        let last = step + 1 == self.s.steps_total;
        for (rank, id) in self.members.iter().enumerate() {
            let commit = v1::Commit {
                term: self.s.term,
                generation: self.s.generation,
                step,
                sum_digest: digest.clone(),
                snapshot_parts: parts.get(rank).cloned().unwrap_or_default(),
                last,
            };
            fx.push(Effect::Send(*id, down::Body::Commit(commit)));
        }
        self.committed = step + 1;
        self.committed_digest = Digest::from_bytes(&digest);
        self.ready.clear();
        self.troubles = 0;
        for id in &self.members {
            if let Some(worker) = self.workers.get_mut(id) {
                worker.applied = Some(self.committed);
                worker.pending_digest = None;
            }
            let next = self.lanes_next[id].clone().collect();
            self.nodes_now
                .insert(*id, lanes::maximal_nodes(self.s.lanes, &next));
        }
        self.receipts.push(record.clone());
        self.emit(|e| e.committed = Some(record), fx);
        if last {
            self.phase = Phase::Finishing { since: 0 };
        }
    }

    /// The step's receipt: lane reports folded in f64 in lane order.
    fn record(&self) -> v1::StepRecord {
        let mut lanes: BTreeMap<u32, &v1::LaneReport> = BTreeMap::new();
        lanes.extend(
            self.ready
                .values()
                .flat_map(|r| &r.lanes)
                .map(|l| (l.lane, l)),
        );
        let mut sum = v1::LaneReport::default();
        let mut pairs_digest = 0u128;
        for lane in lanes.values() {
            sum.mlm_loss += lane.mlm_loss;
            sum.itm_loss += lane.itm_loss;
            sum.mlm_masked += lane.mlm_masked;
            sum.mlm_correct += lane.mlm_correct;
            sum.itm_correct += lane.itm_correct;
            sum.pairs += lane.pairs;
            sum.unmasked_micro_batches += lane.unmasked_micro_batches;
            let digest = Digest::from_bytes(&lane.pairs_digest).map_or(0, |d| d.0);
            pairs_digest = pairs_digest.rotate_left(7) ^ digest;
        }
        let micro_batches = f64::from(self.s.micro_batches);
        let share = |part: u64, of: u64| {
            if of == 0 {
                0.0
            } else {
                part as f64 / of as f64
            }
        };
        let first = self.ready.values().next();
        let digest = first.and_then(|r| Digest::from_bytes(&r.sum_digest));
        v1::StepRecord {
            step: self.committed,
            mlm_loss: sum.mlm_loss / micro_batches,
            itm_loss: sum.itm_loss / micro_batches,
            mlm_accuracy: share(sum.mlm_correct, sum.mlm_masked),
            itm_accuracy: share(sum.itm_correct, sum.pairs),
            mlm_masked: sum.mlm_masked,
            pairs: sum.pairs,
            unmasked_micro_batches: sum.unmasked_micro_batches,
            sum_digest: digest.map(|d| d.to_string()).unwrap_or_default(),
            pairs_digest: Digest(pairs_digest).to_string(),
        }
    }

    /// After the last commit: evaluation, export, and the last checkpoint's manifest.
    pub(super) fn advance_finishing(&mut self, waited: Millis, fx: &mut Vec<Effect>) {
        let total = self.s.steps_total;
        if self.members.is_empty() {
            return;
        }
        if self.s.evaluates && !self.evaluated.contains_key(&total) {
            self.ask_evaluator(|step| down::Body::Evaluate(v1::Evaluate { step }), fx);
            return;
        }
        if self.exported.is_none() {
            self.ask_evaluator(|step| down::Body::Export(v1::Export { step }), fx);
            return;
        }
        if self.s.manifests.last() == Some(&total) {
            self.end(true, "trained to the last step".into(), fx);
        } else if self.checkpoint.is_none() {
            let text = "the last checkpoint's parts were lost with their workers; start again \
                        with --resume to recompute them";
            self.fail(text.into(), fx);
        } else {
            let _ = waited;
            self.wait_for("the last checkpoint's parts".into(), fx);
        }
    }
}
