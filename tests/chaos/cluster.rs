//! A run of the real binary: coordinators and workers as processes, each on a host of its own, and
//! started again when they die, as a scheduler of machines would. It knows no faults.
//!
//! What happens is known by the coordinator's events alone; waiting means waiting for an event, and
//! a run that does not get there in time says what it was waiting for and keeps its folder.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use belfry_proto::v1::{Reason, StepRecord};

use crate::network::{self, on};
use crate::watch::{Seen, Watch};

/// Everything here takes seconds; this is for a machine that is busy with something else.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often processes are looked after while no event comes.
const TEND_INTERVAL: Duration = Duration::from_millis(10);
/// A process that dies so often has another fault than the one under test.
const RESTARTS_MAX: u32 = 200;

/// The smallest run that has everything in it.
pub const TINY: &str = "configs/tiny.toml";

/// What a run is made of.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Workers at the start; named `worker-0` and so on.
    pub workers: u32,
    /// The run file.
    pub config: &'static str,
    /// Overrides of it, `key=value`.
    pub settings: Vec<String>,
    /// More arguments of one worker's first process.
    pub injected: Option<(u32, String)>,
    /// Environment of one process by its name, of all by `*`.
    pub environment: Vec<(String, String, String)>,
    /// The run's root, where it is not a folder of the cluster's own. A store brings the run file.
    pub root: Option<String>,
    /// Workers whose shard cache lies elsewhere.
    pub caches: Vec<(u32, PathBuf)>,
}

impl Setup {
    pub fn new(workers: u32, settings: &[&str]) -> Self {
        Setup {
            workers,
            config: TINY,
            settings: settings.iter().map(|s| (*s).to_owned()).collect(),
            injected: None,
            environment: Vec::new(),
            root: None,
            caches: Vec::new(),
        }
    }
}

struct Process {
    child: Option<Child>,
    starts: u32,
    /// Whether it is started again when it dies.
    tended: bool,
    /// It ended by itself and well.
    done: bool,
}

/// The hashes that a run ends with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hashes {
    pub parameters: String,
    pub optimizer: String,
}

/// A run under way.
pub struct Cluster {
    setup: Setup,
    pub folder: PathBuf,
    pub root: String,
    watch: Watch,
    processes: BTreeMap<String, Process>,
    /// Everything heard, in order; what lies before `cursor` was waited for.
    pub seen: Vec<Seen>,
    records: BTreeMap<u64, StepRecord>,
    hashes: Option<Hashes>,
    failed: Option<String>,
    pub recomputed: u64,
    pub restarts: u64,
}

impl Cluster {
    /// Starts a coordinator and the workers.
    pub fn start(setup: Setup) -> Self {
        let folder = tempfile::Builder::new().prefix("belfry-chaos-").tempdir();
        let folder = folder.expect("a folder").keep();
        let root = folder.join("run").display().to_string();
        let root = setup.root.clone().unwrap_or(root);
        fs::create_dir_all(folder.join("logs")).expect("is made");
        let text = resolved(setup.config, &setup.settings);
        if !root.contains("://") {
            fs::create_dir_all(&root).expect("is made");
            fs::write(Path::new(&root).join("run.toml"), &text).expect("is written");
        }
        fs::write(folder.join("run.toml"), text).expect("is written");
        let watch = Watch::new(folder.join("address"));
        let workers = setup.workers;
        let mut cluster = Cluster {
            setup,
            folder,
            root,
            watch,
            processes: BTreeMap::new(),
            seen: Vec::new(),
            records: BTreeMap::new(),
            hashes: None,
            failed: None,
            recomputed: 0,
            restarts: 0,
        };
        cluster.spawn("coordinator");
        for id in 0..workers {
            cluster.spawn(&format!("worker-{id}"));
        }
        cluster
    }

    /// Starts the process `name` on the host of its name.
    pub fn spawn(&mut self, name: &str) {
        let process = self.processes.entry(name.to_owned()).or_insert(Process {
            child: None,
            starts: 0,
            tended: true,
            done: false,
        });
        assert!(process.child.is_none(), "{name} runs already");
        let logs = self.folder.join("logs");
        let mut options = File::options();
        let log = options
            .create(true)
            .append(true)
            .open(logs.join(format!("{name}.log")));
        let log = log.expect("is opened");
        let address = network::address(name);
        let mut command = on(name, env!("CARGO_BIN_EXE_belfry"));
        command.current_dir(env!("CARGO_MANIFEST_DIR"));
        match name.strip_prefix("worker-") {
            Some(id) => {
                command.args([
                    "worker",
                    "--id",
                    id,
                    "--bind",
                    &address.to_string(),
                    "--cache",
                ]);
                let mut caches = self.setup.caches.iter();
                let elsewhere = caches.find(|(whose, _)| whose.to_string() == id);
                let own = self.folder.join(format!("cache-{id}"));
                command.arg(elsewhere.map_or(&own, |(_, cache)| cache));
                let injected = self.setup.injected.as_ref();
                // A fault of the first process; its successor has other memory.
                if let Some((_, fault)) = injected.filter(|(whom, _)| whom.to_string() == id)
                    && process.starts == 0
                {
                    command.args(["--inject", fault]);
                }
            }
            None => {
                command.args(["coordinator", "--listen", &format!("{address}:0")]);
                command.args(["--workers", &self.setup.workers.to_string()]);
            }
        }
        let environment = self
            .setup
            .environment
            .iter()
            .filter(|(who, ..)| who == name || who == "*");
        command.envs(environment.map(|(_, key, value)| (key, value)));
        let child = command
            .arg("--address-file")
            .arg(self.folder.join("address"))
            .args(["--root", &self.root, "--log"])
            .arg(logs.join(format!("{name}.jsonl")))
            .arg(self.folder.join("run.toml"))
            .env("RAYON_NUM_THREADS", "1")
            .env_remove("BELFRY_SET")
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("is duplicated"))
            .stderr(log)
            .spawn();
        process.child = Some(child.expect("the binary starts"));
        process.starts += 1;
        process.done = false;
    }

    /// Process id of `name`, which runs.
    pub fn pid(&self, name: &str) -> u32 {
        let child = self.processes[name].child.as_ref();
        child.unwrap_or_else(|| panic!("{name} does not run")).id()
    }

    /// Whether `name` is started again when it dies.
    pub fn tended(&mut self, name: &str, tended: bool) {
        self.processes.get_mut(name).expect("is known").tended = tended;
    }

    /// Waits until `name` has ended; how.
    pub fn ended(&mut self, name: &str) -> std::process::ExitStatus {
        let process = self.processes.get_mut(name).expect("is known");
        let mut child = process.child.take().expect("runs");
        let begun = Instant::now();
        loop {
            if let Some(status) = child.try_wait().expect("is ours") {
                self.processes.get_mut(name).expect("is known").done = status.success();
                return status;
            }
            let waited = begun.elapsed();
            if waited > PATIENCE {
                let _ = child.kill();
                self.give_up(&format!("{name} ends"));
            }
            self.listen(|_| false);
        }
    }

    /// Starts again whatever died.
    fn tend(&mut self) {
        let mut died = Vec::new();
        for (name, process) in &mut self.processes {
            let Some(child) = &mut process.child else {
                continue;
            };
            let Some(status) = child.try_wait().expect("is ours") else {
                continue;
            };
            process.child = None;
            process.done = status.success();
            if !status.success() && process.tended {
                assert!(process.starts < RESTARTS_MAX, "{name} dies again and again");
                died.push(name.clone());
            }
        }
        for name in died {
            self.restarts += 1;
            self.spawn(&name);
        }
    }

    /// Takes in the next event, or looks after the processes; returns the event if it is the one.
    fn listen(&mut self, wanted: impl Fn(&Seen) -> bool) -> Option<Seen> {
        self.tend();
        let seen = match self.watch.events.recv_timeout(TEND_INTERVAL) {
            Ok(seen) => seen,
            Err(RecvTimeoutError::Timeout) => return None,
            Err(RecvTimeoutError::Disconnected) => panic!("the watcher is gone"),
        };
        self.take(&seen);
        let hit = wanted(&seen).then(|| seen.clone());
        self.seen.push(seen);
        hit
    }

    fn take(&mut self, seen: &Seen) {
        let event = &seen.event;
        if let Some(record) = &event.committed {
            // A step is committed once, or again to the very same bits.
            match self.records.get(&record.step) {
                Some(before) => {
                    assert_eq!(before, record, "step {} has two pasts", record.step);
                    self.recomputed += 1;
                }
                None => drop(self.records.insert(record.step, record.clone())),
            }
        }
        if let Some(exported) = &event.exported {
            self.hashes = Some(Hashes {
                parameters: exported.parameters_sha256.clone(),
                optimizer: exported.optimizer_sha256.clone(),
            });
        }
        if event.phase == "failed" {
            self.failed = Some(event.notice.clone());
        }
    }

    /// Waits for an event that comes from now on.
    pub fn until(&mut self, what: &str, wanted: impl Fn(&Seen) -> bool) -> Seen {
        self.within(PATIENCE, &wanted)
            .unwrap_or_else(|| self.give_up(what))
    }

    /// Waits for an event for so long.
    pub fn within(&mut self, time: Duration, wanted: &dyn Fn(&Seen) -> bool) -> Option<Seen> {
        let begun = Instant::now();
        while begun.elapsed() < time {
            let hit = self.listen(wanted);
            if hit.is_some() {
                return hit;
            }
            if let Some(why) = &self.failed {
                panic!("the run failed: {why}; see {}", self.folder.display());
            }
        }
        None
    }

    /// Waits until `steps` steps are committed; when the last of them was heard of.
    pub fn committed(&mut self, steps: u64) -> Instant {
        let earlier = self.seen.iter().rev();
        let mut commits = earlier.filter(|s| s.event.committed.is_some());
        if let Some(seen) = commits.next().filter(|s| s.event.step >= steps) {
            return seen.at;
        }
        let hit = |seen: &Seen| seen.event.committed.is_some() && seen.event.step >= steps;
        self.until(&format!("step {steps} is committed"), hit).at
    }

    /// Waits for the next commit; when it was heard of.
    pub fn next_commit(&mut self) -> Instant {
        self.until("a commit", |seen| seen.event.committed.is_some())
            .at
    }

    /// The first commit behind `since`; when it was heard of.
    pub fn commit_since(&mut self, since: Instant) -> Instant {
        let mut commits = self.seen.iter().filter(|s| s.event.committed.is_some());
        if let Some(seen) = commits.find(|seen| seen.at >= since) {
            return seen.at;
        }
        self.next_commit()
    }

    /// Waits for a notice with one of these reasons about `worker` that comes behind `since`; when
    /// it was heard of.
    pub fn noticed(&mut self, since: Instant, worker: u64, reasons: &[Reason]) -> Instant {
        let hit = |seen: &Seen| {
            let event = &seen.event;
            seen.at >= since && event.worker_id == Some(worker) && reasons.contains(&event.reason())
        };
        if let Some(before) = self.seen.iter().find(|seen| hit(seen)) {
            return before.at;
        }
        self.until(&format!("{reasons:?} about worker {worker}"), hit)
            .at
    }

    /// Commits heard so far.
    pub fn steps(&self) -> u64 {
        self.records.len() as u64
    }

    /// The highest generation heard of.
    pub fn generation(&self) -> u64 {
        self.seen
            .iter()
            .map(|s| s.event.generation)
            .max()
            .unwrap_or(0)
    }

    /// Times between commits that were heard live, from `from` on.
    pub fn step_times(&self, from: Instant) -> Vec<Duration> {
        let commits = self
            .seen
            .iter()
            .filter(|s| s.event.committed.is_some() && s.at >= from);
        let at: Vec<Instant> = commits.map(|s| s.at).collect();
        at.windows(2).map(|w| w[1] - w[0]).collect()
    }

    /// What `name` has logged, as JSON lines.
    pub fn log(&self, name: &str) -> String {
        let file = self.folder.join("logs").join(format!("{name}.jsonl"));
        fs::read_to_string(file).unwrap_or_default()
    }

    /// Waits for the end of the run and of all its processes.
    pub fn finish(&mut self) -> Hashes {
        let mut begun = Instant::now();
        while self.hashes.is_none() {
            if self.listen(|seen| seen.event.committed.is_some()).is_some() {
                // It goes on: a long run has its time.
                begun = Instant::now();
            }
            if let Some(why) = &self.failed {
                panic!("the run failed: {why}; see {}", self.folder.display());
            }
            if begun.elapsed() > PATIENCE {
                self.give_up("the end of the run");
            }
        }
        let names: Vec<String> = self.processes.keys().cloned().collect();
        for name in names {
            if self.processes[&name].child.is_some() {
                let status = self.ended(&name);
                // One that starts while the others end may find nobody; that is no fault.
                let late = self.processes[&name].starts > 1;
                assert!(status.success() || late, "{name} ended with {status}");
            }
        }
        self.hashes.clone().expect("was heard")
    }

    /// Proves by the ledger that every step is there once and every pair was trained exactly once.
    pub fn audit(&self) {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_belfry"));
        let environment = self.setup.environment.iter().filter(|(who, ..)| who == "*");
        let command = command.current_dir(env!("CARGO_MANIFEST_DIR"));
        command.envs(environment.map(|(_, key, value)| (key, value)));
        let output = command
            .args(["audit", "--run", &self.root])
            .output()
            .expect("starts");
        let told = String::from_utf8_lossy(&output.stdout);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "the audit refutes the run: {told}{said}"
        );
    }

    fn give_up(&self, what: &str) -> ! {
        let last = self.seen.last().map(|s| &s.event);
        let phase = last.map(|e| (e.phase.clone(), e.waiting_for.clone(), e.step, e.generation));
        let notices = self.seen.iter().map(|s| &s.event.notice);
        let notices: Vec<&String> = notices.filter(|n| !n.is_empty()).collect();
        let recent = &notices[notices.len().saturating_sub(12)..];
        panic!(
            "in {PATIENCE:?} not seen: {what}; (phase, waiting for, step, generation) {phase:?}; \
             last notices {recent:#?}; see {}",
            self.folder.display()
        );
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for process in self.processes.values_mut() {
            if let Some(child) = &mut process.child {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
        if std::thread::panicking() {
            eprintln!("kept for a look: {}", self.folder.display());
        } else {
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

/// The run file with these overrides, on data that is packed once.
pub fn resolved(config: &str, settings: &[String]) -> String {
    let data = data();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_belfry"));
    command
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["config", config])
        .arg("--set")
        .arg(format!("data.train={}", data.join("train").display()))
        .arg("--set")
        .arg(format!(
            "data.validation={}",
            data.join("validation").display()
        ));
    for setting in settings {
        command.args(["--set", setting]);
    }
    crate::apart::must(&mut command)
}

/// Packed photographs, in a folder of this program's own.
pub fn data() -> &'static Path {
    static DATA: std::sync::LazyLock<tempfile::TempDir> = std::sync::LazyLock::new(|| {
        let folder = tempfile::tempdir().expect("a folder");
        let place = |name: &str| folder.path().join(name).display().to_string();
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_belfry"));
        command
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .args(["run", TINY, "--workers", "1"])
            .args(["--set", "run.steps=3", "--set"])
            .arg(format!("data.train={}", place("train")))
            .arg("--set")
            .arg(format!("data.validation={}", place("validation")))
            .args(["--root", &place("run")]);
        crate::apart::must(&mut command);
        folder
    });
    DATA.path()
}
