//! A plan as it stands, for people: what runs, and why the rest does not.

use belfry_proto::v1;

use super::queue::Queued;
use super::{Live, Prepared, Scheduler};
use crate::core::Millis;

impl Scheduler {
    /// The plan at `now`.
    pub fn status(&self, now: Millis) -> v1::PlanStatus {
        let stages = (0..self.live.len()).map(|i| self.stage_status(now, i));
        let agents = self.agents.iter().map(|(number, agent)| {
            let busy = self.live.iter().flat_map(|live| &live.slots);
            v1::AgentStatus {
                name: self.queue.agents[*number as usize].name.clone(),
                slots: agent.slots,
                busy: busy.filter(|slot| slot.agent == *number).count() as u32,
                heard_ms: now.saturating_sub(agent.heard),
            }
        });
        v1::PlanStatus {
            plan: self.queue.plan.clone(),
            term: self.settings.term,
            stages: stages.collect(),
            agents: agents.collect(),
        }
    }

    fn stage_status(&self, now: Millis, i: usize) -> v1::StageStatus {
        let (queued, live) = (&self.queue.stages[i], &self.live[i]);
        let (state, why) = match &queued.end {
            Some(end) => (end.word(), end.reason().to_owned()),
            None if !live.slots.is_empty() => ("running", troubles(live)),
            None => match self.waits_for(i) {
                Some(before) => ("waiting", format!("comes after {before}")),
                None => ("ready", self.lacks(now, queued, live)),
            },
        };
        v1::StageStatus {
            state: state.into(),
            workers: live.slots.len() as u32,
            step: live.step,
            steps_total: live.steps_total,
            why,
            ..describe(queued)
        }
    }

    /// Why a stage that may run does not.
    fn lacks(&self, now: Millis, queued: &Queued, live: &Live) -> String {
        if now < live.again {
            let (next, all) = (queued.failures + 1, queued.stage.retries + 1);
            let seconds = (live.again - now).div_ceil(1000);
            let failure = &queued.last_failure;
            return format!("try {next} of {all} begins in {seconds} s; the last one: {failure}");
        }
        if !self.settled {
            return "the scheduler waits for the agents that it knows".into();
        }
        if !matches!(live.prepared, Prepared::Yes { .. }) {
            return "its root and its data are being prepared".into();
        }
        let there = self.slots().len();
        let min = queued.stage.min_workers;
        if (there as u32) < min {
            return format!("needs {min} workers at once, {there} are there");
        }
        format!("needs {min} workers at once; of {there} that are there others have too many")
    }
}

fn troubles(live: &Live) -> String {
    match live.gave_up.values().next() {
        None => String::new(),
        Some(why) => format!("{} workers gave up: {why}", live.gave_up.len()),
    }
}

/// What the queue alone says of a stage; also when nobody schedules it.
pub fn describe(queued: &Queued) -> v1::StageStatus {
    let stage = &queued.stage;
    v1::StageStatus {
        name: stage.name.clone(),
        group: stage.group.clone(),
        state: queued.end.as_ref().map_or("open", |end| end.word()).into(),
        min_workers: stage.min_workers,
        preferred_workers: stage.preferred_workers,
        priority: stage.priority,
        failures: queued.failures,
        retries: stage.retries,
        why: queued
            .end
            .as_ref()
            .map_or(String::new(), |e| e.reason().into()),
        ..Default::default()
    }
}
