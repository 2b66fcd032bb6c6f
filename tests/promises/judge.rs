//! `belfry eval`, `ask`, `match` and `retrieve` on the real binary: the same figures for any number of
//! processes, any shares and any interruption; answers; clear refusals.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use serde_json::{Value, json};

use crate::system::alone;
use crate::weights::{belfry, succeeded, told};

/// Photographs with questions to train on, and those judged.
const TRAINED: usize = 24;
const JUDGED: usize = 10;

fn stamps() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/stamps");
    let entries = fs::read_dir(folder).expect("is bundled");
    let mut photos: Vec<PathBuf> = entries.map(|e| e.expect("is read").path()).collect();
    photos.retain(|path| path.extension().is_some_and(|e| e == "jpg"));
    photos.sort();
    photos
}

fn printed(output: &Output) -> Value {
    succeeded(output);
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().last().expect("prints a line");
    serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {text}"))
}

fn refused(arguments: &[&str], parts: &[&str]) {
    let output = belfry(arguments);
    let said = told(&output);
    assert!(!output.status.success(), "{arguments:?} must be refused");
    for part in parts {
        assert!(said.contains(part), "`{part}` is not in: {said}");
    }
}

/// A folder with a trained run and its data.
struct Trained {
    folder: tempfile::TempDir,
}

impl Trained {
    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    fn read(&self, name: &str) -> String {
        let path = self.folder.path().join(name);
        fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    }

    /// `belfry eval` of the run into a folder of its own.
    fn eval(&self, to: &str, more: &[&str]) -> Value {
        let (run, to) = (self.path("run"), self.path(to));
        let arguments = ["eval", "--run", &run, "--to", &to, "--json"];
        printed(&belfry(&[&arguments[..], more].concat()))
    }

    fn train(&self, settings: &[&str]) {
        let data = |part: &str| format!("data.{part}={}", self.path(part));
        let (train, validation) = (data("train"), data("validation"));
        let run = self.path("run");
        let mut arguments = vec!["run", "configs/tiny.toml", "--workers", "1", "--root", &run];
        for setting in [&*train, &*validation, "run.steps=4"] {
            arguments.extend(["--set", setting]);
        }
        for setting in settings {
            arguments.extend(["--set", setting]);
        }
        succeeded(&belfry(&arguments));
    }

    /// The figures that the run's own evaluation of its last state had.
    fn of_run(&self) -> Value {
        let text = self.read("run/metrics/evaluation-000000004.json");
        serde_json::from_str(&text).expect("is JSON")
    }
}

/// Questions about photographs as VQAv2 is published: which are answered "yes" by ten, by seven.
fn vqa() -> Trained {
    let trained = Trained {
        folder: tempfile::tempdir().expect("a folder"),
    };
    let coco = trained.folder.path().join("coco");
    let photos = stamps();
    for (part, photos) in [
        ("train2014", &photos[..TRAINED]),
        ("val2014", &photos[TRAINED..TRAINED + JUDGED]),
        ("test2015", &photos[TRAINED..TRAINED + JUDGED]),
    ] {
        let images = coco.join(part);
        fs::create_dir_all(&images).expect("a folder");
        let (mut questions, mut annotations) = (Vec::new(), Vec::new());
        for (n, photo) in photos.iter().enumerate() {
            let image = 1 + n as u64;
            let name = format!("COCO_{part}_{image:012}.jpg");
            fs::copy(photo, images.join(name)).expect("copies");
            for (nth, text) in ["is it alive?", "is it red?"].into_iter().enumerate() {
                let id = 10 * image + nth as u64;
                questions.push(json!({"image_id": image, "question": text, "question_id": id}));
                let [first, rest] = if n % 2 == 0 {
                    ["yes", "no"]
                } else {
                    ["no", "yes"]
                };
                let answer = |k: usize| json!({"answer": if k < 8 - nth { first } else { rest }});
                let answers: Vec<Value> = (0..10).map(answer).collect();
                annotations.push(json!({
                    "question_id": id, "multiple_choice_answer": first, "answers": answers,
                }));
            }
        }
        let write = |name: String, value: Value| {
            fs::write(coco.join(name), value.to_string()).expect("writes");
        };
        let name = format!("v2_OpenEnded_mscoco_{part}_questions.json");
        write(name, json!({"questions": questions}));
        if part != "test2015" {
            let name = format!("v2_mscoco_{part}_annotations.json");
            write(name, json!({"annotations": annotations}));
        }
    }
    let (coco, answers) = (trained.path("coco"), trained.path("train/answers.json"));
    let pack = [
        "shards",
        "pack",
        "--format",
        "vqav2",
        "--pairs-per-shard",
        "8",
        &coco,
    ];
    let (train, validation) = (trained.path("train"), trained.path("validation"));
    let test = trained.path("test");
    let to = |more: &[&str]| succeeded(&belfry(&[&pack[..], more].concat()));
    to(&[&train, "--split", "train2014"]);
    to(&[&validation, "--split", "val", "--answers", &answers]);
    to(&[&test, "--split", "test", "--answers", &answers]);
    trained.train(&[
        "model.task=vqa",
        "model.head.answers=2",
        "eval.pairs_per_batch=3",
    ]);
    trained
}

#[test]
fn vqa_is_judged_alike_by_any_number_of_processes_and_after_any_interruption() {
    let _alone = alone();
    let trained = vqa();
    let whole = trained.eval("one", &[]);
    let figures = &whole["figures"];
    assert_eq!(
        (whole["step"].as_u64(), &whole["task"]),
        (Some(4), &json!("vqa"))
    );
    assert_eq!(whole["pairs"], 2 * JUDGED);
    let of_run = trained.of_run();
    for name in ["vqa_loss", "vqa_score"] {
        assert!(figures[name].is_f64(), "{whole}");
        assert_eq!(figures[name], of_run[name], "as in training");
    }
    let kept = trained.read("one/figures.json");
    for workers in ["2", "3"] {
        let to = format!("workers{workers}");
        assert_eq!(
            trained.eval(&to, &["--workers", workers])["figures"],
            *figures
        );
        assert_eq!(trained.read(&format!("{to}/figures.json")), kept);
    }

    // Shares of machines that do not see each other, joined.
    let mut files = Vec::new();
    for share in ["1/2", "2/2"] {
        let to = format!("share{}", &share[..1]);
        let said = trained.eval(&to, &["--share", share]);
        assert!(said["figures"].is_null() && said["units"] == 7, "{said}");
        files.push(trained.path(&format!("{to}/tally-{}-of-2.jsonl", &share[..1])));
    }
    refused(&["eval", "--join", &files[1]], &["first one missing is 0"]);
    let joined = belfry(&["eval", "--join", &files[1], &files[0], "--json"]);
    assert_eq!(printed(&joined)["figures"], *figures);

    // What a kill leaves: whole lines and half of one. What was done is not done again.
    let tally = trained.folder.path().join("one/tally-1-of-1.jsonl");
    let text = fs::read(&tally).expect("is there");
    fs::create_dir_all(trained.path("killed")).expect("a folder");
    let torn = trained.folder.path().join("killed/tally-1-of-1.jsonl");
    fs::write(&torn, &text[..text.len() / 2]).expect("writes");
    assert_eq!(
        trained.eval("killed", &["--workers", "2"])["figures"],
        *figures
    );
    let before = fs::read(&torn).expect("is there").len();
    assert!(before <= text.len() / 2, "a whole share was done again");
    assert_eq!(trained.eval("killed", &[])["figures"], *figures);
    assert_eq!(trained.read("killed/figures.json"), kept);
    assert_eq!(
        trained.read("killed/vqa_result.json"),
        trained.read("one/vqa_result.json")
    );

    the_result_file_is_the_servers(&trained);
    questions_are_answered(&trained);
}

fn the_result_file_is_the_servers(trained: &Trained) {
    let test = trained.path("test");
    let said = trained.eval("test_result", &["--data", &test]);
    assert_eq!(
        said["figures"],
        json!({}),
        "a test split has nothing to compare with"
    );
    let (result, questions) = (
        trained.path("test_result/vqa_result.json"),
        trained.path("coco/v2_OpenEnded_mscoco_test2015_questions.json"),
    );
    let check = ["eval", "--check-evalai", &result, "--questions", &questions];
    let checked = belfry(&check);
    succeeded(&checked);
    assert!(String::from_utf8_lossy(&checked.stdout).contains("20 answers"));
    let text = trained.read("test_result/vqa_result.json");
    let answers: Vec<Value> = serde_json::from_str(&text).expect("is JSON");
    assert!(
        answers
            .iter()
            .all(|a| a["answer"] == "yes" || a["answer"] == "no")
    );
    let cut = json!(answers[1..]).to_string();
    fs::write(&result, cut).expect("writes");
    refused(&check, &["question 10 has no answer"]);
}

fn questions_are_answered(trained: &Trained) {
    let (run, photo) = (trained.path("run"), stamps()[0].display().to_string());
    let ask = ["ask", "--run", &run, "--image", &photo, "--question"];
    let said = printed(&belfry(&[&ask[..], &["is it alive?", "--json"]].concat()));
    let answers = said["answers"].as_array().expect("a list");
    assert_eq!(answers.len(), 2, "{said}");
    let score = |n: usize| answers[n]["score"].as_f64().expect("a number");
    assert!(score(0) >= score(1) && score(0) < 1.0, "{said}");
    let long = "is it alive and well and red and green ".repeat(4);
    refused(&[&ask[..], &[&long]].concat(), &["tokens", "data.text_len"]);
    refused(&[&ask[..], &[""]].concat(), &["empty"]);
    let text = trained.path("train/answers.json");
    let wrong = ["ask", "--run", &run, "--question", "is it?", "--image"];
    refused(&[&wrong[..], &[&text]].concat(), &["answers.json"]);
    refused(&[&wrong[..], &["nowhere.jpg"]].concat(), &["nowhere.jpg"]);
    let captions = [
        "match",
        "--run",
        &run,
        "--image",
        &photo,
        "--caption",
        "a dog",
    ];
    refused(&captions, &["belfry match", "of vqa"]);
    refused(&["ask", "--image", &photo, "--question", "?"], &["--run"]);
}

/// Captions of photographs; few of them are judged.
fn retrieval() -> Trained {
    let trained = Trained {
        folder: tempfile::tempdir().expect("a folder"),
    };
    for (part, range) in [("train", 0..40), ("validation", 40..52)] {
        let photos = trained.folder.path().join("photos").join(part);
        fs::create_dir_all(&photos).expect("a folder");
        for photo in &stamps()[range] {
            let name = photo.file_stem().expect("has a name").to_string_lossy();
            fs::copy(photo, photos.join(format!("{name}.jpg"))).expect("copies");
            let caption = fs::read_to_string(photo.with_extension("txt")).expect("is there");
            let two = format!("{}\nthis is {name}\n", caption.trim());
            fs::write(photos.join(format!("{name}.txt")), two).expect("writes");
        }
        let (from, to) = (photos.display().to_string(), trained.path(part));
        succeeded(&belfry(&[
            "shards",
            "pack",
            &from,
            &to,
            "--pairs-per-shard",
            "10",
        ]));
    }
    trained.train(&[
        "model.task=retrieval",
        "eval.pairs_per_batch=5",
        "eval.top_k=4",
    ]);
    trained
}

#[test]
fn rankings_are_alike_for_any_number_of_processes_and_nothing_is_encoded_twice() {
    let _alone = alone();
    let trained = retrieval();
    let whole = trained.eval("one", &[]);
    let figures = &whole["figures"];
    for name in ["ir1", "ir5", "ir10", "tr1", "tr5", "tr10", "r_mean"] {
        let value = figures[name].as_f64().expect("a number");
        assert!((0.0..=1.0).contains(&value), "{whole}");
        assert_eq!(figures[name], trained.of_run()[name], "as in training");
    }
    assert_eq!(whole["encoder_runs"], json!({"images": 12, "texts": 24}));
    for workers in ["2", "3"] {
        let to = format!("workers{workers}");
        let said = trained.eval(&to, &["--workers", workers]);
        assert_eq!(said["figures"], *figures);
        assert_eq!(
            said["encoder_runs"],
            json!({"images": 12, "texts": 24}),
            "shared"
        );
    }
    // Everything on disk, nothing in memory.
    let spilled = trained.eval("spilled", &["--set", "eval.experts_bytes_max=0"]);
    assert_eq!(spilled["figures"], *figures);
    let mut files = Vec::new();
    for share in ["1/3", "2/3", "3/3"] {
        let to = format!("share{}", &share[..1]);
        trained.eval(&to, &["--share", share]);
        files.push(trained.path(&format!("{to}/tally-{}-of-3.jsonl", &share[..1])));
    }
    let join: Vec<&str> = files.iter().map(String::as_str).collect();
    let joined = belfry(&[&["eval", "--json", "--join"], &join[..]].concat());
    assert_eq!(printed(&joined)["figures"], *figures);
    // A file of another evaluation is no share of this one.
    let again = trained.eval("other", &["--share", "1/3", "--set", "eval.top_k=3"]);
    assert!(again["figures"].is_null());
    let other = trained.path("other/tally-1-of-3.jsonl");
    refused(
        &["eval", "--join", &other, &files[1], &files[2]],
        &["different evaluations", "other settings"],
    );
    captions_are_matched_and_photographs_found(&trained);
}

fn captions_are_matched_and_photographs_found(trained: &Trained) {
    let (run, photo) = (trained.path("run"), stamps()[0].display().to_string());
    let said = printed(&belfry(&[
        "match",
        "--run",
        &run,
        "--image",
        &photo,
        "--json",
        "--caption",
        "a dog",
        "--caption",
        "a planet",
    ]));
    let captions = said["captions"].as_array().expect("a list");
    let score = |n: usize| captions[n]["match"].as_f64().expect("a number");
    assert!(captions.len() == 2 && score(0) >= score(1), "{said}");

    let photos = trained.path("photos/validation");
    let broken = Path::new(&photos).join("broken.jpg");
    fs::write(&broken, "no image").expect("writes");
    let retrieve = [
        "retrieve", "--run", &run, "--index", &photos, "--top", "3", "--json",
    ];
    let first = belfry(&[&retrieve[..], &["--query", "a red flower"]].concat());
    let found = printed(&first)["results"].clone();
    assert_eq!(found.as_array().map(Vec::len), Some(3), "{found}");
    let said = told(&first);
    assert!(
        said.contains("indexed 36 anew") && said.contains("broken.jpg"),
        "{said}"
    );
    let again = belfry(&[&retrieve[..], &["--query", "a red flower"]].concat());
    assert_eq!(printed(&again)["results"], found);
    assert!(!told(&again).contains("indexed"), "{}", told(&again));
    let captions = printed(&belfry(&[&retrieve[..], &["--image", &photo]].concat()));
    assert!(captions["results"][0]["caption"].is_string(), "{captions}");
    let ask = ["ask", "--run", &run, "--image", &photo, "--question", "?"];
    refused(&ask, &["belfry ask", "of retrieval"]);
    let nowhere = trained.path("nowhere");
    refused(
        &[
            "retrieve", "--run", &run, "--index", &nowhere, "--query", "a dog",
        ],
        &["nowhere"],
    );
}

#[test]
fn what_cannot_be_judged_is_refused_by_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let nowhere = path("nowhere");
    refused(&["eval"], &["--run", "--weights"]);
    refused(&["eval", "--run", &nowhere], &["no such folder"]);
    refused(&["eval", "--weights", "a.safetensors"], &["--config"]);
    refused(
        &[
            "eval", "--run", &nowhere, "--share", "4/3", "--to", &nowhere,
        ],
        &["4/3", "2/3"],
    );
    refused(&["eval", "--run", &nowhere, "--share", "1/3"], &["--to"]);
    refused(&["eval", "--join", &nowhere], &["nowhere"]);
    fs::write(path("hello"), "hello").expect("writes");
    refused(&["eval", "--join", &path("hello")], &["tally file"]);
    refused(
        &["eval", "--check-evalai", &path("hello")],
        &["hello", "not JSON"],
    );
}
