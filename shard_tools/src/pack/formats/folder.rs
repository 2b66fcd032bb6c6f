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
    let images = images(folder)?;
    let keys: BTreeSet<&str> = images.iter().filter_map(|name| key(name)).collect();
    Ok(keys.into_iter().map(str::to_owned).collect())
}

/// Every image of `folder` with the captions beside it; only `keys`, where some are given.
///
/// # Errors
/// [`ShardError::Input`], [`ShardError::Sample`] where there is no image.
pub fn catalog(folder: &Path, keys: Option<&[String]>) -> Result<Catalog, ShardError> {
    let keys: Option<BTreeSet<&str>> = keys.map(|keys| keys.iter().map(String::as_str).collect());
    let mut catalog = Catalog::new(folder, Contents::Captions);
    for name in images(folder)? {
        if let Some(key) = key(&name)
            && keys.as_ref().is_none_or(|keys| keys.contains(key))
        {
            catalog.push(&Description {
                key: key.to_owned(),
                images: vec![Place::File(name.to_string())],
                texts: Texts::At(Place::File(format!("{key}.{TEXT_EXTENSION}"))),
                record: None,
            });
        }
    }
    catalog.some("image (key.jpg, key.png, key.webp)")
}

/// The key of an image's file name.
pub(super) fn key(name: &str) -> Option<&str> {
    let (key, extension) = name.split_once('.')?;
    reader::is_image(extension).then_some(key)
}

/// Names of every image in `folder`, sorted.
pub(super) fn images(folder: &Path) -> Result<Vec<Box<str>>, ShardError> {
    let failed = |source| ShardError::Input {
        file: folder.display().to_string(),
        source,
    };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let name = name.to_string_lossy();
        if key(&name).is_some() {
            found.push(name.into_owned().into_boxed_str());
        }
    }
    found.sort_unstable();
    Ok(found)
}
