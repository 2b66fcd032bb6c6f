//! Checks everything that a dataset claims, and reports all that is wrong, not the first only.

use rayon::prelude::*;

use crate::error::ShardError;
use crate::manifest::{MANIFEST_FILE, Manifest, ShardEntry, ShardIndex, sha256};
use crate::pair::Contents;
use crate::store::Root;
use crate::{check, pack, reader};

/// Reads a dataset's manifest.
///
/// # Errors
/// [`ShardError`], naming the file.
pub async fn manifest(root: &Root) -> Result<Manifest, ShardError> {
    Manifest::parse(
        &root.get(MANIFEST_FILE).await?,
        &format!("{root}/{MANIFEST_FILE}"),
    )
}

/// Reads the index of a shard.
///
/// # Errors
/// [`ShardError`], naming the file.
pub async fn index(root: &Root, entry: &ShardEntry) -> Result<ShardIndex, ShardError> {
    let bytes = root.get(&entry.index_file).await?;
    ShardIndex::parse(&bytes, entry, &format!("{root}/{}", entry.index_file))
}

/// Everything that is wrong with the dataset, in words that name shard, member and offset.
///
/// # Errors
/// [`ShardError`] when there is no manifest to begin with.
pub async fn problems(root: &Root) -> Result<Vec<String>, ShardError> {
    let mut found = Vec::new();
    for entry in &manifest(root).await?.shards {
        if let Err(error) = index(root, entry).await {
            found.push(error.to_string());
        }
        match root.get(&entry.file).await {
            Err(error) => found.push(error.to_string()),
            Ok(tar) => found.extend(shard_problems(&tar, entry)),
        }
    }
    Ok(found)
}

fn shard_problems(tar: &[u8], entry: &ShardEntry) -> Vec<String> {
    let mut found = Vec::new();
    if tar.len() as u64 != entry.bytes || sha256(tar) != entry.sha256 {
        found.push(format!(
            "shard {}: {} bytes with sha256 {}, the manifest says {} bytes with {}",
            entry.file,
            tar.len(),
            sha256(tar),
            entry.bytes,
            entry.sha256
        ));
    }
    let samples = match reader::scan(tar, &entry.file) {
        Ok(samples) => samples,
        Err(error) => {
            found.push(error.to_string());
            return found;
        }
    };
    let images = samples.par_iter().flat_map_iter(|sample| &sample.images);
    found.par_extend(images.filter_map(|image| {
        let bytes = reader::member_bytes(tar, &entry.file, image).ok()?;
        let reason = check::image(bytes).err()?;
        let (shard, member, offset) = (entry.file.clone(), image.name.clone(), image.offset);
        Some(
            ShardError::Member {
                shard,
                member,
                offset,
                reason,
            }
            .to_string(),
        )
    }));
    found
}

/// Makes a dataset of tars that somebody else wrote, without rewriting them: index and manifest
/// beside them.
///
/// # Errors
/// [`ShardError`], naming shard, member and offset.
pub async fn index_foreign(root: &Root, dataset: &str) -> Result<Manifest, ShardError> {
    if root.exists(MANIFEST_FILE).await? {
        return Err(ShardError::Exists(root.to_string()));
    }
    let mut shards = Vec::new();
    for (file, _) in root.list("").await? {
        if file.ends_with(".tar") && !file.contains('/') {
            let tar = root.get(&file).await?;
            shards.push(pack::describe(root, &file, &tar, &[]).await?);
        }
    }
    if shards.is_empty() {
        return Err(ShardError::Manifest {
            origin: root.to_string(),
            reason: "no .tar file here".into(),
        });
    }
    let manifest = pack::manifest_of(dataset, Contents::Captions, &[], shards);
    pack::write_manifest(root, &manifest).await?;
    Ok(manifest)
}
