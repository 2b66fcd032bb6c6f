//! Batches of every task over small datasets of plain colours, hinted at or not.

use std::collections::BTreeSet;
use std::io::Cursor;

use belfry_configs::{Dataset, Datasets, Task};
use shard_tools::manifest::{
    ANSWERS_FILE, DataFile, MANIFEST_FILE, Manifest, Member, SCHEMA_VERSION, SampleEntry,
    ShardEntry, ShardIndex, Source, sha256,
};
use shard_tools::pair::{Contents, Pair};
use tempfile::TempDir;

use super::*;
use crate::host_batch::Targets;
use crate::image::clip_transform;

const SIDE: usize = 32;

/// A sample whose images are of one colour each.
struct Sample {
    source: u32,
    colours: Vec<u8>,
    pairs: Vec<Pair>,
}

fn png(colour: u8) -> Vec<u8> {
    let pixel = image::Rgb([colour, 255 - colour, 7]);
    let image = image::RgbImage::from_pixel(40, 33, pixel);
    let mut bytes = Cursor::new(Vec::new());
    image
        .write_to(&mut bytes, image::ImageFormat::Png)
        .expect("encodes");
    bytes.into_inner()
}

/// The pixels that a batch should hold for an image of this colour.
fn pixels(colour: u8) -> Vec<f32> {
    clip_transform(&png(colour), SIDE).expect("decodes")
}

fn append(tar: &mut tar::Builder<Vec<u8>>, name: String, data: &[u8]) -> Member {
    let offset = tar.get_ref().len() as u64 + 512;
    let mut header = tar::Header::new_ustar();
    header.set_size(data.len() as u64);
    header.set_mode(0o644);
    tar.append_data(&mut header, &name, data).expect("appends");
    let bytes = data.len() as u64;
    Member {
        name,
        offset,
        bytes,
    }
}

fn write_shard(folder: &Path, number: usize, samples: &[Sample]) -> ShardEntry {
    let mut tar = tar::Builder::new(Vec::new());
    let entries = samples.iter().enumerate().map(|(n, sample)| {
        let key = format!("{number}-{n}");
        let colours = sample.colours.iter().enumerate();
        let images = colours
            .map(|(i, c)| append(&mut tar, format!("{key}.{i}.png"), &png(*c)))
            .collect();
        let json = serde_json::to_vec(&sample.pairs).expect("plain");
        SampleEntry {
            text: append(&mut tar, format!("{key}.pairs.json"), &json),
            key,
            images,
            pairs: sample.pairs.len() as u32,
            source: sample.source,
        }
    });
    let index = ShardIndex {
        schema_version: SCHEMA_VERSION,
        file: format!("{number}.tar"),
        samples: entries.collect(),
    };
    let tar = tar.into_inner().expect("whole");
    let json = serde_json::to_vec(&index).expect("plain");
    std::fs::write(folder.join(&index.file), &tar).expect("writes");
    std::fs::write(folder.join(format!("{number}.json")), &json).expect("writes");
    let of = |source: u32| samples.iter().filter(move |s| s.source == source);
    ShardEntry {
        file: index.file,
        index_file: format!("{number}.json"),
        bytes: tar.len() as u64,
        sha256: sha256(&tar),
        index_sha256: sha256(&json),
        samples: samples.len() as u32,
        pairs: samples.iter().map(|s| s.pairs.len() as u32).sum(),
        source_samples: (0..2).map(|s| of(s).count() as u32).collect(),
        source_pairs: (0..2)
            .map(|s| of(s).map(|s| s.pairs.len() as u32).sum())
            .collect(),
    }
}

/// A dataset of two sources in a folder of its own.
fn write(contents: Contents, shards: &[Vec<Sample>]) -> TempDir {
    let folder = TempDir::new().expect("a folder");
    let shards: Vec<ShardEntry> = shards
        .iter()
        .enumerate()
        .map(|(number, samples)| write_shard(folder.path(), number, samples))
        .collect();
    let source = |n: usize| Source {
        name: format!("s{n}"),
        samples: shards.iter().map(|s| u64::from(s.source_samples[n])).sum(),
        pairs: shards.iter().map(|s| u64::from(s.source_pairs[n])).sum(),
    };
    let answers = br#"["yes","no","two","red"]"#;
    std::fs::write(folder.path().join(ANSWERS_FILE), answers).expect("writes");
    let manifest = Manifest {
        schema_version: SCHEMA_VERSION,
        dataset: "colours".into(),
        contents,
        sources: vec![source(0), source(1)],
        files: vec![DataFile {
            file: ANSWERS_FILE.into(),
            bytes: answers.len() as u64,
            sha256: sha256(answers),
        }],
        samples: shards.iter().map(|s| u64::from(s.samples)).sum(),
        pairs: shards.iter().map(|s| u64::from(s.pairs)).sum(),
        shards,
    };
    let json = serde_json::to_vec(&manifest).expect("plain");
    std::fs::write(folder.path().join(MANIFEST_FILE), json).expect("writes");
    folder
}

/// `shards` shards of four samples: the colour of a sample is its number in the dataset times two,
/// source 1 has the odd ones; sample n has 1 + n mod 3 pairs, made by `pair(sample, pair)`.
fn colours(
    contents: Contents,
    shards: u8,
    pair: impl Fn(u8, u8) -> Pair,
) -> (TempDir, Vec<Vec<u8>>) {
    let images = contents.images() as u8;
    let sample = |n: u8| Sample {
        source: u32::from(n % 2),
        colours: (0..images).map(|i| n * 2 + i).collect(),
        pairs: (0..1 + n % 3).map(|p| pair(n, p)).collect(),
    };
    let shards: Vec<Vec<Sample>> = (0..shards)
        .map(|shard| (shard * 4..shard * 4 + 4).map(sample).collect())
        .collect();
    let samples = shards.iter().flatten();
    let by_pair = samples.flat_map(|s| s.pairs.iter().map(|_| s.colours.clone()));
    (write(contents, &shards), by_pair.collect())
}

fn caption(n: u8, p: u8) -> Pair {
    Pair::caption(format!("a picture of colour {n}, said in way {p}"))
}

fn config(
    task: Task,
    train: &[&TempDir],
    more: impl FnOnce(&mut belfry_configs::RunConfig),
) -> ValidConfig {
    let house = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let loaded = belfry_configs::load(&house.join("configs/tiny.toml"), &[]).expect("valid");
    let mut config = (*loaded).clone();
    let dataset = |folder: &&TempDir| Dataset {
        path: folder.path().display().to_string(),
        weight: None,
    };
    config.data.train = Datasets(train.iter().map(dataset).collect());
    config.data.validation = config.data.train.clone();
    config.data.pack_from = None;
    config.data.tokenizer = house.join(&config.data.tokenizer).display().to_string();
    config.model.task = task;
    config.model.image.size = SIDE as u32;
    config.model.head.answers = 4;
    config.batch.lanes = 2;
    config.batch.global_batch = 16;
    config.batch.micro_batch = 4;
    more(&mut config);
    config.validate().expect("valid")
}

fn open(config: &ValidConfig) -> DataPlane {
    let cache = std::env::temp_dir().join("belfry-data-tests");
    DataPlane::open(config, &cache, Split::Train).expect("opens")
}

fn steps(plane: &DataPlane, steps: u64) -> Vec<HostBatch> {
    let all = (0..steps).flat_map(|step| [(step, 0), (step, 1)]);
    let all = all.map(|(step, lane)| plane.lane_step(step, lane, &Quarantine::new()));
    all.flat_map(|batches| batches.expect("reads")).collect()
}

fn image(images: &[f32], row: usize) -> &[f32] {
    &images[row * 3 * SIDE * SIDE..(row + 1) * 3 * SIDE * SIDE]
}

#[test]
fn a_pair_brings_its_image_its_words_and_a_false_image_of_its_source() {
    let (folder, by_pair) = colours(Contents::Captions, 5, caption);
    let config = config(Task::Pretrain, &[&folder], |_| {});
    let plane = open(&config);
    let mut false_images = 0;
    for batch in steps(&plane, 6) {
        assert_eq!(batch.itm_labels.iter().sum::<i32>(), 2, "two of four match");
        assert_eq!(batch.targets, Targets::None);
        assert!(batch.second_images.is_empty());
        let mut mixed = Vec::new();
        batch.itm_images(&mut mixed);
        for row in 0..4 {
            let colour = by_pair[batch.pair_ids[row] as usize][0];
            assert_eq!(image(&batch.images, row), pixels(colour));
            let first = by_pair[batch.image_ids[row] as usize][0];
            assert_eq!(first, colour, "the first pair of the same image");
            let shown = image(&mixed, row);
            if batch.itm_labels[row] == 1 {
                assert_eq!(shown, image(&batch.images, row));
                continue;
            }
            // Samples of source 1 have colours 2, 6, 10 and so on.
            let same = |other: &&u8| **other % 4 == colour % 4;
            let source: Vec<u8> = by_pair.iter().flatten().filter(same).copied().collect();
            assert!(
                source.iter().any(|c| pixels(*c) == shown),
                "another source's image"
            );
            false_images += usize::from(shown != image(&batch.images, row));
        }
        let texts = batch.ids.chunks(16).zip(batch.masked_ids.chunks(16));
        for ((ids, masked), labels) in texts.zip(batch.mlm_labels.chunks(16)) {
            for ((id, masked), label) in ids.iter().zip(masked).zip(labels) {
                assert!(*label == -100 && id == masked || label == id);
            }
        }
        assert!(batch.bytes() <= plane.inner.assembly.bytes(4));
    }
    assert!(false_images > 20, "{false_images} of 48 differ");
}

#[test]
fn hints_rounds_and_mixtures_change_no_bit() {
    let (one, _) = colours(Contents::Captions, 5, caption);
    let (two, _) = colours(Contents::Captions, 3, caption);
    let with = |steps, bytes: u64| {
        config(Task::Pretrain, &[&one, &two], |config| {
            config.data.rounds = 2;
            config.data.prefetch_steps = steps;
            config.data.prefetch_bytes_max = bytes;
        })
    };
    let plain = open(&with(0, 1));
    let expected = steps(&plain, 8);
    let ids: BTreeSet<u64> = expected.iter().flat_map(|b| b.pair_ids.clone()).collect();
    assert!(ids.iter().any(|id| *id >= 39), "both datasets are there");
    for (ahead, bytes) in [(0, 1 << 20), (3, 1 << 30)] {
        let plane = open(&with(ahead, bytes));
        let mut found = Vec::new();
        for step in 0..8 {
            plane.prefetch(step, &[0, 1]);
            found.extend([0, 1].map(|lane| plane.lane_step(step, lane, &Quarantine::new())));
        }
        let found = found
            .into_iter()
            .flat_map(|batches| batches.expect("reads"));
        assert!(found.eq(expected.iter().cloned()), "{ahead} steps ahead");
    }
}

#[test]
fn a_lost_shard_is_named_and_its_pairs_are_replaced_under_quarantine() {
    let (folder, _) = colours(Contents::Captions, 5, caption);
    let plane = open(&config(Task::Pretrain, &[&folder], |_| {}));
    std::fs::remove_file(folder.path().join("2.tar")).expect("was there");
    let lost = ShardRef {
        dataset: 0,
        shard: 2,
    };
    let mut replaced = 0;
    for step in 0..6 {
        for lane in [0, 1] {
            let whole = plane.sequence().pairs(step, lane, &Quarantine::new());
            plane.prefetch(step, &[lane]);
            let made = plane.lane_step(step, lane, &Quarantine::new());
            match made {
                Ok(_) => assert!(whole.iter().all(|pair| pair.shard != 2)),
                Err(error) => {
                    assert_eq!(error.unreadable(), Some(lost), "{error}");
                    assert!(error.to_string().contains("2.tar"), "{error}");
                }
            }
            let quarantine = Quarantine::from([lost]);
            let batches = plane
                .lane_step(step, lane, &quarantine)
                .expect("others are there");
            let ids: Vec<u64> = batches.iter().flat_map(|b| b.pair_ids.clone()).collect();
            let pairs = plane.sequence().pairs(step, lane, &quarantine);
            assert_eq!(ids, pairs.iter().map(|p| p.id).collect::<Vec<_>>());
            replaced += pairs.iter().filter(|p| p.replaces.is_some()).count();
        }
    }
    assert!(replaced > 5, "{replaced}");
}

#[test]
fn classifiers_have_their_labels_and_nlvr2_two_images() {
    let labelled = |n: u8, p: u8| Pair {
        labels: vec![u32::from((n + p) % 2)],
        ..caption(n, p)
    };
    let (folder, by_pair) = colours(Contents::Nlvr2, 5, labelled);
    let plane = open(&config(Task::Nlvr2, &[&folder], |_| {}));
    for batch in steps(&plane, 4) {
        assert!(batch.itm_labels.is_empty() && batch.masked_ids.is_empty());
        let Targets::Classes(classes) = &batch.targets else {
            panic!("{:?}", batch.targets)
        };
        assert_eq!(classes.len(), 4);
        for (row, class) in classes.iter().enumerate() {
            let id = batch.pair_ids[row];
            let colours = &by_pair[id as usize];
            assert_eq!(image(&batch.images, row), pixels(colours[0]));
            assert_eq!(image(&batch.second_images, row), pixels(colours[1]));
            let pair = (id - batch.image_ids[row]) as u8;
            assert_eq!(*class, i32::from((colours[0] / 2 + pair) % 2));
        }
    }
    let wrong = |n: u8, p: u8| Pair {
        labels: vec![3],
        ..caption(n, p)
    };
    let (folder, _) = colours(Contents::SnliVe, 3, wrong);
    let plane = open(&config(Task::SnliVe, &[&folder], |_| {}));
    let said = plane
        .lane_step(0, 0, &Quarantine::new())
        .expect_err("no class 3");
    assert!(said.to_string().contains("labels [3]"), "{said}");
}

#[test]
fn questions_have_the_soft_scores_of_their_answers() {
    let asked = |n: u8, p: u8| Pair {
        labels: vec![u32::from(n % 4), u32::from((n + 1) % 4)],
        scores: vec![1.0, 0.3],
        ..caption(n, p)
    };
    let (folder, by_pair) = colours(Contents::Vqa, 5, asked);
    let plane = open(&config(Task::Vqa, &[&folder], |_| {}));
    for batch in steps(&plane, 4) {
        let Targets::Scores { answers, rows } = &batch.targets else {
            panic!("{:?}", batch.targets)
        };
        assert_eq!(*answers, 4);
        for (row, id) in rows.iter().zip(&batch.pair_ids) {
            let sample = u32::from(by_pair[*id as usize][0] / 2);
            assert_eq!(*row, [(sample % 4, 1.0), ((sample + 1) % 4, 0.3)]);
        }
    }
    let config = config(Task::Vqa, &[&folder], |c| c.model.head.answers = 3129);
    let refused = DataPlane::open(&config, &std::env::temp_dir(), Split::Train);
    let said = refused.err().expect("refused").to_string();
    assert!(
        said.contains("model.head.answers: is 3129") && said.contains("has 4"),
        "{said}"
    );
}

#[test]
fn any_row_of_a_step_has_the_numbers_of_its_lanes_batch() {
    let (folder, _) = colours(Contents::Captions, 5, caption);
    let config = config(Task::Retrieval, &[&folder], |_| {});
    let plane = open(&config);
    for step in 0..3 {
        let lanes = [0, 1].map(|lane| plane.lane_step(step, lane, &Quarantine::new()));
        let batches: Vec<HostBatch> = lanes.into_iter().flat_map(|b| b.expect("reads")).collect();
        let places = [9, 0, 15, 0, 6];
        let rows = plane
            .rows(step, &places, &Quarantine::new())
            .expect("reads");
        assert_eq!(rows.pairs, places.len());
        for (row, place) in places.into_iter().enumerate() {
            let (batch, at) = (&batches[place / 4], place % 4);
            assert_eq!(rows.pair_ids[row], batch.pair_ids[at]);
            assert_eq!(rows.image_ids[row], batch.image_ids[at]);
            assert_eq!(image(&rows.images, row), image(&batch.images, at));
            let tokens = |ids: &[i32], row: usize| ids[row * 16..(row + 1) * 16].to_vec();
            assert_eq!(tokens(&rows.ids, row), tokens(&batch.ids, at));
        }
    }
    let lost = ShardRef {
        dataset: 0,
        shard: plane.sequence().pairs(0, 1, &Quarantine::new())[0].shard,
    };
    std::fs::remove_file(folder.path().join(format!("{}.tar", lost.shard))).expect("was there");
    let plane = open(&config);
    let error = plane
        .rows(0, &[8], &Quarantine::new())
        .expect_err("is gone");
    assert_eq!(error.unreadable(), Some(lost), "{error}");
    let without = Quarantine::from([lost]);
    let rows = plane
        .rows(0, &[8], &without)
        .expect("another pair stands for it");
    assert_eq!(
        rows.pair_ids[0],
        plane.sequence().pairs(0, 1, &without)[0].id
    );
}

#[test]
fn an_evaluation_walks_all_datasets_once() {
    let (one, first) = colours(Contents::Captions, 3, caption);
    let (two, second) = colours(Contents::Captions, 2, caption);
    let config = config(Task::Retrieval, &[&one, &two], |_| {});
    let cache = std::env::temp_dir().join("belfry-data-tests");
    let plane = DataPlane::open(&config, &cache, Split::Validation).expect("opens");
    let batches = plane.evaluation_batches().collect::<Result<Vec<_>, _>>();
    let batches = batches.expect("reads");
    let ids: Vec<u64> = batches.iter().flat_map(|b| b.pair_ids.clone()).collect();
    assert_eq!(ids, (0..plane.pairs()).collect::<Vec<_>>());
    let by_pair: Vec<u8> = first.iter().chain(&second).map(|c| c[0]).collect();
    assert_eq!(by_pair.len() as u64, plane.pairs());
    for batch in &batches {
        assert!(batch.itm_labels.is_empty() && batch.masked_ids.is_empty());
        for (row, id) in batch.pair_ids.iter().enumerate() {
            assert_eq!(image(&batch.images, row), pixels(by_pair[*id as usize]));
        }
    }
    // Any range gives the same, whole or texts and images apart.
    let pairs = plane.pairs();
    let (whole, about) = plane.evaluation_batch(0..pairs, 0).expect("reads");
    let second = about.iter().position(|a| a.dataset == 1);
    assert_eq!(second, Some(first.len()), "each pair knows its dataset");
    let texts = plane.evaluation_texts(3..pairs).expect("reads");
    assert_eq!(texts.ids, whole.ids[3 * whole.text_len..]);
    let mask = whole.text_mask[3 * whole.text_len..].iter();
    assert_eq!(
        texts.text_mask,
        mask.map(|m| f32::from(*m)).collect::<Vec<_>>()
    );
    assert_eq!(texts.image_ids, whole.image_ids[3..]);
    let shown = plane.evaluation_images(&[pairs - 1, 0]).expect("reads");
    assert_eq!(image(&shown, 0), pixels(by_pair[pairs as usize - 1]));
    assert_eq!(image(&shown, 1), pixels(by_pair[0]));
}

#[test]
fn an_image_that_stands_there_twice_is_decoded_once() {
    let shard = ShardRef {
        dataset: 0,
        shard: 0,
    };
    let wish = |sample, bytes: &[u8]| pixels::Wish {
        place: reading::ImagePlace {
            shard,
            sample,
            image: 0,
        },
        bytes: bytes.to_vec().into(),
        key: Key::new(0, Purpose::Augment).with(sample as u64),
    };
    // The third has the place of the first, so its bytes are never looked at.
    let wishes = [wish(0, &png(9)), wish(1, &png(50)), wish(0, b"no image")];
    let how = How {
        kind: Default::default(),
        side: SIDE,
        truncated: Default::default(),
    };
    let mut all = vec![0.0; 3 * 3 * SIDE * SIDE];
    pixels::fill(
        how,
        &wishes,
        all.chunks_exact_mut(3 * SIDE * SIDE).collect(),
    )
    .expect("decodes");
    for (row, colour) in [9, 50, 9].into_iter().enumerate() {
        assert_eq!(image(&all, row), pixels(colour));
    }
    let wishes = [wish(0, &png(9)), wish(5, b"no image")];
    let slots = all.chunks_exact_mut(3 * SIDE * SIDE).take(2).collect();
    let (place, _) = pixels::fill(how, &wishes, slots).expect_err("no image");
    assert_eq!(place.sample, 5);
}
