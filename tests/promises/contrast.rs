//! Contrastive tasks on the real binary: the contrast is of the whole global batch, so neither the
//! number of workers, nor a death between its two passes, nor the micro-batch changes what is
//! learned.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::system::{Run, alone, kill, outcome};

/// Sixteen pairs in eight lanes, contrasted with each other.
const RETRIEVAL: [&str; 2] = ["--set", "model.task=retrieval"];

fn with<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&RETRIEVAL[..], more].concat()
}

/// A number of every committed step.
fn told(local: &Path, key: &str) -> Vec<f64> {
    let text = fs::read_to_string(local.join("metrics.jsonl")).expect("written by the run");
    let number = |line: &str| {
        let step: Value = serde_json::from_str(line).expect("is JSON");
        step[key]
            .as_f64()
            .unwrap_or_else(|| panic!("no `{key}` in {line}"))
    };
    text.lines().map(number).collect()
}

#[test]
fn retrieval_has_the_same_bits_with_any_number_of_workers_and_after_a_death() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run::in_folder(folder.path());
    let expected = run.finish(1, &RETRIEVAL).hashes();
    let losses = told(&run.local, "itc_loss");
    // Of one row among sixteen, before anything is learned.
    assert!((losses[0] - 16f64.ln()).abs() < 0.3, "{losses:?}");
    for workers in [2, 3] {
        let folder = tempfile::tempdir().expect("a folder");
        let outcome = Run::in_folder(folder.path()).finish(workers, &RETRIEVAL);
        assert_eq!(outcome.hashes(), expected, "{workers} workers");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run::in_folder(folder.path());
    let mut child = run.start(3, &RETRIEVAL);
    run.await_steps(&mut child, 2);
    kill(run.pid("worker-1"));
    run.await_steps(&mut child, 5);
    kill(run.pid("worker-2"));
    let outcome = outcome(child.wait_with_output().expect("ends"));
    assert_eq!(outcome.hashes(), expected);
    assert!(outcome.restarts() >= 2, "both faults fired");
}

/// As on a GPU: state, gradients and losses stay on the device.
#[test]
fn a_device_with_its_own_memory_contrasts_the_same_bits_at_any_worker_count() {
    let _alone = alone();
    let settings = with(&["--set", "run.device=cpu-apart", "--set", "run.steps=4"]);
    let hashes = [1, 3].map(|workers| {
        let folder = tempfile::tempdir().expect("a folder");
        Run::in_folder(folder.path())
            .finish(workers, &settings)
            .hashes()
    });
    assert_eq!(hashes[0], hashes[1]);
}

#[test]
fn the_micro_batch_of_a_retrieval_run_changes_rounding_only() {
    let _alone = alone();
    let losses = [1, 2, 4].map(|micro_batch| {
        let folder = tempfile::tempdir().expect("a folder");
        let run = Run::in_folder(folder.path());
        let size = format!("batch.micro_batch={micro_batch}");
        let settings = with(&["--set", "batch.lanes=4", "--set", &size]);
        run.finish(2, &settings).hashes();
        ["itc_loss", "itm_loss"].map(|key| told(&run.local, key))
    });
    for other in &losses[1..] {
        for (a, b) in losses[0].iter().flatten().zip(other.iter().flatten()) {
            assert!((a - b).abs() < 1e-3, "{losses:?}");
        }
    }
}

#[test]
fn contrastive_pre_training_has_the_same_bits_with_two_workers() {
    let _alone = alone();
    let settings = ["--set", "model.task=pretrain_itc", "--set", "run.steps=4"];
    let hashes = [1, 2].map(|workers| {
        let folder = tempfile::tempdir().expect("a folder");
        let run = Run::in_folder(folder.path());
        let hashes = run.finish(workers, &settings).hashes();
        assert!(
            told(&run.local, "mlm_loss")[0] > 5.0,
            "words are predicted too"
        );
        hashes
    });
    assert_eq!(hashes[0], hashes[1]);
}

#[test]
fn a_micro_batch_alone_is_another_contrast_with_the_same_bits_for_any_number_of_workers() {
    let _alone = alone();
    let scope = "model.head.contrastive_scope=micro_batch";
    let settings = with(&["--set", scope, "--set", "run.steps=4"]);
    let hashes = [1, 3].map(|workers| {
        let folder = tempfile::tempdir().expect("a folder");
        let run = Run::in_folder(folder.path());
        let hashes = run.finish(workers, &settings).hashes();
        let losses = told(&run.local, "itc_loss");
        assert!(
            (losses[0] - 2f64.ln()).abs() < 0.3,
            "one of two: {losses:?}"
        );
        hashes
    });
    assert_eq!(hashes[0], hashes[1]);
}

#[test]
fn settings_under_which_the_micro_batch_would_matter_are_refused() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run::in_folder(folder.path());
    let lanes = ["--set", "batch.lanes=4", "--set", "batch.device_batch=2"];
    run.finish(1, &with(&lanes))
        .refused(&["batch.device_batch", "must be 1", "hard negatives"]);
    run.finish(1, &with(&["--set", "model.head.global_negatives=false"]))
        .refused(&["model.head.global_negatives", "\"micro_batch\""]);
}
