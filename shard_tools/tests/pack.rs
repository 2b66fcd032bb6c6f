//! Packing: the same bytes every time and with any number of threads, an unfinished dataset goes on
//! after kill -9, what is bad is counted and listed, and whatever is wrong later is found.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use shard_tools::ShardError;
use shard_tools::check::Check;
use shard_tools::manifest::{Manifest, sha256};
use shard_tools::pack::{self, Bad, BadKind, MaxBad, PackOptions};
use shard_tools::store::Root;
use shard_tools::verify::problems;

fn photographs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/stamps")
}

fn options(output: &Path, resume: bool) -> PackOptions {
    PackOptions {
        pairs_per_shard: 40,
        resume,
        ..PackOptions::new(output.display().to_string(), "stamps")
    }
}

async fn pack_folder(options: &PackOptions) -> Result<Manifest, ShardError> {
    let catalog = pack::folder(&photographs(), None)?;
    Ok(pack::pack(catalog, options).await?.manifest)
}

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

async fn wrong(folder: &Path) -> Vec<String> {
    let root = Root::open(&folder.display().to_string()).expect("opens");
    problems(&root).await.expect("there is a manifest")
}

#[tokio::test]
async fn any_number_of_threads_gives_the_same_bytes() {
    let folder = tempfile::tempdir().expect("a folder");
    let one = folder.path().join("one");
    let packed = PackOptions {
        threads: 1,
        ..options(&one, false)
    };
    let manifest = pack_folder(&packed).await.expect("packs");
    assert_eq!((manifest.samples, manifest.pairs), (232, 232));
    assert!(manifest.files.is_empty(), "nothing is bad");
    assert!(wrong(&one).await.is_empty());
    for (name, threads, check) in [("four", 4, Check::Structure), ("decode", 3, Check::Decode)] {
        let other = folder.path().join(name);
        let packed = PackOptions {
            threads,
            check,
            ..options(&other, false)
        };
        pack_folder(&packed).await.expect("packs");
        assert_eq!(files(&one), files(&other), "{name}: the same bytes");
    }
    let refused = pack_folder(&options(&one, true)).await;
    let told = refused.expect_err("is whole").to_string();
    assert!(told.contains("already holds a dataset"), "{told}");
}

#[tokio::test]
async fn shards_end_by_bytes_too() {
    let folder = tempfile::tempdir().expect("a folder");
    let packed = folder.path().join("packed");
    let bytes_max = 200 << 10;
    let packing = PackOptions {
        shard_bytes: bytes_max,
        ..options(&packed, false)
    };
    let manifest = pack_folder(&packing).await.expect("packs");
    assert_eq!(manifest.samples, 232);
    let shards = &manifest.shards;
    assert!(
        shards
            .iter()
            .all(|shard| shard.bytes <= bytes_max && shard.pairs <= 40)
    );
    // No stamp is half as long as the cap, so no shard but the last may be half empty.
    let filled = &shards[..shards.len() - 1];
    assert!(
        filled
            .iter()
            .all(|shard| shard.bytes > bytes_max / 2 || shard.pairs == 40)
    );
    assert!(wrong(&packed).await.is_empty());
}

/// The photographs under three names each: enough shards to be killed between.
fn many(folder: &Path) -> PathBuf {
    let input = folder.join("many");
    std::fs::create_dir(&input).expect("is made");
    for name in files(&photographs()).into_keys() {
        for copy in 0..3 {
            let to = input.join(format!("{copy}-{name}"));
            std::fs::copy(photographs().join(&name), to).expect("is copied");
        }
    }
    input
}

fn program(input: &Path, output: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shard_tools"));
    command.arg("pack").args([input, output]);
    command.args([
        "--pairs-per-shard",
        "20",
        "--check",
        "decode",
        "--max-bad",
        "2",
    ]);
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

fn refused(command: &mut Command) -> String {
    let output = command.output().expect("starts");
    assert!(!output.status.success(), "is refused");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_killed_packer_goes_on_to_the_same_bytes() {
    let folder = tempfile::tempdir().expect("a folder");
    let input = many(folder.path());
    // Two bad samples, so that what was found bad must outlive the crash.
    std::fs::write(input.join("0-3_earth.jpg"), b"<html>").expect("is written");
    std::fs::write(input.join("2-5_jupiter.txt"), b"\n").expect("is written");
    let whole = folder.path().join("whole");
    assert!(program(&input, &whole).status().expect("starts").success());
    let whole = files(&whole);
    assert!(whole.contains_key("bad.jsonl") && !whole.contains_key("packing"));

    let mut killed = 0;
    for shard in [0, 3, 9, 17, 30] {
        let output = folder.path().join(format!("killed-{shard}"));
        let mut child = program(&input, &output).spawn().expect("starts");
        let entry = output.join(format!("packing/{shard:06}.json"));
        while !entry.exists() && child.try_wait().expect("answers").is_none() {
            std::thread::yield_now();
        }
        child.kill().expect("is killed");
        child.wait().expect("ends");
        // What a write that was cut leaves beside its target must not count.
        std::fs::write(output.join("000031.tar#1"), b"half").expect("is written");
        if !output.join("manifest.json").exists() {
            killed += 1;
            let told = refused(&mut program(&input, &output));
            assert!(told.contains("--resume"), "{told}");
            let told = refused(program(&input, &output).args(["--resume", "--seed", "1"]));
            assert!(told.contains("--seed was 0, is 1"), "{told}");
            let finished = finished_shards(&output);
            assert!(
                program(&input, &output)
                    .arg("--resume")
                    .status()
                    .expect("starts")
                    .success()
            );
            for (file, written) in finished {
                let again = std::fs::metadata(output.join(&file)).expect("is there");
                assert_eq!(
                    again.modified().expect("a time"),
                    written,
                    "{file} is written once"
                );
            }
        }
        assert_eq!(files(&output), whole, "killed after shard {shard}");
    }
    assert!(killed >= 3, "killed only {killed} times before the end");
}

/// Tars whose entry stands in the journal, with the time of their writing.
fn finished_shards(output: &Path) -> Vec<(String, std::time::SystemTime)> {
    let finished = (0..).map(|number| format!("{number:06}"));
    finished
        .take_while(|n| output.join(format!("packing/{n}.json")).exists())
        .map(|n| {
            let file = format!("{n}.tar");
            let written = std::fs::metadata(output.join(&file)).expect("is there");
            (file, written.modified().expect("a time"))
        })
        .collect()
}

#[tokio::test]
async fn other_tars_are_not_written_over() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("000000.tar"), b"mine").expect("is written");
    for resume in [false, true] {
        let refused = pack_folder(&options(folder.path(), resume)).await;
        let told = refused.expect_err("holds tars").to_string();
        assert!(told.contains("holds tars"), "{told}");
    }
}

#[tokio::test]
async fn bad_samples_are_counted_and_listed_and_too_many_fail() {
    let folder = tempfile::tempdir().expect("a folder");
    let input = folder.path().join("in");
    std::fs::create_dir(&input).expect("is made");
    let earth = std::fs::read(photographs().join("3_earth.jpg")).expect("a photograph");
    for index in 0..20 {
        let write = |extension: &str, bytes: &[u8]| {
            let file = input.join(format!("{index:02}.{extension}"));
            std::fs::write(file, bytes).expect("is written");
        };
        match index {
            4 => write("jpg", &earth[..earth.len() / 2]),
            7 => write("png", b"GIF89a"),
            // A JPEG by another name is no harm.
            9 => write("PNG", &earth),
            11 => {
                write("jpg", &earth);
                continue;
            }
            13 => {
                write("jpg", &earth);
                write("webp", &earth);
            }
            _ => write("jpg", &earth),
        }
        write(
            "txt",
            format!("sample {index}\n\nsample {index}\n").as_bytes(),
        );
    }
    let pack_at = |name: &str, max_bad: &str, resume: bool| {
        let options = PackOptions {
            max_bad: max_bad.parse().expect("a limit"),
            ..options(&folder.path().join(name), resume)
        };
        let catalog = pack::folder(&input, None).expect("there are images");
        async move { pack::pack(catalog, &options).await }
    };
    let told = pack_at("out", "3", false)
        .await
        .err()
        .expect("four are bad")
        .to_string();
    assert!(
        told.contains("3 allowed") && told.contains("--max-bad"),
        "{told}"
    );
    let told = pack_at("none", "0", false)
        .await
        .err()
        .expect("four are bad")
        .to_string();
    assert!(
        told.contains(&input.display().to_string()),
        "names the file: {told}"
    );

    // It ended before its first shard, so there is nothing to go on with or to be in the way.
    let packed = pack_at("out", "20%", false)
        .await
        .expect("four are allowed");
    assert_eq!((packed.manifest.samples, packed.manifest.pairs), (16, 16));
    assert_eq!(
        packed.left_out.values().sum::<u64>(),
        16,
        "a repeated caption each"
    );
    let kinds: BTreeMap<BadKind, u64> = pack::by_kind(&packed.bad);
    let expected = [
        (BadKind::BrokenImage, 2),
        (BadKind::BrokenText, 1),
        (BadKind::DoubleKey, 1),
    ];
    assert_eq!(kinds, expected.into());
    let listed = std::fs::read_to_string(folder.path().join("out/bad.jsonl")).expect("is there");
    let listed: Vec<Bad> = listed
        .lines()
        .map(|line| serde_json::from_str(line).expect("a JSON line"))
        .collect();
    assert_eq!(listed, packed.bad);
    assert!(
        listed
            .iter()
            .any(|bad| bad.place.ends_with("04.jpg") && bad.reason.contains("cut off"))
    );
    assert!(
        listed
            .iter()
            .any(|bad| bad.place.ends_with("07.png") && bad.reason.contains("GIF"))
    );
    assert_eq!(packed.manifest.files[0].file, "bad.jsonl");
    assert!(wrong(&folder.path().join("out")).await.is_empty());
    assert_eq!(MaxBad::Share(0.2).of(20), 4);
}

#[tokio::test]
async fn everything_that_is_wrong_is_found_with_its_place() {
    let folder = tempfile::tempdir().expect("a folder");
    let packed = folder.path().join("packed");
    pack_folder(&options(&packed, false)).await.expect("packs");
    let shard = packed.join("000002.tar");
    let mut bytes = std::fs::read(&shard).expect("was packed");
    // The first member's data begins behind its header; a JPEG must begin with its mark.
    bytes[512] ^= 0xFF;
    std::fs::write(&shard, bytes).expect("is written");
    std::fs::remove_file(packed.join("000003.index.json")).expect("is removed");
    let found = wrong(&packed).await;
    let told = |parts: &[&str]| {
        let all = |text: &&String| parts.iter().all(|part| text.contains(part));
        assert!(found.iter().any(|text| all(&text)), "{parts:?}: {found:#?}");
    };
    told(&["000002.tar", "sha256"]);
    told(&["000002.tar", "member", "offset 512"]);
    told(&["000003.index.json", "does not exist"]);
}
