//! One child process of a launcher: started, looked after, started again by what its end meant. It
//! refuses to know what the child does.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::{ASIDE, FATAL};

/// Deaths of one child in a row, each soon after its start, before it is given up.
pub const QUICK_DEATHS_MAX: u32 = 20;
/// A child that lived for so long was well; it is started again at once.
const WELL: Duration = Duration::from_secs(2);
/// Pause before a child that was not well is started again, so that a crash at start does not spin.
const RESTART_PAUSE: Duration = Duration::from_millis(200);
/// Pause before a child that left by itself is started again.
pub const LEFT_PAUSE: Duration = Duration::from_secs(5);

/// A child that is to run: it does, or it is about to.
pub struct Child {
    process: Option<std::process::Child>,
    /// Times that it was started again.
    pub restarts: u32,
    /// Its last word was an error of its own.
    pub gave_up: bool,
    quick_deaths: u32,
    started: Instant,
    again: Instant,
    /// Its largest resident size, over restarts.
    pub peak_memory_bytes: u64,
}

/// What a look at a child finds.
#[derive(Debug)]
pub enum Fate {
    /// It runs.
    Lives,
    /// It ended before, and its pause is not over.
    Waits,
    /// It is to be started.
    Due,
    /// It ended well just now.
    Left,
    /// It ended just now by an error that starting again does not mend.
    GaveUp,
    /// It ended just now because another goes on, or may.
    Aside,
    /// It died just now.
    Died(ExitStatus),
    /// It died just now, and so often before that starting it again is of no use.
    TooOften,
}

impl Child {
    /// A child that is to be started at once.
    pub fn new() -> Self {
        Child {
            process: None,
            restarts: 0,
            gave_up: false,
            quick_deaths: 0,
            started: Instant::now(),
            again: Instant::now(),
            peak_memory_bytes: 0,
        }
    }

    /// Its process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(std::process::Child::id)
    }

    /// Starts this binary with `arguments`; what it prints goes to `NAME.out`, or with what it says
    /// to `NAME.log` in `logs`.
    pub fn start(
        &mut self,
        (logs, name): (&Path, &str),
        arguments: &[OsString],
        threads: usize,
        prints: bool,
    ) -> anyhow::Result<()> {
        let opened = File::options()
            .create(true)
            .append(true)
            .open(logs.join(format!("{name}.log")));
        let log = opened.with_context(|| format!("cannot write {}", logs.display()))?;
        let printed = match prints {
            true => File::create(logs.join(format!("{name}.out")))
                .with_context(|| format!("cannot write {}", logs.display()))?,
            false => log.try_clone()?,
        };
        let mut command = Command::new(std::env::current_exe()?);
        if std::env::var_os("RAYON_NUM_THREADS").is_none() {
            command.env("RAYON_NUM_THREADS", threads.max(1).to_string());
        }
        let process = command
            .args(arguments)
            // The resolved file already holds what the environment said.
            .env_remove("BELFRY_SET")
            // A ctrl-c at the terminal is for the launcher, which ends its children in good order.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(printed)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        self.process = Some(process);
        self.started = Instant::now();
        Ok(())
    }

    /// Looks after it: what became of it since the last look.
    pub fn look(&mut self) -> anyhow::Result<Fate> {
        let Some(process) = &mut self.process else {
            return Ok(if self.is_due() {
                Fate::Due
            } else {
                Fate::Waits
            });
        };
        if let Some(peak) = peak_memory(process.id()) {
            self.peak_memory_bytes = self.peak_memory_bytes.max(peak);
        }
        let Some(status) = process.try_wait()? else {
            self.gave_up &= self.started.elapsed() < WELL;
            return Ok(Fate::Lives);
        };
        self.process = None;
        self.again = Instant::now();
        if status.success() {
            self.again += LEFT_PAUSE;
            return Ok(Fate::Left);
        }
        self.restarts += 1;
        self.gave_up = status.code() == Some(i32::from(FATAL));
        if !self.gave_up && self.started.elapsed() >= WELL {
            self.quick_deaths = 0;
        } else {
            self.again += if self.gave_up {
                LEFT_PAUSE
            } else {
                RESTART_PAUSE
            };
            self.quick_deaths += 1;
        }
        Ok(if self.quick_deaths > QUICK_DEATHS_MAX {
            Fate::TooOften
        } else if self.gave_up {
            Fate::GaveUp
        } else if status.code() == Some(i32::from(ASIDE)) {
            Fate::Aside
        } else {
            Fate::Died(status)
        })
    }

    /// Whether it does not run and may be started.
    pub fn is_due(&self) -> bool {
        self.process.is_none() && Instant::now() >= self.again
    }

    /// Asks it to end in good order: a closed standard input is the sign to go.
    pub fn ask_to_end(&mut self) {
        if let Some(process) = &mut self.process {
            drop(process.stdin.take());
        }
    }

    /// Whether no process is left of it.
    pub fn is_gone(&mut self) -> bool {
        let Some(process) = &mut self.process else {
            return true;
        };
        matches!(process.try_wait(), Ok(Some(_)))
    }

    /// Ends it now.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Lets children end within `grace`, then ends them.
pub async fn end_all<'a>(children: impl Iterator<Item = &'a mut Child>, grace: Duration) {
    let mut children: Vec<&mut Child> = children.collect();
    for child in &mut children {
        child.ask_to_end();
    }
    let deadline = Instant::now() + grace;
    while !children.iter_mut().all(|c| c.is_gone()) && Instant::now() <= deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for child in children {
        child.kill();
    }
}

/// Threads that each of `processes` may use of this machine.
pub fn threads_of(processes: u32) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    cores / processes.max(1) as usize
}

/// The error line that a child left in its log.
pub fn last_words(logs: &Path, name: &str) -> String {
    let file = logs.join(format!("{name}.log"));
    let text = std::fs::read_to_string(&file).unwrap_or_default();
    let told = text
        .lines()
        .rev()
        .find_map(|line| line.strip_prefix("error: "));
    told.map_or_else(|| format!("see {}", file.display()), str::to_owned)
}

/// Largest resident size of a living process, where the system tells it.
fn peak_memory(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}
