//! The paper's five runs in small: pre-training and the four fine-tunes that begin with it, trained,
//! judged and scheduled as one plan on the real binary.

use serde_json::Value;

use crate::stages::{Planned, hashes, printed};
use crate::system::{alone, kill, outcome};

const STAGES: [&str; 5] = ["pretrain", "vqav2", "snli-ve", "nlvr2", "flickr30k"];
/// Steps of every stage: enough to be killed in.
const STEPS: &str = "run.steps=12";
const SETTINGS: [&str; 6] = [
    "--set",
    STEPS,
    "--set",
    "checkpoint.every_steps=4",
    "--set",
    "run.evaluate_every_steps=6",
];

/// One, two and three workers, in two stages a killed worker and a killed coordinator: the same
/// weights and the same figures in every stage.
#[test]
fn every_task_ends_with_the_same_bits_and_figures_however_it_is_trained() {
    let _alone = alone();
    let one = printed(Planned::of_tasks().finish(1, &SETTINGS));
    let two = printed(Planned::of_tasks().finish(2, &SETTINGS));

    let disturbed = Planned::of_tasks();
    let mut plan = disturbed.start(3, &SETTINGS);
    disturbed.await_steps(&mut plan, "pretrain", 5);
    kill(disturbed.pid(Some("pretrain"), "worker"));
    disturbed.await_steps(&mut plan, "flickr30k", 3);
    kill(disturbed.pid(Some("flickr30k"), "worker"));
    disturbed.await_steps(&mut plan, "flickr30k", 7);
    kill(disturbed.pid(Some("flickr30k"), "coordinator"));
    let outcome = outcome(plan.wait_with_output().expect("ends"));
    let said = outcome.said.clone();
    let three = printed(outcome);

    for stage in STAGES {
        assert_eq!(hashes(&two, stage), hashes(&one, stage), "{stage}");
        assert_eq!(
            hashes(&three, stage),
            hashes(&one, stage),
            "{stage}: {said}"
        );
    }
    assert_eq!(two["results"], one["results"]);
    assert_eq!(three["results"], one["results"], "{said}");
    let rows = one["results"].as_array().expect("a list");
    assert!(rows.len() >= STAGES.len(), "{rows:?}");
    let reached = |row: &Value| row["reached"].as_f64().is_some();
    assert!(rows.iter().all(reached), "{rows:?}");
}
