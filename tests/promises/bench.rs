//! `belfry bench` on the real binary, and the script of GPU checks on a machine without one: figures
//! come with their floors, looking changes no bit, choices go into the run file, nowhere else.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

use crate::skipped;
use crate::system::alone;

const TINY: &str = "configs/tiny.toml";

fn house() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn bench(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_belfry"));
    command.current_dir(house()).arg("bench").args(arguments);
    command.output().expect("the binary starts")
}

/// What it printed, and the JSON line at its end.
fn accepted(arguments: &[&str]) -> (String, Value) {
    let output = bench(arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {said}");
    let text = String::from_utf8(output.stdout).expect("is text");
    let last = text.lines().last().expect("a line");
    let json = serde_json::from_str(last).expect("the last line is JSON");
    (text, json)
}

fn refused(arguments: &[&str], words: &str) {
    let output = bench(arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{arguments:?} must be refused");
    assert!(said.contains(words), "`{words}` is not in: {said}");
}

fn above_zero(json: &Value, keys: &[&str]) {
    for key in keys {
        let value = json[key].as_f64();
        assert!(value.is_some_and(|v| v > 0.0), "{key}: {value:?} in {json}");
    }
}

fn place(folder: &tempfile::TempDir, name: &str) -> String {
    folder.path().join(name).display().to_string()
}

#[test]
fn a_step_stands_beside_its_floors_and_looking_at_it_changes_no_bit() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let case = [TINY, "--pairs", "4", "--device", "cpu"];
    let case = |more: &[&str]| -> Vec<String> {
        let all = ["step"].iter().chain(&case).chain(more);
        all.map(|s| (*s).to_owned()).collect()
    };
    let run = |arguments: Vec<String>| {
        accepted(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let sheet = ["--steps", "3", "--warm-up", "0", "--peak-tflops", "2"];
    let (text, json) = run(case(&sheet));
    for words in ["floor, in this run", "f32 products of", "the chip's sheet"] {
        assert!(text.contains(words), "`{words}` is not in: {text}");
    }
    above_zero(
        &json,
        &[
            "seconds",
            "samples_per_second",
            "tflops",
            "matmul_tflops",
            "mfu",
            "mfu_sheet",
            "memory_bytes_per_second",
            "predicted_bytes",
        ],
    );
    // One step each: warm-up, unseen, watched.
    let out = place(&folder, "trace.json");
    let (text, traced) = run(case(&["--steps", "1", "--trace", "--out", &out]));
    assert_eq!(traced["parameters_sha256"], json["parameters_sha256"]);
    let timeline: Value =
        serde_json::from_slice(&fs::read(&out).expect("was written")).expect("JSON");
    let events = timeline["traceEvents"].as_array().expect("a list");
    for phase in [
        "weights to leaves",
        "copies to device",
        "masks and noise",
        "image tower, forward",
        "passes, forward",
        "losses",
        "passes, backward",
        "image tower, backward",
        "gradient collection",
        "fold",
        "optimizer",
    ] {
        assert!(text.contains(phase), "{phase} is not in: {text}");
        assert!(
            events.iter().any(|event| event["name"] == phase),
            "{phase} is not in the timeline"
        );
    }
}

#[test]
fn the_fastest_device_batch_goes_into_the_run_file_and_nothing_else_changes() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("run.toml");
    let text = fs::read_to_string(house().join(TINY)).expect("is there");
    let comment = "micro_batch = 2\ndevice_batch = 1 # stays\n";
    let before = text
        .replace("global_batch = 16", "global_batch = 64 # ours")
        .replace("micro_batch = 2\n", comment);
    fs::write(&file, &before).expect("is written");
    let name = file.display().to_string();
    let (_, json) = accepted(&["step", &name, "--fit", "--write", "--steps", "1"]);
    let cases = json["cases"].as_array().expect("a list");
    assert!(
        !cases.is_empty() && cases.len() <= 3,
        "1, 2 and 4 divide: {json}"
    );
    let best = json["device_batch"].as_u64().expect("a number");
    assert!([1, 2, 4].contains(&best), "{best}");
    let after = fs::read_to_string(&file).expect("is there");
    let expected = before.replace("device_batch = 1 #", &format!("device_batch = {best} #"));
    assert_eq!(after, expected);

    let set = ["--set", "model.dropout=0"];
    let measured_otherwise = ["step", &name, "--fit", "--write"];
    refused(&[&measured_otherwise[..], &set].concat(), "leave out --set");
    let too_small = ["step", &name, "--fit", "--memory-bytes", "1"];
    refused(&too_small, "no device_batch fits");
    refused(&["step", &name, "--write"], "--fit");
}

#[test]
fn reduce_data_and_checkpoint_stand_beside_their_floors() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let small = ["reduce", "--millions", "1", "--lanes", "4", "--rounds", "2"];
    let (text, json) = accepted(&small);
    assert!(text.contains("raw sockets"), "{text}");
    above_zero(
        &json,
        &["seconds", "raw_seconds", "memcpy_bytes_per_second"],
    );

    let train = format!("data.train={}", place(&folder, "train"));
    let validation = format!("data.validation={}", place(&folder, "validation"));
    let (text, json) = accepted(&[
        "data",
        TINY,
        "--steps",
        "2",
        "--set",
        &train,
        "--set",
        &validation,
    ]);
    assert!(text.contains("raw GETs"), "{text}");
    above_zero(
        &json,
        &[
            "samples_per_second",
            "samples_per_second_per_core",
            "raw_samples_per_second",
        ],
    );

    let root = place(&folder, "root");
    let (text, json) = accepted(&["checkpoint", TINY, "--root", &root, "--rounds", "1"]);
    assert!(
        text.contains("raw puts") && text.contains("memcpy"),
        "{text}"
    );
    above_zero(
        &json,
        &[
            "bytes",
            "store_seconds",
            "load_seconds",
            // What a step waits for may be nothing on a busy machine; what the copy takes is not.
            "snapshot_seconds",
        ],
    );
    let left = fs::read_dir(&root).expect("is a folder").count();
    assert_eq!(left, 0, "the benchmark cleans up behind itself");
}

#[test]
fn what_cannot_be_measured_is_refused_by_name() {
    refused(&["step", "configs/none.toml"], "configs/none.toml");
    refused(&["step", TINY, "--lanes", "9"], "1 to 8 lanes");
    refused(&["step", TINY, "--pairs", "3"], "batch.micro_batch");
    refused(&["data", TINY, "--lane", "8"], "lanes 0 to 7");
    refused(&["reduce", "--workers", "9", "--lanes", "8"], "--workers 9");
    if cfg!(feature = "cuda") {
        skipped("this build has GPUs, so it does not say how to get them");
        return;
    }
    for arguments in [&["step", TINY][..], &["step", TINY, "--fit"], &["reduce"]] {
        refused(
            &[arguments, &["--device", "cuda:0"]].concat(),
            "--features cuda",
        );
    }
}

/// The newest golden test of the model beside this one, if it was built; the data's has that name too.
fn golden_binary() -> Option<PathBuf> {
    let folder = std::env::current_exe().ok()?.parent()?.to_owned();
    let built = fs::read_dir(folder).ok()?.flatten().filter(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        name.starts_with("golden-") && !name.contains('.')
    });
    let of_the_model = built.map(|entry| entry.path()).filter(|file| {
        let listed = Command::new(file).arg("--list").output();
        listed.is_ok_and(|o| String::from_utf8_lossy(&o.stdout).contains("bf16_stays_near_f32"))
    });
    of_the_model.max_by_key(|file| file.metadata().and_then(|m| m.modified()).ok())
}

/// The script must work on the day when there is a GPU: here it runs whole, on the CPU and small.
#[test]
fn the_gpu_script_runs_through_and_ends_in_its_table() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let golden = golden_binary();
    if golden.is_none() {
        skipped("golden parity in the GPU script: that test was not built beside this one");
    }
    let mut command = Command::new("bash");
    command
        .current_dir(folder.path())
        .arg(house().join("tests/gpu.sh"))
        .arg(env!("CARGO_BIN_EXE_belfry"))
        .arg(golden.clone().unwrap_or_else(|| "-".into()))
        .arg(folder.path().join("out"))
        .env("DEVICE", "cpu")
        .env("BELFRY_GPU_SMOKE", "1")
        .env("BELFRY_GOLDEN_DIR", house().join("tests/golden"));
    let output = command.output().expect("bash starts");
    let text = String::from_utf8_lossy(&output.stdout);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{said}");
    let table = fs::read_to_string(folder.path().join("out/table.txt")).expect("was written");
    let word = |row: &str| {
        let line = table.lines().find(|line| line.starts_with(row));
        let line = line.unwrap_or_else(|| panic!("no `{row}` in:\n{table}"));
        line[34..]
            .split_whitespace()
            .next()
            .unwrap_or("")
            .to_owned()
    };
    let parity = if golden.is_some() { "ok" } else { "SKIPPED" };
    for (row, expected) in [
        ("golden parity f32", parity),
        ("golden parity bf16", parity),
        ("bits: 1 worker = 1 workers (again)", "ok"),
        ("bits: 1 worker = 2 workers (w2)", "ok"),
        ("bits: steps of 4 pairs, twice", "ok"),
        ("NCCL, world 1 = TCP", "SKIPPED"),
        ("all-reduce, 2 workers, TCP", "ok"),
        ("timeline", "ok"),
        ("PyTorch", "SKIPPED"),
        ("step, 2 pairs, bf16", "ok"),
        ("step, 4 pairs, bf16", "ok"),
        ("step, 2 pairs, f32", "ok"),
    ] {
        assert_eq!(word(row), expected, "{row}\n{table}\n{said}");
    }
    assert!(text.trim_end().ends_with(table.trim_end()), "{text}");
    assert!(folder.path().join("out/trace.json").exists());
}

#[test]
fn an_order_of_nine_million_pairs_is_planned_at_once_in_little_memory() {
    let made_up = ["--synthetic", "4000000,9000000,4000", "--windows", "1,8"];
    let case = ["order", "configs/pretrain-4m.toml", "--steps", "16"];
    let (text, json) = accepted(&[&case[..], &made_up[..]].concat());
    assert!(text.contains("uniform shuffle"), "{text}");
    let number = |key: &str| json[key].as_f64().expect(key);
    assert_eq!(number("pairs"), 9e6);
    assert!(number("plan_seconds") < 2.0, "{text}");
    assert!(number("order_bytes_per_thousand_pairs") < 1024.0, "{text}");
    // A window of eight shards is an eighth as often at the same one.
    let [one, eight] = [number("window_1_same_shard"), number("window_8_same_shard")];
    assert!(one > 0.9 && (0.1..0.2).contains(&eight), "{text}");
    assert!(
        number("window_8_shards") > 6.0 * number("window_1_shards"),
        "{text}"
    );
    refused(
        &["order", TINY, "--synthetic", "1,2"],
        "needs SAMPLES,PAIRS,SHARDS",
    );
}
