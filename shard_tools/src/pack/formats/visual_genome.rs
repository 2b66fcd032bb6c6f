//! `vg`: Visual Genome's `region_descriptions.json` beside `VG_100K` and `VG_100K_2`.
//!
//! An image's captions are its regions' phrases, each once, in the order of the file: 5.4 million
//! phrases become 4.8 million (model_spec 13).

use serde::Deserialize;
use serde_json::value::RawValue;

use super::Input;
use super::records::{self, Id, Parsed};
use crate::error::ShardError;
use crate::pack::bad::BadKind;
use crate::pack::catalog::{Catalog, Description, Place, Texts};
use crate::pair::Contents;

/// An element of the file: an image's regions.
#[derive(Deserialize)]
struct Image {
    id: Option<Id>,
    regions: Vec<Box<RawValue>>,
}

#[derive(Deserialize)]
struct Region {
    image_id: Option<Id>,
    phrase: String,
}

/// Region descriptions as captions.
///
/// # Errors
/// [`ShardError`], naming the file.
pub fn catalog(input: &Input) -> Result<Catalog, ShardError> {
    input.of_split("vg", &[("train", ())])?;
    let places = [
        "region_descriptions.json",
        "annotations/region_descriptions.json",
    ];
    let file = input.annotation(0, &places)?;
    let images = match &input.images {
        Some(given) => given.clone(),
        None if input.folder.join("images").is_dir() => input.folder.join("images"),
        None => input.folder.clone(),
    };
    let mut catalog = Catalog::new(images, Contents::Captions);
    records::list(&file, "images", |place, image: Parsed<Image>| match image {
        Ok(image) => describe(&mut catalog, &place, image),
        Err(reason) => catalog.bad(BadKind::BrokenRecord, place, reason),
    })?;
    catalog.some("image")
}

fn describe(catalog: &mut Catalog, place: &str, image: Image) {
    let (mut id, mut captions) = (image.id, Vec::new());
    let count = image.regions.len();
    for (number, raw) in image.regions.into_iter().enumerate() {
        match serde_json::from_str::<Region>(raw.get()) {
            Ok(region) => {
                id = id.or(region.image_id);
                captions.push(region.phrase);
            }
            Err(error) => {
                let place = format!("{place}: regions[{number}]");
                catalog.bad(BadKind::BrokenRecord, place, error.to_string());
            }
        }
    }
    let Some(id) = id else {
        return catalog.bad(BadKind::BrokenRecord, place, "has no image id");
    };
    if captions.is_empty() && count == 0 {
        return catalog.leave_out("images without regions");
    }
    let name = format!("{id}.jpg");
    let folders = ["VG_100K", "VG_100K_2"];
    let there = |folder: &&str| catalog.folder.join(folder).join(&name).exists();
    // Where it is in neither, reading it will say so.
    let folder = folders.into_iter().find(there).unwrap_or(folders[0]);
    catalog.push(&Description {
        key: id.to_string(),
        images: vec![Place::File(format!("{folder}/{name}"))],
        texts: Texts::Captions(captions),
        record: None,
    });
}
