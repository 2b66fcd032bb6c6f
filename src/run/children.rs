//! The launcher's child processes: a run's coordinator and workers, started again when they die.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::bail;

use super::child::{self, Child, Fate, LEFT_PAUSE, QUICK_DEATHS_MAX};
use crate::files::replace;

/// Time that children get to end by themselves.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// What one child is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Coordinator,
    /// The second coordinator of a pair.
    Standby,
    Worker(u32),
}

impl Role {
    fn name(self) -> String {
        match self {
            Role::Coordinator => "coordinator".into(),
            Role::Standby => "standby".into(),
            Role::Worker(id) => format!("worker-{id}"),
        }
    }
}

/// All children of a run.
pub struct Children {
    config: PathBuf,
    root: String,
    local: PathBuf,
    workers: u32,
    /// Whether two coordinators stand by for each other.
    pair: bool,
    running: Vec<(Role, Child)>,
}

impl Children {
    /// Starts a coordinator, or a pair of them, and `workers` workers.
    pub fn start(
        config: &Path,
        root: &str,
        local: &Path,
        workers: u32,
        pair: bool,
    ) -> anyhow::Result<Self> {
        let coordinators = std::iter::once(Role::Coordinator).chain(pair.then_some(Role::Standby));
        let roles = coordinators.chain((0..workers).map(Role::Worker));
        let mut children = Children {
            config: config.to_owned(),
            root: root.to_owned(),
            local: local.to_owned(),
            workers,
            pair,
            running: roles.map(|role| (role, Child::new())).collect(),
        };
        // An address of an earlier start would only mislead.
        let _ = std::fs::remove_file(children.address_file());
        for index in 0..children.running.len() {
            children.spawn(index)?;
        }
        Ok(children)
    }

    /// Where the coordinator writes its address.
    pub fn address_file(&self) -> PathBuf {
        self.local.join("coordinator.address")
    }

    /// Children started again so far.
    pub fn restarts(&self) -> u32 {
        self.running.iter().map(|(_, child)| child.restarts).sum()
    }

    /// Sum of the children's largest resident sizes.
    pub fn peak_memory_bytes(&self) -> u64 {
        let peaks = self.running.iter().map(|(_, c)| c.peak_memory_bytes);
        peaks.sum()
    }

    fn logs(&self) -> PathBuf {
        self.local.join("logs")
    }

    fn spawn(&mut self, index: usize) -> anyhow::Result<()> {
        let role = self.running[index].0;
        let (name, logs) = (role.name(), self.logs());
        let mut arguments: Vec<OsString> = match role {
            Role::Coordinator | Role::Standby => {
                // Of one name over restarts: who is started again need not wait for its own lease.
                let workers = self.workers.to_string();
                let mut own = vec!["coordinator", "--name", &name, "--workers", &workers];
                own.extend(self.pair.then_some("--standby"));
                own.into_iter().map(OsString::from).collect()
            }
            Role::Worker(id) => {
                let cache = self.local.join("cache");
                let id = id.to_string();
                vec![
                    "worker".into(),
                    "--id".into(),
                    id.into(),
                    "--cache".into(),
                    cache.into(),
                ]
            }
        };
        arguments.extend([
            "--address-file".into(),
            self.address_file().into(),
            "--root".into(),
            OsString::from(&self.root),
            "--log".into(),
            logs.join(format!("{name}.jsonl")).into(),
            "--follow-stdin".into(),
            self.config.clone().into(),
        ]);
        let threads = child::threads_of(self.workers);
        let child = &mut self.running[index].1;
        child.start((&logs, &name), &arguments, threads, false)?;
        self.write_pids()
    }

    /// Who was well before is not waited for.
    fn spawn_if_due(&mut self, index: usize) -> anyhow::Result<()> {
        match self.running[index].1.is_due() {
            true => self.spawn(index),
            false => Ok(()),
        }
    }

    /// `run.pids.json`: who runs under which process id, for people and tests.
    fn write_pids(&self) -> anyhow::Result<()> {
        let children = self.running.iter().filter_map(|(role, child)| {
            let (pid, restarts) = (child.pid()?, child.restarts);
            Some(serde_json::json!({"role": role.name(), "pid": pid, "restarts": restarts}))
        });
        let text = serde_json::Value::Array(children.collect()).to_string();
        replace(&self.local.join("run.pids.json"), &text)
    }

    /// Starts again what died; gives up on what cannot be mended. Returns whether the coordinator
    /// has ended the run well.
    pub fn tend(&mut self) -> anyhow::Result<bool> {
        for index in 0..self.running.len() {
            let role = self.running[index].0;
            let name = role.name();
            match self.running[index].1.look()? {
                Fate::Lives | Fate::Waits => {}
                Fate::Due => self.spawn(index)?,
                // A worker was asked to leave, or told that the run is over, which is seen in a
                // moment.
                Fate::Left if matches!(role, Role::Worker(_)) => {}
                Fate::Left => return Ok(true),
                Fate::GaveUp => {
                    let words = child::last_words(&self.logs(), &name);
                    if !matches!(role, Role::Worker(_)) || !self.somebody_works() {
                        bail!("{name} gave up: {words}");
                    }
                    let pause = LEFT_PAUSE.as_secs();
                    eprintln!("{name} gave up: {words}");
                    eprintln!("the others go on without {name}; starting it again in {pause} s");
                }
                Fate::Aside => {
                    let words = child::last_words(&self.logs(), &name);
                    eprintln!("{name} stepped aside ({words}); starting it again");
                    self.spawn_if_due(index)?;
                }
                Fate::Died(status) => {
                    eprintln!("{name} died ({status}); starting it again");
                    self.spawn_if_due(index)?;
                }
                Fate::TooOften => bail!(
                    "{name} died {QUICK_DEATHS_MAX} times soon after its start; see {}",
                    self.logs().display()
                ),
            }
        }
        Ok(false)
    }

    /// Whether a worker is left that has not given up.
    fn somebody_works(&self) -> bool {
        let mut workers = self.running.iter();
        workers.any(|(role, child)| matches!(role, Role::Worker(_)) && !child.gave_up)
    }

    /// Lets children end, then ends them.
    pub async fn stop(&mut self) {
        child::end_all(self.running.iter_mut().map(|(_, child)| child), STOP_GRACE).await;
    }
}
