//! Every way in which a checkpoint on a disk can lie, and what is said of it.

use super::verify::{Pace, Verdict, verify};
use super::*;

/// A root with a checkpoint of `step` in three parts, one larger than a block; their names.
async fn made(step: u64) -> (tempfile::TempDir, Root, Vec<v1::PartStored>) {
    let folder = tempfile::tempdir().expect("a folder");
    let root = Root::open(&folder.path().display().to_string()).expect("opens");
    let parts = put(&root, step).await;
    (folder, root, parts)
}

async fn put(root: &Root, step: u64) -> Vec<v1::PartStored> {
    use sha2::Digest as _;
    let mut parts = Vec::new();
    for (part, len) in (0..).zip([40, BLOCK_BYTES as usize * 2 + 77, 1000]) {
        let bytes: Vec<u8> = (0..len).map(|i| (i as u64 * step + part) as u8).collect();
        let sha256 = hex(&sha2::Sha256::digest(&bytes));
        let blocks = bytes.chunks(BLOCK_BYTES as usize);
        let blocks = blocks.flat_map(|b| xxhash_rust::xxh3::xxh3_64(b).to_le_bytes());
        let stored = v1::PartStored {
            step,
            part: part as u32,
            file: format!("{}.safetensors", &sha256[..32]),
            sha256,
            bytes: len as u64,
            blocks: blocks.collect(),
            ..Default::default()
        };
        let path = format!("{}/{}", folder(step), stored.file);
        root.put(&path, Bytes::from(bytes)).await.expect("is put");
        parts.push(stored);
    }
    let said = put_manifest(root, "run", step, &parts).await;
    assert_eq!(said.expect("is put"), None);
    parts
}

async fn verdict(root: &Root, step: u64) -> Verdict {
    let mut pace = Pace::new(f64::INFINITY);
    verify(root, step, &mut pace, |_| {})
        .await
        .expect("the store answers")
}

#[tokio::test]
async fn every_lie_of_a_part_is_named_with_its_place() {
    let (folder, root, parts) = made(4).await;
    let good = verdict(&root, 4).await;
    assert_eq!(good.faults, [""; 0]);
    assert_eq!(good.bytes, parts.iter().map(|p| p.bytes).sum::<u64>());
    let path = folder.path().join(super::folder(4)).join(&parts[1].file);
    let whole = std::fs::read(&path).expect("was put");
    let said = async |bytes: Option<&[u8]>| {
        match bytes {
            Some(bytes) => std::fs::write(&path, bytes).expect("is written"),
            None => std::fs::remove_file(&path).expect("was there"),
        }
        let verdict = verdict(&root, 4).await;
        let [fault] = &verdict.faults[..] else {
            panic!("{verdict:?}")
        };
        assert!(fault.contains(&parts[1].file), "{fault}");
        fault.clone()
    };
    // A flip in each kind of block: the first, one in the middle, the short one at the end.
    let block = BLOCK_BYTES as usize;
    let ends = [(0, block), (block, 2 * block), (2 * block, whole.len())];
    for (from, to) in ends {
        for at in [from, to - 1] {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            let fault = said(Some(&flipped)).await;
            assert!(
                fault.ends_with(&format!("; wrong in bytes {from}..{to}")),
                "{fault}"
            );
        }
    }
    for cut in [1, block - 1, block, block + 1, whole.len() - 1] {
        let fault = said(Some(&whole[..cut])).await;
        assert!(fault.contains(&format!("ends at byte {cut}, ")), "{fault}");
    }
    assert!(said(Some(&[])).await.contains("ends at byte 0"));
    let longer = [&whole[..], b"x"].concat();
    assert!(
        said(Some(&longer))
            .await
            .contains(&format!("goes on behind byte {}", whole.len()))
    );
    assert!(said(None).await.contains("is missing"));
    std::fs::write(&path, &whole).expect("is written");
    assert_eq!(verdict(&root, 4).await, good);
}

#[tokio::test]
async fn a_manifest_cut_at_any_byte_is_no_manifest_and_is_replaced() {
    let (folder, root, parts) = made(4).await;
    let path = folder.path().join(manifest_file(4));
    let whole = std::fs::read(&path).expect("was put");
    for cut in 0..whole.len() {
        std::fs::write(&path, &whole[..cut]).expect("is written");
        let verdict = verdict(&root, 4).await;
        let [fault] = &verdict.faults[..] else {
            panic!("cut at {cut}: {verdict:?}")
        };
        assert!(
            fault.contains("manifest.json") && fault.contains("is not a manifest"),
            "{fault}"
        );
    }
    for text in ["no JSON", "{}", "{\"step\": 5}"] {
        std::fs::write(&path, text).expect("is written");
        assert_eq!(verdict(&root, 4).await.faults.len(), 1, "{text}");
    }
    let said = put_manifest(&root, "run", 4, &parts).await.expect("is put");
    assert_eq!((said, verdict(&root, 4).await.faults.len()), (None, 0));
    let other = put_manifest(&root, "run", 4, &parts[..2])
        .await
        .expect("is read");
    assert!(
        other
            .expect("another one stands there")
            .contains("says otherwise")
    );
    let elsewhere = String::from_utf8(whole)
        .expect("text")
        .replace("\"step\": 4", "\"step\": 8");
    std::fs::write(&path, elsewhere).expect("is written");
    assert!(verdict(&root, 4).await.faults[0].contains("is of step 8, its folder of step 4"));
}

#[tokio::test]
async fn a_manifest_of_an_earlier_version_has_no_blocks_and_is_verified_all_the_same() {
    let (folder, root, mut parts) = made(4).await;
    std::fs::remove_file(folder.path().join(manifest_file(4))).expect("was there");
    parts.iter_mut().for_each(|part| part.blocks.clear());
    put_manifest(&root, "run", 4, &parts).await.expect("is put");
    assert_eq!(verdict(&root, 4).await.faults, [""; 0]);
    let path = folder.path().join(super::folder(4)).join(&parts[2].file);
    let mut bytes = std::fs::read(&path).expect("was put");
    bytes[5] ^= 1;
    std::fs::write(&path, bytes).expect("is written");
    let fault = verdict(&root, 4).await.faults.pop().expect("a fault");
    assert!(
        fault.contains("has sha256") && !fault.contains("wrong in bytes"),
        "{fault}"
    );
}

#[tokio::test]
async fn what_is_marked_corrupt_is_not_usable_until_it_is_written_again() {
    let (_folder, root, _) = made(4).await;
    put(&root, 8).await;
    let usable = async || {
        usable(&root)
            .await
            .expect("is listed")
            .into_iter()
            .collect::<Vec<_>>()
    };
    assert_eq!(usable().await, [4, 8]);
    let rotten = Verdict {
        step: 8,
        bytes: 1,
        faults: vec!["rotten".into()],
    };
    mark(&root, &rotten).await.expect("is put");
    assert_eq!(usable().await, [4]);
    put(&root, 8).await;
    assert_eq!(usable().await, [4, 8]);
    mark(&root, &verdict(&root, 8).await).await.expect("is put");
    let listed = list(&root).await.expect("is listed");
    assert!(listed[&8].verified.is_some() && listed[&4].verified.is_none());
}

#[tokio::test]
async fn a_deletion_that_is_cut_leaves_no_checkpoint_and_can_be_repeated() {
    let (folder, root, parts) = made(4).await;
    put(&root, 8).await;
    root.delete(&manifest_file(4)).await.expect("is deleted");
    let listed = list(&root).await.expect("is listed");
    assert!(!listed[&4].is_usable() && listed[&4].parts().count() == 3);
    let bytes: u64 = parts.iter().map(|p| p.bytes).sum();
    assert_eq!(delete(&root, 4).await.expect("is deleted"), bytes);
    assert_eq!(delete(&root, 4).await.expect("is gone"), 0);
    assert!(!folder.path().join(super::folder(4)).exists());
    assert_eq!(usable(&root).await.expect("is listed"), BTreeSet::from([8]));
}
