//! The main loop on the real binary: the same bits at any worker count and after any crash; clear
//! refusals of bad input. Faults are placed by what the run itself reports, never by sleeping.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::s3_server::{self, S3Server};
use crate::small_disk::SmallDisk;

/// A tiny run takes seconds; this is for a machine that is busy with something else.
const PATIENCE: Duration = Duration::from_secs(240);

/// One run at a time: they would only slow each other down.
pub fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A run of the real binary.
pub struct Run {
    pub root: String,
    pub local: PathBuf,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
}

impl Run {
    pub fn in_folder(folder: &Path) -> Self {
        let place = |name: &str| folder.join(name).display().to_string();
        Run::with(place, folder.join("run"))
    }

    /// Data and run where `place` says; logs and metrics in `local`.
    fn with(place: impl Fn(&str) -> String, local: PathBuf) -> Self {
        let set = |key: &str, value: String| ["--set".to_owned(), format!("{key}={value}")];
        let mut arguments = vec!["run".to_owned(), "configs/tiny.toml".to_owned()];
        arguments.extend(set("data.train", place("data/train")));
        arguments.extend(set("data.validation", place("data/validation")));
        Run {
            root: place("run"),
            local,
            arguments,
            environment: Vec::new(),
        }
    }

    fn command(&self, workers: u32, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_belfry"));
        command
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .args(&self.arguments)
            .args(["--workers", &workers.to_string(), "--root", &self.root])
            .arg("--local")
            .arg(&self.local)
            .envs(self.environment.iter().cloned())
            .args(more)
            .stdin(Stdio::null());
        command
    }

    pub fn finish(&self, workers: u32, more: &[&str]) -> Outcome {
        outcome(
            self.command(workers, more)
                .output()
                .expect("the binary starts"),
        )
    }

    pub fn start(&self, workers: u32, more: &[&str]) -> Child {
        let mut command = self.command(workers, more);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("the binary starts")
    }

    /// Waits until `steps` steps are committed, while the run lives.
    pub fn await_steps(&self, child: &mut Child, steps: usize) {
        let begun = Instant::now();
        loop {
            let text = fs::read_to_string(self.local.join("metrics.jsonl")).unwrap_or_default();
            if text.lines().count() >= steps {
                return;
            }
            assert!(
                child.try_wait().expect("is ours").is_none(),
                "the run ended before the fault"
            );
            assert!(begun.elapsed() < PATIENCE, "no step {steps} in time");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn pid(&self, role: &str) -> u32 {
        let text = fs::read(self.local.join("run.pids.json")).expect("written by the launcher");
        let all: Value = serde_json::from_slice(&text).expect("is JSON");
        let found = all
            .as_array()
            .expect("a list")
            .iter()
            .find(|c| c["role"] == role);
        found.expect("is running")["pid"]
            .as_u64()
            .expect("a number") as u32
    }
}

pub struct Outcome {
    success: bool,
    /// Standard error.
    pub said: String,
    /// Standard output.
    printed: String,
    result: Value,
}

impl Outcome {
    pub fn hashes(&self) -> (String, String) {
        assert!(self.success, "{}", self.said);
        let text = |key: &str| self.result[key].as_str().expect("a hash").to_owned();
        (text("parameters_sha256"), text("optimizer_sha256"))
    }

    pub fn restarts(&self) -> u64 {
        self.result["metrics"]["restarts"]
            .as_u64()
            .expect("a count")
    }

    /// What it printed, if it went well.
    pub fn accepted(self) -> String {
        assert!(self.success, "{}", self.said);
        self.printed
    }

    /// A refusal whose words hold all of `parts`.
    pub fn refused(&self, parts: &[&str]) {
        assert!(!self.success, "must be refused: {}", self.said);
        for part in parts {
            assert!(
                self.said.contains(part),
                "`{part}` is not in: {}",
                self.said
            );
        }
    }
}

pub fn outcome(output: Output) -> Outcome {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let result = text
        .lines()
        .last()
        .and_then(|line| serde_json::from_str(line).ok());
    Outcome {
        success: output.status.success(),
        said: String::from_utf8_lossy(&output.stderr).into_owned(),
        result: result.unwrap_or(Value::Null),
        printed: text,
    }
}

pub fn kill(pid: u32) {
    let killed = Command::new("kill").args(["-9", &pid.to_string()]).status();
    assert!(
        killed.expect("kill is there").success(),
        "the fault did not fire"
    );
}

/// What an undisturbed run with one worker ends with.
pub fn undisturbed() -> &'static (String, String) {
    static HASHES: OnceLock<(String, String)> = OnceLock::new();
    HASHES.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a folder");
        Run::in_folder(folder.path()).finish(1, &[]).hashes()
    })
}

#[test]
fn any_number_of_workers_gives_the_same_bits() {
    let _alone = alone();
    for workers in [2, 3, 5] {
        let folder = tempfile::tempdir().expect("a folder");
        let outcome = Run::in_folder(folder.path()).finish(workers, &[]);
        assert_eq!(outcome.hashes(), *undisturbed(), "{workers} workers");
    }
}

#[test]
fn two_kills_of_a_worker_change_no_bit() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run::in_folder(folder.path());
    let mut child = run.start(3, &[]);
    run.await_steps(&mut child, 2);
    kill(run.pid("worker-1"));
    run.await_steps(&mut child, 5);
    kill(run.pid("worker-2"));
    let outcome = outcome(child.wait_with_output().expect("ends"));
    assert_eq!(outcome.hashes(), *undisturbed());
    assert!(outcome.restarts() >= 2, "both faults fired");
}

/// As on a GPU: state, gradients and losses stay on the device, products are bf16, and a device
/// batch holds two micro-batches.
#[test]
fn a_device_with_its_own_memory_gives_the_same_bits_at_any_worker_count() {
    let _alone = alone();
    let settings = [
        "--set",
        "run.device=cpu-apart",
        "--set",
        "precision.matmul=bf16",
        "--set",
        "batch.lanes=4",
        "--set",
        "batch.device_batch=2",
    ];
    let folder = tempfile::tempdir().expect("a folder");
    let expected = Run::in_folder(folder.path()).finish(1, &settings).hashes();
    assert_ne!(expected, *undisturbed(), "bf16 products change bits");
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run::in_folder(folder.path());
    let mut child = run.start(3, &settings);
    run.await_steps(&mut child, 3);
    kill(run.pid("worker-1"));
    let outcome = outcome(child.wait_with_output().expect("ends"));
    assert_eq!(outcome.hashes(), expected);
    assert!(outcome.restarts() >= 1, "the fault fired");
}

#[test]
fn a_kill_of_the_coordinator_changes_no_bit_and_no_worker() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run::in_folder(folder.path());
    let mut child = run.start(2, &[]);
    run.await_steps(&mut child, 3);
    let before = run.pid("worker-0");
    kill(run.pid("coordinator"));
    run.await_steps(&mut child, 6);
    assert_eq!(run.pid("worker-0"), before, "the worker survived");
    let outcome = outcome(child.wait_with_output().expect("ends"));
    assert_eq!(outcome.hashes(), *undisturbed());
    assert!(outcome.restarts() >= 1, "the fault fired");
}

#[test]
fn everything_killed_and_resumed_with_other_workers_gives_the_same_bits() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run::in_folder(folder.path());
    let mut child = run.start(3, &[]);
    run.await_steps(&mut child, 6);
    let pids: Vec<u32> = ["coordinator", "worker-0", "worker-1", "worker-2"]
        .map(|role| run.pid(role))
        .into();
    child.kill().expect("the launcher is killed");
    child.wait().expect("it was ours");
    for pid in pids {
        // Some have seen their launcher's end already.
        let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
    }
    run.finish(2, &[])
        .refused(&["already holds a run", "--resume"]);
    let resumed = run.finish(2, &["--resume"]);
    assert_eq!(resumed.hashes(), *undisturbed());
    let again = run.finish(2, &["--resume"]);
    assert_eq!(
        again.hashes(),
        *undisturbed(),
        "a finished run tells its result again"
    );
}

#[test]
fn bad_settings_are_refused_before_anything_starts() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run::in_folder(folder.path());
    run.finish(1, &["--set", "batch.lane=8"])
        .refused(&["unknown field `lane`"]);
    run.finish(1, &["--set", "batch.lanes=3"])
        .refused(&["batch.lanes", "nearest that do: [1, 2, 4, 8]"]);
    run.finish(1, &["--set", "batch.micro_batch=3"])
        .refused(&["batch.micro_batch", "nearest"]);
    run.finish(1, &["--set", "model.task=vqav2"])
        .refused(&["`vqav2`", "`vqa`"]);
    run.finish(0, &[]).refused(&["--workers 0"]);
    assert!(!run.local.join("run.toml").exists(), "nothing was begun");
}

/// A dataset packed by an undisturbed start, to be damaged.
pub fn packed(folder: &Path) -> Run {
    let run = Run::in_folder(folder);
    run.finish(1, &["--set", "run.steps=3"]).hashes();
    fs::remove_dir_all(&run.local).expect("its run is not needed");
    run
}

#[test]
fn damaged_data_names_its_place() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let run = packed(folder.path());
    let shard = folder.path().join("data/train/000003.tar");
    let good = fs::read(&shard).expect("was packed");
    let damage = |bytes: &[u8], parts: &[&str]| {
        fs::write(&shard, bytes).expect("is written");
        run.finish(1, &[]).refused(parts);
        fs::remove_dir_all(&run.local).expect("its run is not needed");
    };
    damage(&good[..good.len() / 2], &["000003.tar", "offset"]);
    let mut lying = good.clone();
    lying[130] ^= 1;
    damage(&lying, &["000003.tar", "offset 0"]);
    let mut flipped = good.clone();
    flipped[700] ^= 1;
    damage(&flipped, &["000003.tar", "sha256"]);
    fs::remove_file(&shard).expect("is removed");
    run.finish(1, &[])
        .refused(&["000003.tar", "No such file", "data.quarantine_shards_max"]);
}

#[test]
fn an_image_that_does_not_decode_is_named_when_packed() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let photos = folder.path().join("photos");
    fs::create_dir(&photos).expect("is made");
    fs::write(photos.join("broken.jpg"), b"\xff\xd8 not a photograph").expect("is written");
    fs::write(photos.join("broken.txt"), "a caption").expect("is written");
    let output = Command::new(env!("CARGO_BIN_EXE_belfry"))
        .args(["shards", "pack"])
        .arg(&photos)
        .arg(folder.path().join("out"))
        .output()
        .expect("starts");
    outcome(output).refused(&["broken.jpg"]);
    assert!(
        !folder.path().join("out/manifest.json").exists(),
        "nothing half is taken for whole"
    );
}

#[test]
fn a_flipped_byte_in_a_checkpoint_is_named() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run::in_folder(folder.path());
    let mut child = run.start(1, &[]);
    run.await_steps(&mut child, 6);
    child.kill().expect("the launcher is killed");
    child.wait().expect("it was ours");
    let checkpoints = run.local.join("checkpoints");
    let mut flipped = 0;
    for step in fs::read_dir(&checkpoints)
        .expect("a checkpoint stands")
        .flatten()
    {
        for part in fs::read_dir(step.path()).expect("a folder").flatten() {
            if part.path().extension().is_some_and(|e| e == "safetensors") {
                let mut bytes = fs::read(part.path()).expect("is read");
                let last = bytes.len() - 1;
                bytes[last] ^= 1;
                fs::write(part.path(), bytes).expect("is written");
                flipped += 1;
            }
        }
    }
    assert!(flipped > 0, "the fault fired");
    run.finish(1, &["--resume"])
        .refused(&["checkpoints/step-", ".safetensors", "sha256"]);
}

#[test]
fn a_port_in_use_is_named() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("is bound").to_string();
    let output = Command::new(env!("CARGO_BIN_EXE_belfry"))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args([
            "coordinator",
            "configs/tiny.toml",
            "--listen",
            &address,
            "--root",
        ])
        .arg(folder.path().join("root"))
        .arg("--address-file")
        .arg(folder.path().join("address"))
        .output()
        .expect("starts");
    outcome(output).refused(&[&address, "free the port"]);
}

#[test]
fn a_full_disk_is_named_and_leaves_nothing_that_is_taken_for_whole() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = packed(folder.path());
    // Room for the run file and the journal, not for a checkpoint of ten megabytes.
    let disk = match SmallDisk::mount(&folder.path().join("small"), 4) {
        Ok(disk) => disk,
        Err(why) => {
            return crate::skipped(&format!(
                "mounting a small tmpfs needs root; the full disk is not tested: {why}"
            ));
        }
    };
    run.root = disk.0.display().to_string();
    run.finish(1, &[]).refused(&["no space left"]);
    let whole = fs::read_dir(disk.0.join("checkpoints"))
        .into_iter()
        .flatten();
    for step in whole.flatten() {
        assert!(!step.path().join("manifest.json").exists(), "{step:?}");
    }
    assert!(!disk.0.join("result.json").exists());
    let shards = disk.0.join("shards").display().to_string();
    // What the refused checkpoint had written is gone again, and its room with it.
    disk.fill(0);
    let output = Command::new(env!("CARGO_BIN_EXE_belfry"))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["shards", "pack", "data/stamps", &shards])
        .output()
        .expect("starts");
    outcome(output).refused(&["no space left"]);
    assert!(!disk.0.join("shards/manifest.json").exists());
}

#[test]
fn an_s3_server_gives_the_same_bits_and_names_what_is_wrong_with_it() {
    let _alone = alone();
    let Some(server) = S3Server::start() else {
        return;
    };
    let folder = tempfile::tempdir().expect("a folder");
    let reached = |secret: &str| {
        let mut command = Command::new("true");
        let envs = server.reach(&mut command, secret).get_envs();
        let text = |s: &std::ffi::OsStr| s.to_str().expect("is text").to_owned();
        envs.filter_map(|(k, v)| Some((text(k), text(v?))))
            .collect::<Vec<_>>()
    };
    let on_s3 = |secret: &str, local: &str| {
        let mut run = Run::with(|name| server.url(name), folder.path().join(local));
        run.environment = reached(secret);
        run
    };
    on_s3("wrong", "denied").finish(1, &[]).refused(&[
        "s3://belfry",
        "access denied",
        "AWS_SECRET_ACCESS_KEY",
    ]);
    let mut nowhere = on_s3(s3_server::SECRET_KEY, "nowhere");
    nowhere.root = "s3://no-such-bucket/run".into();
    nowhere
        .finish(1, &[])
        .refused(&["s3://no-such-bucket/run", "bucket exists"]);

    let run = on_s3(s3_server::SECRET_KEY, "run");
    let mut child = run.start(2, &[]);
    run.await_steps(&mut child, 6);
    kill(run.pid("coordinator"));
    kill(run.pid("worker-0"));
    let outcome = outcome(child.wait_with_output().expect("ends"));
    assert_eq!(outcome.hashes(), *undisturbed());
    assert!(outcome.restarts() >= 2, "both faults fired");
    run.finish(1, &[]).refused(&["already holds a run"]);
    let again = run.finish(1, &["--resume"]);
    assert_eq!(again.hashes(), *undisturbed());

    // Its weights go out to the server and come in from there.
    let belfry = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_belfry"));
        command.current_dir(env!("CARGO_MANIFEST_DIR"));
        let server = server.reach(&mut command, s3_server::SECRET_KEY);
        let output = server.args(arguments).output().expect("starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
    };
    let (there, here) = (
        server.url("weights.safetensors"),
        folder.path().join("w.safetensors"),
    );
    belfry(&["export", &run.root, "--to", &there]);
    let to = here.display().to_string();
    belfry(&["import", "--from", &there, "--to", &to, "configs/tiny.toml"]);
    belfry(&["export", &run.root, "--to", &format!("{to}.exported")]);
    let read = |file: &str| fs::read(file).expect("was written");
    assert!(read(&to) == read(&format!("{to}.exported")));
}
