//! Datasets made of a folder's pixels.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Cursor;
use std::path::{Path, PathBuf};

use image::{ImageFormat, Rgb, RgbImage};
use shard_tools::pack::formats::pixels;
use shard_tools::pack::{self, BadKind, list_keys};
use shard_tools::pair::Contents;

use crate::fixture::{Publisher, Read};

const TASKS: [Contents; 4] = [
    Contents::Captions,
    Contents::Vqa,
    Contents::SnliVe,
    Contents::Nlvr2,
];

/// 36 plain pictures, each a little brighter than the one before; `p07` is the seventh.
fn grey() -> Publisher {
    let publisher = Publisher::new();
    for number in 1..=36u8 {
        let picture = RgbImage::from_pixel(8, 6, Rgb([7 * number; 3]));
        let mut bytes = Cursor::new(Vec::new());
        let written = picture.write_to(&mut bytes, ImageFormat::Png);
        written.expect("is written");
        publisher
            .write(&format!("in/p{number:02}.png"), bytes.into_inner())
            .write(
                &format!("in/p{number:02}.txt"),
                format!("Picture {number}.\n"),
            );
    }
    publisher
}

fn number(key: &str) -> u32 {
    key[1..].parse().expect("a number")
}

#[tokio::test]
async fn answers_are_true_of_the_pixels() {
    let publisher = grey();
    let catalog = pixels::catalog(&publisher.path("in"), None, Contents::Vqa);
    let read = publisher.pack(catalog, 0).await;
    let answers = std::fs::read_to_string(publisher.path("packed/answers.json"));
    let answers: Vec<String> = serde_json::from_str(&answers.expect("is there")).expect("a list");
    let mut asked = BTreeMap::new();
    for (key, sample) in &read.samples {
        for pair in &sample.pairs {
            let said: Vec<(&str, f32)> = pair
                .labels
                .iter()
                .map(|label| answers[*label as usize].as_str())
                .zip(pair.scores.iter().copied())
                .collect();
            let number = number(key);
            // Twelve pictures each; the two on either side of a line lie near it.
            let expected: &[(&str, f32)] = match (pair.text.as_str(), number) {
                ("how bright is the picture?", 11) => &[("dark", 1.0), ("medium", 0.3)],
                ("how bright is the picture?", 12) => &[("dark", 1.0), ("medium", 0.9)],
                ("how bright is the picture?", 13) => &[("medium", 1.0), ("dark", 0.9)],
                ("how bright is the picture?", 14) => &[("medium", 1.0), ("dark", 0.3)],
                ("how bright is the picture?", 23) => &[("medium", 1.0), ("bright", 0.3)],
                ("how bright is the picture?", 24) => &[("medium", 1.0), ("bright", 0.9)],
                ("how bright is the picture?", 25) => &[("bright", 1.0), ("medium", 0.9)],
                ("how bright is the picture?", 26) => &[("bright", 1.0), ("medium", 0.3)],
                ("how bright is the picture?", n) if n < 11 => &[("dark", 1.0)],
                ("how bright is the picture?", n) if n < 23 => &[("medium", 1.0)],
                ("how bright is the picture?", _) => &[("bright", 1.0)],
                ("is the picture dark or bright?", n) if n < 11 => &[("dark", 1.0)],
                ("is the picture dark or bright?", n) if n > 26 => &[("bright", 1.0)],
                ("is the picture bright?", n) if n < 11 => &[("no", 1.0)],
                ("is the picture bright?", n) if n > 26 => &[("yes", 1.0)],
                (text, n) => panic!("p{n} was asked `{text}`: {said:?}"),
            };
            assert_eq!(said, expected, "{} of {key}", pair.text);
            *asked.entry(pair.text.clone()).or_insert(0) += 1;
            let id: u32 = pair
                .id
                .as_ref()
                .expect("has one")
                .parse()
                .expect("a number");
            assert_eq!(id / 1000, number);
        }
    }
    assert_eq!(
        asked.len(),
        3,
        "what all pictures have alike is not asked: {asked:?}"
    );
    assert_eq!(asked["how bright is the picture?"], 36);
}

#[tokio::test]
async fn statements_compare_what_is_there() {
    let publisher = grey();
    let keys: Vec<String> = (1..=20).map(|number| format!("p{number:02}")).collect();
    let catalog = pixels::catalog(&publisher.path("in"), Some(&keys), Contents::Nlvr2);
    let read = publisher.pack(catalog, 0).await;
    assert!(read.samples.len() > 20, "{}", read.samples.len());
    for (key, sample) in &read.samples {
        let (left, right) = key.split_once("--").expect("two pictures");
        assert!(
            number(left) <= 20 && number(right) <= 20,
            "{key} is held out"
        );
        let file = |key: &str| {
            let bytes = std::fs::read(publisher.path(&format!("in/{key}.png")));
            bytes.expect("is there")
        };
        assert_eq!(sample.bytes(), [file(left), file(right)]);
        for pair in &sample.pairs {
            assert_eq!(
                pair.text,
                "The left picture is brighter than the right one."
            );
            let truth = number(left) > number(right);
            assert_eq!(pair.labels, [u32::from(truth)], "{} of {key}", pair.text);
        }
    }
}

#[tokio::test]
async fn captions_begin_with_what_is_seen() {
    let publisher = grey();
    let catalog = pixels::catalog(&publisher.path("in"), None, Contents::Captions);
    let read = publisher.pack(catalog, 0).await;
    assert_eq!(
        read.of("p03").texts(),
        [
            "A dark, neutral, muted, even picture, evenly lit. Picture 3.",
            "It is evenly lit, even, muted, neutral, dark."
        ]
    );
    assert!(read.of("p36").texts()[0].starts_with("A bright,"));
}

#[tokio::test]
async fn a_broken_image_counts_as_bad_and_a_missing_caption_too() {
    let publisher = grey();
    publisher.write("in/p05.png", &b"\x89PNG\r\n\x1a\n and no more"[..]);
    std::fs::remove_file(publisher.path("in/p07.txt")).expect("is removed");
    let catalog = pixels::catalog(&publisher.path("in"), None, Contents::Captions);
    let read = publisher.pack(catalog, 2).await;
    read.tells(BadKind::BrokenImage, &["p05.png"]);
    read.tells(BadKind::BrokenText, &["p07.txt", "is not there"]);
    let empty = pixels::catalog(&publisher.path(""), None, Contents::Vqa);
    let told = empty.err().expect("holds no image").to_string();
    assert!(told.contains("no image"), "{told}");
}

fn stamps() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/stamps")
}

/// How often each text has each label.
fn labels(read: &Read) -> BTreeMap<String, BTreeMap<u32, u32>> {
    let mut counts: BTreeMap<String, BTreeMap<u32, u32>> = BTreeMap::new();
    for pair in read.samples.values().flat_map(|sample| &sample.pairs) {
        let of = counts.entry(pair.text.clone()).or_default();
        *of.entry(pair.labels[0]).or_default() += 1;
    }
    counts
}

#[tokio::test]
async fn photographs_give_every_task_its_data() {
    let publisher = Publisher::new();
    let all = list_keys(&stamps()).expect("photographs");
    let keys: Vec<String> = all.iter().step_by(4).cloned().collect();
    let wanted: BTreeSet<&str> = keys.iter().map(String::as_str).collect();
    for contents in TASKS {
        let catalog = || pixels::catalog(&stamps(), Some(&keys), contents);
        let again = catalog().expect("is described").sha256();
        let first = catalog().expect("is described");
        assert_eq!(first.sha256(), again, "the same folder gives the same data");
        let read = publisher
            .pack_to(&format!("{contents:?}"), Ok(first), 0)
            .await;
        for key in read.keys() {
            assert!(key.split("--").all(|key| wanted.contains(key)), "{key}");
        }
        assert_eq!(read.packed.manifest.contents, contents);
        if contents == Contents::Captions {
            assert_eq!(read.samples.len(), keys.len());
            continue;
        }
        let labels = labels(&read);
        let classes = contents.classes();
        for (text, counts) in &labels {
            assert!(counts.values().all(|n| *n >= 3), "{text}: {counts:?}");
            let enough = classes.is_none_or(|classes| counts.len() as u32 == classes);
            assert!(enough, "{text}: {counts:?}");
            if contents != Contents::Nlvr2 {
                let mut even: Vec<&u32> = counts.values().collect();
                even.dedup();
                assert_eq!(even.len(), 1, "{text}: {counts:?}");
            }
        }
        let texts = match contents {
            Contents::Vqa => 15,
            Contents::SnliVe => 5,
            _ => 4,
        };
        assert_eq!(labels.len(), texts, "{:?}", labels.keys());
        let mut sums: BTreeMap<u32, u32> = BTreeMap::new();
        for (label, n) in labels.values().flatten() {
            *sums.entry(*label).or_default() += n;
        }
        if contents == Contents::Nlvr2 {
            assert_eq!(sums[&0], sums[&1], "as many true as false");
        }
    }
}

#[tokio::test]
async fn every_part_of_a_folder_has_one_answer_file() {
    let all = list_keys(&stamps()).expect("photographs");
    let (first, rest) = all.split_at(40);
    let file = |keys: &[String]| {
        let catalog = pixels::catalog(&stamps(), Some(keys), Contents::Vqa);
        catalog.expect("is described").files
    };
    let (first, rest) = (file(first), file(rest));
    assert_eq!(first, rest);
    let answers: Vec<String> = serde_json::from_slice(&first[0].1).expect("a list");
    assert_eq!(answers.len(), 17);
    let kept: Vec<String> = answers
        .iter()
        .map(|answer| pack::normalize(answer))
        .collect();
    assert_eq!(kept, answers, "an answer is its own normal form");
}
