//! `index`: makes a dataset of tars that somebody else wrote, without rewriting them. What a tar is
//! allowed to be, the reader knows.

use anyhow::Context as _;
use clap::Args;
use futures::{StreamExt as _, TryStreamExt as _};

use super::dataset::{byte_bar, in_flight};
use crate::error::ShardError;
use crate::manifest::{ANSWERS_FILE, DataFile, MANIFEST_FILE, Manifest, sha256};
use crate::pack;
use crate::pair::Contents;
use crate::store::Root;

/// What to index.
#[derive(Debug, Args)]
pub struct IndexArguments {
    /// Folder or URL with the tars.
    dataset: String,
    /// A name for people.
    #[arg(long, default_value = "dataset")]
    name: String,
    /// What the pairs carry: captions, vqa, snli_ve or nlvr2.
    #[arg(long, default_value = "captions")]
    contents: String,
}

/// Writes manifest and indexes beside the tars.
///
/// # Errors
/// What went wrong, naming shard, member and offset.
pub async fn run(arguments: &IndexArguments) -> anyhow::Result<()> {
    let IndexArguments {
        dataset,
        name,
        contents,
    } = arguments;
    let contents = serde_json::from_value(contents.as_str().into());
    let contents = contents.context("--contents")?;
    let manifest = index_foreign(&Root::existing(dataset)?, name, contents).await?;
    println!(
        "{dataset}: indexed {} shards, {} samples, {} pairs",
        manifest.shards.len(),
        manifest.samples,
        manifest.pairs
    );
    Ok(())
}

/// Index and manifest beside foreign tars, several tars at once. An `answers.json` beside them
/// belongs to a VQA dataset.
///
/// # Errors
/// [`ShardError`], naming shard, member and offset.
pub async fn index_foreign(
    root: &Root,
    dataset: &str,
    contents: Contents,
) -> Result<Manifest, ShardError> {
    if root.exists(MANIFEST_FILE).await? {
        return Err(ShardError::Exists(root.to_string()));
    }
    let listed = root.list("").await?.into_iter();
    let tars = listed.filter(|(file, _)| file.ends_with(".tar") && !file.contains('/'));
    let tars: Vec<(String, u64)> = tars.collect();
    if tars.is_empty() {
        return Err(ShardError::Manifest {
            origin: root.to_string(),
            reason: "no .tar file here".into(),
        });
    }
    let bar = byte_bar("indexing", tars.iter().map(|(_, bytes)| bytes).sum());
    let walk = futures::stream::iter(&tars).map(|(file, bytes)| {
        let bar = bar.clone();
        async move {
            let tar = root.get(file).await?;
            let entry = pack::describe(root, file, &tar, &[]).await?;
            bar.inc(*bytes);
            Ok::<_, ShardError>(entry)
        }
    });
    let walk = walk.buffered(in_flight(tars.iter().map(|(_, bytes)| *bytes)));
    let shards = walk.try_collect().await?;
    bar.finish_and_clear();
    let mut manifest = pack::manifest_of(dataset, contents, &[], shards);
    if contents == Contents::Vqa {
        let bytes = root.get(ANSWERS_FILE).await?;
        manifest.files.push(DataFile {
            file: ANSWERS_FILE.into(),
            bytes: bytes.len() as u64,
            sha256: sha256(&bytes),
        });
    }
    pack::write_manifest(root, &manifest).await?;
    Ok(manifest)
}
