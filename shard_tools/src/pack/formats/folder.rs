//! `folder`: `key.jpg|png|webp` beside `key.txt`, one caption a line.

use std::collections::BTreeSet;
use std::path::Path;

use crate::error::ShardError;
use crate::pack::catalog::{Catalog, Description, Place, Texts};
use crate::pair::{Contents, TEXT_EXTENSION};
use crate::reader;

/// Keys of a folder's images, sorted.
///
/// # Errors
/// [`ShardError::Input`].
pub fn list_keys(folder: &Path) -> Result<Vec<String>, ShardError> {
    let keys: BTreeSet<String> = images(folder)?.into_iter().map(|(key, _)| key).collect();
    Ok(keys.into_iter().collect())
}

/// Every image of `folder` with the captions beside it; only `keys`, where some are given.
///
/// # Errors
/// [`ShardError::Input`], [`ShardError::Sample`] where there is no image.
pub fn catalog(folder: &Path, keys: Option<&[String]>) -> Result<Catalog, ShardError> {
    let keys: Option<BTreeSet<&String>> = keys.map(|keys| keys.iter().collect());
    let mut catalog = Catalog::new(folder, Contents::Captions);
    for (key, name) in images(folder)? {
        if keys.as_ref().is_none_or(|keys| keys.contains(&key)) {
            catalog.push(&Description {
                texts: Texts::At(Place::File(format!("{key}.{TEXT_EXTENSION}"))),
                images: vec![Place::File(name)],
                key,
                record: None,
            });
        }
    }
    catalog.some("image (key.jpg, key.png, key.webp)")
}

/// (key, file name) of every image in `folder`, sorted.
fn images(folder: &Path) -> Result<BTreeSet<(String, String)>, ShardError> {
    let failed = |source| ShardError::Input {
        file: folder.display().to_string(),
        source,
    };
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let name = name.to_string_lossy().into_owned();
        if let Some((key, extension)) = name.split_once('.')
            && reader::is_image(extension)
        {
            found.insert((key.to_owned(), name));
        }
    }
    Ok(found)
}
