//! Plans on the real binary: stages in their order on shared workers, the same bits whatever is
//! killed, and what a scheduler is asked while it runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::system::{Outcome, alone, kill, outcome};

/// A tiny plan takes seconds; this is for a machine that is busy with something else.
const PATIENCE: Duration = Duration::from_secs(300);

/// A plan of small runs in a folder of its own.
pub struct Planned {
    folder: tempfile::TempDir,
}

/// What the folder's run files and data are called in a stage.
const TINY: &str = "CONFIG";

impl Planned {
    /// A plan of these stages; `CONFIG` in them is the tiny run file with data in the folder.
    fn new(stages: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/tiny.toml");
        let text = fs::read_to_string(config).expect("is read");
        let data = folder.path().join("data").display().to_string();
        let text = text.replace("\"data/packed", &format!("\"{data}"));
        fs::write(folder.path().join("tiny.toml"), text).expect("is written");
        let planned = Planned { folder };
        planned.write("plan.toml", &format!("[plan]\nname = \"test\"\n{stages}"));
        planned
    }

    /// The plan of the five tiny tasks, with data in the folder.
    pub fn of_tasks() -> Self {
        let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
        let folder = tempfile::tempdir().expect("a folder");
        let data = folder.path().join("data").display().to_string();
        let planned = Planned { folder };
        let copy = |from: &Path, to: PathBuf| {
            let text = fs::read_to_string(from).expect("is read");
            let text = text.replace("\"data/packed", &format!("\"{data}"));
            fs::write(to, text).expect("is written");
        };
        for below in ["shared", "tiny"] {
            fs::create_dir(planned.path(below)).expect("is made");
            for entry in fs::read_dir(configs.join(below)).expect("is there") {
                let entry = entry.expect("is readable");
                copy(&entry.path(), planned.path(below).join(entry.file_name()));
            }
        }
        copy(
            &configs.join("plan-tiny-tasks.toml"),
            planned.path("plan.toml"),
        );
        planned
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn root(&self) -> PathBuf {
        self.path("root")
    }

    fn write(&self, name: &str, text: &str) {
        let text = text.replace(TINY, "config = \"tiny.toml\"");
        fs::write(self.path(name), text).expect("is written");
    }

    fn belfry(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_belfry"));
        command.current_dir(env!("CARGO_MANIFEST_DIR")).args(words);
        command.stdin(Stdio::null());
        command
    }

    fn run(&self, workers: u32, more: &[&str]) -> Command {
        let mut command = self.belfry(&["run"]);
        command
            .arg(self.path("plan.toml"))
            .args(["--workers", &workers.to_string()]);
        command.arg("--root").arg(self.root()).args(more);
        command
    }

    pub fn finish(&self, workers: u32, more: &[&str]) -> Outcome {
        outcome(self.run(workers, more).output().expect("starts"))
    }

    pub fn start(&self, workers: u32, more: &[&str]) -> Child {
        let mut command = self.run(workers, more);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("starts")
    }

    /// Asks the scheduler, which the plan's journal names.
    fn ask(&self, words: &[&str]) -> Outcome {
        let mut command = self.belfry(words);
        command.arg("--root").arg(self.root());
        outcome(command.output().expect("starts"))
    }

    pub fn stage(&self, name: &str) -> PathBuf {
        self.root().join("stages").join(name)
    }

    /// Waits until a stage has committed so many steps, while the plan runs.
    pub fn await_steps(&self, plan: &mut Child, stage: &str, steps: usize) {
        self.await_that(plan, &format!("step {steps} of {stage}"), || {
            let file = self.stage(stage).join("metrics.jsonl");
            let text = fs::read_to_string(file).unwrap_or_default();
            text.lines().count() >= steps
        });
    }

    fn await_that(&self, plan: &mut Child, what: &str, holds: impl Fn() -> bool) {
        let begun = Instant::now();
        while !holds() {
            assert!(
                plan.try_wait().expect("is ours").is_none(),
                "the plan ended before {what}"
            );
            assert!(begun.elapsed() < PATIENCE, "no {what} in time");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The process id of a stage's process, or of one of the launcher's two, by how its role begins.
    pub fn pid(&self, stage: Option<&str>, role: &str) -> u32 {
        let file = match stage {
            Some(_) => "agent.pids.json",
            None => "run.pids.json",
        };
        let text = fs::read(self.root().join(file)).expect("is written");
        let all: Value = serde_json::from_slice(&text).expect("is JSON");
        let mut all = all.as_array().expect("a list").iter();
        let found = all.find(|c| {
            let has_role = c["role"].as_str().is_some_and(|r| r.starts_with(role));
            has_role && stage.is_none_or(|s| c["stage"] == s)
        });
        let pid = found.expect("it runs")["pid"].as_u64();
        pid.expect("a number") as u32
    }
}

/// Hashes of a stage's parameters and optimizer.
pub fn hashes(result: &Value, stage: &str) -> (String, String) {
    let mut stages = result["stages"].as_array().expect("a list").iter();
    let found = stages.find(|s| s["name"] == stage).expect("is told");
    assert_eq!(found["state"], "done", "{found}");
    let text = |key: &str| found[key].as_str().expect("a hash").to_owned();
    (text("parameters_sha256"), text("optimizer_sha256"))
}

pub fn printed(outcome: Outcome) -> Value {
    let text = outcome.accepted();
    let line = text.lines().last().expect("a line");
    serde_json::from_str(line).expect("is JSON")
}

const THREE: &str = r#"
[[stage]]
name = "a"
CONFIG
preferred_workers = 3
results = [{ metric = "itm_accuracy", name = "matching", scale = 100, paper = 50 }]

[[stage]]
name = "b"
CONFIG
init_from = "a"
seeds = [1]
set = ["run.steps=8"]
preferred_workers = 3

[[stage]]
name = "c"
CONFIG
after = ["a"]
seeds = [2]
set = ["run.steps=6"]
preferred_workers = 2

[[stage]]
name = "e"
kind = "eval"
of = "b"
results = [{ metric = "mlm_loss", name = "words" }]
"#;

/// Whatever is killed, every stage ends with the bits of an undisturbed plan with one worker, and
/// those of the run alone.
#[test]
fn kills_of_every_kind_of_process_change_no_bit_of_any_stage() {
    let _alone = alone();
    let undisturbed = printed(Planned::new(THREE).finish(1, &[]));

    let disturbed = Planned::new(THREE);
    let mut plan = disturbed.start(3, &[]);
    disturbed.await_steps(&mut plan, "a", 2);
    kill(disturbed.pid(Some("a"), "worker-1"));
    disturbed.await_steps(&mut plan, "a", 5);
    kill(disturbed.pid(Some("a"), "coordinator"));
    disturbed.await_steps(&mut plan, "a", 7);
    kill(disturbed.pid(None, "scheduler"));
    disturbed.await_steps(&mut plan, "b", 3);
    kill(disturbed.pid(None, "agent"));
    let outcome = outcome(plan.wait_with_output().expect("ends"));
    let said = outcome.said.clone();
    let result = printed(outcome);
    assert!(
        result["restarts"].as_u64() >= Some(2),
        "scheduler and agent were started again: {said}"
    );
    for stage in ["a", "b", "c"] {
        assert_eq!(
            hashes(&result, stage),
            hashes(&undisturbed, stage),
            "{stage}: {said}"
        );
    }
    assert_eq!(
        hashes(&result, "a"),
        *crate::system::undisturbed(),
        "as the run alone"
    );
    let rows = result["results"].as_array().expect("a list");
    assert_eq!((rows.len(), &rows[0]["paper"]), (2, &Value::from(50.0)));
    for row in rows {
        assert!(row["reached"].as_f64().is_some(), "{rows:?}");
    }
    assert_eq!(result["results"], undisturbed["results"], "evaluations too");
    let begun = fs::read_to_string(disturbed.stage("b").join("run.toml")).expect("is there");
    assert!(
        begun.contains("stages/a"),
        "it begins with the first: {begun}"
    );
    let table = fs::read_to_string(disturbed.root().join("results.md")).expect("is written");
    assert!(table.contains("| a | matching |"), "{table}");
    let metrics = fs::read_to_string(disturbed.stage("b").join("metrics.jsonl"));
    assert_eq!(
        metrics.expect("is there").lines().count(),
        8,
        "a line per step"
    );

    // A plan that is over tells its results again, and shows how it stands.
    disturbed
        .finish(3, &[])
        .refused(&["already holds a plan", "--resume"]);
    let again = printed(disturbed.finish(2, &["--resume"]));
    assert_eq!(again["results"], result["results"]);
    let status = disturbed.ask(&["status", "--json"]).accepted();
    let status: Value = serde_json::from_str(&status).expect("is JSON");
    assert_eq!(
        (&status["leads"], &status["stages"][1]["state"]),
        (&false.into(), &"done".into())
    );
    let logs = disturbed.ask(&["logs", "b", "--lines", "2"]).accepted();
    assert!(
        logs.contains("== coordinator ==") && logs.contains("== worker-0 =="),
        "{logs}"
    );
}

#[test]
fn a_stage_is_cancelled_and_another_submitted_while_the_plan_runs() {
    let _alone = alone();
    let long = r#"
[[stage]]
name = "long"
CONFIG
set = ["run.steps=100000"]

[[stage]]
name = "behind"
CONFIG
after = ["long"]
"#;
    let planned = Planned::new(long);
    let mut plan = planned.start(2, &[]);
    planned.await_steps(&mut plan, "long", 1);
    let text = "[plan]\nname = \"more\"\n[[stage]]\nname = \"urgent\"\nCONFIG\npriority = 5\n\
                preferred_workers = 1\nset = [\"run.steps=4\"]\n";
    planned.write("more.toml", text);
    let file = planned.path("more.toml").display().to_string();
    planned.ask(&["submit", &file]).accepted();
    planned
        .ask(&["submit", &file])
        .refused(&["a stage `urgent` is in the queue already"]);
    planned.await_that(&mut plan, "the end of `urgent`", || {
        planned.stage("urgent").join("result.json").exists()
    });
    let status: Value =
        serde_json::from_str(&planned.ask(&["status", "--json"]).accepted()).expect("is JSON");
    let stages = status["stages"].as_array().expect("a list");
    assert_eq!(stages.len(), 3, "{status}");
    assert_eq!(stages[1]["why"], "comes after long", "{status}");
    planned
        .ask(&["cancel", "nothing"])
        .refused(&["no stage is called `nothing`", "long"]);
    planned.ask(&["cancel", "long"]).accepted();
    let outcome = outcome(plan.wait_with_output().expect("ends"));
    outcome.refused(&["long cancelled: by request", "behind cancelled"]);
    assert!(planned.stage("urgent").join("result.json").exists());
    assert!(!planned.stage("behind").exists(), "it never began");
}

#[test]
fn a_stage_that_cannot_work_is_tried_again_and_fails_with_those_behind_it_alone() {
    let _alone = alone();
    let stages = r#"
[[stage]]
name = "bad"
CONFIG
retries = 1
set = ["data.train=MISSING", "data.pack_from=MISSING"]

[[stage]]
name = "behind"
CONFIG
after = ["bad"]

[[stage]]
name = "good"
CONFIG
set = ["run.steps=3"]
"#;
    let planned = Planned::new(stages);
    let outcome = planned.finish(1, &[]);
    let parts = [
        "bad failed",
        "MISSING",
        "behind failed: `bad`, which it comes after, failed",
    ];
    outcome.refused(&parts);
    assert!(outcome.said.contains("try 2 of 2"), "{}", outcome.said);
    assert!(
        planned.stage("good").join("result.json").exists(),
        "{}",
        outcome.said
    );
}

#[test]
fn a_plan_that_cannot_work_is_refused_before_anything_starts() {
    let _alone = alone();
    for (stages, workers, parts) in [
        (
            "[[stage]]\nname = \"a\"\nCONFIG\nafter = [\"b\"]\n",
            1,
            ["stage `a`, after", "no stage is called `b`"],
        ),
        (
            "[[stage]]\nname = \"a\"\nCONFIG\nset = [\"batch.lanes=3\"]\n",
            1,
            ["stage `a`, config", "batch.lanes"],
        ),
        (
            "[[stage]]\nname = \"a\"\nCONFIG\nmin_workers = 4\n",
            3,
            ["--workers 3", "stage `a` needs at least 4"],
        ),
        (
            "[[stage]]\nname = \"a\"\nCONFIG\nprio = 4\n",
            3,
            ["plan.toml", "unknown field `prio`"],
        ),
    ] {
        let planned = Planned::new(stages);
        planned.finish(workers, &[]).refused(&parts);
        assert!(
            !planned.root().join("plan.json").exists(),
            "nothing was begun"
        );
    }
}
