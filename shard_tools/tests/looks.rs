//! What looks at a dataset: the binary's commands on real photographs, with what is wrong or different
//! planted.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use shard_tools::pack::tar_of;

/// Exit code, standard output, standard error.
type Said = (i32, String, String);

fn shard_tools(arguments: &[&str]) -> Said {
    let output = Command::new(env!("CARGO_BIN_EXE_shard_tools"))
        .args(arguments)
        .env_remove("RUST_BACKTRACE")
        .output()
        .expect("starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("is text");
    let code = output.status.code().expect("ends by itself");
    (code, text(output.stdout), text(output.stderr))
}

fn accepted(arguments: &[&str]) -> String {
    let (code, said, wrong) = shard_tools(arguments);
    assert_eq!(code, 0, "{arguments:?}: {said}{wrong}");
    said
}

fn photograph(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/stamps");
    std::fs::read(folder.join(name)).expect("is there")
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Folder(tempfile::tempdir().expect("a folder"))
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    /// A dataset of tars with these members, indexed.
    fn dataset(&self, name: &str, contents: &str, tars: &[Vec<(String, Vec<u8>)>]) -> String {
        let folder = self.path(name);
        std::fs::create_dir(&folder).expect("is made");
        for (place, members) in tars.iter().enumerate() {
            let file = PathBuf::from(&folder).join(format!("{place:03}.tar"));
            std::fs::write(file, tar_of(members.clone())).expect("is written");
        }
        if contents == "vqa" {
            let file = PathBuf::from(&folder).join("answers.json");
            std::fs::write(file, r#"["yes","no","a dog"]"#).expect("is written");
        }
        accepted(&["index", &folder, "--contents", contents, "--name", name]);
        folder
    }
}

/// An image with its captions, as members of a tar.
fn captioned(key: &str, image: &str, captions: &str) -> Vec<(String, Vec<u8>)> {
    let image = (format!("{key}.jpg"), photograph(image));
    vec![image, (format!("{key}.txt"), captions.as_bytes().to_vec())]
}

fn labelled(key: &str, images: &[&str], pairs: &str) -> Vec<(String, Vec<u8>)> {
    let name = |place: usize| match images.len() {
        1 => format!("{key}.jpg"),
        _ => format!("{key}.{place}.jpg"),
    };
    let images = images.iter().enumerate();
    let mut members: Vec<_> = images
        .map(|(i, image)| (name(i), photograph(image)))
        .collect();
    members.push((format!("{key}.pairs.json"), pairs.as_bytes().to_vec()));
    members
}

fn three() -> Vec<Vec<(String, Vec<u8>)>> {
    let one = captioned("a", "bear.jpg", "A bear.\nAn animal.\n");
    let two = captioned("b", "bison.jpg", "A bison.\n");
    let three = captioned("c", "beaver.jpg", "A beaver.\n");
    vec![[one, two].concat(), three]
}

#[test]
fn datasets_are_compared_by_what_they_hold_and_not_by_their_shards() {
    let folder = Folder::new();
    let a = folder.dataset("same", "captions", &three());
    accepted(&["diff", &a, &a]);
    // The same samples in another order, in one shard: only the manifest's count of shards differs.
    let mut members = three();
    members.reverse();
    let other = folder.path("elsewhere");
    std::fs::create_dir(&other).expect("is made");
    std::fs::write(format!("{other}/x.tar"), tar_of(members.concat())).expect("is written");
    accepted(&["index", &other, "--name", "same"]);
    let (code, said, _) = shard_tools(&["diff", &a, &other]);
    assert_eq!((code, said.as_str()), (1, "manifest: shards is 2, and 1\n"));

    let changed = vec![
        captioned("a", "bear.jpg", "A bear.\nA animal.\n"),
        [
            captioned("d", "badger.jpg", "A badger.\n"),
            captioned("c", "badger.jpg", "A beaver.\n"),
        ]
        .concat(),
    ];
    let b = folder.dataset("changed", "captions", &changed);
    let (code, said, wrong) = shard_tools(&["diff", &a, &b]);
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(code, 1);
    assert!(wrong.contains("6 differences"), "{wrong}");
    assert_eq!(lines.len(), 6, "{said}");
    assert!(
        lines[0].contains("dataset is `same`, and `changed`"),
        "{said}"
    );
    assert!(lines[1].starts_with("manifest: sources"), "{said}");
    let pair = "sample `a`, pair 1: {\"text\":\"An animal.\"}, and {\"text\":\"A animal.\"}";
    assert_eq!(lines[2], pair);
    assert_eq!(lines[3], format!("sample `b` is only in {}", real(&a)));
    assert!(
        lines[4].starts_with("sample `c`: image c.jpg has"),
        "{said}"
    );
    assert_eq!(lines[5], format!("sample `d` is only in {}", real(&b)));
    let (code, _, wrong) = shard_tools(&["diff", &a, &folder.path("missing")]);
    assert_eq!(code, 2, "trouble is no difference");
    assert!(wrong.contains("missing: no such folder"), "{wrong}");
}

fn real(folder: &str) -> String {
    std::fs::canonicalize(folder)
        .expect("is there")
        .display()
        .to_string()
}

#[test]
fn verify_names_every_lie_and_quick_reads_hashes_only() {
    let folder = Folder::new();
    let pairs = r#"[{"text":"is it a dog?","labels":[2,7],"scores":[1.0,0.3]}]"#;
    let mut broken = labelled(
        "v/2",
        &["bison.jpg"],
        r#"[{"text":"what is it?","labels":[1]}]"#,
    );
    broken[0].1.truncate(2000);
    let members = [labelled("v/1", &["bear.jpg"], pairs), broken];
    let vqa = folder.dataset(
        "vqa",
        "vqa",
        &[members.concat(), labelled("v/1", &["bear.jpg"], pairs)],
    );
    let (code, said, wrong) = shard_tools(&["verify", &vqa]);
    assert_eq!(code, 1);
    let told = |part: &str| assert!(said.contains(part), "{part}: {said}");
    told("shard 000.tar, member v/1.pairs.json, offset");
    told("label 7, and there are 3 classes");
    told("shard 000.tar, member v/2.jpg, offset");
    told("sample `v/1` is in shard 000.tar and in 001.tar");
    assert_eq!(said.lines().count(), 4, "{said}");
    assert!(wrong.contains("4 problems"), "{wrong}");
    // Indexes alone tell that a key comes twice; what is inside members they do not.
    let (_, quick, _) = shard_tools(&["verify", "--quick", &vqa]);
    assert_eq!(quick, "sample `v/1` is in shard 000.tar and in 001.tar\n");

    // Images of one sample; a file that was changed, a shard that is gone.
    let nlvr2 = labelled("n", &["bear.jpg"], r#"[{"text":"both","labels":[1]}]"#);
    let nlvr2 = folder.dataset("nlvr2", "nlvr2", &[nlvr2]);
    let (_, said, _) = shard_tools(&["verify", &nlvr2]);
    assert!(
        said.contains("its sample has 1 images, its contents want 2"),
        "{said}"
    );
    std::fs::write(format!("{vqa}/answers.json"), r#"["yes"]"#).expect("is written");
    std::fs::remove_file(format!("{vqa}/001.tar")).expect("is removed");
    let (code, said, _) = shard_tools(&["verify", "--quick", &vqa]);
    assert_eq!((code, said.lines().count()), (1, 3), "{said}");
    assert!(said.contains("file answers.json: 7 bytes"), "{said}");
    assert!(said.contains("001.tar does not exist"), "{said}");
}

#[test]
fn an_index_that_disagrees_with_its_tar_is_found() {
    let folder = Folder::new();
    let a = folder.dataset("a", "captions", &three());
    // The tar is swapped and the manifest's hashes made to agree: only the index still tells.
    let mut swapped = three()[0].clone();
    swapped.rotate_left(2);
    let tar = tar_of(swapped);
    let file = format!("{a}/manifest.json");
    let manifest = std::fs::read_to_string(&file).expect("is text");
    let old =
        shard_tools::manifest::sha256(&std::fs::read(format!("{a}/000.tar")).expect("is there"));
    let manifest = manifest.replace(&old, &shard_tools::manifest::sha256(&tar));
    std::fs::write(&file, manifest).expect("is written");
    std::fs::write(format!("{a}/000.tar"), tar).expect("is written");
    let (code, said, _) = shard_tools(&["verify", &a]);
    assert_eq!((code, said.lines().count()), (1, 1), "{said}");
    assert!(
        said.contains("shard 000.tar, sample 0: the index 000.index.json says `a`"),
        "{said}"
    );
    assert!(said.contains("the tar holds `b`"), "{said}");
}

#[test]
fn lists_and_totals_are_for_people_and_machines() {
    let folder = Folder::new();
    let a = folder.dataset("animals", "captions", &three());
    let all = "000.tar\ta\tA bear. | An animal.\n000.tar\tb\tA bison.\n001.tar\tc\tA beaver.\n";
    assert_eq!(accepted(&["ls", &a]), all);
    assert_eq!(accepted(&["ls", &a, "--limit", "1"]).lines().count(), 1);
    assert_eq!(
        accepted(&["ls", &a, "--shard", "1"]),
        "001.tar\tc\tA beaver.\n"
    );
    assert_eq!(
        accepted(&["ls", &a, "--shard", "001.tar"]),
        "001.tar\tc\tA beaver.\n"
    );
    let line = accepted(&["ls", &a, "--key", "b", "--json"]);
    let line: Value = serde_json::from_str(&line).expect("is JSON");
    assert_eq!(line["pairs"][0]["text"], "A bison.");
    assert_eq!(line["images"][0]["name"], "b.jpg");
    let (code, _, wrong) = shard_tools(&["ls", &a, "--key", "zebra"]);
    assert!(
        code == 1 && wrong.contains("no key holds `zebra`"),
        "{wrong}"
    );
    let (code, _, wrong) = shard_tools(&["ls", &a, "--shard", "9"]);
    assert!(
        code == 1 && wrong.contains("2 shards, 000.tar to 001.tar"),
        "{wrong}"
    );

    let info = accepted(&["info", &a]);
    assert!(info.contains("pairs     4, 1.33 a sample"), "{info}");
    let info: Value = serde_json::from_str(&accepted(&["info", &a, "--json"])).expect("is JSON");
    assert_eq!(
        (info["samples"].as_u64(), info["shards"].as_u64()),
        (Some(3), Some(2))
    );
    let bytes = std::fs::read(format!("{a}/manifest.json")).expect("is there");
    assert_eq!(
        info["manifest_sha256"],
        shard_tools::manifest::sha256(&bytes)
    );
}

#[test]
fn statistics_count_labels_and_what_comes_twice() {
    let folder = Folder::new();
    let pairs = |label| format!(r#"[{{"text":"a bear sleeps","labels":[{label}]}}]"#);
    let tars = [
        labelled("1", &["bear.jpg"], &pairs(2)),
        labelled("2", &["bear.jpg"], &pairs(0)),
        labelled("3", &["bison.jpg"], &pairs(2)),
    ];
    let snli = folder.dataset("snli", "snli_ve", &tars);
    let said = accepted(&["stats", &snli, "--json"]);
    let stats: Value = serde_json::from_str(&said).expect("is JSON");
    let counts = &stats["counts"];
    assert_eq!(counts["images"], 3);
    assert_eq!(counts["formats"]["jpeg"], 3);
    assert_eq!(counts["labels"]["2"], 2);
    assert_eq!(counts["text_words"]["sum"], 9.0);
    assert_eq!(stats["duplicates"]["images"], 1);
    assert_eq!(stats["duplicates"]["texts"], 2);
    assert_eq!(stats["duplicates"]["samples"][0][1], "2");
    let bytes = photograph("bear.jpg").len() * 2 + photograph("bison.jpg").len();
    assert_eq!(counts["sources"][0]["image_bytes"], bytes);
    let said = accepted(&["stats", &snli]);
    assert!(said.contains("entailment (2)"), "{said}");
    assert!(said.contains("the same image: 1, 2"), "{said}");
    let said = accepted(&["stats", &snli, "--no-duplicates"]);
    assert!(!said.contains("duplicates"), "{said}");
}

#[test]
fn a_sheet_shows_what_its_seed_draws() {
    let folder = Folder::new();
    let mut tars = three();
    tars[1][0].1.truncate(700);
    let a = folder.dataset("animals", "captions", &tars);
    let draw = |name: &str, more: &[&str]| {
        let to = folder.path(name);
        let arguments = [&["sample", &a, "--to", &to][..], more].concat();
        let said = accepted(&arguments);
        (said, std::fs::read(&to).expect("was written"))
    };
    let (said, sheet) = draw("all.png", &[]);
    assert!(
        said.contains("3 samples") && said.contains("1 images do not decode"),
        "{said}"
    );
    let image = image::load_from_memory(&sheet).expect("is a PNG").to_rgb8();
    let (width, height) = image.dimensions();
    assert!(width > 3 * 240 && height > 200, "{width} x {height}");
    let coloured = image
        .pixels()
        .filter(|p| p.0.iter().max() != p.0.iter().min());
    assert!(coloured.count() > 5_000, "photographs are on it");
    assert_eq!(draw("again.png", &[]).1, sheet, "the same bytes");
    let (_, one) = draw("one.png", &["--count", "1", "--seed", "1"]);
    assert_eq!(draw("two.png", &["--count", "1", "--seed", "1"]).1, one);
    let others = (2..9).map(|seed| draw("s.png", &["--count", "1", "--seed", &seed.to_string()]).1);
    assert!(
        others.filter(|other| *other != one).count() > 0,
        "other seeds draw others"
    );
}
