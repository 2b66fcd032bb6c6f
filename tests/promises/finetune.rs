//! A run that begins with another: the same parameters whatever the number of workers, exactly the
//! steps of its epochs, and evaluations in a rhythm that change no bit.

use std::fs;
use std::path::{Path, PathBuf};

use belfry_model::resize_positions;
use safetensors::SafeTensors;
use serde_json::Value;

use crate::system::{Run, alone, kill, outcome, undisturbed};
use crate::weights::{belfry, run, succeeded, told};

const POSITIONS: &str = "vit_model.visual.positional_embedding";
/// Two checkpoints, of steps 2 and 4, each evaluated.
const TWO: [&str; 6] = [
    "--set",
    "checkpoint.every_steps=2",
    "--set",
    "checkpoint.keep_last=0",
    "--set",
    "run.evaluate_every_steps=2",
];
/// One step that moves nothing that can be seen.
const STILL: [&str; 6] = [
    "--set",
    "run.steps=1",
    "--set",
    "optim.warmup=0",
    "--set",
    "optim.learning_rate=1e-30",
];

fn begins_with(root: &Path) -> String {
    format!("init.run={}", root.display())
}

fn resolved(root: &Path) -> toml::Table {
    let text = fs::read_to_string(root.join("run.toml")).expect("the run left it");
    text.parse().expect("is TOML")
}

fn export(root: &Path) -> Vec<u8> {
    fs::read(root.join("export/model.safetensors")).expect("the run wrote it")
}

fn numbers(file: &SafeTensors, name: &str) -> Vec<f32> {
    let view = file.tensor(name).expect("is there");
    let (words, _) = view.data().as_chunks::<4>();
    words.iter().map(|raw| f32::from_le_bytes(*raw)).collect()
}

fn assert_near(name: &str, one: &[f32], other: &[f32]) {
    assert_eq!(one.len(), other.len(), "{name}");
    let differences = one.iter().zip(other).map(|(a, b)| (a - b).abs());
    let largest = differences.fold(0.0, f32::max);
    assert!(largest < 1e-20, "{name} moved by {largest:e}");
}

fn first_part(root: &Path, step: u64) -> PathBuf {
    let folder = root.join(format!("checkpoints/step-{step:09}"));
    let text = fs::read(folder.join("manifest.json")).expect("is read");
    let manifest: Value = serde_json::from_slice(&text).expect("is JSON");
    folder.join(manifest["parts"][0]["file"].as_str().expect("a name"))
}

fn flip(file: &Path) {
    let mut bytes = fs::read(file).expect("is read");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(file, bytes).expect("is written");
}

#[test]
fn a_fine_tune_begins_with_the_parameters_of_another_run() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let (first, second) = (folder.path().join("first"), folder.path().join("second"));
    succeeded(&run(folder.path(), "first", &TWO));
    let begin = begins_with(&first);
    let larger = [
        &STILL[..],
        &["--set", &begin, "--set", "model.image.size=48"],
    ]
    .concat();
    let said = succeeded(&run(folder.path(), "second", &larger));
    assert!(
        said.contains("begins with the parameters of step 4"),
        "{said}"
    );
    let pinned = resolved(&second);
    let manifest = fs::read(first.join("checkpoints/step-000000004/manifest.json"));
    let sha256 = shard_tools::manifest::sha256(&manifest.expect("is read"));
    assert_eq!(pinned["init"]["step"].as_integer(), Some(4));
    assert_eq!(pinned["init"]["manifest_sha256"].as_str(), Some(&*sha256));
    let log = fs::read_to_string(second.join("logs/worker-0.jsonl")).expect("a log");
    assert!(
        log.contains("positions scaled from 2x2 to 3x3") && log.contains(&sha256),
        "{log}"
    );

    let (before, after) = (export(&first), export(&second));
    let [before, after] = [&before, &after].map(|b| SafeTensors::deserialize(b).expect("is whole"));
    assert_eq!(before.len(), after.len());
    for name in before.names() {
        let was = numbers(&before, name);
        let expected = match name {
            POSITIONS => resize_positions(&was, 16, 3).expect("a square"),
            _ => was,
        };
        assert_near(name, &numbers(&after, name), &expected);
    }
}

#[test]
fn a_corrupt_checkpoint_is_passed_over_loudly_and_what_is_not_there_is_refused() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let first = folder.path().join("first");
    succeeded(&run(folder.path(), "first", &TWO));
    let begin = begins_with(&first);
    let with = |name: &str, more: &[&str]| {
        let settings = [&STILL[..], &["--set", &begin], more].concat();
        run(folder.path(), name, &settings)
    };
    let refused = |name: &str, more: &[&str], words: &[&str]| {
        let output = with(name, more);
        assert!(!output.status.success(), "{name}: {}", told(&output));
        for word in words {
            let said = told(&output);
            assert!(said.contains(word), "{name}: `{word}` is not in: {said}");
        }
    };
    succeeded(&with("best", &["--set", "init.best=itm_accuracy"]));
    let best = resolved(&folder.path().join("best"));
    let score = |step: u64| {
        let file = first.join(format!("metrics/evaluation-{step:09}.json"));
        let value: Value = serde_json::from_slice(&fs::read(file).expect("is read")).expect("JSON");
        value["itm_accuracy"].as_f64().expect("a number")
    };
    let expected = if score(2) > score(4) { 2 } else { 4 };
    assert_eq!(best["init"]["step"].as_integer(), Some(expected));

    flip(&first_part(&first, 4));
    let said = succeeded(&with("older", &[]));
    assert!(
        said.contains("step 4") && said.contains("is corrupt and is not begun with"),
        "{said}"
    );
    let older = resolved(&folder.path().join("older"));
    assert_eq!(older["init"]["step"].as_integer(), Some(2));
    refused(
        "named",
        &["--set", "init.step=4"],
        &["of step 4", "bring one back", "2, 4"],
    );
    refused(
        "other",
        &["--set", "init.step=3"],
        &["no checkpoint of step 3", "2, 4"],
    );
    let nowhere = ["--set", "init.run=/no/such/run"];
    refused("nowhere", &nowhere, &["init.run", "no such folder"]);
    let data = format!("init.run={}", folder.path().join("data/train").display());
    refused(
        "data",
        &["--set", &data],
        &["init.run", "holds no checkpoint"],
    );
    flip(&first_part(&first, 2));
    refused("none", &[], &["of step 4:", "of step 2:", "is right"]);
}

/// Whoever computes, and whatever becomes of the run that it began with: the same bits.
#[test]
fn a_fine_tune_has_the_same_bits_for_any_number_of_workers_and_without_its_source() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let first = folder.path().join("first");
    succeeded(&run(folder.path(), "first", &TWO));
    let begin = begins_with(&first);
    let settings = ["--set", &begin, "--set", "model.image.size=48"];
    let place = |name: &str| Run::in_folder(&folder.path().join(name));
    let one = place("one").finish(1, &settings).hashes();
    for workers in [2, 3] {
        let name = workers.to_string();
        let hashes = place(&name).finish(workers, &settings).hashes();
        assert_eq!(hashes, one, "{workers} workers");
    }
    let stopped = place("stopped");
    let mut child = stopped.start(2, &settings);
    stopped.await_steps(&mut child, 6);
    let launcher = child.id();
    let asked = std::process::Command::new("kill")
        .arg(launcher.to_string())
        .status();
    assert!(asked.expect("kill is there").success());
    child.wait_with_output().expect("ends");
    fs::remove_dir_all(&first).expect("is removed");
    let resumed = stopped.finish(2, &[&settings[..], &["--resume"]].concat());
    assert_eq!(resumed.hashes(), one, "{}", resumed.said);
}

/// Steps of the evaluations that stand in the run's root.
fn evaluated(run: &Run) -> Vec<u64> {
    let text = fs::read(run.local.join("result.json")).expect("the run ended");
    let result: Value = serde_json::from_slice(&text).expect("is JSON");
    let evaluations = result["evaluations"].as_array().expect("a list").iter();
    let steps: Vec<u64> = evaluations
        .map(|e| e["step"].as_u64().expect("a step"))
        .collect();
    for step in &steps {
        let file = format!("metrics/evaluation-{step:09}.json");
        assert!(run.local.join(file).exists(), "of step {step}");
    }
    steps
}

#[test]
fn epochs_end_at_their_exact_step_and_evaluations_change_no_bit() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run::in_folder(folder.path());
    // 200 photographs with a caption each: 12.5 steps of 16 pairs.
    let settings = [
        "--set",
        "run.epochs=1",
        "--set",
        "run.evaluate_every_epochs=0.25",
    ];
    let ended = run.finish(2, &settings);
    assert_eq!(
        ended.hashes(),
        *undisturbed(),
        "twelve steps and the same bits"
    );
    let told = "1 epochs of 200 pairs in batches of 16: 12 steps; 8 pairs at the end";
    assert!(ended.said.contains(told), "{}", ended.said);
    // 50, 100 and 150 pairs are complete after 64, 112 and 160.
    assert_eq!(evaluated(&run), [0, 4, 7, 10, 12]);
    let pinned = resolved(&run.local);
    assert_eq!(pinned["run"]["steps"].as_integer(), Some(12));
    assert_eq!(pinned["run"]["epoch_pairs"].as_integer(), Some(200));

    let train = format!("data.train={}", folder.path().join("data/train").display());
    let shown = |more: &[&str]| {
        let arguments = [&["config", "configs/tiny.toml"], more].concat();
        let output = belfry(&arguments);
        succeeded(&output);
        String::from_utf8(output.stdout).expect("is text")
    };
    let half = shown(&["--set", &train, "--set", "run.epochs=0.5"]);
    assert!(
        half.contains("steps = 6") && half.contains("4 pairs at the end"),
        "{half}"
    );
    let nowhere = ["--set", "data.train=/no/data", "--set", "run.epochs=0.5"];
    assert!(
        shown(&nowhere).contains("# steps: unknown"),
        "{}",
        shown(&nowhere)
    );
    let plan = [
        "plan",
        "configs/tiny.toml",
        "--set",
        &train,
        "--set",
        "run.epochs=0.5",
    ];
    let planned = belfry(&plan);
    succeeded(&planned);
    let planned = String::from_utf8(planned.stdout).expect("is text");
    assert!(planned.contains("6, 96 pairs in all"), "{planned}");
}

#[test]
fn an_evaluation_that_dies_with_its_worker_or_leader_is_done_again() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run::in_folder(folder.path());
    let settings = ["--set", "run.evaluate_every_steps=1"];
    let mut child = run.start(3, &settings);
    // The first worker judges every state: hardly a moment passes in which it does not.
    run.await_steps(&mut child, 2);
    kill(run.pid("worker-0"));
    run.await_steps(&mut child, 4);
    kill(run.pid("coordinator"));
    run.await_steps(&mut child, 6);
    kill(run.pid("worker-0"));
    let ended = outcome(child.wait_with_output().expect("ends"));
    assert_eq!(ended.hashes(), *undisturbed(), "{}", ended.said);
    assert_eq!(evaluated(&run), (0..=12).collect::<Vec<u64>>());
}

#[test]
fn the_best_state_is_kept_though_no_checkpoint_was_due() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run::in_folder(folder.path());
    let settings = [
        "--set",
        "run.evaluate_every_steps=3",
        "--set",
        "checkpoint.every_steps=100",
        "--set",
        "checkpoint.keep_last=1",
        "--set",
        "checkpoint.keep_best={ count = 1, metric = \"itm_loss\" }",
    ];
    let ended = run.finish(2, &settings);
    assert_eq!(ended.hashes(), *undisturbed());
    assert_eq!(evaluated(&run), [0, 3, 6, 9, 12]);
    let loss = |step: u64| {
        let file = run.local.join(format!("metrics/evaluation-{step:09}.json"));
        let value: Value = serde_json::from_slice(&fs::read(file).expect("is read")).expect("JSON");
        value["itm_loss"].as_f64().expect("a number")
    };
    // One that was still being stored when the next was due may be missing, and that is said.
    let durable = |step: &u64| {
        ended
            .said
            .contains(&format!("checkpoint of step {step} is durable"))
    };
    let mut candidates: Vec<u64> = [3, 6, 9].into_iter().filter(durable).collect();
    assert!(!candidates.is_empty(), "{}", ended.said);
    candidates.sort_by(|a, b| loss(*a).total_cmp(&loss(*b)));
    let names = fs::read_dir(run.local.join("checkpoints")).expect("a folder");
    let mut names: Vec<String> = names
        .flatten()
        .map(|f| f.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    let name = |step: u64| format!("step-{step:09}");
    let (best, last) = (candidates[0], 12);
    // The last state may itself be the best, judged before or after its checkpoint was durable.
    let alone = loss(last) <= loss(best) && names == [name(last)];
    assert!(
        alone || names == [name(best), name(last)],
        "{best}: {names:?}"
    );
}
