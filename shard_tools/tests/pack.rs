//! Packing: the same bytes every time, an unfinished dataset goes on, and whatever is wrong later is
//! found with its place.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use shard_tools::pack::{PackOptions, pack_folder};
use shard_tools::store::Root;
use shard_tools::verify::problems;

fn photographs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/stamps")
}

fn options(output: &Path, resume: bool) -> PackOptions {
    PackOptions {
        input: photographs(),
        output: output.display().to_string(),
        dataset: "stamps".into(),
        pairs_per_shard: 40,
        seed: 0,
        keys: None,
        resume,
        progress: false,
    }
}

fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).expect("is a folder").flatten();
    entries
        .map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            (name, std::fs::read(entry.path()).expect("is read"))
        })
        .collect()
}

async fn wrong(folder: &Path) -> Vec<String> {
    let root = Root::open(&folder.display().to_string()).expect("opens");
    problems(&root).await.expect("there is a manifest")
}

#[tokio::test]
async fn packing_twice_and_going_on_give_the_same_bytes() {
    let folder = tempfile::tempdir().expect("a folder");
    let [one, two] = ["one", "two"].map(|name| folder.path().join(name));
    let manifest = pack_folder(&options(&one, false)).await.expect("packs");
    assert_eq!((manifest.samples, manifest.pairs), (232, 232));
    pack_folder(&options(&two, false)).await.expect("packs");
    let whole = files(&one);
    assert_eq!(whole, files(&two), "the same bytes");
    assert!(wrong(&one).await.is_empty());

    let refused = pack_folder(&options(&one, true)).await;
    let told = refused.expect_err("is whole").to_string();
    assert!(told.contains("already holds a dataset"), "{told}");

    // A crash before the end: no manifest, a shard missing, another cut off.
    std::fs::remove_file(two.join("manifest.json")).expect("is removed");
    std::fs::remove_file(two.join("000005.tar")).expect("is removed");
    let half = whole["000004.tar"][..5000].to_vec();
    std::fs::write(two.join("000004.tar"), half).expect("is written");
    let refused = pack_folder(&options(&two, false)).await;
    let told = refused.expect_err("not without resume").to_string();
    assert!(told.contains("--resume"), "{told}");
    pack_folder(&options(&two, true)).await.expect("goes on");
    assert_eq!(files(&two), whole);
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
