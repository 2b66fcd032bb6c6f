//! `img2dataset`: what img2dataset writes, as tars or as folders: image, `.txt` caption and `.json`
//! record of the download. A record whose status is not success counts as a failed download.

use std::collections::BTreeMap;

use super::webdataset::{self, Members};
use super::{Input, files_below};
use crate::error::ShardError;
use crate::pack::bad::BadKind;
use crate::pack::catalog::{Catalog, Description, Place, Texts};
use crate::pair::Contents;
use crate::reader;
use crate::store::Root;

/// Every download.
///
/// # Errors
/// [`ShardError`], naming the file.
pub async fn catalog(location: &str) -> Result<Catalog, ShardError> {
    let root = Root::existing(location)?;
    let tars = root
        .list("")
        .await?
        .iter()
        .any(|(key, _)| key.ends_with(".tar"));
    match root.local_folder() {
        Some(_) if !tars => files(&Input::new(location)),
        _ => {
            let members = Members {
                records: true,
                tar_in_key: false,
            };
            webdataset::catalog(location, members).await
        }
    }
}

/// A download's files.
#[derive(Default)]
struct Group {
    images: Vec<Place>,
    text: Option<Place>,
    record: Option<Place>,
}

/// `00000/000000000.jpg` and the like. Keys count on over all folders.
fn files(input: &Input) -> Result<Catalog, ShardError> {
    let mut groups: BTreeMap<Box<str>, Group> = BTreeMap::new();
    for path in files_below(&input.folder)? {
        let base = path.rsplit('/').next().unwrap_or(&path);
        // Beside the folders of downloads lie their statistics.
        let Some((stem, extension)) = base.split_once('.').filter(|_| path.contains('/')) else {
            continue;
        };
        let extension = extension.to_ascii_lowercase();
        let group = groups.entry(stem.into()).or_default();
        let place = Place::File(path.to_string());
        match extension.as_str() {
            "txt" => group.text = Some(place),
            "json" => group.record = Some(place),
            image if reader::is_image(image) => group.images.push(place),
            _ => {}
        }
    }
    let mut catalog = Catalog::new(&input.folder, Contents::Captions);
    for (key, group) in groups {
        let place = key.to_string();
        let texts = match (group.text, &group.record) {
            (Some(text), _) => Texts::At(text),
            (None, Some(_)) => Texts::InRecord,
            (None, None) => {
                catalog.bad(BadKind::BrokenText, place, "has neither .txt nor .json");
                continue;
            }
        };
        if group.images.len() > 1 {
            catalog.bad(BadKind::DoubleKey, place, "has several images");
        } else if group.images.is_empty() && group.record.is_none() {
            catalog.bad(BadKind::MissingImage, place, "has no image");
        } else {
            catalog.push(&Description {
                key: key.into(),
                images: group.images,
                texts,
                record: group.record,
            });
        }
    }
    catalog.some("download (00000/000000000.jpg, .txt, .json), nor a tar,")
}
