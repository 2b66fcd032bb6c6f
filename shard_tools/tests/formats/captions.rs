//! Caption datasets: COCO, Flickr30K, Conceptual Captions, SBU, Visual Genome.

use serde_json::{Value, json};
use shard_tools::pack::BadKind;
use shard_tools::pack::formats::{Input, downloads, karpathy, visual_genome};

use crate::fixture::{Publisher, photo, png};

fn sentences(imgid: u64, texts: &[&str]) -> Value {
    let sentence = |(n, text): (usize, &&str)| {
        let tokens: Vec<&str> = text.split(' ').collect();
        json!({"tokens": tokens, "raw": text, "imgid": imgid, "sentid": imgid * 5 + n as u64})
    };
    texts.iter().enumerate().map(sentence).collect()
}

fn coco_image(number: u64, folder: &str, split: &str, texts: &[&str]) -> Value {
    json!({
        "filepath": folder, "sentids": [number * 5], "imgid": number, "cocoid": number,
        "filename": format!("COCO_{folder}_{number:012}.jpg"), "split": split,
        "sentences": sentences(number, texts),
    })
}

fn coco() -> Publisher {
    let publisher = Publisher::new();
    let mut broken = coco_image(6, "train2014", "train", &["a broken one"]);
    broken
        .as_object_mut()
        .expect("an object")
        .remove("sentences");
    let images = [
        coco_image(1, "train2014", "train", &["A dog.", "A cat", "A dog."]),
        coco_image(2, "val2014", "restval", &["rest"]),
        coco_image(3, "val2014", "val", &["val"]),
        coco_image(4, "val2014", "test", &["test one", "test two"]),
        coco_image(5, "train2014", "train", &["nobody shipped this image"]),
        broken,
    ];
    publisher.json(
        "karpathy/dataset_coco.json",
        &json!({"images": images, "dataset": "coco"}),
    );
    for (number, folder) in [
        (1, "train2014"),
        (2, "val2014"),
        (3, "val2014"),
        (4, "val2014"),
    ] {
        let name = format!("{folder}/COCO_{folder}_{number:012}.jpg");
        publisher.write(&name, photo(number));
    }
    publisher
}

#[tokio::test]
async fn coco_trains_on_train_and_restval_and_tests_on_test() {
    let publisher = coco();
    let input = || Input::new(publisher.path(""));
    let train = publisher.pack(karpathy::coco(&input()), 2).await;
    assert_eq!(
        train.keys(),
        ["COCO_train2014_000000000001", "COCO_val2014_000000000002"]
    );
    let first = train.of("COCO_train2014_000000000001");
    assert_eq!(first.texts(), ["A dog.", "A cat"]);
    assert_eq!(first.bytes(), [photo(1)]);
    assert_eq!(train.left_out(), 1, "a repeated caption");
    train.tells(
        BadKind::BrokenRecord,
        &["dataset_coco.json: images[5]", "sentences"],
    );
    train.tells(
        BadKind::MissingImage,
        &["train2014/COCO_train2014_000000000005.jpg"],
    );

    for split in ["val", "test"] {
        let read = publisher
            .pack_to(split, karpathy::coco(&input().split(split)), 1)
            .await;
        assert_eq!(read.keys(), ["COCO_val2014_000000000004"], "{split}");
    }
    let own = karpathy::coco(&input().split("karpathy-val"));
    assert_eq!(
        publisher.pack_to("own", own, 1).await.keys(),
        ["COCO_val2014_000000000003"]
    );
    let refused = karpathy::coco(&input().split("dev"))
        .err()
        .expect("no such split");
    assert!(
        refused.to_string().contains("coco has train, val, test"),
        "{refused}"
    );
}

#[tokio::test]
async fn flickr30k_trains_on_train_and_val() {
    let publisher = Publisher::new();
    let image = |number: u64, split: &str| {
        json!({
            "sentids": [0], "imgid": number, "filename": format!("{number}.jpg"), "split": split,
            "sentences": sentences(number, &["Two men.", "Men."]),
        })
    };
    let images = [
        image(10, "train"),
        image(11, "val"),
        image(12, "test"),
        json!({"split": 7}),
    ];
    publisher.json(
        "dataset_flickr30k.json",
        &json!({"images": images, "dataset": "flickr30k"}),
    );
    for number in 10..13 {
        publisher.write(&format!("flickr30k-images/{number}.jpg"), photo(number));
    }
    let input = || Input::new(publisher.path(""));
    let train = publisher.pack(karpathy::flickr30k(&input()), 1).await;
    assert_eq!(train.keys(), ["10", "11"]);
    train.tells(BadKind::BrokenRecord, &["images[3]"]);
    let test = karpathy::flickr30k(&input().split("test"));
    let test = publisher.pack_to("test", test, 1).await;
    assert_eq!(test.keys(), ["12"]);
    assert_eq!(test.packed.manifest.pairs, 2);
}

#[tokio::test]
async fn conceptual_captions_are_found_by_row() {
    let publisher = Publisher::new();
    publisher.write(
        "utils/Train_GCC-training.tsv",
        "a red bus\thttp://h/a.jpg\na tree\thttp://h/b.jpg\nno tab here\nsea \"at dusk\tu\nx\tu\n",
    );
    // As downloaded: zeros before the row, or none; true formats differ from the names.
    publisher.write("train_image/00000000.jpg", photo(0));
    publisher.write("train_image/3.jpg", png(3));
    publisher.write("train_image/00000004.jpg", b"GIF89a...");
    publisher.write("train_image/00000099.jpg", photo(1));
    let read = publisher.pack(
        downloads::conceptual_captions(&Input::new(publisher.path(""))),
        3,
    );
    let read = read.await;
    assert_eq!(read.keys(), ["00000000", "3"]);
    assert_eq!(read.of("00000000").texts(), ["a red bus"]);
    assert_eq!(read.of("3").texts(), ["sea \"at dusk"]);
    assert_eq!(
        read.of("3").images,
        [("3.png".to_owned(), png(3))],
        "named by its content"
    );
    read.tells(BadKind::MissingImage, &["Train_GCC-training.tsv:2", "`1`"]);
    read.tells(
        BadKind::BrokenRecord,
        &["Train_GCC-training.tsv:3", "no tab"],
    );
    read.tells(BadKind::BrokenImage, &["00000004.jpg", "GIF"]);
    assert_eq!(read.left_out(), 1, "a file that no record names");

    // The authors' list of downloads leaves out what it does not name.
    publisher.write("train_image_exist.txt", "x/train_image/00000000.jpg\n");
    let read = downloads::conceptual_captions(&Input::new(publisher.path("")));
    let read = publisher.pack_to("listed", read, 0).await;
    assert_eq!((read.keys(), read.left_out()), (vec!["00000000"], 4 + 3));
}

#[tokio::test]
async fn lists_of_file_and_caption_are_read() {
    let publisher = Publisher::new();
    let list = json!([
        ["images_val/0/7.jpg", "one"],
        ["images_val/1/8.jpg", "two"],
        ["9.jpg"]
    ]);
    publisher.json("val_annot.json", &list);
    publisher.write("images_val/0/7.jpg", photo(0));
    publisher.write("images_val/1/8.jpg", photo(1));
    let input = Input::new(publisher.path("")).split("val");
    let read = publisher
        .pack(downloads::conceptual_captions(&input), 1)
        .await;
    assert_eq!(read.keys(), ["7", "8"]);
    read.tells(BadKind::BrokenRecord, &["val_annot.json: annotations[2]"]);
}

#[tokio::test]
async fn sbu_comes_as_json_and_as_text() {
    let publisher = Publisher::new();
    let url = |name: &str| format!("http://static.flickr.com/2723/{name}");
    publisher.json(
        "sbu-captions-all.json",
        &json!({
            "image_urls": [url("4385_b0f.jpg"), url("1.x_o.jpg"), url("gone.jpg"), url("4.jpg")],
            "user_ids": ["47889917@N08", "1@N0", "2@N0", "3@N0"],
            "captions": ["A boat", "A hill", "Gone", null],
        }),
    );
    publisher
        .write("SBU/4385_b0f.jpg", photo(0))
        .write("SBU/1.x_o.jpg", photo(1));
    let input = Input::new(publisher.path(""));
    let read = publisher.pack(downloads::sbu(&input), 2).await;
    assert_eq!(read.keys(), ["1_x_o", "4385_b0f"], "a dot would end a key");
    assert_eq!(read.of("1_x_o").texts(), ["A hill"]);
    read.tells(BadKind::MissingImage, &["[2]", "gone.jpg"]);
    read.tells(BadKind::BrokenRecord, &["[3]"]);

    let other = Publisher::new();
    other.write(
        "SBU_captioned_photo_dataset_captions.txt",
        "A boat\nA hill\n\n",
    );
    let urls = [url("4385_b0f.jpg"), url("1.jpg"), url("2.jpg")].join("\n");
    other.write("SBU_captioned_photo_dataset_urls.txt", urls);
    other
        .write("images/4385_b0f.jpg", photo(0))
        .write("images/1.jpg", photo(1));
    let read = other
        .pack(downloads::sbu(&Input::new(other.path(""))), 1)
        .await;
    assert_eq!(read.keys(), ["1", "4385_b0f"]);
    read.tells(BadKind::BrokenRecord, &["captions.txt:3", "empty"]);
}

#[tokio::test]
async fn visual_genome_keeps_every_phrase_once() {
    let publisher = Publisher::new();
    let region = |image: u64, id: u64, phrase: &str| {
        json!({
            "region_id": id, "width": 82, "height": 139, "image_id": image, "phrase": phrase,
            "y": 57, "x": 421,
        })
    };
    let mut broken = region(2, 20, "");
    broken["phrase"] = json!(["no", "text"]);
    let phrases = ["the clock", "shade", "the clock", " the  clock "];
    let regions = phrases
        .iter()
        .enumerate()
        .map(|(n, phrase)| region(1, n as u64, phrase));
    publisher.json(
        "annotations/region_descriptions.json",
        &json!([
            {"id": 1, "regions": regions.collect::<Vec<Value>>()},
            {"id": 2, "regions": [broken, region(2, 21, "a wall")]},
            {"id": 3, "regions": [region(3, 30, "not downloaded")]},
            {"id": 4, "regions": []},
        ]),
    );
    publisher
        .write("images/VG_100K/1.jpg", photo(0))
        .write("images/VG_100K_2/2.jpg", photo(1));
    let read = publisher
        .pack(visual_genome::catalog(&Input::new(publisher.path(""))), 2)
        .await;
    assert_eq!(read.keys(), ["1", "2"]);
    assert_eq!(read.of("1").texts(), ["the clock", "shade"]);
    assert_eq!(read.of("2").texts(), ["a wall"]);
    assert_eq!(read.of("2").bytes(), [photo(1)]);
    assert_eq!(
        read.left_out(),
        3,
        "two repeated phrases and an image without regions"
    );
    read.tells(
        BadKind::BrokenRecord,
        &["region_descriptions.json: images[1]: regions[0]"],
    );
    read.tells(BadKind::MissingImage, &["VG_100K/3.jpg"]);
}
