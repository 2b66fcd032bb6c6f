//! `vqav2`: `v2_OpenEnded_mscoco_*_questions.json` and `v2_mscoco_*_annotations.json` beside COCO's
//! `train2014`, `val2014` and `test2015`.
//!
//! A question's labels are its annotators' answers, normalised, as far as they are in the
//! vocabulary: the normalised majority answers of train and val with at least 9 questions, 3,129 of
//! the published data. Questions without a label are left out by rule; test questions have none and
//! stay. The vocabulary goes beside the manifest.

use std::collections::BTreeMap;
use std::path::PathBuf;

use bytes::Bytes;
use serde::Deserialize;

use super::Input;
use super::records::{self, Parsed};
use crate::error::ShardError;
use crate::manifest::ANSWERS_FILE;
use crate::pack::answers::{Majorities, Vocabulary};
use crate::pack::bad::BadKind;
use crate::pack::catalog::{Catalog, Description, Place, Texts};
use crate::pair::{Contents, Pair};

/// A part of the data as published.
#[derive(Clone, Copy)]
struct Part {
    questions: &'static str,
    annotations: Option<&'static str>,
    /// The images' folder, and the part of their names between `COCO_` and the number.
    images: &'static str,
}

const TRAIN: Part = Part {
    questions: "v2_OpenEnded_mscoco_train2014_questions.json",
    annotations: Some("v2_mscoco_train2014_annotations.json"),
    images: "train2014",
};
const VAL: Part = Part {
    questions: "v2_OpenEnded_mscoco_val2014_questions.json",
    annotations: Some("v2_mscoco_val2014_annotations.json"),
    images: "val2014",
};
const TEST: Part = Part {
    questions: "v2_OpenEnded_mscoco_test2015_questions.json",
    annotations: None,
    images: "test2015",
};
const TEST_DEV: Part = Part {
    questions: "v2_OpenEnded_mscoco_test-dev2015_questions.json",
    ..TEST
};
/// The paper's runs train on all of train and val, and look at val besides (model_spec 13).
const SPLITS: &[(&str, &[Part])] = &[
    ("train", &[TRAIN, VAL]),
    ("train2014", &[TRAIN]),
    ("val", &[VAL]),
    ("test", &[TEST]),
    ("test-dev", &[TEST_DEV]),
];

#[derive(Deserialize)]
struct Question {
    image_id: u64,
    question_id: u64,
    question: String,
}

#[derive(Deserialize)]
struct Annotation {
    question_id: u64,
    multiple_choice_answer: String,
    answers: Vec<Answer>,
}

#[derive(Deserialize)]
struct Answer {
    answer: String,
}

/// Questions with classes and soft scores.
///
/// # Errors
/// [`ShardError`], naming the file.
pub fn catalog(input: &Input) -> Result<Catalog, ShardError> {
    if !input.annotations.is_empty() {
        let reason =
            "--annotations: vqav2 finds questions and annotations by their published names";
        return Err(ShardError::Option(reason.into()));
    }
    let parts = *input.of_split("vqav2", SPLITS)?;
    let images = input.images.clone().unwrap_or_else(|| input.folder.clone());
    let mut catalog = Catalog::new(images, Contents::Vqa);
    let vocabulary = vocabulary(input, &mut catalog)?;
    let text = serde_json::to_vec(vocabulary.answers()).expect("plain data");
    catalog.files.push((ANSWERS_FILE.into(), Bytes::from(text)));
    for part in parts {
        describe(&mut catalog, input, &vocabulary, *part)?;
    }
    catalog.some("question")
}

fn published(input: &Input, name: &str) -> Result<PathBuf, ShardError> {
    let places = [
        name.to_owned(),
        format!("vqav2/{name}"),
        format!("annotations/{name}"),
    ];
    let missing = "--answers (answers.json of the packed training split), or the file itself,";
    input.first(&places.each_ref().map(String::as_str), missing)
}

/// As given, or made of both annotation files. Broken annotations are counted when their own part
/// is packed.
fn vocabulary(input: &Input, catalog: &mut Catalog) -> Result<Vocabulary, ShardError> {
    if let Some(file) = &input.answers {
        let failed = |source| ShardError::Input {
            file: file.display().to_string(),
            source,
        };
        let text = std::fs::read(file).map_err(failed)?;
        let answers = serde_json::from_slice(&text).map_err(|e| ShardError::Sample {
            file: file.display().to_string(),
            reason: format!("--answers: not a JSON list of strings: {e}"),
        })?;
        return Ok(Vocabulary::new(answers));
    }
    let mut majorities = Majorities::default();
    for part in [TRAIN, VAL] {
        let file = published(input, part.annotations.unwrap_or_default())?;
        records::list(&file, "annotations", |_, parsed: Parsed<Annotation>| {
            if let Ok(annotation) = parsed {
                majorities.add(&annotation.multiple_choice_answer);
            }
        })?;
    }
    let vocabulary = majorities.vocabulary();
    if vocabulary.answers().is_empty() {
        return Err(ShardError::Sample {
            file: catalog.folder.display().to_string(),
            reason: "no answer has 9 questions, so there would be no class; --answers FILE gives \
                     the vocabulary of a packed training split"
                .into(),
        });
    }
    Ok(vocabulary)
}

type Labels = (Vec<u32>, Vec<f32>);

fn describe(
    catalog: &mut Catalog,
    input: &Input,
    vocabulary: &Vocabulary,
    part: Part,
) -> Result<(), ShardError> {
    let mut labels = match part.annotations {
        Some(name) => Some(labels(catalog, vocabulary, &published(input, name)?)?),
        None => None,
    };
    let file = published(input, part.questions)?;
    records::list(&file, "questions", |place, question: Parsed<Question>| {
        let question = match question {
            Ok(question) => question,
            Err(reason) => return catalog.bad(BadKind::BrokenRecord, place, reason),
        };
        if question.question.trim().is_empty() {
            return catalog.bad(BadKind::BrokenText, place, "the question is empty");
        }
        let found = labels.as_mut().map(|all| all.remove(&question.question_id));
        let (labels, scores) = match found {
            None => Labels::default(),
            Some(Some(found)) if found.0.is_empty() => {
                return catalog.leave_out("questions without an answer of the vocabulary");
            }
            Some(Some(found)) => found,
            Some(None) => {
                let reason = format!("question {} has no annotation", question.question_id);
                return catalog.bad(BadKind::BrokenRecord, place, reason);
            }
        };
        let key = format!("COCO_{}_{:012}", part.images, question.image_id);
        catalog.push(&Description {
            images: vec![Place::File(format!("{}/{key}.jpg", part.images))],
            key,
            texts: Texts::Pairs(vec![Pair {
                text: question.question,
                id: Some(question.question_id.to_string()),
                labels,
                scores,
            }]),
            record: None,
        });
    })?;
    for _ in labels.unwrap_or_default() {
        catalog.leave_out("annotations whose question is not there");
    }
    Ok(())
}

/// Labels by question.
fn labels(
    catalog: &mut Catalog,
    vocabulary: &Vocabulary,
    file: &std::path::Path,
) -> Result<BTreeMap<u64, Labels>, ShardError> {
    let mut all = BTreeMap::new();
    records::list(
        file,
        "annotations",
        |place, parsed: Parsed<Annotation>| match parsed {
            Ok(annotation) => {
                let answers = annotation
                    .answers
                    .iter()
                    .map(|answer| answer.answer.as_str());
                all.insert(annotation.question_id, vocabulary.labels(answers));
            }
            Err(reason) => catalog.bad(BadKind::BrokenRecord, place, reason),
        },
    )?;
    Ok(all)
}
