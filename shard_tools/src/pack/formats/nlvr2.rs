//! `nlvr2`: NLVR2's `train.json`, `dev.json` and `test1.json` (JSON lines) beside the images, two a
//! sample.

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
    sentence: String,
    label: String,
    /// `train-10171-0-0`: the last part counts the statements about the same two images.
    identifier: String,
    /// The training images' folder.
    directory: Option<Id>,
}

/// Statements about two images, with labels.
///
/// # Errors
/// [`ShardError`], naming the file.
pub fn catalog(input: &Input) -> Result<Catalog, ShardError> {
    let splits = [
        ("train", "train"),
        ("dev", "dev"),
        ("val", "dev"),
        ("test1", "test1"),
        ("test", "test1"),
    ];
    let split = *input.of_split("nlvr2", &splits)?;
    let name = format!("{split}.json");
    let places = [
        &name,
        &format!("data/{name}"),
        &format!("nlvr2/data/{name}"),
    ];
    let file = input.annotation(0, &places.map(String::as_str))?;
    let folder = match (&input.images, split) {
        (Some(given), _) => given.clone(),
        (None, "train") => input.image_folder(&["images/train", "train"])?,
        (None, split) => input.image_folder(&[split, &format!("images/{split}")])?,
    };
    let mut catalog = Catalog::new(folder, Contents::Nlvr2);
    records::json_lines(&file, |place, line: Parsed<Line>| {
        let line = match line {
            Ok(line) => line,
            Err(reason) => return catalog.bad(BadKind::BrokenRecord, place, reason),
        };
        match describe(line, split) {
            Ok(description) => catalog.push(&description),
            Err(reason) => catalog.bad(BadKind::BrokenRecord, place, reason),
        }
    })?;
    catalog.some("statement")
}

fn describe(line: Line, split: &str) -> Result<Description, String> {
    let label = match line.label.to_ascii_lowercase().as_str() {
        "true" => 1,
        "false" => 0,
        other => return Err(format!("unknown label `{other}`")),
    };
    if line.sentence.trim().is_empty() {
        return Err("the sentence is empty".into());
    }
    let Some((images, _)) = line.identifier.rsplit_once('-') else {
        return Err(format!("identifier `{}` has no parts", line.identifier));
    };
    let folder = match (split, &line.directory) {
        ("train", Some(directory)) => format!("{directory}/"),
        ("train", None) => return Err("a training record without its directory".into()),
        _ => String::new(),
    };
    let image = |number: u32| Place::File(format!("{folder}{images}-img{number}.png"));
    Ok(Description {
        key: images.to_owned(),
        images: vec![image(0), image(1)],
        texts: Texts::Pairs(vec![Pair {
            text: line.sentence,
            labels: vec![label],
            scores: Vec::new(),
            id: Some(line.identifier),
        }]),
        record: None,
    })
}
