//! An agent's processes: those that are ordered run, those that are not any more leave. Each place
//! for a worker holds one at a time.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use belfry_configs::load_str;
use belfry_proto::v1::{self, ChildRole, ChildState, Order};
use shard_tools::store::Root;

use super::command::{self, Host};
use super::place::stage_root;
use super::watched::{Watched, complete};
use crate::files::replace;
use crate::run::child::{self, Child, Fate, QUICK_DEATHS_MAX};
use crate::run::prepare::RUN_FILE;

/// A worker that leaves finishes its step; a step may take as long as this.
const LEAVE_GRACE: Duration = Duration::from_secs(120);
/// Longest wait for a stage's run file; it is tried again.
const READ_PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of an evaluation's result that are passed on.
const FIGURES_BYTES_MAX: usize = 64 << 10;

/// One process.
struct Task {
    order: Order,
    child: Child,
    state: ChildState,
    words: String,
    /// Since when it is not wanted any more.
    leaving: Option<Instant>,
    watched: Option<Watched>,
    started: bool,
}

impl Task {
    fn name(&self) -> String {
        command::name(&self.order)
    }

    fn is(&self, order: &Order) -> bool {
        let own = &self.order;
        (&own.stage, own.role, own.slot, own.attempt)
            == (&order.stage, order.role, order.slot, order.attempt)
    }

    /// Whether both cannot be at once.
    fn excludes(&self, order: &Order) -> bool {
        let leads = |role: ChildRole| role == ChildRole::Coordinator;
        match (leads(self.order.role()), leads(order.role())) {
            (true, true) => self.order.stage == order.stage,
            (false, false) => self.order.slot == order.slot,
            _ => false,
        }
    }

    /// An error ended it; it is not started again for this order.
    fn is_over(&self) -> bool {
        self.state != ChildState::Running && self.order.role() != ChildRole::Worker
    }
}

/// All processes of an agent.
pub struct Tasks {
    local: PathBuf,
    bind: std::net::IpAddr,
    slots: u32,
    root: String,
    tasks: Vec<Task>,
    orders: Vec<Order>,
}

impl Tasks {
    /// An agent's processes: none yet.
    pub fn new(local: PathBuf, bind: std::net::IpAddr, slots: u32) -> Self {
        Tasks {
            local,
            bind,
            slots,
            root: String::new(),
            tasks: Vec::new(),
            orders: Vec::new(),
        }
    }

    fn host(&self) -> Host<'_> {
        Host {
            root: &self.root,
            local: &self.local,
            bind: self.bind,
        }
    }

    /// Takes what should run from now on.
    pub fn follow(&mut self, assignment: v1::Assignment) {
        self.root = assignment.root;
        self.orders = assignment.orders;
        for task in &mut self.tasks {
            if task.leaving.is_none() && !self.orders.iter().any(|order| task.is(order)) {
                tracing::info!(stage = task.order.stage, "{} leaves", task.name());
                task.leaving = Some(Instant::now());
                task.child.ask_to_end();
            }
        }
    }

    /// Starts what is ordered and not there, and again what died; returns whether something changed
    /// that the scheduler should hear at once.
    pub async fn tend(&mut self) -> anyhow::Result<bool> {
        let mut changed = self.let_go();
        for order in self.orders.clone() {
            let there = self.tasks.iter().any(|task| task.excludes(&order));
            // An evaluation whose command line is not known yet waits for the next answer.
            let lacks = order.role() == ChildRole::Evaluation && order.arguments.is_empty();
            if !there && !lacks {
                self.tasks.push(Task {
                    order,
                    child: Child::new(),
                    state: ChildState::Running,
                    words: String::new(),
                    leaving: None,
                    watched: None,
                    started: false,
                });
            }
        }
        let mut started = false;
        for index in 0..self.tasks.len() {
            if self.tasks[index].leaving.is_some() || self.tasks[index].is_over() {
                continue;
            }
            let fate = self.tasks[index].child.look()?;
            changed |= !matches!(fate, Fate::Lives | Fate::Waits | Fate::Due);
            let due = matches!(fate, Fate::Due);
            if !due {
                self.judge(index, fate);
            }
            let task = &self.tasks[index];
            if !task.is_over() && task.child.is_due() {
                if let Err(error) = self.start(index).await {
                    let order = &self.tasks[index].order;
                    tracing::warn!(stage = order.stage, "cannot start it yet: {error:#}");
                    continue;
                }
                started = true;
            }
        }
        if started || changed {
            self.write_pids()?;
        }
        Ok(changed)
    }

    /// Forgets who has left; ends who takes too long.
    fn let_go(&mut self) -> bool {
        let before = self.tasks.len();
        self.tasks.retain_mut(|task| {
            let Some(since) = task.leaving else {
                return true;
            };
            if !task.child.is_gone() && since.elapsed() < LEAVE_GRACE {
                return true;
            }
            task.child.kill();
            false
        });
        self.tasks.len() < before
    }

    /// What the end of a process means.
    fn judge(&mut self, index: usize, fate: Fate) {
        let logs = self.host().logs(&self.tasks[index].order.stage);
        let root = stage_root(&self.root, &self.tasks[index].order.stage);
        let folder = self.host().folder(&self.tasks[index].order.stage);
        let task = &mut self.tasks[index];
        let (name, stage) = (task.name(), task.order.stage.clone());
        match fate {
            Fate::Waits | Fate::Due => {}
            Fate::Lives => {
                if task.state == ChildState::GaveUp && !task.child.gave_up {
                    task.state = ChildState::Running;
                }
            }
            Fate::Left => match task.order.role() {
                // Asked to leave, or told that the run is over, which is seen in a moment.
                ChildRole::Worker => {}
                ChildRole::Coordinator => {
                    task.state = ChildState::Ended;
                    task.watched = None;
                    tokio::spawn(complete(folder, root));
                }
                ChildRole::Evaluation => match printed(&logs, &name) {
                    Ok(line) => {
                        task.state = ChildState::Ended;
                        task.words = line;
                    }
                    Err(why) => {
                        task.state = ChildState::GaveUp;
                        task.words = why;
                    }
                },
            },
            Fate::GaveUp => {
                task.state = ChildState::GaveUp;
                task.words = format!("{name} gave up: {}", child::last_words(&logs, &name));
                tracing::warn!(stage, "{}", task.words);
            }
            Fate::TooOften => {
                task.state = ChildState::GaveUp;
                task.words = format!(
                    "{name} died {QUICK_DEATHS_MAX} times soon after its start; see {}",
                    logs.display()
                );
                tracing::warn!(stage, "{}", task.words);
            }
            Fate::Aside => tracing::info!(stage, "{name} stepped aside; starting it again"),
            Fate::Died(status) => {
                tracing::warn!(stage, "{name} died ({status}); starting it again");
            }
        }
    }

    async fn start(&mut self, index: usize) -> anyhow::Result<()> {
        let order = self.tasks[index].order.clone();
        let (stage, role) = (&order.stage, order.role());
        let logs = self.host().logs(stage);
        std::fs::create_dir_all(&logs)
            .with_context(|| format!("cannot make {}", logs.display()))?;
        let mut watched = None;
        if role != ChildRole::Evaluation {
            let silence = self.fetch_config(stage).await?;
            if role == ChildRole::Coordinator {
                let address_file = self.host().address_file(stage);
                // An address of an earlier start would only mislead.
                let _ = std::fs::remove_file(&address_file);
                let folder = self.host().folder(stage);
                watched = Some(Watched::open(address_file, folder, silence));
            }
        }
        let arguments = command::of(&self.host(), &order);
        let name = command::name(&order);
        let threads = child::threads_of(self.slots);
        let prints = role == ChildRole::Evaluation;
        let task = &mut self.tasks[index];
        task.child
            .start((&logs, &name), &arguments, threads, prints)?;
        if !std::mem::replace(&mut task.started, true) {
            tracing::info!(stage, "{name} begins");
        }
        if task.watched.is_none() {
            task.watched = watched;
        }
        Ok(())
    }

    /// The stage's resolved run file, on this host; returns its silence that counts as death.
    async fn fetch_config(&self, stage: &str) -> anyhow::Result<Duration> {
        let location = stage_root(&self.root, stage);
        let read = async { Root::existing(&location)?.get(RUN_FILE).await };
        let text = tokio::time::timeout(READ_PATIENCE, read).await;
        let text = text.with_context(|| format!("{location} does not answer"))??;
        let text = String::from_utf8(text.to_vec()).context(RUN_FILE)?;
        let config = load_str(&text, &format!("{location}/{RUN_FILE}"), &[])?;
        replace(&self.host().config(stage), &text)?;
        Ok(config.cluster.timeouts().silence)
    }

    /// `agent.pids.json`: who runs under which process id, for people and tests.
    fn write_pids(&self) -> anyhow::Result<()> {
        let children = self.tasks.iter().filter_map(|task| {
            Some(serde_json::json!({
                "stage": task.order.stage, "role": task.name(), "pid": task.child.pid()?,
                "restarts": task.child.restarts,
            }))
        });
        let text = serde_json::Value::Array(children.collect()).to_string();
        replace(&self.local.join("agent.pids.json"), &text)
    }

    /// What runs, for the scheduler.
    pub fn report(&self) -> Vec<v1::Child> {
        let wanted = self.tasks.iter().filter(|task| task.leaving.is_none());
        let told = wanted.map(|task| {
            let watched = task.watched.as_ref();
            let (step, steps_total) = watched.map_or((0, 0), Watched::progress);
            v1::Child {
                stage: task.order.stage.clone(),
                role: task.order.role,
                slot: task.order.slot,
                attempt: task.order.attempt,
                state: task.state.into(),
                words: task.words.clone(),
                step,
                steps_total,
            }
        });
        told.collect()
    }

    /// Lets everything end, then ends it.
    pub async fn stop(&mut self, grace: Duration) {
        child::end_all(self.tasks.iter_mut().map(|task| &mut task.child), grace).await;
    }
}

/// The last line that an evaluation printed: one JSON object.
fn printed(logs: &Path, name: &str) -> Result<String, String> {
    let file = logs.join(format!("{name}.out"));
    let text = std::fs::read_to_string(&file);
    let text = text.map_err(|e| format!("{}: {e}", file.display()))?;
    let line = text.lines().rev().find(|line| !line.trim().is_empty());
    let line = line.filter(|line| line.len() <= FIGURES_BYTES_MAX);
    let object = line.and_then(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    match (line, object) {
        (Some(line), Some(object)) if object["figures"].is_object() => Ok(line.to_owned()),
        _ => Err(format!(
            "{} does not end with a line of figures",
            file.display()
        )),
    }
}
