//! `coco` and `flickr30k`: Karpathy's `dataset_coco.json` and `dataset_flickr30k.json` beside the
//! images as their publishers ship them.
//!
//! Splits as the paper's runs use them (model_spec 13): COCO trains on train and restval, Flickr30K
//! on train and val; both validate and test on Karpathy's test split.

use std::path::PathBuf;

use serde::Deserialize;

use super::Input;
use super::records::{self, Parsed};
use crate::error::ShardError;
use crate::pack::bad::BadKind;
use crate::pack::catalog::{Catalog, Description, Place, Texts, key_of};
use crate::pair::Contents;

/// Our splits, and Karpathy's in each.
type Splits = [(&'static str, &'static [&'static str])];

const COCO: &Splits = &[
    ("train", &["train", "restval"]),
    ("val", &["test"]),
    ("test", &["test"]),
    ("karpathy-val", &["val"]),
];
const FLICKR30K: &Splits = &[
    ("train", &["train", "val"]),
    ("val", &["test"]),
    ("test", &["test"]),
    ("karpathy-val", &["val"]),
];
/// All of Karpathy's.
const KNOWN: [&str; 4] = ["train", "restval", "val", "test"];

/// An element of `images`.
#[derive(Deserialize)]
struct Image {
    /// `train2014` or `val2014`; Flickr30K has none.
    #[serde(default)]
    filepath: String,
    filename: String,
    split: String,
    sentences: Vec<Sentence>,
}

#[derive(Deserialize)]
struct Sentence {
    raw: String,
}

/// COCO captions.
///
/// # Errors
/// [`ShardError`], naming the file.
pub fn coco(input: &Input) -> Result<Catalog, ShardError> {
    let splits = input.of_split("coco", COCO)?;
    let places = [
        "dataset_coco.json",
        "karpathy/dataset_coco.json",
        "annotations/dataset_coco.json",
    ];
    let folder = input.images.clone().unwrap_or_else(|| input.folder.clone());
    catalog(input.annotation(0, &places)?, folder, splits)
}

/// Flickr30K captions.
///
/// # Errors
/// [`ShardError`], naming the file.
pub fn flickr30k(input: &Input) -> Result<Catalog, ShardError> {
    let splits = input.of_split("flickr30k", FLICKR30K)?;
    let places = [
        "dataset_flickr30k.json",
        "karpathy/dataset_flickr30k.json",
        "annotations/dataset_flickr30k.json",
    ];
    let folder = input.image_folder(&["flickr30k-images", "flickr30k_images", "images"])?;
    catalog(input.annotation(0, &places)?, folder, splits)
}

fn catalog(file: PathBuf, folder: PathBuf, splits: &[&str]) -> Result<Catalog, ShardError> {
    let mut catalog = Catalog::new(folder, Contents::Captions);
    records::list(&file, "images", |place, image: Parsed<Image>| {
        let image = match image {
            Ok(image) if KNOWN.contains(&image.split.as_str()) => image,
            Ok(image) => {
                let reason = format!("unknown split `{}`", image.split);
                return catalog.bad(BadKind::BrokenRecord, place, reason);
            }
            Err(reason) => return catalog.bad(BadKind::BrokenRecord, place, reason),
        };
        if !splits.contains(&image.split.as_str()) {
            return;
        }
        let path = match image.filepath.as_str() {
            "" => image.filename.clone(),
            folder => format!("{folder}/{}", image.filename),
        };
        let captions = image.sentences.into_iter().map(|sentence| sentence.raw);
        catalog.push(&Description {
            key: key_of(&image.filename),
            images: vec![Place::File(path)],
            texts: Texts::Captions(captions.collect()),
            record: None,
        });
    })?;
    catalog.some("image of this split")
}
