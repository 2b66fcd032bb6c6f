//! The scheduler's core on small plans: what begins when, what a failure costs, and what a scheduler
//! that follows a killed one does.

use belfry_configs::plan::{Plan, Stage, Work};
use belfry_proto::v1::{self, Child, ChildRole, ChildState};

use super::*;

const SECOND: Millis = 1000;

fn settings() -> Settings {
    Settings {
        term: 1,
        root: "/plan".into(),
        agent_silence: 10 * SECOND,
        settle: 5 * SECOND,
        retry_pause: SECOND,
        retry_pause_max: 60 * SECOND,
    }
}

fn stage(name: &str, after: &[&str]) -> Stage {
    Stage {
        name: name.into(),
        group: name.into(),
        work: Work::Train {
            run: String::new(),
            init_from: None,
        },
        after: after.iter().map(|name| (*name).to_owned()).collect(),
        min_workers: 1,
        preferred_workers: 8,
        priority: 0,
        retries: 1,
        results: Vec::new(),
    }
}

/// A scheduler, its clock, and agents that do what they are told.
struct World {
    core: Scheduler,
    now: Millis,
    requests: u64,
    said: Vec<String>,
    /// What each agent said last.
    agents: BTreeMap<String, v1::AgentReport>,
    journal: Queue,
    ended: u32,
}

impl World {
    fn new(stages: Vec<Stage>, agents: &[(&str, u32)]) -> Self {
        let mut world = World {
            core: Scheduler::new(0, settings(), Queue::default()),
            now: 0,
            requests: 0,
            said: Vec::new(),
            agents: BTreeMap::new(),
            journal: Queue::default(),
            ended: 0,
        };
        world.submit(stages).expect("is taken");
        for (name, slots) in agents {
            let report = v1::AgentReport {
                agent: (*name).into(),
                incarnation: 1,
                slots: *slots,
                ..Default::default()
            };
            world.agents.insert((*name).into(), report);
        }
        world.pass(0);
        world
    }

    fn submit(&mut self, stages: Vec<Stage>) -> Result<(), String> {
        self.requests += 1;
        let plan = Plan {
            name: "p".into(),
            stages,
        };
        let request = self.requests;
        self.apply(Event::Submit { request, plan }).1
    }

    /// Applies an event; preparations succeed at once. Returns an assignment and an answer.
    fn apply(&mut self, event: Event) -> (v1::Assignment, Result<(), String>) {
        let mut events = vec![event];
        let (mut assigned, mut answer) = (v1::Assignment::default(), Ok(()));
        while !events.is_empty() {
            let event = events.remove(0);
            let mut durable = self.journal == *self.core.queue();
            for effect in self.core.apply(self.now, event) {
                match effect {
                    Effect::Journal(queue) => {
                        assert_eq!(&queue, self.core.queue());
                        self.journal = queue;
                        durable = true;
                    }
                    Effect::Prepare { stage, attempt } => events.push(Event::Prepared {
                        stage,
                        attempt,
                        outcome: Ok(Ready::Begin {
                            arguments: Vec::new(),
                        }),
                    }),
                    Effect::Assign { assignment, .. } => {
                        assert!(
                            durable || self.journal == *self.core.queue(),
                            "told before durable"
                        );
                        assigned = assignment;
                    }
                    Effect::Accept { .. } => assert!(durable || self.journal == *self.core.queue()),
                    Effect::Refuse { why, .. } => answer = Err(why),
                    Effect::Notice(text) => self.said.push(text),
                    Effect::AllEnded => self.ended += 1,
                    Effect::StoreFigures { .. } => {}
                }
            }
        }
        (assigned, answer)
    }

    /// Time passes; every agent reports and follows.
    fn pass(&mut self, millis: Millis) {
        self.now += millis;
        let _ = self.apply(Event::Tick);
        for _ in 0..2 {
            for name in self.agents.keys().cloned().collect::<Vec<_>>() {
                self.report(&name);
            }
        }
    }

    fn report(&mut self, name: &str) {
        self.requests += 1;
        let (request, report) = (self.requests, self.agents[name].clone());
        let (assignment, refused) = self.apply(Event::Report { request, report });
        refused.expect("is heard");
        let children = assignment.orders.iter().map(|order| Child {
            stage: order.stage.clone(),
            role: order.role,
            slot: order.slot,
            attempt: order.attempt,
            ..Default::default()
        });
        self.agents.get_mut(name).expect("is there").children = children.collect();
    }

    /// The process of this role says how it ended, before its agent is told anything else.
    fn ends(&mut self, stage: &str, role: ChildRole, state: ChildState) {
        let all = self
            .agents
            .values_mut()
            .flat_map(|agent| &mut agent.children);
        let mut of_role = all.filter(|c| c.stage == stage && c.role() == role);
        let child = of_role.next().expect("it runs");
        child.state = state.into();
        child.words = "words".into();
        drop(of_role);
        self.pass(0);
    }

    /// State and workers of a stage.
    fn state(&self, stage: &str) -> (String, u32) {
        let status = self.core.status(self.now);
        let mut stages = status.stages.into_iter();
        let stage = stages.find(|s| s.name == stage).expect("is queued");
        (stage.state, stage.workers)
    }

    fn is(&self, stage: &str, state: &str, workers: u32) {
        assert_eq!(self.state(stage), (state.to_owned(), workers), "{stage}");
    }

    /// A scheduler of the next term, which knows the journal alone.
    fn killed(&mut self) {
        let settings = Settings {
            term: 2,
            ..settings()
        };
        self.core = Scheduler::new(self.now, settings, self.journal.clone());
    }
}

#[test]
fn stages_run_in_their_order_and_share_the_workers() {
    let stages = vec![stage("a", &[]), stage("b", &["a"]), stage("c", &["a"])];
    let mut world = World::new(stages, &[("host", 3)]);
    world.is("a", "running", 3);
    world.is("b", "waiting", 0);
    let coordinators = |world: &World| {
        let children = world.agents["host"].children.iter();
        children
            .filter(|c| c.role() == ChildRole::Coordinator)
            .count()
    };
    assert_eq!(coordinators(&world), 1);
    world.ends("a", ChildRole::Coordinator, ChildState::Ended);
    world.is("a", "done", 0);
    world.is("b", "running", 2);
    world.is("c", "running", 1);
    assert_eq!(coordinators(&world), 2);
    world.ends("b", ChildRole::Coordinator, ChildState::Ended);
    world.is("c", "running", 3);
    assert_eq!(world.ended, 0);
    world.ends("c", ChildRole::Coordinator, ChildState::Ended);
    assert_eq!(world.ended, 1, "said once");
    world.pass(SECOND);
    assert_eq!(world.ended, 1);
}

#[test]
fn a_failure_is_tried_again_and_takes_along_what_comes_after_it() {
    let stages = vec![
        stage("a", &[]),
        stage("b", &["a"]),
        stage("c", &["b"]),
        stage("d", &[]),
    ];
    let mut world = World::new(stages, &[("host", 2)]);
    world.ends("a", ChildRole::Coordinator, ChildState::GaveUp);
    assert_eq!(world.state("a").0, "ready", "{:?}", world.said);
    world.is("d", "running", 2);
    world.pass(SECOND);
    world.is("a", "running", 1);
    // What the first try still says is nobody's word.
    let mut old = world.agents["host"].clone();
    for child in &mut old.children {
        child.attempt = 0;
        child.state = ChildState::GaveUp.into();
    }
    let kept = std::mem::replace(world.agents.get_mut("host").expect("is there"), old);
    world
        .agents
        .get_mut("host")
        .expect("is there")
        .children
        .retain(|c| c.stage == "a");
    world.report("host");
    world.is("a", "running", 1);
    world.agents.insert("host".into(), kept);
    world.ends("a", ChildRole::Coordinator, ChildState::GaveUp);
    for stage in ["a", "b", "c"] {
        world.is(stage, "failed", 0);
    }
    world.is("d", "running", 2);
    let status = world.core.status(world.now);
    assert_eq!(status.stages[1].why, "`a`, which it comes after, failed");
    world.ends("d", ChildRole::Coordinator, ChildState::Ended);
    assert_eq!(world.ended, 1);
    let _ = world.apply(Event::Revive);
    world.pass(0);
    world.is("a", "running", 2);
    world.is("b", "waiting", 0);
    world.is("d", "done", 0);
}

#[test]
fn one_worker_that_gives_up_is_no_failure_and_all_are() {
    let mut world = World::new(vec![stage("a", &[])], &[("host", 2)]);
    world.ends("a", ChildRole::Worker, ChildState::GaveUp);
    world.is("a", "running", 2);
    let host = world.agents.get_mut("host").expect("is there");
    for child in &mut host.children {
        if child.role() == ChildRole::Worker {
            child.state = ChildState::GaveUp.into();
            child.words = "no device".into();
        }
    }
    world.report("host");
    let status = world.core.status(world.now);
    assert_eq!(status.stages[0].failures, 1);
    assert!(
        status.stages[0]
            .why
            .contains("every worker gave up: no device"),
        "{status:?}"
    );
}

#[test]
fn a_killed_scheduler_is_followed_without_a_worker_moving() {
    let mut first = stage("a", &[]);
    first.preferred_workers = 2;
    let mut world = World::new(vec![first, stage("b", &[])], &[("one", 2), ("two", 2)]);
    world.is("a", "running", 2);
    world.is("b", "running", 2);
    let before: Vec<_> = world.agents.values().map(|a| a.children.clone()).collect();
    world.killed();
    // Only one agent is back: nothing is given to others yet.
    world.report("one");
    world.pass(SECOND);
    let after: Vec<_> = world.agents.values().map(|a| a.children.clone()).collect();
    assert_eq!(before, after);
    world.ends("a", ChildRole::Coordinator, ChildState::Ended);
    world.is("a", "done", 0);
    world.is("b", "running", 4);
}

#[test]
fn an_agent_that_falls_silent_is_counted_out_and_one_that_starts_again_is_not() {
    let mut world = World::new(vec![stage("a", &[])], &[("one", 2), ("two", 1)]);
    world.is("a", "running", 3);
    let one = world.agents.remove("one").expect("is there");
    world.pass(9 * SECOND);
    world.is("a", "running", 3);
    world.pass(2 * SECOND);
    world.is("a", "running", 1);
    let leads = |world: &World| {
        let mut children = world.agents["two"].children.iter();
        children.any(|c| c.role() == ChildRole::Coordinator)
    };
    assert!(leads(&world), "its coordinator moved");
    let again = v1::AgentReport {
        incarnation: 2,
        children: Vec::new(),
        ..one.clone()
    };
    world.agents.insert("one".into(), again);
    world.pass(SECOND);
    world.is("a", "running", 3);
    let ids = |world: &mut World, name: &str| {
        let report = world.agents[name].clone();
        let (assignment, _) = world.apply(Event::Report { request: 0, report });
        let orders = assignment
            .orders
            .iter()
            .filter(|o| o.role() == ChildRole::Worker);
        orders.map(|o| o.worker_id).collect::<Vec<_>>()
    };
    assert_eq!(ids(&mut world, "one"), [0, 1], "ids last");
    assert_eq!(ids(&mut world, "two"), [u64::from(SLOTS_MAX)]);
    let old = Event::Report {
        request: 0,
        report: one,
    };
    let told = world.apply(old).1.expect_err("another began later");
    assert!(told.contains("another agent is called `one`"), "{told}");
}

#[test]
fn a_higher_priority_takes_workers_and_gives_them_back() {
    let mut world = World::new(vec![stage("a", &[])], &[("host", 3)]);
    let mut urgent = stage("b", &[]);
    (
        urgent.priority,
        urgent.min_workers,
        urgent.preferred_workers,
    ) = (5, 2, 2);
    world.submit(vec![urgent]).expect("is taken");
    world.pass(0);
    world.is("a", "running", 1);
    world.is("b", "running", 2);
    let mut whole = stage("c", &[]);
    (whole.priority, whole.min_workers) = (9, 3);
    world.submit(vec![whole]).expect("is taken");
    world.pass(0);
    world.is("a", "ready", 0);
    world.is("c", "running", 3);
    world.ends("c", ChildRole::Coordinator, ChildState::Ended);
    world.is("b", "running", 2);
    world.is("a", "running", 1);
}

#[test]
fn what_is_asked_is_refused_by_name_or_done() {
    let mut world = World::new(vec![stage("a", &[]), stage("b", &["a"])], &[("host", 1)]);
    let told = world
        .submit(vec![stage("c", &[]), stage("a", &[])])
        .expect_err("is there");
    assert!(
        told.contains("a stage `a` is in the queue already"),
        "{told}"
    );
    assert_eq!(world.core.queue().stages.len(), 2, "all of a plan or none");
    let cancel = |world: &mut World, stage: &str| {
        let stage = stage.to_owned();
        world.apply(Event::Cancel { request: 0, stage }).1
    };
    let told = cancel(&mut world, "x").expect_err("is not there");
    assert!(
        told.contains("no stage is called `x`; there are a, b"),
        "{told}"
    );
    cancel(&mut world, "a").expect("is cancelled");
    cancel(&mut world, "a").expect("again harms nothing");
    world.pass(0);
    world.is("a", "cancelled", 0);
    world.is("b", "cancelled", 0);
    assert!(
        world.agents["host"].children.is_empty(),
        "its processes leave"
    );
    assert_eq!(world.ended, 1);
    let nobody = v1::AgentReport {
        agent: "big".into(),
        slots: SLOTS_MAX + 1,
        ..Default::default()
    };
    let told = world
        .apply(Event::Report {
            request: 0,
            report: nobody,
        })
        .1;
    assert!(told.expect_err("too many").contains("--slots 65"));
}

#[test]
fn an_evaluation_takes_one_worker_and_leaves_its_figures() {
    let mut eval = stage("e", &["a"]);
    (eval.preferred_workers, eval.work) = (
        1,
        Work::Eval {
            of: "a".into(),
            data: None,
            best: None,
            set: Vec::new(),
        },
    );
    let mut world = World::new(vec![stage("a", &[]), eval], &[("host", 2)]);
    world.ends("a", ChildRole::Coordinator, ChildState::Ended);
    world.is("e", "running", 1);
    assert_eq!(
        world.agents["host"].children.len(),
        1,
        "it has no coordinator"
    );
    world.ends("e", ChildRole::Evaluation, ChildState::Ended);
    world.is("e", "done", 0);
}
