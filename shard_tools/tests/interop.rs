//! Shards between Belfry and the `webdataset` package, both ways.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use shard_tools::manifest::sha256;

/// A Python with `webdataset`, or a loud word that there is none.
fn python() -> Option<String> {
    let program = std::env::var("BELFRY_PYTHON").unwrap_or_else(|_| "python3".into());
    let found = Command::new(&program)
        .args(["-c", "import webdataset"])
        .output();
    if found.is_ok_and(|output| output.status.success()) {
        return Some(program);
    }
    let _ = writeln!(
        std::io::stderr(),
        "SKIPPED: `{program}` has no webdataset; `pip install webdataset` brings it, BELFRY_PYTHON \
         names the Python that has it"
    );
    None
}

fn output(command: &mut Command) -> String {
    let output = command.output().expect("starts");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command:?}: {said}");
    String::from_utf8(output.stdout).expect("is text")
}

fn script(python: &str, arguments: &[&str]) -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/webdataset_interop.py");
    output(Command::new(python).arg(file).args(arguments))
}

fn shard_tools(arguments: &[&str]) -> String {
    output(Command::new(env!("CARGO_BIN_EXE_shard_tools")).args(arguments))
}

fn photographs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/stamps")
}

/// What `webdataset` reads in a folder, by key.
fn read(python: &str, folder: &str) -> BTreeMap<String, Value> {
    let lines = script(python, &["read", folder]);
    let sample = |line| serde_json::from_str::<Value>(line).expect("is JSON");
    let samples = lines.lines().map(sample);
    let samples = samples.map(|s| (s["key"].as_str().expect("a key").to_owned(), s));
    samples.collect()
}

/// What we list in a folder, by key.
fn listed(folder: &str) -> BTreeMap<String, Value> {
    let lines = shard_tools(&["ls", folder, "--limit", "0", "--json"]);
    let sample = |line| serde_json::from_str::<Value>(line).expect("is JSON");
    let samples = lines.lines().map(sample);
    let samples = samples.map(|s| (s["key"].as_str().expect("a key").to_owned(), s));
    samples.collect()
}

#[test]
fn webdataset_reads_what_we_pack() {
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let packed = folder.path().join("packed").display().to_string();
    let photographs = photographs();
    let input = photographs.display().to_string();
    shard_tools(&["pack", &input, &packed, "--pairs-per-shard", "50"]);
    let found = read(&python, &packed);
    assert_eq!(found.len(), 232, "every photograph once");
    for (key, sample) in &found {
        let of = |extension: &str| {
            let file = photographs.join(format!("{key}.{extension}"));
            std::fs::read(file).expect("is there")
        };
        assert_eq!(sample["sha256"]["jpg"], sha256(&of("jpg")), "{key}");
        let text = String::from_utf8(of("txt")).expect("is text");
        let first = sample["text"].as_str().and_then(|text| text.lines().next());
        assert_eq!(first, text.lines().next(), "{key}");
    }
}

/// Long names, two images and labels, as our own tars write them.
#[test]
fn webdataset_reads_our_long_names_and_pairs() {
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let photograph = std::fs::read(photographs().join("bear.jpg")).expect("is there");
    let long = format!("s/{}", "long-".repeat(60));
    let keys = ["s/größe-漢字".to_owned(), long];
    let pairs = json!([{"text": "both are bears", "labels": [1], "scores": [0.5]}]).to_string();
    let members = keys.iter().flat_map(|key| {
        [
            (format!("{key}.0.jpg"), photograph.clone()),
            (format!("{key}.1.jpg"), photograph.clone()),
            (format!("{key}.pairs.json"), pairs.clone().into_bytes()),
        ]
    });
    let tar = shard_tools::pack::tar_of(members);
    std::fs::write(folder.path().join("000000.tar"), tar).expect("is written");
    let found = read(&python, &folder.path().display().to_string());
    let read_keys: Vec<&String> = found.keys().collect();
    assert_eq!(read_keys, keys.iter().collect::<Vec<_>>());
    for sample in found.values() {
        assert_eq!(sample["sha256"]["0.jpg"], sha256(&photograph));
        assert_eq!(sample["sha256"]["1.jpg"], sha256(&photograph));
        assert_eq!(sample["text"], pairs);
    }
}

#[test]
fn we_read_what_webdataset_and_tarfile_write() {
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let input = photographs().display().to_string();
    let (captions, pairs) = (path("captions"), path("pairs"));
    for folder in [&captions, &pairs] {
        std::fs::create_dir(folder).expect("is made");
    }
    script(&python, &["write", &input, &captions]);
    std::fs::rename(
        format!("{captions}/pairs.tar"),
        format!("{pairs}/pairs.tar"),
    )
    .expect("is moved");

    shard_tools(&["index", &captions]);
    shard_tools(&["verify", &captions]);
    let (ours, theirs) = (listed(&captions), read(&python, &captions));
    let keys = |samples: &BTreeMap<String, Value>| samples.keys().cloned().collect::<Vec<_>>();
    // webdataset keeps a leading `./`, tar's own way to write a folder; both take it for the key.
    assert_eq!(keys(&ours), keys(&theirs));
    assert_eq!(ours.len(), 20 + 3 + 3 + 3 + 2);
    assert_eq!(ours.keys().filter(|key| key.len() > 300).count(), 6);
    for (key, sample) in &ours {
        let file = format!("{captions}/{}", sample["shard"].as_str().expect("a name"));
        let tar = std::fs::read(file).expect("is there");
        let image = &sample["images"][0];
        let [offset, bytes] = ["offset", "bytes"].map(|f| image[f].as_u64().expect("a number"));
        let data = &tar[offset as usize..(offset + bytes) as usize];
        let hashes = theirs[key]["sha256"].as_object().expect("an object");
        let image = hashes.iter().find(|(name, _)| name.starts_with("jp"));
        assert_eq!(image.expect("an image").1, &sha256(data), "{key}");
    }
    let odd = ours.values().find(|s| {
        s["images"][0]["name"]
            .as_str()
            .is_some_and(|n| n.ends_with("JPG"))
    });
    let texts: Vec<&Value> = odd.expect("upper-case extensions")["pairs"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|pair| &pair["text"])
        .collect();
    assert_eq!(texts, ["one caption", "and another", "And a third."]);

    shard_tools(&["index", &pairs, "--contents", "nlvr2"]);
    shard_tools(&["verify", &pairs]);
    let sample = &listed(&pairs)["nlvr2/dev-0"];
    assert_eq!(sample["images"].as_array().map(Vec::len), Some(2));
    let both =
        json!([{"text": "both are toys", "id": "dev-0-0", "labels": [1]}, {"text": "ça va 漢"}]);
    assert_eq!(sample["pairs"], both);
}
