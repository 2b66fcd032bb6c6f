//! Shards between Belfry and the `webdataset` package, both ways.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::system::outcome;

/// A Python with `webdataset`, or a loud word that there is none.
fn python() -> Option<String> {
    let program = std::env::var("BELFRY_PYTHON").unwrap_or_else(|_| "python3".into());
    let found = Command::new(&program)
        .args(["-c", "import webdataset"])
        .output();
    if found.is_ok_and(|output| output.status.success()) {
        return Some(program);
    }
    crate::skipped(&format!(
        "`{program}` has no webdataset; `pip install webdataset` brings it, BELFRY_PYTHON names \
         the Python that has it"
    ));
    None
}

fn script(python: &str, arguments: &[&str]) -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/promises/python");
    let output = Command::new(python)
        .arg(file.join("webdataset_interop.py"))
        .args(arguments)
        .output()
        .expect("Python starts");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    String::from_utf8(output.stdout).expect("is text")
}

fn shards(arguments: &[&str]) -> crate::system::Outcome {
    let mut command = Command::new(env!("CARGO_BIN_EXE_belfry"));
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    command.arg("shards").args(arguments);
    outcome(command.output().expect("starts"))
}

#[test]
fn webdataset_reads_packed_shards_and_its_own_are_indexed() {
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let photos = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/stamps");

    let (photos_text, packed) = (photos.display().to_string(), path("packed"));
    shards(&["pack", &photos_text, &packed, "--pairs-per-shard", "50"]).accepted();
    let lines = script(&python, &["read", &packed]);
    let read: BTreeMap<String, Value> = lines
        .lines()
        .map(|line| {
            let sample: Value = serde_json::from_str(line).expect("is JSON");
            (sample["key"].as_str().expect("a key").to_owned(), sample)
        })
        .collect();
    assert_eq!(read.len(), 232, "every photograph once");
    for (key, sample) in &read {
        let bytes = std::fs::read(photos.join(format!("{key}.jpg"))).expect("is there");
        assert_eq!(
            sample["sha256"],
            shard_tools::manifest::sha256(&bytes),
            "{key}"
        );
        let text = std::fs::read_to_string(photos.join(format!("{key}.txt"))).expect("is there");
        assert_eq!(
            sample["captions"][0],
            text.lines().next().expect("a caption")
        );
    }

    let foreign = path("foreign");
    std::fs::create_dir(&foreign).expect("is made");
    script(&python, &["write", &photos_text, &foreign]);
    shards(&["index", &foreign]).accepted();
    shards(&["verify", &foreign]).accepted();
    let listed = shards(&["info", &foreign]).accepted();
    assert!(listed.contains("20"), "{listed}");
    shards(&["pack", &photos_text, &packed]).refused(&["already holds a dataset"]);
}
