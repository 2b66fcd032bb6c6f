//! Every run file in this folder must load; a file that does not is worse than none.

use std::path::{Path, PathBuf};

use belfry_configs::plan;
use belfry_configs::{Recompute, ValidConfig, load, load_str};

/// The TOML files of `folder`, one of the package's, by name.
fn files(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .expect("the folder is readable")
        .map(|entry| entry.expect("a readable entry").path())
        .filter(|path| path.extension().is_some_and(|e| e == "toml"))
        .filter(|path| path.file_name().is_some_and(|n| n != "Cargo.toml"))
        .collect();
    files.sort();
    files
}

fn stem(file: &Path) -> String {
    let stem = file.file_stem().expect("has a name");
    stem.to_string_lossy().into_owned()
}

/// Run files and the names of their runs. A plan lists runs and is none; what lies in `shared` is
/// below others.
fn run_files() -> Vec<(PathBuf, String)> {
    let of = |folder: &'static str, before: &'static str| {
        let named = move |file: PathBuf| {
            let name = format!("{before}{}", stem(&file));
            (file, name)
        };
        files(folder).into_iter().map(named)
    };
    let runs = of(".", "").chain(of("tiny", "tiny-"));
    runs.filter(|(file, _)| !is_plan(file)).collect()
}

fn is_plan(file: &Path) -> bool {
    plan::is_plan(&std::fs::read_to_string(file).expect("is text"))
}

#[test]
fn every_plan_loads_with_its_run_files_and_is_named_after_its_file() {
    let files: Vec<PathBuf> = files(".")
        .into_iter()
        .filter(|file| is_plan(file))
        .collect();
    assert!(files.len() >= 2, "found only {files:?}");
    for file in files {
        let plan = plan::load(&file, &[]).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        assert_eq!(plan.name, stem(&file));
    }
}

/// Table 3 (and 7), ManagerTower's row.
#[test]
fn the_papers_plan_stands_beside_the_papers_numbers() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("plan-paper.toml");
    let file = plan::read(&file).expect("is a plan");
    let targets = file.stage.iter().flat_map(|stage| &stage.results);
    let paper: Vec<f64> = targets.filter_map(|target| target.paper).collect();
    assert_eq!(
        paper,
        [79.39, 79.15, 81.26, 81.44, 82.81, 83.34, 86.56, 95.64]
    );
}

fn loaded(name: &str) -> ValidConfig {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    load(&path, &[]).expect("a run file of this package loads")
}

#[test]
fn every_run_file_loads_and_is_named_after_its_run() {
    let files = run_files();
    assert!(files.len() >= 14, "found only {files:?}");
    for (file, name) in files {
        let config = load(&file, &[]).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        assert_eq!(config.run.name, name);
    }
}

#[test]
fn the_resolved_text_is_the_same_run() {
    for (file, _) in run_files() {
        let config = load(&file, &[]).expect("loads");
        let again = load_str(&config.to_toml(), "run.toml", &[]).expect("its own text loads");
        assert_eq!(config.sha256(), again.sha256(), "{}", file.display());
    }
}

#[test]
fn pretraining_is_the_papers() {
    let config = loaded("pretrain-4m.toml");
    assert_eq!(config.batch.global_batch, 4096);
    assert_eq!(config.micro_batches_per_lane(), 4);
    assert_eq!(config.warmup_steps(), 10_000);
    assert_eq!(
        (config.model.text.layers, config.model.image.layers),
        (12, 12)
    );
    assert_eq!(
        (config.model.text.managed, config.model.cross_layers),
        (6, 6)
    );
}

#[test]
fn a_misspelt_key_and_an_indivisible_batch_are_named() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tiny.toml");
    let refused = |setting: &str| {
        load(&path, &[setting.to_owned()])
            .expect_err("must be refused")
            .to_string()
    };
    let told = refused("batch.laness=8");
    assert!(told.contains("laness") && told.contains("lanes"), "{told}");
    let told = refused("batch.lanes=3");
    assert!(
        told.contains("batch.lanes") && told.contains("nearest that do: [1, 2, 4"),
        "{told}"
    );
    let told = refused("batch.micro_batch=5");
    assert!(told.contains("batch.micro_batch"), "{told}");
    let told = refused("batch.lanes");
    assert!(told.contains("key=value"), "{told}");
}

#[test]
fn weights_to_begin_with_are_files_and_never_downloads() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tiny.toml");
    let with = |settings: &[&str]| {
        let settings: Vec<String> = settings.iter().map(|s| (*s).to_owned()).collect();
        load(&path, &settings)
    };
    let config = with(&[r#"init.from=["a.bin", "s3://bucket/b.pt"]"#]).expect("both can be read");
    assert_eq!(config.init.from, ["a.bin", "s3://bucket/b.pt"]);
    assert!(config.init.fresh.is_empty());
    for (settings, words) in [
        (
            &[r#"init.from=["https://host/a.bin"]"#][..],
            "nothing is downloaded",
        ),
        (&[r#"init.from=["a.bin", "a.bin"]"#], "listed twice"),
        (&[r#"init.from=[""]"#], "neither a path"),
        (&[r#"init.fresh=["vit_model."]"#], "needs init.from"),
        (
            &[r#"init.from=["a"]"#, r#"init.fresh=[""]"#],
            "empty prefix",
        ),
        (&[r#"init.form=["a"]"#], "unknown field `form`"),
    ] {
        let told = with(settings).expect_err("must be refused").to_string();
        assert!(told.contains(words), "`{words}` is not in: {told}");
    }
}

#[test]
fn what_is_recomputed_is_one_of_two_words() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tiny.toml");
    let with = |value: &str| load(&path, &[format!("batch.recompute={value}")]);
    assert_eq!(loaded("tiny.toml").batch.recompute, Recompute::None);
    assert_eq!(with("blocks").unwrap().batch.recompute, Recompute::Blocks);
    let told = with("layers").expect_err("must be refused").to_string();
    for word in ["recompute", "layers", "none", "blocks"] {
        assert!(told.contains(word), "`{word}` is not in: {told}");
    }
}

#[test]
fn what_is_kept_of_checkpoints_must_be_there() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tiny.toml");
    let with = |settings: &[&str]| {
        let settings: Vec<String> = settings.iter().map(|s| (*s).to_owned()).collect();
        load(&path, &settings)
    };
    let default = loaded("tiny.toml").checkpoint.clone();
    assert_eq!((default.keep_last, default.keep_every_steps), (3, 0));
    assert_eq!((default.scrub_hours, default.keep_best), (24.0, None));
    let best = "checkpoint.keep_best={ count = 2, metric = \"itm_accuracy\" }";
    let best_of = with(&[best])
        .expect("it is evaluated")
        .checkpoint
        .keep_best
        .clone();
    assert_eq!(
        best_of.map(|b| (b.count, b.metric)),
        Some((2, "itm_accuracy".to_owned()))
    );
    for (settings, words) in [
        (&["checkpoint.keep_every_steps=6"][..], "such as 4 or 8"),
        (&["checkpoint.keep_last=-1"], "keep_last"),
        (&["checkpoint.scrub_hours=-1"], "checkpoint.scrub_hours"),
        (&["checkpoint.scrub_hours=nan"], "checkpoint.scrub_hours"),
        (
            &[best, "checkpoint.keep_best.count=0"],
            "checkpoint.keep_best.count",
        ),
        (&[best, "checkpoint.keep_best.metric=loss"], "mlm_loss"),
        (&[best, "data.validation=[]"], "set data.validation"),
    ] {
        let told = with(settings).expect_err("must be refused").to_string();
        assert!(told.contains(words), "`{words}` is not in: {told}");
    }
}

#[test]
fn what_the_chosen_system_cannot_have_is_named() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tiny.toml");
    let set = |settings: &[&str]| {
        let settings: Vec<String> = settings.iter().map(|s| (*s).to_owned()).collect();
        load(&path, &settings)
    };
    let refused: [(&[&str], &str); 8] = [
        (&["model.text.managed=0"], "model.text.managed"),
        (&["model.image.managed=3"], "model.image.managed"),
        (
            &["model.system=bridgetower", "model.text.managed=1"],
            "model.text.managed",
        ),
        (
            &["model.system=bridgetower", "model.image.layers=3"],
            "model.image.layers",
        ),
        (&["model.meter_fusion=true"], "model.meter_fusion"),
        (
            &[
                "model.manager=concat_attention",
                "model.manager_weight=scalar",
            ],
            "model.manager_weight",
        ),
        (&["model.head.layers=3"], "model.head.layers"),
        (&["model.head.temperature=0.7"], "model.head.temperature"),
    ];
    for (settings, key) in refused {
        let told = set(settings).expect_err("must be refused").to_string();
        assert!(told.starts_with(key), "{settings:?}: {told}");
    }
    let valid: [&[&str]; 5] = [
        &["model.system=bridgetower"],
        &["model.system=meter", "model.meter_fusion=true"],
        &["model.manager=sae_split", "model.cross_layers=5"],
        &["model.text.managed=1", "model.image.managed=2"],
        &[
            "model.text.kind=bert",
            "model.text.positions=16",
            "model.task=nlvr2",
        ],
    ];
    for settings in valid {
        set(settings).unwrap_or_else(|e| panic!("{settings:?}: {e}"));
    }
}

#[test]
fn a_sum_that_cannot_keep_its_promise_is_refused_and_the_choices_named() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tiny.toml");
    let set = |settings: &[&str]| {
        let settings: Vec<String> = settings.iter().map(|s| (*s).to_owned()).collect();
        load(&path, &settings)
    };
    let gpu = "run.device=cuda:0";
    let refused: [(&[&str], &str, &str); 5] = [
        (&["collective.wire=bf16"], "collective.wire", "nccl_ring"),
        (
            &[gpu, "collective.transport=nccl", "collective.wire=bf16"],
            "collective.wire",
            "who holds which lanes",
        ),
        (
            &["collective.transport=nccl"],
            "collective.transport",
            "run.device",
        ),
        (
            &[gpu, "collective.hierarchical=true"],
            "collective.hierarchical",
            "\"nccl\"",
        ),
        (&["collective.transport=gloo"], "", "`nccl_ring`"),
    ];
    for (settings, key, words) in refused {
        let told = set(settings).expect_err("must be refused").to_string();
        let named = told.starts_with(key) && told.contains(words);
        assert!(named, "{settings:?}: {told}");
    }
    let tree = set(&[
        gpu,
        "collective.transport=nccl",
        "collective.hierarchical=true",
    ]);
    let tree = tree.expect("valid").collective.clone();
    assert_eq!((tree.order(), tree.same_bits()), ("tree", true));
    let ring = [
        gpu,
        "collective.transport=nccl_ring",
        "collective.wire=bf16",
    ];
    let ring = set(&ring).expect("valid").collective.clone();
    assert_eq!((ring.order(), ring.same_bits()), ("ring bf16", false));
    let plain = set(&[]).expect("valid").collective.clone();
    assert_eq!(plain.order(), "tree");
}

#[test]
fn a_run_is_so_many_steps_or_so_many_epochs() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tiny.toml");
    let with = |settings: &[&str]| {
        let settings: Vec<String> = settings.iter().map(|s| (*s).to_owned()).collect();
        load(&path, &settings)
    };
    let open = with(&["run.epochs=10"]).expect("instead of the file's steps");
    assert!(open.needs_epoch_pairs() && open.run.steps == 0);
    let ten = open.with_epoch_pairs(200).expect("has steps");
    assert_eq!((ten.run.steps, ten.unused_pairs()), (125, Some(0)));
    assert!(!ten.needs_epoch_pairs());
    let text = ten.to_toml();
    let again = load_str(&text, "run.toml", &[]).expect("its own text loads");
    assert_eq!((again.sha256(), again.run.steps), (ten.sha256(), 125));
    let steps = load_str(&text, "run.toml", &["run.steps=7".into()]).expect("replaces the epochs");
    assert_eq!((steps.run.steps, steps.run.epochs), (7, None));
    let fifth = with(&["run.epochs=0.2", "optim.warmup=0.5"]).expect("valid");
    let fifth = fifth.with_epoch_pairs(200).expect("has steps");
    assert_eq!((fifth.run.steps, fifth.warmup_steps()), (2, 1));
    assert_eq!(fifth.unused_pairs(), Some(8));
    let told = with(&["run.epochs=0.01"]).expect("data tells");
    let told = told.with_epoch_pairs(200).expect_err("no step").to_string();
    assert!(
        told.contains("run.epochs") && told.contains("not one step"),
        "{told}"
    );

    let both = text.replace("epoch_pairs = 200\n", "");
    let told = load_str(&both, "both.toml", &[])
        .expect_err("both")
        .to_string();
    assert!(told.contains("stands beside run.steps"), "{told}");
    let wrong = text.replace("steps = 125", "steps = 124");
    let told = load_str(&wrong, "wrong.toml", &[])
        .expect_err("not those")
        .to_string();
    assert!(told.contains("are 125 steps, not 124"), "{told}");

    let every = with(&[
        "run.evaluate_every_steps=5",
        "run.evaluate_every_epochs=0.5",
    ]);
    let every = every
        .expect("the later one")
        .with_epoch_pairs(200)
        .expect("steps");
    assert!(every.rhythm().is_due(7) && !every.rhythm().is_due(5));
    let all = ["run.evaluate_every_steps=5", "data.validation=[]"];
    for (settings, words) in [
        (&["run.epochs=0"][..], "run.epochs: must be above 0"),
        (&["run.epochs=0.1234567"], "decimals"),
        (&["run.steps=0"], "or give run.epochs"),
        (&all, "set data.validation"),
    ] {
        let told = with(settings).expect_err("must be refused").to_string();
        assert!(told.contains(words), "`{words}` is not in: {told}");
    }
}

#[test]
fn a_run_to_begin_with_is_named_and_pinned_once() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tiny.toml");
    let with = |settings: &[&str]| {
        let settings: Vec<String> = settings.iter().map(|s| (*s).to_owned()).collect();
        load(&path, &settings)
    };
    let open = with(&["init.run=runs/first"]).expect("a root");
    assert!(open.needs_beginning() && open.init.pinned().is_none());
    let sha256 = "ab".repeat(32);
    let pinned = open.with_beginning(40, sha256.clone()).expect("a hash");
    assert_eq!(pinned.init.pinned(), Some(("runs/first", 40, &*sha256)));
    assert_eq!(open.beginning_of(&pinned), Some((40, &*sha256)));
    let other = with(&["init.run=runs/first", "init.step=41"]).expect("valid");
    assert_eq!(
        other.beginning_of(&pinned),
        None,
        "another step was asked for"
    );
    let other = with(&["init.run=runs/second"]).expect("valid");
    assert_eq!(other.beginning_of(&pinned), None);
    let none = load_str(&pinned.to_toml(), "run.toml", &["init.run=".into()]).expect("taken out");
    assert!(none.init.is_fresh() && none.init == with(&[]).expect("valid").init);
    for (settings, words) in [
        (&["init.step=4"][..], "init.step: needs init.run"),
        (&["init.best=itm_loss"], "init.best: needs init.run"),
        (
            &["init.run=a", "init.best=speed"],
            "no task's evaluation has a figure",
        ),
        (
            &["init.run=a", "init.best=r_mean", "init.step=4"],
            "beside init.step",
        ),
        (
            &["init.run=a", "init.step=4", "init.manifest_sha256=ab"],
            "must be a SHA-256",
        ),
    ] {
        let told = with(settings).expect_err("must be refused").to_string();
        assert!(told.contains(words), "`{words}` is not in: {told}");
    }
}
