//! What agents report, and what they are told to run.

use std::collections::BTreeSet;

use belfry_configs::plan::Work;
use belfry_proto::v1::{self, ChildRole, ChildState};

use super::allocate::Slot;
use super::interface::Effect;
use super::queue::{End, KnownAgent};
use super::{Prepared, Scheduler};
use crate::core::Millis;

/// Workers of one agent: a host has fewer devices.
pub const SLOTS_MAX: u32 = 64;
/// Agents that a plan may ever have heard.
const AGENTS_MAX: usize = 4096;
/// Characters of an agent's name.
const NAME_MAX: usize = 128;

/// An agent that is heard.
#[derive(Clone, Debug)]
pub(super) struct Agent {
    pub(super) incarnation: u64,
    pub(super) slots: u32,
    pub(super) heard: Millis,
}

impl Scheduler {
    /// Takes an agent's word; it is answered when everything is decided.
    pub(super) fn take_report(
        &mut self,
        now: Millis,
        request: u64,
        report: v1::AgentReport,
        fx: &mut Vec<Effect>,
    ) {
        let number = match self.agent(now, &report, fx) {
            Ok(number) => number,
            Err(why) => return self.answers.push(Effect::Refuse { request, why }),
        };
        for child in report.children {
            self.take_child(now, number, child, fx);
        }
        self.asked.push((request, number));
    }

    /// The number of the agent that speaks.
    fn agent(
        &mut self,
        now: Millis,
        report: &v1::AgentReport,
        fx: &mut Vec<Effect>,
    ) -> Result<u32, String> {
        let name = &report.agent;
        if name.is_empty() || name.len() > NAME_MAX {
            return Err(format!(
                "`{name}` names no agent: 1 to {NAME_MAX} characters do"
            ));
        }
        if report.slots == 0 || report.slots > SLOTS_MAX {
            return Err(format!(
                "--slots {}: 1 to {SLOTS_MAX} are possible",
                report.slots
            ));
        }
        let known = self.queue.agents.iter().position(|a| a.name == *name);
        let number = match known {
            Some(number) => number,
            None if self.queue.agents.len() >= AGENTS_MAX => {
                return Err(format!(
                    "{AGENTS_MAX} agents were heard, more cannot be numbered"
                ));
            }
            None => {
                self.queue.agents.push(KnownAgent { name: name.clone() });
                self.dirty = true;
                self.queue.agents.len() - 1
            }
        } as u32;
        if let Some(agent) = self.agents.get(&number)
            && agent.incarnation > report.incarnation
        {
            return Err(format!(
                "another agent is called `{name}` and began later; give each its own --name"
            ));
        }
        if !self.agents.contains_key(&number) {
            let slots = report.slots;
            fx.push(Effect::Notice(format!(
                "agent {name} is here with {slots} workers"
            )));
        }
        let agent = Agent {
            incarnation: report.incarnation,
            slots: report.slots,
            heard: now,
        };
        self.agents.insert(number, agent);
        Ok(number)
    }

    /// Takes what an agent says of one process. What an earlier try says is nobody's word.
    fn take_child(&mut self, now: Millis, agent: u32, child: v1::Child, fx: &mut Vec<Effect>) {
        let Some(i) = self.place(&child.stage) else {
            return;
        };
        let queued = &self.queue.stages[i];
        if queued.end.is_some() || queued.attempt() != child.attempt {
            return;
        }
        let slot = Slot {
            agent,
            index: child.slot,
        };
        match (child.role(), child.state()) {
            (ChildRole::Coordinator, ChildState::Ended) => self.end(i, End::Done, fx),
            (ChildRole::Evaluation, ChildState::Ended) => {
                fx.push(Effect::StoreFigures {
                    stage: child.stage,
                    figures: child.words,
                });
                self.end(i, End::Done, fx);
            }
            (ChildRole::Coordinator | ChildRole::Evaluation, ChildState::GaveUp) => {
                self.failed(now, i, child.words, fx);
            }
            (ChildRole::Worker, ChildState::GaveUp) => {
                let live = &mut self.live[i];
                if live.slots.contains(&slot) {
                    live.gave_up.insert(slot, child.words);
                }
                let all = live
                    .slots
                    .iter()
                    .all(|slot| live.gave_up.contains_key(slot));
                if all && let Some(why) = live.gave_up.values().next().cloned() {
                    self.failed(now, i, format!("every worker gave up: {why}"), fx);
                }
            }
            (role, ChildState::Running | ChildState::Ended) => {
                self.adopt(i, slot, role);
                let live = &mut self.live[i];
                live.gave_up.remove(&slot);
                if role == ChildRole::Coordinator && child.steps_total > 0 {
                    live.step = child.step;
                    live.steps_total = child.steps_total;
                }
            }
        }
    }

    /// A new scheduler takes over what runs; a settled one has decided what runs.
    fn adopt(&mut self, i: usize, slot: Slot, role: ChildRole) {
        if self.settled {
            return;
        }
        match role {
            ChildRole::Coordinator => {
                self.live[i].coordinator.get_or_insert(slot.agent);
            }
            ChildRole::Worker | ChildRole::Evaluation => {
                if !self.live.iter().any(|live| live.slots.contains(&slot)) {
                    self.live[i].slots.insert(slot);
                }
            }
        }
    }

    /// Agents that were not heard for too long are gone, and what ran there.
    pub(super) fn forget_silent(&mut self, now: Millis, fx: &mut Vec<Effect>) {
        let silence = self.settings.agent_silence;
        let gone = |agent: &Agent| now.saturating_sub(agent.heard) > silence;
        let silent = self.agents.iter().filter(|(_, a)| gone(a));
        for number in silent.map(|(n, _)| *n).collect::<Vec<_>>() {
            self.agents.remove(&number);
            let name = &self.queue.agents[number as usize].name;
            let seconds = silence / 1000;
            fx.push(Effect::Notice(format!(
                "agent {name} was not heard for {seconds} s: its workers are counted out"
            )));
            for live in &mut self.live {
                live.slots.retain(|slot| slot.agent != number);
                live.gave_up.retain(|slot, _| slot.agent != number);
                live.coordinator = live.coordinator.filter(|agent| *agent != number);
            }
        }
    }

    /// Every place for a worker that is there.
    pub(super) fn slots(&self) -> BTreeSet<Slot> {
        let all = self.agents.iter().flat_map(|(agent, a)| {
            (0..a.slots).map(|index| Slot {
                agent: *agent,
                index,
            })
        });
        all.collect()
    }

    /// The coordinator stays where it is while that host lives; else it goes where most workers are.
    pub(super) fn choose_coordinator(&mut self, i: usize) {
        let live = &mut self.live[i];
        if live.slots.is_empty() || !self.queue.stages[i].stage.work.trains() {
            live.coordinator = None;
            return;
        }
        if live
            .coordinator
            .is_some_and(|agent| self.agents.contains_key(&agent))
        {
            return;
        }
        let count = |agent: u32| live.slots.iter().filter(|s| s.agent == agent).count();
        let hosts = live.slots.iter().map(|slot| slot.agent);
        live.coordinator = hosts.max_by_key(|agent| (count(*agent), std::cmp::Reverse(*agent)));
    }

    /// All that should run at an agent.
    pub(super) fn assignment(&self, agent: u32) -> v1::Assignment {
        let mut orders = Vec::new();
        for (queued, live) in self.queue.stages.iter().zip(&self.live) {
            if queued.end.is_some() {
                continue;
            }
            let order = v1::Order {
                stage: queued.stage.name.clone(),
                attempt: queued.attempt(),
                ..Default::default()
            };
            if live.coordinator == Some(agent) {
                orders.push(v1::Order {
                    role: ChildRole::Coordinator.into(),
                    workers: live.slots.len() as u32,
                    ..order.clone()
                });
            }
            let (role, arguments) = match (&queued.stage.work, &live.prepared) {
                (Work::Train { .. }, _) => (ChildRole::Worker, Vec::new()),
                (Work::Eval { .. }, Prepared::Yes { arguments }) => {
                    (ChildRole::Evaluation, arguments.clone())
                }
                (Work::Eval { .. }, _) => (ChildRole::Evaluation, Vec::new()),
            };
            for slot in live.slots.iter().filter(|slot| slot.agent == agent) {
                orders.push(v1::Order {
                    role: role.into(),
                    slot: slot.index,
                    worker_id: u64::from(slot.agent * SLOTS_MAX + slot.index),
                    arguments: arguments.clone(),
                    ..order.clone()
                });
            }
        }
        v1::Assignment {
            term: self.settings.term,
            root: self.settings.root.clone(),
            orders,
        }
    }
}
