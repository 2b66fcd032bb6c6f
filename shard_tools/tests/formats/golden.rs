//! VQA answers against the authors' preparation.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use shard_tools::pack::{Vocabulary, normalize, soft_score};

fn folder() -> PathBuf {
    if let Ok(folder) = std::env::var("BELFRY_GOLDEN_DIR") {
        return folder.into();
    }
    let house = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let whole = house.join("../shared/golden");
    if whole.is_dir() {
        return whole;
    }
    house.join("tests/golden")
}

#[derive(Deserialize)]
struct Golden {
    normalize_word: Vec<(String, String)>,
    soft_score: Vec<(u32, f32)>,
    vocab: serde_json::Map<String, serde_json::Value>,
    questions: Vec<Question>,
}

#[derive(Deserialize)]
struct Question {
    answers: Vec<String>,
    labels: Vec<u32>,
    scores: Vec<f32>,
}

#[test]
fn answers_are_normalised_and_scored_as_the_authors_do() {
    let file = folder().join("vqa_answers.json");
    let text = std::fs::read(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let golden: Golden = serde_json::from_slice(&text).expect("is as expected");
    assert!(golden.normalize_word.len() > 20 && golden.questions.len() > 3);
    for (given, expected) in &golden.normalize_word {
        assert_eq!(normalize(given), *expected, "{given:?}");
    }
    for (count, score) in golden.soft_score {
        assert_eq!(soft_score(count), score, "{count} annotators");
    }
    let mut answers = vec![String::new(); golden.vocab.len()];
    for (answer, class) in golden.vocab {
        answers[class.as_u64().expect("a class") as usize] = answer;
    }
    let vocabulary = Vocabulary::new(answers);
    for question in golden.questions {
        let found = vocabulary.labels(question.answers.iter().map(String::as_str));
        assert_eq!(
            found,
            (question.labels, question.scores),
            "{:?}",
            question.answers
        );
    }
}
