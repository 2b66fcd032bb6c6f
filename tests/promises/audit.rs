//! `belfry audit` on real runs: it proves what was trained, also after kills and under quarantine,
//! and names whatever was changed behind a run's back.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

use crate::system::{Run, alone, kill, outcome, packed};

/// Three epochs of 200 pairs, and a tail.
const STEPS: [&str; 2] = ["--set", "run.steps=40"];

fn audit(root: &str, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_belfry"));
    let command = command.current_dir(env!("CARGO_MANIFEST_DIR"));
    let command = command.args(["audit", "--run", root]).args(more);
    command.output().expect("the binary starts")
}

/// The JSON of an audit that ended with `code`.
fn audited(root: &str, code: i32) -> Value {
    let output = audit(root, &["--json"]);
    let said = String::from_utf8_lossy(&output.stderr);
    let printed = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(code), "{said}{printed}");
    serde_json::from_slice(&output.stdout).expect("one object")
}

/// An audit that proves nothing and says all of `parts`.
fn refuted(root: &str, parts: &[&str]) {
    let faults = audited(root, 1)["faults"].to_string();
    for part in parts {
        assert!(faults.contains(part), "`{part}` is not in {faults}");
    }
}

fn ledger(run: &Run) -> Vec<PathBuf> {
    let files = fs::read_dir(run.local.join("ledger")).expect("a ledger");
    let mut files: Vec<PathBuf> = files.map(|f| f.expect("is read").path()).collect();
    files.sort();
    files
}

/// Changes `file` for as long as `look` looks.
fn changed(file: &Path, change: impl Fn(&str) -> String, look: impl Fn()) {
    let good = fs::read_to_string(file).expect("is text");
    let bad = change(&good);
    assert_ne!(good, bad, "the change was made");
    fs::write(file, bad).expect("is written");
    look();
    fs::write(file, good).expect("is written");
}

#[test]
fn a_run_with_kills_is_proved_and_what_is_tampered_with_is_named() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run::in_folder(folder.path());
    let mut child = run.start(3, &STEPS);
    run.await_steps(&mut child, 6);
    kill(run.pid("worker-1"));
    run.await_steps(&mut child, 20);
    let unfinished = audited(&run.root, 0);
    assert_eq!(unfinished["finished"], false);
    kill(run.pid("coordinator"));
    outcome(child.wait_with_output().expect("ends")).hashes();

    let report = audited(&run.root, 0);
    assert_eq!(report["proved"], true);
    assert_eq!(
        (&report["receipts"], &report["lanes"]),
        (&40.into(), &320.into())
    );
    let epochs = report["epochs"].as_array().expect("a list");
    assert_eq!(epochs.len(), 3);
    assert!(
        epochs
            .iter()
            .all(|e| e["trained"] == 200 && e["missing"] == 0)
    );
    // 640 pairs were trained: 160 of the fourth epoch's 200 are left.
    let tails = report["unused_tail"].as_array().expect("a list").iter();
    let pairs = |t: &Value| Some(t["positions"][1].as_u64()? - t["positions"][0].as_u64()?);
    assert_eq!(tails.filter_map(pairs).sum::<u64>(), 160);
    let listed = audit(&run.root, &["--tail"]);
    let listed = String::from_utf8(listed.stdout).expect("is text");
    assert_eq!(
        listed.lines().filter(|l| l.starts_with("tail")).count(),
        160
    );

    tampered_with(&run);
    another_dataset(&run, folder.path());
}

/// First and last step of a file of the ledger; a kill may have made it longer than a checkpoint's.
fn steps_of(file: &Path) -> (u64, u64) {
    let name = file.file_stem().expect("a name").to_string_lossy();
    let (first, last) = name.split_once('-').expect("two steps");
    let step = |text: &str| text.parse().expect("a step");
    (step(first), step(last))
}

fn tampered_with(run: &Run) {
    let files = ledger(run);
    let (first, last) = steps_of(&files[1]);
    // Another digest of lane 1: both its pairs are named, by key and caption.
    let other_lane = |text: &str| {
        let at = text.find("\"lanes\":\"").expect("lanes") + 9 + 16;
        let digit = if &text[at..=at] == "0" { "1" } else { "0" };
        format!("{}{digit}{}", &text[..at], &text[at + 1..])
    };
    changed(&files[1], other_lane, || {
        let lane = format!("step {first}, lane 1");
        refuted(
            &run.root,
            &[&lane, "epoch 0: not trained", "(key ", "caption 0"],
        );
    });
    let other_count = |text: &str| text.replacen("\"pairs\":16", "\"pairs\":17", 1);
    changed(&files[1], other_count, || {
        let told = format!("step {first}: its receipt says pairs 17, the order 16");
        refuted(&run.root, &[&told]);
    });
    let cut = |text: &str| text[..text.len() - 20].to_owned();
    changed(&files[1], cut, || {
        let name = files[1].file_name().expect("a name").to_string_lossy();
        let line = format!("{name}, line {}", last - first + 1);
        refuted(&run.root, &[&line, &format!("step {last}: no receipt")]);
    });
    for file in [&files[1], &files[files.len() - 1]] {
        let (first, last) = steps_of(file);
        let kept = fs::read(file).expect("is read");
        fs::remove_file(file).expect("is removed");
        refuted(
            &run.root,
            &[&format!("steps {first} to {last}: no receipts")],
        );
        fs::write(file, kept).expect("is written");
    }
    assert_eq!(audited(&run.root, 0)["faults_found"], 0, "all is as it was");
}

/// The same shards under another manifest are another dataset, for the audit and for the run.
fn another_dataset(run: &Run, folder: &Path) {
    let manifest = folder.join("data/train/manifest.json");
    let renamed = |text: &str| text.replacen("\"tiny\"", "\"another\"", 1);
    changed(&manifest, renamed, || {
        refuted(
            &run.root,
            &["data/train", "the run trained on", "200 pairs"],
        );
        // It is refused when the run goes on, too.
        fs::remove_file(run.local.join("result.json")).expect("was written");
        run.finish(1, &[&STEPS[..], &["--resume"]].concat())
            .refused(&[
                "data.train is another dataset now",
                "the run began with",
                "bring back",
            ]);
    });
    let nowhere = audit(&folder.join("nowhere").display().to_string(), &[]);
    outcome(nowhere).refused(&["no such folder"]);
}

/// Flips a byte of a packed shard's data.
fn damage(folder: &Path, shard: &str) {
    let file = folder.join("data/train").join(shard);
    let mut bytes = fs::read(&file).expect("was packed");
    bytes[700] ^= 1;
    fs::write(&file, bytes).expect("is written");
}

#[test]
fn a_shard_that_stays_unreadable_stops_the_run_or_is_done_without_at_any_worker_count() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let run = packed(folder.path());
    damage(folder.path(), "000003.tar");
    run.finish(2, &[])
        .refused(&["000003.tar", "sha256", "quarantine_shards_max = 0"]);
    fs::remove_dir_all(&run.local).expect("its run is not needed");

    let allowed = |max: &'static str| [&STEPS[..], &["--set", max]].concat();
    let one = allowed("data.quarantine_shards_max=1");
    let expected = run.finish(1, &one).hashes();
    let ledgers = |run: &Run| -> Vec<String> {
        let text = |file: &PathBuf| fs::read_to_string(file).expect("is text");
        ledger(run).iter().map(text).collect()
    };
    let receipts = ledgers(&run).concat();
    fs::remove_dir_all(&run.local).expect("its run is not needed");

    // The same bits and receipts with more workers and kills, of the coordinator too.
    let mut child = run.start(3, &one);
    run.await_steps(&mut child, 10);
    kill(run.pid("coordinator"));
    run.await_steps(&mut child, 20);
    kill(run.pid("worker-1"));
    let ended = outcome(child.wait_with_output().expect("ends"));
    assert_eq!(ended.hashes(), expected);
    assert_eq!(ledgers(&run).concat(), receipts, "the same receipts");
    assert!(
        receipts.contains("\"file\":\"000003.tar\""),
        "the ledger names it"
    );

    let report = audited(&run.root, 0);
    let lost = &report["quarantine"][0];
    let name = lost["shard"].as_str().expect("a name");
    assert!(name.ends_with("data/train/000003.tar"), "{name}");
    assert!(lost["substituted"].as_u64() > Some(0), "{lost}");
    let substituted = report["epochs"].as_array().expect("a list").iter();
    let substituted = substituted.map(|e| e["substituted"].as_u64().expect("a count"));
    assert!(substituted.sum::<u64>() > 0);
    // What the ledger says of a quarantine must stand in the journal.
    let elsewhere = |text: &str| text.replacen("000003.tar", "000004.tar", 1);
    let named = ledger(&run).into_iter().find(|file| {
        let text = fs::read_to_string(file).expect("is text");
        text.contains("000003.tar")
    });
    changed(&named.expect("a file of the ledger"), elsewhere, || {
        refuted(
            &run.root,
            &["other shards under quarantine than the journal"],
        );
    });
    fs::remove_dir_all(&run.local).expect("its run is not needed");

    // A second one is one too many: both are named.
    damage(folder.path(), "000001.tar");
    let both = ["data.quarantine_shards_max = 1", "000001.tar", "000003.tar"];
    run.finish(2, &one).refused(&both);
}
