//! Packed datasets as input: repacked with other options, or several mixed into one.
//!
//! Manifest and indexes say where everything lies; samples are read by ranges when they are packed,
//! from a folder or a store.

use futures::{StreamExt as _, TryStreamExt as _, stream};

use crate::error::ShardError;
use crate::manifest::{ANSWERS_FILE, Manifest, ShardIndex};
use crate::pack::catalog::{Catalog, Description, Place, Texts};
use crate::store::Root;
use crate::verify;

/// Indexes on their way at once.
const REQUESTS: usize = 16;

/// One packed dataset, with its sources and its answer vocabulary.
///
/// # Errors
/// [`ShardError`], naming the file.
pub async fn catalog(root: &Root) -> Result<Catalog, ShardError> {
    let manifest = verify::manifest(root).await?;
    let mut catalog = Catalog::new(root.to_string(), manifest.contents);
    if manifest.sources.len() > 1 {
        let names = manifest.sources.iter().map(|source| source.name.clone());
        catalog.sources = names.collect();
    }
    add(&mut catalog, root, &manifest, "").await?;
    catalog.some("sample")
}

/// Several packed datasets, `(name, location)`, each a source whose name begins its keys.
///
/// # Errors
/// [`ShardError`], naming the file; [`ShardError::Option`] where they do not go together.
pub async fn mixed(inputs: &[(String, String)]) -> Result<Catalog, ShardError> {
    let mut mixed: Option<Catalog> = None;
    for (name, location) in inputs {
        let plain = !name.is_empty() && !name.contains(['/', '\\', '.']);
        if !plain || inputs.iter().filter(|(other, _)| other == name).count() > 1 {
            let reason = format!("{name}={location}: a source needs a plain name of its own");
            return Err(ShardError::Option(reason));
        }
        let root = Root::existing(location)?;
        let manifest = verify::manifest(&root).await?;
        let catalog = mixed.get_or_insert_with(|| Catalog::new("", manifest.contents));
        if catalog.contents != manifest.contents {
            return Err(ShardError::Option(format!(
                "{name}={location} holds {:?}, those before hold {:?}; they cannot be mixed",
                manifest.contents, catalog.contents
            )));
        }
        catalog.sources.push(name.clone());
        add(catalog, &root, &manifest, &format!("{name}/")).await?;
    }
    let nothing = || ShardError::Option("name at least one dataset as NAME=PATH".into());
    mixed.ok_or_else(nothing)?.some("sample")
}

async fn add(
    catalog: &mut Catalog,
    root: &Root,
    manifest: &Manifest,
    prefix: &str,
) -> Result<(), ShardError> {
    if manifest.files.iter().any(|file| file.file == ANSWERS_FILE) {
        let answers = root.get(ANSWERS_FILE).await?;
        match catalog.files.iter().find(|(name, _)| name == ANSWERS_FILE) {
            None => catalog.files.push((ANSWERS_FILE.into(), answers)),
            Some((_, before)) if *before == answers => {}
            Some(_) => {
                return Err(ShardError::Option(format!(
                    "{root}/{ANSWERS_FILE} is another vocabulary than that of the datasets before; \
                     pack with one --answers to mix"
                )));
            }
        }
    }
    let indexes = manifest
        .shards
        .iter()
        .map(|entry| verify::index(root, entry));
    let mut indexes = stream::iter(indexes).buffered(REQUESTS);
    while let Some(index) = indexes.try_next().await? {
        let tar = catalog.tars.len() as u32;
        catalog.tars.push((root.clone(), index.file.clone()));
        describe(catalog, tar, index, prefix);
    }
    Ok(())
}

fn describe(catalog: &mut Catalog, tar: u32, index: ShardIndex, prefix: &str) {
    for sample in index.samples {
        let images = sample.images.into_iter();
        catalog.push(&Description {
            key: format!("{prefix}{}", sample.key),
            images: images.map(|member| Place::Member(tar, member)).collect(),
            texts: Texts::At(Place::Member(tar, sample.text)),
            record: None,
        });
    }
}
