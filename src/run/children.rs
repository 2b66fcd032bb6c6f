//! The launcher's child processes: started, started again, ended.

use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use crate::files::replace;

/// Deaths of one child in a row, each soon after its start, before the run is given up.
const QUICK_DEATHS_MAX: u32 = 20;
/// A child that lived for so long was well; it is started again at once.
const WELL: Duration = Duration::from_secs(2);
/// Pause before a child that was not well is started again, so that a crash at start does not spin.
const RESTART_PAUSE: Duration = Duration::from_millis(200);
/// Pause before a worker that left by itself is started again.
const LEFT_PAUSE: Duration = Duration::from_secs(5);
/// Time that children get to end by themselves.
const STOP_GRACE: Duration = Duration::from_secs(5);
/// Exit code of an error that starting again does not mend.
const FATAL: i32 = 2;
/// Exit code of a coordinator that another one succeeded, or that was asked to stop.
const ASIDE: i32 = 3;

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

struct Running {
    role: Role,
    child: Option<Child>,
    restarts: u32,
    /// Its last word was an error of its own.
    gave_up: bool,
    quick_deaths: u32,
    started: Instant,
    /// Not before this time is it started again.
    again: Instant,
    peak_memory_bytes: u64,
}

/// All children of a run.
pub struct Children {
    config: PathBuf,
    root: String,
    local: PathBuf,
    workers: u32,
    /// Whether two coordinators stand by for each other.
    pair: bool,
    running: Vec<Running>,
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
        let running = roles.map(|role| Running {
            role,
            child: None,
            restarts: 0,
            gave_up: false,
            quick_deaths: 0,
            started: Instant::now(),
            again: Instant::now(),
            peak_memory_bytes: 0,
        });
        let mut children = Children {
            config: config.to_owned(),
            root: root.to_owned(),
            local: local.to_owned(),
            workers,
            pair,
            running: running.collect(),
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
        self.running.iter().map(|r| r.restarts).sum()
    }

    /// Sum of the children's largest resident sizes.
    pub fn peak_memory_bytes(&self) -> u64 {
        self.running.iter().map(|r| r.peak_memory_bytes).sum()
    }

    fn spawn(&mut self, index: usize) -> anyhow::Result<()> {
        let role = self.running[index].role;
        let name = role.name();
        let logs = self.local.join("logs");
        let opened = File::options()
            .create(true)
            .append(true)
            .open(logs.join(format!("{name}.log")));
        let log = opened.with_context(|| format!("cannot write {}", logs.display()))?;
        let mut command = Command::new(std::env::current_exe()?);
        match role {
            Role::Coordinator | Role::Standby => {
                // Of one name over restarts: who is started again need not wait for its own lease.
                let workers = self.workers.to_string();
                command.args(["coordinator", "--name", &name, "--workers", &workers]);
                command.args(self.pair.then_some("--standby"))
            }
            Role::Worker(id) => command
                .args(["worker", "--id", &id.to_string(), "--cache"])
                .arg(self.local.join("cache")),
        };
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        if std::env::var_os("RAYON_NUM_THREADS").is_none() {
            let threads = (cores / self.workers as usize).max(1);
            command.env("RAYON_NUM_THREADS", threads.to_string());
        }
        // The resolved file already holds what the environment said.
        command.env_remove("BELFRY_SET");
        let child = command
            .arg("--address-file")
            .arg(self.address_file())
            .arg("--root")
            .arg(&self.root)
            .arg("--log")
            .arg(logs.join(format!("{name}.jsonl")))
            .arg("--follow-stdin")
            .arg(&self.config)
            // A ctrl-c at the terminal is for the launcher, which ends its children in good order.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        self.running[index].child = Some(child);
        self.running[index].started = Instant::now();
        self.write_pids()
    }

    /// `run.pids.json`: who runs under which process id, for people and tests.
    fn write_pids(&self) -> anyhow::Result<()> {
        let children = self.running.iter().filter_map(|r| {
            let pid = r.child.as_ref()?.id();
            Some(serde_json::json!({"role": r.role.name(), "pid": pid, "restarts": r.restarts}))
        });
        let text = serde_json::Value::Array(children.collect()).to_string();
        replace(&self.local.join("run.pids.json"), &text)
    }

    /// Starts again what died; gives up on what cannot be mended. Returns whether the coordinator
    /// has ended the run well.
    pub fn tend(&mut self) -> anyhow::Result<bool> {
        for index in 0..self.running.len() {
            let running = &mut self.running[index];
            let name = running.role.name();
            let Some(child) = &mut running.child else {
                if Instant::now() >= running.again {
                    self.spawn(index)?;
                }
                continue;
            };
            if let Some(peak) = peak_memory(child.id()) {
                running.peak_memory_bytes = running.peak_memory_bytes.max(peak);
            }
            let Some(status) = child.try_wait()? else {
                running.gave_up &= running.started.elapsed() < WELL;
                continue;
            };
            running.child = None;
            running.again = Instant::now();
            if status.success() {
                if matches!(running.role, Role::Coordinator | Role::Standby) {
                    return Ok(true);
                }
                // Asked to leave, or told that the run is over, which is seen in a moment.
                running.again += LEFT_PAUSE;
                continue;
            }
            let words = self.last_words(&name);
            let running = &mut self.running[index];
            running.gave_up = status.code() == Some(FATAL);
            if running.gave_up {
                let alone = matches!(running.role, Role::Worker(_)) && self.somebody_works();
                if !alone {
                    bail!("{name} gave up: {words}");
                }
            }
            let running = &mut self.running[index];
            running.restarts += 1;
            if running.gave_up {
                let pause = LEFT_PAUSE.as_secs();
                eprintln!("{name} gave up: {words}");
                eprintln!("the others go on without {name}; starting it again in {pause} s");
                running.again += LEFT_PAUSE;
            } else if status.code() == Some(ASIDE) {
                eprintln!("{name} stepped aside ({words}); starting it again");
            } else {
                eprintln!("{name} died ({status}); starting it again");
            }
            if !running.gave_up && running.started.elapsed() >= WELL {
                running.quick_deaths = 0;
                self.spawn(index)?;
                continue;
            }
            running.again += RESTART_PAUSE;
            running.quick_deaths += 1;
            if running.quick_deaths > QUICK_DEATHS_MAX {
                bail!(
                    "{name} died {QUICK_DEATHS_MAX} times soon after its start; see {}/logs",
                    self.local.display()
                );
            }
        }
        Ok(false)
    }

    /// Whether a worker is left that has not given up.
    fn somebody_works(&self) -> bool {
        let mut workers = self.running.iter();
        workers.any(|r| matches!(r.role, Role::Worker(_)) && !r.gave_up)
    }

    /// The error line that a child left in its log.
    fn last_words(&self, name: &str) -> String {
        let file = self.local.join("logs").join(format!("{name}.log"));
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        let told = text
            .lines()
            .rev()
            .find_map(|line| line.strip_prefix("error: "));
        told.map_or_else(|| format!("see {}", file.display()), str::to_owned)
    }

    /// Lets children end, then ends them.
    pub async fn stop(&mut self) {
        // A closed standard input is the sign to go.
        for child in self.running.iter_mut().filter_map(|r| r.child.as_mut()) {
            drop(child.stdin.take());
        }
        let deadline = Instant::now() + STOP_GRACE;
        loop {
            let mut alive = self.running.iter_mut().filter_map(|r| r.child.as_mut());
            if alive.all(|c| matches!(c.try_wait(), Ok(Some(_)))) || Instant::now() > deadline {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        for child in self.running.iter_mut().filter_map(|r| r.child.as_mut()) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        for child in self.running.iter_mut().filter_map(|r| r.child.as_mut()) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Largest resident size of a living process, where the system tells it.
fn peak_memory(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}
