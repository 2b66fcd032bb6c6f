//! Datasets with labels: VQAv2, SNLI-VE, NLVR2.

use serde_json::{Value, json};
use shard_tools::pack::BadKind;
use shard_tools::pack::formats::{Input, nlvr2, snli_ve, vqav2};
use shard_tools::pair::Contents;

use crate::fixture::{Publisher, photo, png};

fn questions(subtype: &str, questions: &[Value]) -> Value {
    json!({
        "info": {"description": "", "version": "2.0"}, "task_type": "Open-Ended",
        "data_type": "mscoco", "license": {}, "data_subtype": subtype, "questions": questions,
    })
}

fn annotation(image: u64, question: u64, majority: &str, answers: &[&str]) -> Value {
    let answer = |(n, text): (usize, &&str)| json!({"answer": text, "answer_confidence": "yes", "answer_id": n + 1});
    let answers: Vec<Value> = answers.iter().enumerate().map(answer).collect();
    json!({
        "question_type": "what", "multiple_choice_answer": majority, "answers": answers,
        "image_id": image, "answer_type": "other", "question_id": question,
    })
}

fn question(image: u64, id: u64, text: &str) -> Value {
    json!({"image_id": image, "question": text, "question_id": id})
}

/// Nine train questions are answered "two", nine val questions "Yes.", few "rare".
fn vqa() -> Publisher {
    let publisher = Publisher::new();
    let ten = |first: &str, rest: &str| {
        let mut answers = vec![rest.to_owned(); 10];
        answers[..3].fill(first.to_owned());
        answers
    };
    let of = |answers: Vec<String>| -> Vec<String> { answers };
    let mut train = Vec::new();
    let mut train_questions = Vec::new();
    for id in 0..9u64 {
        train_questions.push(question(1 + id % 2, 100 + id, &format!("how many {id}?")));
        let answers = of(ten("Two", "2"));
        let answers: Vec<&str> = answers.iter().map(String::as_str).collect();
        train.push(annotation(1 + id % 2, 100 + id, "two", &answers));
    }
    train_questions.push(question(2, 200, "what is rare?"));
    train.push(annotation(2, 200, "rare", &["rare"; 10]));
    train_questions.push(json!({"image_id": "none", "question_id": 300}));
    let (mut val, mut val_questions) = (Vec::new(), Vec::new());
    for id in 0..9u64 {
        val_questions.push(question(7, 700 + id, "is it?"));
        val.push(annotation(
            7,
            700 + id,
            "yes",
            &["Yes.", "yes", "a yes", "two", "rare"],
        ));
    }
    let name = |part: &str| format!("v2_OpenEnded_mscoco_{part}_questions.json");
    publisher
        .json(
            &name("train2014"),
            &questions("train2014", &train_questions),
        )
        .json(&name("val2014"), &questions("val2014", &val_questions))
        .json(
            &name("test2015"),
            &questions("test2015", &[question(9, 900, "why?")]),
        )
        .json(
            "v2_mscoco_train2014_annotations.json",
            &json!({"annotations": train}),
        )
        .json(
            "v2_mscoco_val2014_annotations.json",
            &json!({"annotations": val}),
        )
        .write("train2014/COCO_train2014_000000000001.jpg", photo(1))
        .write("train2014/COCO_train2014_000000000002.jpg", photo(2))
        .write("val2014/COCO_val2014_000000000007.jpg", photo(7))
        .write("test2015/COCO_test2015_000000000009.jpg", photo(3));
    publisher
}

#[tokio::test]
async fn vqa_answers_become_classes_with_soft_scores() {
    let publisher = vqa();
    let input = || Input::new(publisher.path(""));
    let train = publisher.pack(vqav2::catalog(&input()), 1).await;
    assert_eq!(train.packed.manifest.contents, Contents::Vqa);
    assert_eq!(
        train.keys(),
        [
            "COCO_train2014_000000000001",
            "COCO_train2014_000000000002",
            "COCO_val2014_000000000007"
        ],
        "the training set is train and val"
    );
    let answers = std::fs::read_to_string(publisher.path("packed/answers.json"));
    assert_eq!(
        answers.expect("is there"),
        r#"["2","yes"]"#,
        "in the order of first sight"
    );
    let files: Vec<&str> = train
        .packed
        .manifest
        .files
        .iter()
        .map(|f| f.file.as_str())
        .collect();
    assert_eq!(files, ["answers.json", "bad.jsonl"]);

    let second = train.of("COCO_train2014_000000000002");
    assert_eq!(
        second.texts(),
        ["how many 1?", "how many 3?", "how many 5?", "how many 7?"]
    );
    assert_eq!(second.pairs[0].id.as_deref(), Some("101"));
    assert_eq!(
        (&second.pairs[0].labels[..], &second.pairs[0].scores[..]),
        (&[0][..], &[1.0][..])
    );
    let val = &train.of("COCO_val2014_000000000007").pairs;
    assert_eq!(
        (val.len(), &val[8].labels[..], &val[8].scores[..]),
        (9, &[1, 0][..], &[0.9, 0.3][..])
    );
    assert_eq!(train.left_out(), 1, "the question with a rare answer");
    train.tells(
        BadKind::BrokenRecord,
        &["train2014_questions.json: questions[10]"],
    );
}

#[tokio::test]
async fn vqa_splits_share_a_vocabulary() {
    let publisher = vqa();
    let input = |split: &str| Input::new(publisher.path("")).split(split);
    let val = publisher
        .pack_to("val", vqav2::catalog(&input("val")), 0)
        .await;
    assert_eq!(val.keys(), ["COCO_val2014_000000000007"]);

    // Where the annotations are not at hand, the packed vocabulary is.
    std::fs::remove_file(publisher.path("v2_mscoco_val2014_annotations.json")).expect("is removed");
    let told = vqav2::catalog(&input("test"))
        .err()
        .expect("no annotations")
        .to_string();
    assert!(
        told.contains("v2_mscoco_val2014_annotations.json") && told.contains("--answers"),
        "{told}"
    );
    let test = Input {
        answers: Some(publisher.path("val/answers.json")),
        ..input("test")
    };
    let test = publisher.pack_to("test", vqav2::catalog(&test), 0).await;
    let pairs = &test.of("COCO_test2015_000000000009").pairs;
    assert_eq!(
        (pairs.len(), pairs[0].labels.len()),
        (1, 0),
        "test questions have no labels"
    );
    assert_eq!(pairs[0].id.as_deref(), Some("900"));
    let read = |split| std::fs::read(publisher.path(split).join("answers.json")).expect("is there");
    assert_eq!(read("val"), read("test"));
}

#[tokio::test]
async fn snli_ve_asks_about_the_hypothesis_alone() {
    let publisher = Publisher::new();
    let line = |image: &str, number: u32, label: &str| {
        json!({
            "annotator_labels": [label], "captionID": format!("{image}.jpg#{number}"),
            "gold_label": label, "pairID": format!("{image}.jpg#{number}r1n"),
            "sentence1": "A premise that is not packed.",
            "sentence2": format!("Hypothesis {number}."), "Flickr30K_ID": image,
        })
    };
    let lines = [
        line("4705552913", 0, "neutral"),
        line("4705552913", 1, "entailment"),
        line("2407214681", 2, "contradiction"),
        line("2407214681", 3, "-"),
        line("2407214681", 4, "maybe"),
    ];
    publisher.lines("snli_ve/snli_ve_dev.jsonl", &lines);
    let broken = std::fs::read_to_string(publisher.path("snli_ve/snli_ve_dev.jsonl"));
    let broken = broken.expect("is there") + "{\"gold_label\": \"neutral\", \n";
    publisher.write("snli_ve/snli_ve_dev.jsonl", broken);
    publisher.write("flickr30k-images/4705552913.jpg", photo(0));
    publisher.write("flickr30k-images/2407214681.jpg", photo(1));
    let input = Input::new(publisher.path("")).split("dev");
    let read = publisher.pack(snli_ve::catalog(&input), 2).await;
    assert_eq!(read.packed.manifest.contents, Contents::SnliVe);
    let pairs = &read.of("4705552913").pairs;
    assert_eq!(
        read.of("4705552913").texts(),
        ["Hypothesis 0.", "Hypothesis 1."]
    );
    assert_eq!(
        (&pairs[0].labels[..], &pairs[1].labels[..]),
        (&[1][..], &[2][..])
    );
    assert_eq!(pairs[0].id.as_deref(), Some("4705552913.jpg#0r1n"));
    assert_eq!(read.of("2407214681").pairs[0].labels, [0]);
    assert_eq!(read.left_out(), 1, "no agreement");
    read.tells(BadKind::BrokenRecord, &["snli_ve_dev.jsonl:5", "maybe"]);
    read.tells(BadKind::BrokenRecord, &["snli_ve_dev.jsonl:6"]);
}

#[tokio::test]
async fn nlvr2_has_two_images_a_sample() {
    let publisher = Publisher::new();
    let line = |split: &str, set: u32, number: u32, label: &str| {
        json!({
            "validation": {"4763681": label}, "sentence": format!("Statement {set}-{number}."),
            "left_url": "https://l", "writer": 138, "right_url": "https://r",
            "synset": "acorn", "query": "acorns1", "label": label, "directory": "88",
            "identifier": format!("{split}-{set}-0-{number}"), "extra_validations": {},
        })
    };
    let mut broken = line("train", 3, 0, "True");
    broken
        .as_object_mut()
        .expect("an object")
        .remove("identifier");
    let train = [
        line("train", 1, 0, "True"),
        line("train", 1, 1, "False"),
        line("train", 2, 0, "True"),
        broken,
    ];
    publisher.lines("nlvr2/data/train.json", &train);
    publisher.lines("nlvr2/data/dev.json", &[line("dev", 5, 0, "False")]);
    for (folder, name) in [("images/train/88", "train-1-0"), ("dev", "dev-5-0")] {
        for image in 0..2 {
            publisher.write(&format!("{folder}/{name}-img{image}.png"), png(image));
        }
    }
    publisher.write("images/train/88/train-2-0-img0.png", png(7));
    let input = || Input::new(publisher.path(""));
    let read = publisher.pack(nlvr2::catalog(&input()), 2).await;
    assert_eq!(read.packed.manifest.contents, Contents::Nlvr2);
    assert_eq!(read.keys(), ["train-1-0"]);
    let sample = read.of("train-1-0");
    assert_eq!(sample.bytes(), [png(0), png(1)]);
    assert_eq!(sample.images[1].0, "train-1-0.1.png");
    assert_eq!(sample.texts(), ["Statement 1-0.", "Statement 1-1."]);
    assert_eq!(
        (sample.pairs[0].labels[0], sample.pairs[1].labels[0]),
        (1, 0)
    );
    assert_eq!(sample.pairs[1].id.as_deref(), Some("train-1-0-1"));
    read.tells(BadKind::MissingImage, &["88/train-2-0-img1.png"]);
    read.tells(BadKind::BrokenRecord, &["train.json:4", "identifier"]);
    let dev = nlvr2::catalog(&input().split("dev"));
    assert_eq!(
        publisher.pack_to("dev-packed", dev, 0).await.keys(),
        ["dev-5-0"]
    );
}
