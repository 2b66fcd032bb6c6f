//! What a new generation changes: the members, this worker's nodes, and the shards that everybody
//! does without.

use super::*;

impl Core {
    pub(super) fn open_generation(&mut self, m: v1::OpenGeneration, effects: &mut Vec<Effect>) {
        if !self.accepts(m.term) || m.generation <= self.generation {
            return;
        }
        if !self.has_state() {
            // The coordinator thinks otherwise: let it see what is held.
            effects.push(Effect::Reconnect);
            return;
        }
        let Some(rank) = m
            .members
            .iter()
            .position(|w| w.worker_id == self.me.worker_id)
        else {
            return;
        };
        self.leave_exchange(effects);
        self.generation = m.generation;
        self.take_quarantine(&m.quarantine, effects);
        if m.recompute && m.step == self.applied {
            self.begin_step_anew(effects);
        }
        let nodes_now = m.members[rank]
            .nodes_now
            .iter()
            .map(|n| (*n).into())
            .collect();
        let links = Links::new(m.links(), &m.members, rank);
        if links.makes_id() {
            let generation = m.generation;
            effects.push(Effect::MakeId { generation });
        }
        self.membership = Some(Membership {
            generation: m.generation,
            rank,
            links,
            members: m.members,
            step: m.step,
            nodes_now,
        });
        self.last = false;
        if m.step == self.applied {
            self.phase = Phase::Idle;
            self.begin_audit(m.audit, effects);
            self.proceed(effects);
        } else if m.step == self.applied + 1 && self.pending.is_some() {
            // The step was committed while this worker held its gradient.
            self.keep_receipt(m.last);
            self.next_audit = m.audit;
            self.start_apply(Vec::new(), effects);
        } else {
            // Too far behind or ahead to be a member: let the coordinator see what is held.
            self.membership = None;
            effects.push(Effect::Reconnect);
        }
    }

    /// Shards that nobody reads at `step`.
    pub(super) fn quarantine_at(&self, step: u64) -> Quarantine {
        let shards = self.quarantine.at(step);
        let shards = shards.map(|s| belfry_data::ShardRef {
            dataset: s.dataset,
            shard: s.shard,
        });
        shards.collect()
    }

    /// What was computed of the open step with other shards is of another step: it is dropped.
    fn take_quarantine(&mut self, told: &[v1::Shard], effects: &mut Vec<Effect>) {
        let before = self.quarantine_at(self.applied);
        self.quarantine = told.iter().cloned().collect();
        if self.quarantine_at(self.applied) == before || self.has(Planted::KeepsLostShards) {
            return;
        }
        self.begin_step_anew(effects);
    }

    /// Nothing that was computed of the open step counts.
    fn begin_step_anew(&mut self, effects: &mut Vec<Effect>) {
        self.partials.clear();
        self.features.clear();
        self.audited.clear();
        self.pending = None;
        self.compute_seconds = 0.0;
        self.lanes_done = 0;
        effects.push(Effect::Unstage);
    }
}
