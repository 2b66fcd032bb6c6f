//! A generation: who its members are, and which tree nodes of the open step are whose.

use super::*;

impl Core {
    /// Members of a generation at the open step: whoever holds its state, or holds the gradient that
    /// leads to it.
    pub(super) fn eligible(&self, worker: &Worker) -> bool {
        if worker.copying.is_some() {
            return false;
        }
        let one_behind = worker.applied.map(|a| a + 1) == Some(self.committed)
            && worker.pending_digest.is_some()
            && worker.pending_digest == self.committed_digest;
        worker.applied == Some(self.committed) || one_behind
    }

    /// Opens the next generation at the open step: survivors keep their nodes, lost lanes are handed
    /// out, new ranges begin with the next step.
    pub(super) fn open_generation(&mut self, now: Millis, fx: &mut Vec<Effect>) {
        let mut old = std::mem::take(&mut self.nodes_now);
        self.keep_evidence();
        let recompute = std::mem::take(&mut self.recompute) | self.audit_is_open_ended();
        if recompute {
            // Lanes are handed out as at the step's begin.
            old.clear();
            self.workers.values_mut().for_each(|w| w.nodes.clear());
        }
        self.members = self.next_members();
        self.ready.clear();
        self.troubles.next_generation();
        self.look = true;
        self.step_since = now;
        if self.members.is_empty() {
            // Nobody can go on from here: the newest checkpoint will.
            for worker in self.workers.values_mut() {
                worker.applied = None;
            }
            self.gather(now);
            return;
        }
        if self.committed >= self.stop_at {
            self.phase = Phase::Finishing;
            return;
        }
        let holders = self.lane_holders(&self.members);
        let cut = self.cut_lanes(&holders);
        let spare = self.s.lanes..self.s.lanes;
        self.lanes_next = self.members.iter().map(|id| (*id, spare.clone())).collect();
        self.lanes_next.extend(holders.into_iter().zip(cut));
        self.steps_of_cut = 0;
        let nodes =
            |(id, range): (&u64, &Range<u32>)| (*id, lanes::range_nodes(self.s.lanes, range));
        self.nodes_next = self.lanes_next.iter().map(nodes).collect();
        self.nodes_now = self.assign(&old);
        self.check_assignment();
        self.generation += 1;
        self.decided = self.decided.max(self.committed);
        self.phase = Phase::Training;
        let linked = self.choose_links(fx);
        self.await_ids(now, &linked);
        (self.links, self.groups) = (linked.links, linked.groups);
        self.write_down(now, false, fx);
        let open = v1::OpenGeneration {
            audit: self.plan_audit(now, self.committed),
            recompute,
            ..self.announcement()
        };
        self.send_all(&self.members, down::Body::OpenGeneration(open), fx);
        for id in &self.members {
            if let Some(worker) = self.workers.get_mut(id) {
                worker.applied = Some(self.committed);
                worker.pending_digest = None;
                worker.nodes.clear();
                worker.waits_for.clear();
            }
        }
        let holders = self.lanes_next.values().filter(|lanes| !lanes.is_empty());
        let text = match (holders.count(), self.members.len()) {
            (holders, members) if holders < members => {
                let spares = members - holders;
                format!(
                    "generation {} of {holders} workers and {spares} spares",
                    self.generation
                )
            }
            (_, members) => format!("generation {} of {members} workers", self.generation),
        };
        self.notice(Reason::GenerationOpened, text, fx);
    }

    fn announcement(&self) -> v1::OpenGeneration {
        let member = |(id, group): (&u64, &u32)| v1::Member {
            worker_id: *id,
            data_address: self.workers[id].address.clone(),
            nodes_now: self.nodes_now[id].iter().map(|n| (*n).into()).collect(),
            lanes_start: self.lanes_next[id].start,
            lanes_end: self.lanes_next[id].end,
            group: *group,
        };
        let before = self.committed.checked_sub(1);
        v1::OpenGeneration {
            term: self.s.term,
            generation: self.generation,
            step: self.committed,
            members: self.members.iter().zip(&self.groups).map(member).collect(),
            last: before.and_then(|step| self.receipts.get(&step).cloned()),
            links: self.links.into(),
            quarantine: self.durable.quarantine.all().cloned().collect(),
            ..Default::default()
        }
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
            // Whoever has lanes in the next step shares what was lost, as evenly as may be: a spare that
            // takes over begins at once.
            let takes = |(id, lanes): (&u64, &Range<u32>)| (!lanes.is_empty()).then_some(*id);
            let takers: Vec<u64> = self.lanes_next.iter().filter_map(takes).collect();
            let missing: Vec<u32> = free.into_iter().collect();
            let share = missing.len().div_ceil(takers.len());
            for (id, lost) in takers.iter().zip(missing.chunks(share)) {
                held.entry(*id).or_default().extend(lost);
            }
            if self.has(Planted::LanesTwice)
                && let Some(last) = takers.last()
            {
                held.entry(*last).or_default().extend(&missing);
            }
        }
        let nodes = |lanes: &BTreeSet<u32>| lanes::maximal_nodes(self.s.lanes, lanes);
        held.iter().map(|(id, lanes)| (*id, nodes(lanes))).collect()
    }
}
