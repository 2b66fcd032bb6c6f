//! `snli-ve`: `snli_ve_{train,dev,test}.jsonl` beside `flickr30k-images`.
//!
//! The text is the hypothesis alone, the second sentence (model_spec 13); the image takes the
//! premise's place.

use serde::Deserialize;

use super::Input;
use super::records::{self, Id, Parsed};
use crate::error::ShardError;
use crate::pack::bad::BadKind;
use crate::pack::catalog::{Catalog, Description, Place, Texts};
use crate::pair::{Contents, Pair};

/// A line of the file.
#[derive(Deserialize)]
struct Line {
    #[serde(rename = "Flickr30K_ID")]
    image: Id,
    sentence2: String,
    gold_label: String,
    #[serde(rename = "pairID")]
    pair_id: Option<String>,
}

/// Hypotheses with labels.
///
/// # Errors
/// [`ShardError`], naming the file.
pub fn catalog(input: &Input) -> Result<Catalog, ShardError> {
    let splits = [
        ("train", "train"),
        ("dev", "dev"),
        ("val", "dev"),
        ("test", "test"),
    ];
    let split = input.of_split("snli-ve", &splits)?;
    let name = format!("snli_ve_{split}.jsonl");
    let file = input.annotation(0, &[&name, &format!("snli_ve/{name}")])?;
    let folder = input.image_folder(&["flickr30k-images", "flickr30k_images", "images"])?;
    let mut catalog = Catalog::new(folder, Contents::SnliVe);
    records::json_lines(&file, |place, line: Parsed<Line>| {
        let line = match line {
            Ok(line) => line,
            Err(reason) => return catalog.bad(BadKind::BrokenRecord, place, reason),
        };
        let label = match line.gold_label.as_str() {
            "contradiction" => 0,
            "neutral" => 1,
            "entailment" => 2,
            "-" => return catalog.leave_out("hypotheses on which the annotators did not agree"),
            other => {
                let reason = format!("unknown gold_label `{other}`");
                return catalog.bad(BadKind::BrokenRecord, place, reason);
            }
        };
        if line.sentence2.trim().is_empty() {
            return catalog.bad(BadKind::BrokenText, place, "sentence2 is empty");
        }
        catalog.push(&Description {
            key: line.image.to_string(),
            images: vec![Place::File(format!("{}.jpg", line.image))],
            texts: Texts::Pairs(vec![Pair {
                text: line.sentence2,
                id: line.pair_id,
                labels: vec![label],
                scores: Vec::new(),
            }]),
            record: None,
        });
    })?;
    catalog.some("hypothesis")
}
