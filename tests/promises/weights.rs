//! Weights in and out of the real binary: a run that begins with given weights, its export, and the
//! files of PyTorch's world (`python/weights.py`).

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use belfry_configs::Init;
use belfry_model::{Device, Draws, ManagerTower, PretrainBatch, Weights};
use belfry_worker::weights::import;
use safetensors::{Dtype, SafeTensors};

use crate::system::alone;

pub fn belfry(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_belfry"));
    command
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(arguments);
    command.output().expect("the binary starts")
}

pub fn told(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn succeeded(output: &Output) -> String {
    assert!(output.status.success(), "{}", told(output));
    told(output)
}

/// `belfry run` of a few tiny steps in `folder`; what it said.
pub fn run(folder: &Path, name: &str, more: &[&str]) -> Output {
    let data = |part: &str| format!("data.{part}={}", folder.join("data").join(part).display());
    let root = folder.join(name).display().to_string();
    let (train, validation) = (data("train"), data("validation"));
    let mut arguments = vec![
        "run",
        "configs/tiny.toml",
        "--workers",
        "2",
        "--root",
        &root,
    ];
    for setting in [&*train, &*validation, "run.steps=4"] {
        arguments.extend(["--set", setting]);
    }
    arguments.extend(more);
    belfry(&arguments)
}

/// Over all f32 tensors of two files with the same names.
fn largest_difference(one: &[u8], other: &[u8]) -> f32 {
    let [one, other] = [one, other].map(|b| SafeTensors::deserialize(b).expect("is whole"));
    assert_eq!(one.len(), other.len());
    let numbers = |file: &SafeTensors, name: &str| -> Vec<f32> {
        let view = file.tensor(name).expect("both have it");
        assert!(matches!(view.dtype(), Dtype::F32 | Dtype::I64));
        let (words, _) = view.data().as_chunks::<4>();
        words.iter().map(|raw| f32::from_le_bytes(*raw)).collect()
    };
    let difference = |name: &str| {
        let pairs = numbers(&one, name).into_iter().zip(numbers(&other, name));
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    };
    one.names().into_iter().map(difference).fold(0.0, f32::max)
}

#[test]
fn a_run_begins_with_given_weights_and_gives_its_own_out() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    succeeded(&run(folder.path(), "first", &[]));
    let export = path("export.safetensors");
    succeeded(&belfry(&["export", &path("first"), "--to", &export]));
    let exported = fs::read(&export).expect("was written");
    let at_the_end = fs::read(folder.path().join("first/export/model.safetensors"));
    assert_eq!(
        exported,
        at_the_end.expect("the run wrote it"),
        "the same file"
    );
    let refused = belfry(&["export", &path("first"), "--step", "3", "--to", &export]);
    assert!(
        told(&refused).contains("steps that have one: [4]"),
        "{}",
        told(&refused)
    );

    // Imported and written again, it is the same file.
    let again = path("again.safetensors");
    let said = succeeded(&belfry(&[
        "import",
        "--from",
        &export,
        "--to",
        &again,
        "configs/tiny.toml",
    ]));
    assert!(!said.contains("fresh"), "{said}");
    assert_eq!(fs::read(&again).expect("was written"), exported);

    // A run that begins with it and hardly moves ends with it.
    let init = format!("init.from=[{export:?}]");
    let still = [
        "run.steps=1",
        "optim.warmup=0",
        "optim.learning_rate=1e-30",
        &init,
    ];
    let still: Vec<&str> = still
        .iter()
        .flat_map(|setting| ["--set", *setting])
        .collect();
    succeeded(&run(folder.path(), "second", &still));
    let second = fs::read(folder.path().join("second/export/model.safetensors"));
    let moved = largest_difference(&second.expect("was written"), &exported);
    assert!(moved < 1e-20, "moved by {moved:e}");
    let log = fs::read_to_string(folder.path().join("second/logs/worker-0.jsonl"));
    let log = log.expect("the worker's log");
    assert!(
        log.contains("export.safetensors") && log.contains("sha256"),
        "{log}"
    );

    let missing = ["--set", "init.from=[\"no/such/file.ckpt\"]"];
    let refused = run(folder.path(), "third", &missing);
    assert!(!refused.status.success());
    assert!(
        told(&refused).contains("no/such/file.ckpt"),
        "{}",
        told(&refused)
    );
    let url = ["--set", "init.from=[\"https://host/file.bin\"]"];
    let refused = run(folder.path(), "fourth", &url);
    assert!(
        told(&refused).contains("nothing is downloaded"),
        "{}",
        told(&refused)
    );
}

/// What script `name` of `tests/promises/python` said; nothing, loudly, where Python lacks what it needs.
///
/// `BELFRY_PYTHON` (default `python3`) names a Python that has torch, transformers and safetensors.
fn interop(name: &str, arguments: &[&str]) -> Option<String> {
    let python = std::env::var("BELFRY_PYTHON").unwrap_or_else(|_| "python3".into());
    let packages = "import torch, transformers, safetensors, numpy";
    let there = Command::new(&python).args(["-c", packages]).output();
    if !there.is_ok_and(|output| output.status.success()) {
        crate::skipped(&format!(
            "{name}: `{python}` lacks torch, transformers, safetensors or numpy; install them and \
             set BELFRY_PYTHON"
        ));
        return None;
    }
    let output = Command::new(&python)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .arg(format!("tests/promises/python/{name}"))
        .args(arguments)
        .output()
        .expect("starts");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}{}", told(&output));
    println!("{said}");
    Some(said)
}

#[test]
fn files_of_pytorch_and_transformers_are_read_and_written() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().display().to_string();
    let said = interop("weights.py", &[env!("CARGO_BIN_EXE_belfry"), &path]);
    let ended = said.as_deref().unwrap_or("ok: skipped").lines().last();
    assert!(ended.is_some_and(|line| line.starts_with("ok")), "{said:?}");
}

/// Largest absolute error of a hidden state; they are of the order of one.
const STATE_TOLERANCE: f32 = 2e-5;

#[tokio::test]
async fn encoders_of_transformers_have_the_same_hidden_states_here() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let Some(said) = interop("hidden_states.py", &[&path("")]) else {
        return;
    };
    assert!(said.contains("ok"), "{said}");
    let settings = ["model.text.vocab=60", "model.text.positions=20"].map(str::to_owned);
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/tiny.toml");
    let config = belfry_configs::load(&file, &settings).expect("a run file of this repository");
    let model = ManagerTower::new(&config.model, config.data.text_len as usize).expect("fits");
    let init = Init {
        from: vec![path("text.safetensors"), path("image.safetensors")],
        fresh: Vec::new(),
        ..Init::default()
    };
    let (table, fresh) = (model.table(), model.table().init(0));
    let (flat, _) = import(&init, &table.into(), fresh).await.expect("fits");

    let states = fs::read(path("states.safetensors")).expect("was written");
    let states = SafeTensors::deserialize(&states).expect("is whole");
    let view = |name: &str| states.tensor(name).expect("is there");
    let floats = |name: &str| -> Vec<f32> {
        let words = view(name).data().as_chunks::<4>().0.to_vec();
        words.into_iter().map(f32::from_le_bytes).collect()
    };
    let ids: Vec<i32> = view("in/ids")
        .data()
        .as_chunks::<8>()
        .0
        .iter()
        .map(|raw| i64::from_le_bytes(*raw) as i32)
        .collect();
    let rows = view("in/ids").shape()[0];
    let batch = PretrainBatch {
        micro_batches: 1,
        pairs: rows,
        text_len: config.data.text_len as usize,
        masked_ids: ids.clone(),
        mlm_labels: vec![-100; ids.len()],
        ids,
        text_mask: floats("in/mask"),
        images: floats("in/pixels"),
        itm_images: floats("in/pixels"),
        itm_labels: vec![1; rows],
    };
    let weights = Weights::load(table, &flat, &Device::flex()).expect("as long as the table");
    let (_, trace) = model
        .pretrain_trace(&weights, &batch, Draws::Off)
        .expect("fits");
    let mut compared = 0;
    for record in &trace.records {
        let Some(name) = record.name.strip_prefix("pass0/") else {
            continue;
        };
        if !states.names().contains(&name) {
            continue;
        }
        let pairs = record.values.iter().zip(floats(name));
        let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        println!("{name}: worst {worst:.1e}");
        assert!(worst <= STATE_TOLERANCE, "{name}: {worst:e}");
        compared += 1;
    }
    assert_eq!(compared, 4, "two layers of two towers");
}
