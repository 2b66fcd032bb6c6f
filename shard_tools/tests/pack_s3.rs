//! Packing straight to a real S3 server, in parts, interrupted and gone on with; and back from there.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use shard_tools::manifest::sha256;

#[path = "../../tests/promises/s3_server.rs"]
mod s3_server;
#[path = "../../tests/promises/skipped.rs"]
mod skipped;

use s3_server::{S3Server, SECRET_KEY};

/// Hash of every file in `folder`.
fn files(folder: &Path) -> BTreeMap<String, String> {
    let entries = std::fs::read_dir(folder).expect("is a folder").flatten();
    entries
        .map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            let bytes = std::fs::read(entry.path()).expect("is read");
            (name, sha256(&bytes))
        })
        .collect()
}

struct Case {
    server: S3Server,
}

impl Case {
    /// Runs the program; whether it went well, and what it said.
    fn run(&self, arguments: &[&str]) -> (bool, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_shard_tools"));
        command.args(arguments);
        let output = self.server.reach(&mut command, SECRET_KEY).output();
        let output = output.expect("starts");
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        (output.status.success(), said)
    }

    fn accepted(&self, arguments: &[&str]) {
        let (good, said) = self.run(arguments);
        assert!(good, "{arguments:?}: {said}");
    }

    fn refused(&self, arguments: &[&str], parts: &[&str]) {
        let (good, said) = self.run(arguments);
        assert!(!good, "{arguments:?} must be refused: {said}");
        for part in parts {
            assert!(said.contains(part), "`{part}` is not in: {said}");
        }
    }
}

#[test]
fn a_bucket_takes_the_bytes_that_a_folder_takes() {
    let Some(server) = S3Server::start() else {
        return;
    };
    let case = Case { server };
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let input = path("input");
    std::fs::create_dir(&input).expect("is made");
    let photographs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/stamps");
    // 28 MB, so that a shard of 20 goes up in parts.
    for name in files(&photographs).into_keys() {
        for copy in 0..12 {
            let to = Path::new(&input).join(format!("{copy}-{name}"));
            std::fs::copy(photographs.join(&name), to).expect("is copied");
        }
    }
    // The last in the packing order, which is that of hashes.
    let keys = files(Path::new(&input)).into_keys();
    let images = keys.filter_map(|name| name.strip_suffix(".jpg").map(str::to_owned));
    let last = images.max_by_key(|key| sha256(format!("0/{key}").as_bytes()));
    let broken = last.expect("there are images") + ".jpg";
    std::fs::write(Path::new(&input).join(&broken), b"BM").expect("is written");
    let options = ["--pairs-per-shard", "100000", "--shard-bytes", "20MiB"];
    let pack = |input: &str, output: &str, more: &[&str]| -> Vec<String> {
        let all = [&["pack", input, output][..], &options, more].concat();
        all.into_iter().map(str::to_owned).collect()
    };
    let run = |arguments: Vec<String>| {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        case.accepted(&arguments);
    };
    run(pack(&input, &path("local"), &["--max-bad", "1"]));
    let local = files(Path::new(&path("local")));
    assert!(local.contains_key("000001.tar") && local.contains_key("bad.jsonl"));

    // The broken image stops it; what was packed before is kept, and another limit goes on.
    let bucket = case.server.url("packed");
    let stopped = pack(&input, &bucket, &[]);
    let stopped: Vec<&str> = stopped.iter().map(String::as_str).collect();
    case.refused(&stopped, &[&broken, "a BMP", "--max-bad"]);
    case.refused(&stopped, &["not finished", "--resume"]);
    run(pack(&input, &bucket, &["--resume", "--max-bad", "1"]));
    case.accepted(&["verify", &bucket]);
    case.refused(&stopped, &["already holds a dataset"]);

    // Read from the bucket by ranges and packed again, the shards are what they were.
    run(pack(&bucket, &path("back"), &["--format", "webdataset"]));
    let back = files(Path::new(&path("back")));
    for (name, hash) in local.iter().filter(|(name, _)| name.ends_with(".tar")) {
        assert_eq!(back.get(name), Some(hash), "{name}");
    }
    let other = case.server.url("mixed");
    case.accepted(&[
        "mix",
        &other,
        &format!("a={bucket}"),
        &format!("b={}", path("local")),
    ]);
    let (_, told) = case.run(&["info", &other, "--json"]);
    let told: serde_json::Value = serde_json::from_str(&told).expect("is JSON");
    assert_eq!(told["samples"], 2 * (232 * 12 - 1), "{told}");
}
