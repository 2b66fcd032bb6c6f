//! Plans that are refused, each by its key, and what seeds make of one.

use std::path::PathBuf;

use super::*;

fn here() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// A plan of these stages, beside the run files.
fn plan(stages: &str) -> Result<Plan, ConfigError> {
    let text = format!("[plan]\nname = \"p\"\n{stages}");
    let file: PlanFile = toml::from_str(&text).map_err(|e| ConfigError::Parse {
        origin: "p.toml".into(),
        message: e.to_string(),
    })?;
    assemble(&file, |_, file, set| load_run(&here().join(file), set))
}

fn stage_named(name: &str, more: &str) -> String {
    format!("[[stage]]\nname = \"{name}\"\nconfig = \"tiny.toml\"\n{more}\n")
}

#[test]
fn what_cannot_work_is_refused_by_its_key() {
    let a = stage_named("a", "");
    let eval = "[[stage]]\nname = \"e\"\nkind = \"eval\"\n";
    for (stages, words) in [
        (String::new(), "stage"),
        (a.clone() + &a, "two stages are called `a`"),
        (stage_named("a b", ""), "stage.name: `a b`"),
        (stage_named("a", "afterr = []"), "unknown field `afterr`"),
        (
            stage_named("a", "after = [\"b\"]"),
            "stage `a`, after: no stage is called `b`",
        ),
        (stage_named("a", "after = [\"a\"]"), "none of a can begin"),
        (
            stage_named("a", "init_from = \"b\"") + &stage_named("b", "after = [\"a\"]"),
            "none of a, b can begin",
        ),
        (
            stage_named("a", "min_workers = 3\npreferred_workers = 2"),
            "stage `a`, min_workers: 3 are more than preferred_workers (2)",
        ),
        (
            stage_named("a", "preferred_workers = 9"),
            "work for 8 workers",
        ),
        (
            stage_named("a", "set = [\"cluster.min_workers=2\"]\nmin_workers = 1"),
            "cluster.min_workers (2)",
        ),
        (
            stage_named("a", "set = [\"batch.lane=8\"]"),
            "unknown field `lane`",
        ),
        (stage_named("a", "seeds = [1, 1]"), "stage `a`, seeds"),
        (stage_named("a", "retries = 101"), "stage `a`, retries"),
        (
            stage_named("a", "best = \"r_mean\""),
            "stage `a`, best: has no meaning here",
        ),
        (
            stage_named("a", "results = [{ metric = \"r_mean\", name = \"r\" }]"),
            "stage `a`, results: this task's evaluation has no `r_mean`",
        ),
        (
            a.clone() + eval + "of = \"a\"\nbest = \"vqa_score\"",
            "stage `e`, best: this task's evaluation has no `vqa_score`",
        ),
        (eval.to_owned(), "stage `e`, of: is missing"),
        (a.clone() + eval + "of = \"e\"", "`e` trains nothing"),
        (
            a.clone() + eval + "of = \"a\"\nmin_workers = 2",
            "takes one worker",
        ),
        (
            a.clone() + eval + "of = \"a\"\nseeds = [1]",
            "stage `e`, seeds: has no meaning",
        ),
        (
            stage_named("a", "seeds = [1, 2]") + &stage_named("b", "init_from = \"a\""),
            "stage `b`, init_from: `a` is repeated with 2 seeds",
        ),
        (
            stage_named("a", "seeds = [1, 2]") + &stage_named("a-seed1", ""),
            "as a repetition of another one is",
        ),
    ] {
        let told = plan(&stages).expect_err(&stages).to_string();
        assert!(told.contains(words), "`{words}` is not in: {told}");
    }
}

#[test]
fn a_missing_run_file_names_its_stage() {
    let folder = std::env::temp_dir().join("no-plan-here");
    let told = load(&folder.join("plan.toml"), &[]).expect_err("is not there");
    assert!(told.to_string().contains("plan.toml"), "{told}");
}

#[test]
fn seeds_multiply_a_stage_and_what_evaluates_it() {
    let text = stage_named("pre", "min_workers = 2\nseeds = [7]")
        + &stage_named(
            "tune",
            "init_from = \"pre\"\nseeds = [0, 1]\npreferred_workers = 2",
        )
        + "[[stage]]\nname = \"test\"\nkind = \"eval\"\nof = \"tune\"\nbest = \"mlm_accuracy\"\n"
        + &stage_named("last", "after = [\"test\"]");
    let plan = plan(&text).expect("can work");
    let names: Vec<&str> = plan.stages.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "pre",
            "tune-seed0",
            "tune-seed1",
            "test-seed0",
            "test-seed1",
            "last"
        ]
    );
    let stage = |name: &str| {
        plan.stages
            .iter()
            .find(|s| s.name == name)
            .expect("is there")
    };
    assert_eq!(stage("tune-seed1").after, ["pre"]);
    assert_eq!(stage("test-seed1").after, ["tune-seed1"]);
    assert_eq!(stage("last").after, ["test-seed0", "test-seed1"]);
    assert_eq!(stage("tune-seed1").group, "tune");
    let (pre, tune) = (stage("pre"), stage("tune-seed1"));
    assert_eq!(
        (pre.min_workers, pre.preferred_workers),
        (2, 8),
        "a worker per lane"
    );
    assert_eq!((tune.min_workers, tune.preferred_workers), (1, 2));
    let Work::Train { run, init_from } = &tune.work else {
        panic!("it trains")
    };
    assert_eq!(init_from.as_deref(), Some("pre"));
    let config = crate::load_str(run, "run.toml", &[]).expect("is a run file");
    assert_eq!(config.run.seed, 1);
    let Work::Train { run, .. } = &pre.work else {
        panic!("it trains")
    };
    assert!(
        run.contains("seed = 7"),
        "one seed is set and renames nothing"
    );
}

#[test]
fn a_run_file_is_a_plan_of_one_stage_and_told_from_one() {
    let path = here().join("tiny.toml");
    let plan = of_run(&path, &["run.steps=3".into()]).expect("loads");
    assert_eq!((plan.name.as_str(), plan.stages.len()), ("tiny", 1));
    let text = std::fs::read_to_string(&path).expect("is read");
    assert!(!is_plan(&text));
    assert!(is_plan("[plan]\nname = \"p\"\n[[stage]]\nname = \"a\""));
    assert!(is_plan("[[stage]]\nbroken ="));
}
