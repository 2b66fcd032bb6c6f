//! The core of a plan's scheduler: pure. It queues stages, gives workers to those that can run, tries
//! again what failed, and says what each agent should run.
//!
//! What must outlive it is the [`Queue`], in the journal; what runs it learns from the agents'
//! reports, so a scheduler that is killed and started again disturbs nothing that trains. It knows no
//! clock, no store and no process.

mod agents;
mod allocate;
mod interface;
mod queue;
mod report;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use belfry_configs::plan::{Plan, STAGES_MAX};

pub use agents::SLOTS_MAX;
pub use allocate::{Demand, Slot, allocate};
pub use interface::{Effect, Event, Ready, Settings};
pub use queue::{End, KnownAgent, Queue, Queued};
pub use report::describe;

use crate::core::Millis;
use agents::Agent;

/// Doublings of a retry's pause.
const DOUBLINGS_MAX: u32 = 16;

/// The scheduler's state.
pub struct Scheduler {
    settings: Settings,
    queue: Queue,
    /// Beside the queue's stages.
    live: Vec<Live>,
    /// By number.
    agents: BTreeMap<u32, Agent>,
    begun: Millis,
    /// Whether known agents had their time to come back.
    settled: bool,
    /// The queue differs from what the journal says.
    dirty: bool,
    /// Said once.
    over: bool,
    /// What waits for the journal.
    answers: Vec<Effect>,
    /// Reports to be answered when all is decided.
    asked: Vec<(u64, u32)>,
}

/// What a scheduler knows of a stage beyond the queue.
#[derive(Clone, Debug, Default)]
struct Live {
    prepared: Prepared,
    /// Not before this time is it tried.
    again: Millis,
    slots: BTreeSet<Slot>,
    /// The agent whose host leads it.
    coordinator: Option<u32>,
    /// Workers that gave up, and why.
    gave_up: BTreeMap<Slot, String>,
    step: u64,
    steps_total: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Prepared {
    #[default]
    No,
    Asked,
    Yes {
        /// The command line of an evaluation.
        arguments: Vec<String>,
    },
}

impl Scheduler {
    /// A scheduler that goes on with `queue` at `now`.
    pub fn new(now: Millis, settings: Settings, queue: Queue) -> Self {
        let live = vec![Live::default(); queue.stages.len()];
        Scheduler {
            settled: queue.agents.is_empty(),
            settings,
            live,
            queue,
            agents: BTreeMap::new(),
            begun: now,
            dirty: false,
            over: false,
            answers: Vec::new(),
            asked: Vec::new(),
        }
    }

    /// What must be durable.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Takes an event; returns what to do, in order.
    pub fn apply(&mut self, now: Millis, event: Event) -> Vec<Effect> {
        let mut fx = Vec::new();
        match event {
            Event::Report { request, report } => self.take_report(now, request, report, &mut fx),
            Event::Submit { request, plan } => {
                let answer = self.submit(plan, &mut fx);
                self.answer(request, answer);
            }
            Event::Cancel { request, stage } => {
                let answer = self.cancel(&stage, &mut fx);
                self.answer(request, answer);
            }
            Event::Revive => self.revive(&mut fx),
            Event::Prepared {
                stage,
                attempt,
                outcome,
            } => self.prepared(now, (&stage, attempt), outcome, &mut fx),
            Event::Tick => {}
        }
        self.advance(now, &mut fx);
        self.settle_answers(fx)
    }

    fn answer(&mut self, request: u64, answer: Result<(), String>) {
        self.answers.push(match answer {
            Ok(()) => Effect::Accept { request },
            Err(why) => Effect::Refuse { request, why },
        });
    }

    /// What was decided is durable before anybody hears of it.
    fn settle_answers(&mut self, fx: Vec<Effect>) -> Vec<Effect> {
        let (mut before, after): (Vec<Effect>, Vec<Effect>) = fx
            .into_iter()
            .partition(|effect| matches!(effect, Effect::StoreFigures { .. }));
        if std::mem::take(&mut self.dirty) {
            before.push(Effect::Journal(self.queue.clone()));
        }
        before.extend(after);
        for (request, agent) in std::mem::take(&mut self.asked) {
            let assignment = self.assignment(agent);
            before.push(Effect::Assign {
                request,
                assignment,
            });
        }
        before.append(&mut self.answers);
        let all = self.queue.stages.iter().all(|s| s.end.is_some());
        let ended = all && !self.queue.stages.is_empty();
        if ended && !self.over {
            before.push(Effect::AllEnded);
        }
        self.over = ended;
        before
    }

    fn place(&self, stage: &str) -> Option<usize> {
        self.queue.stages.iter().position(|s| s.stage.name == stage)
    }

    fn submit(&mut self, plan: Plan, fx: &mut Vec<Effect>) -> Result<(), String> {
        let total = self.queue.stages.len() + plan.stages.len();
        if total > STAGES_MAX {
            return Err(format!(
                "{total} stages would be queued; at most {STAGES_MAX} can be"
            ));
        }
        if let Some(known) = plan.stages.iter().find(|s| self.place(&s.name).is_some()) {
            return Err(format!(
                "a stage `{}` is in the queue already; rename the new one",
                known.name
            ));
        }
        // A stage comes after stages of its own plan only: names are its own too.
        if self.queue.stages.is_empty() {
            self.queue.plan = plan.name;
        }
        for stage in plan.stages {
            fx.push(Effect::Notice(format!("{}: submitted", stage.name)));
            self.queue.stages.push(Queued::new(stage));
            self.live.push(Live::default());
        }
        self.dirty = true;
        Ok(())
    }

    fn cancel(&mut self, stage: &str, fx: &mut Vec<Effect>) -> Result<(), String> {
        let Some(i) = self.place(stage) else {
            let names: Vec<&str> = self
                .queue
                .stages
                .iter()
                .map(|s| s.stage.name.as_str())
                .collect();
            return Err(format!(
                "no stage is called `{stage}`; there are {}",
                names.join(", ")
            ));
        };
        match &self.queue.stages[i].end {
            Some(End::Cancelled { .. }) => {}
            Some(end) => return Err(format!("`{stage}` is {} already", end.word())),
            None => {
                let reason = "by request".into();
                self.end(i, End::Cancelled { reason }, fx);
            }
        }
        Ok(())
    }

    fn revive(&mut self, fx: &mut Vec<Effect>) {
        for (queued, live) in self.queue.stages.iter_mut().zip(&mut self.live) {
            if matches!(queued.end, Some(End::Failed { .. } | End::Cancelled { .. })) {
                queued.end = None;
                // Another number than any try before, so that none of them speaks for this one.
                queued.revivals += 1 + queued.failures;
                queued.failures = 0;
                *live = Live::default();
                self.dirty = true;
                fx.push(Effect::Notice(format!(
                    "{}: is tried again",
                    queued.stage.name
                )));
            }
        }
    }

    fn prepared(
        &mut self,
        now: Millis,
        (stage, attempt): (&str, u32),
        outcome: Result<Ready, String>,
        fx: &mut Vec<Effect>,
    ) {
        let Some(i) = self.place(stage) else {
            return;
        };
        let queued = &self.queue.stages[i];
        if queued.end.is_some() || queued.attempt() != attempt {
            return;
        }
        match outcome {
            Ok(Ready::Begin { arguments }) => self.live[i].prepared = Prepared::Yes { arguments },
            Ok(Ready::Over) => self.end(i, End::Done, fx),
            Err(why) => self.failed(now, i, why, fx),
        }
    }

    /// A try failed.
    fn failed(&mut self, now: Millis, i: usize, why: String, fx: &mut Vec<Effect>) {
        let queued = &mut self.queue.stages[i];
        queued.failures += 1;
        queued.last_failure.clone_from(&why);
        self.dirty = true;
        let name = &queued.stage.name;
        let (failures, retries) = (queued.failures, queued.stage.retries);
        if failures > retries {
            self.end(i, End::Failed { reason: why }, fx);
            return;
        }
        let doublings = (failures - 1).min(DOUBLINGS_MAX);
        let pause = (self.settings.retry_pause << doublings).min(self.settings.retry_pause_max);
        fx.push(Effect::Notice(format!(
            "{name}: try {failures} of {} failed: {why}; the next one begins in {:.0} s",
            retries + 1,
            (pause as f64 / 1000.0).ceil()
        )));
        self.live[i] = Live {
            again: now + pause,
            ..Live::default()
        };
    }

    /// A stage ended, and with it those that cannot begin any more.
    fn end(&mut self, i: usize, end: End, fx: &mut Vec<Effect>) {
        let mut ending = vec![(i, end)];
        while let Some((i, end)) = ending.pop() {
            if self.queue.stages[i].end.is_some() {
                continue;
            }
            let name = self.queue.stages[i].stage.name.clone();
            let why = match end.reason() {
                "" => String::new(),
                reason => format!(": {reason}"),
            };
            fx.push(Effect::Notice(format!("{name}: {}{why}", end.word())));
            self.live[i] = Live {
                step: self.live[i].step,
                steps_total: self.live[i].steps_total,
                ..Live::default()
            };
            self.dirty = true;
            let follows = |q: &Queued| q.end.is_none() && q.stage.after.contains(&name);
            let behind = self
                .queue
                .stages
                .iter()
                .enumerate()
                .filter(|(_, q)| follows(q));
            let reason = format!("`{name}`, which it comes after, was {}", end.word());
            let behind = behind.filter_map(|(j, _)| match &end {
                End::Done => None,
                End::Failed { .. } => Some((
                    j,
                    End::Failed {
                        reason: reason.replace("was ", ""),
                    },
                )),
                End::Cancelled { .. } => Some((
                    j,
                    End::Cancelled {
                        reason: reason.clone(),
                    },
                )),
            });
            ending.extend(behind.collect::<Vec<_>>());
            self.queue.stages[i].end = Some(end);
        }
    }

    /// Prepares what may begin, and gives workers to what is prepared.
    fn advance(&mut self, now: Millis, fx: &mut Vec<Effect>) {
        self.forget_silent(now, fx);
        let back = (0..self.queue.agents.len() as u32).all(|n| self.agents.contains_key(&n));
        self.settled |= back || now >= self.begun + self.settings.settle;
        if !self.settled {
            return;
        }
        for i in 0..self.live.len() {
            let may = self.waits_for(i).is_none() && now >= self.live[i].again;
            if may && self.queue.stages[i].end.is_none() && self.live[i].prepared == Prepared::No {
                self.live[i].prepared = Prepared::Asked;
                let queued = &self.queue.stages[i];
                fx.push(Effect::Prepare {
                    stage: queued.stage.name.clone(),
                    attempt: queued.attempt(),
                });
            }
        }
        self.allocate(fx);
    }

    /// The first stage before this one that has not ended well.
    fn waits_for(&self, i: usize) -> Option<&str> {
        let done = |name: &str| {
            let before = self.place(name).map(|j| &self.queue.stages[j]);
            before.is_some_and(|q| q.end == Some(End::Done))
        };
        let after = &self.queue.stages[i].stage.after;
        after.iter().find(|name| !done(name)).map(String::as_str)
    }

    fn allocate(&mut self, fx: &mut Vec<Effect>) {
        let (ready, others): (Vec<usize>, Vec<usize>) = (0..self.live.len())
            .filter(|i| self.queue.stages[*i].end.is_none())
            .partition(|i| matches!(self.live[*i].prepared, Prepared::Yes { .. }));
        // What a scheduler before this one began keeps its workers while it is prepared again.
        let mut there = self.slots();
        for slot in others.iter().flat_map(|i| &self.live[*i].slots) {
            there.remove(slot);
        }
        let demands: Vec<Demand> = ready
            .iter()
            .map(|i| {
                let stage = &self.queue.stages[*i].stage;
                Demand {
                    priority: stage.priority,
                    min: stage.min_workers,
                    preferred: stage.preferred_workers,
                    held: self.live[*i].slots.clone(),
                }
            })
            .collect();
        for (i, given) in ready.into_iter().zip(allocate(&there, &demands)) {
            let (before, after) = (self.live[i].slots.len(), given.len());
            if before != after {
                let name = &self.queue.stages[i].stage.name;
                let text = match (before, after) {
                    (0, n) => format!("{name}: begins with {n} workers"),
                    (_, 0) => format!("{name}: gives its workers to other stages and waits"),
                    (m, n) => format!("{name}: {n} workers instead of {m}"),
                };
                fx.push(Effect::Notice(text));
            }
            let live = &mut self.live[i];
            live.gave_up.retain(|slot, _| given.contains(slot));
            live.slots = given;
            self.choose_coordinator(i);
        }
    }
}
