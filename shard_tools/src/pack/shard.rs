//! From samples to a shard's tar, index and manifest entry, and from entries to a manifest.

use bytes::Bytes;

use crate::error::ShardError;
use crate::manifest::{
    MANIFEST_FILE, Manifest, SCHEMA_VERSION, ShardEntry, ShardIndex, Source, sha256,
};
use crate::pair::Contents;
use crate::reader;
use crate::store::{Root, StoreError};

/// A tar of `members`, in order, with nothing in it but names and data.
pub fn tar_of<D: AsRef<[u8]>>(members: impl IntoIterator<Item = (String, D)>) -> Vec<u8> {
    tar_into(Vec::new(), members)
}

/// The same into `buffer`, whose capacity is kept.
pub(super) fn tar_into<D: AsRef<[u8]>>(
    buffer: Vec<u8>,
    members: impl IntoIterator<Item = (String, D)>,
) -> Vec<u8> {
    let mut builder = tar::Builder::new(buffer);
    for (name, data) in members {
        let data = data.as_ref();
        let mut header = tar::Header::new_ustar();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(0);
        builder
            .append_data(&mut header, name, data)
            .expect("a plain name into memory");
    }
    builder.into_inner().expect("memory does not fail")
}

/// Puts the manifest, which makes the shards a dataset.
pub(crate) async fn write_manifest(root: &Root, manifest: &Manifest) -> Result<(), StoreError> {
    let text = serde_json::to_vec_pretty(manifest).expect("plain data");
    root.put(MANIFEST_FILE, Bytes::from(text)).await
}

/// A manifest of `shards`. Without names of `sources` the dataset is its own source.
pub(crate) fn manifest_of(
    dataset: &str,
    contents: Contents,
    sources: &[String],
    shards: Vec<ShardEntry>,
) -> Manifest {
    let samples = shards.iter().map(|s| u64::from(s.samples)).sum();
    let pairs = shards.iter().map(|s| u64::from(s.pairs)).sum();
    let sources = match sources {
        [] => {
            let name = dataset.replace(['/', '\\', '.'], "-");
            vec![Source {
                name,
                samples,
                pairs,
            }]
        }
        names => names
            .iter()
            .enumerate()
            .map(|(i, name)| Source {
                name: name.clone(),
                samples: shards.iter().map(|s| u64::from(s.source_samples[i])).sum(),
                pairs: shards.iter().map(|s| u64::from(s.source_pairs[i])).sum(),
            })
            .collect(),
    };
    Manifest {
        schema_version: SCHEMA_VERSION,
        dataset: dataset.to_owned(),
        contents,
        sources,
        files: Vec::new(),
        samples,
        pairs,
        shards,
    }
}

/// Which of `sources` the sample is from, by the first folder of its key.
fn source_of(key: &str, sources: &[String]) -> Option<u32> {
    if sources.len() < 2 {
        return Some(0);
    }
    let (folder, _) = key.split_once('/')?;
    let index = sources.iter().position(|name| name == folder)?;
    Some(index as u32)
}

/// Scans a shard's bytes, writes its index and returns its manifest entry.
pub(crate) async fn describe(
    root: &Root,
    file: &str,
    tar: &[u8],
    sources: &[String],
) -> Result<ShardEntry, ShardError> {
    let (entry, index) = describe_only(file, tar, sources)?;
    root.put(&entry.index_file, index).await?;
    Ok(entry)
}

/// Scans a shard's bytes: its manifest entry and its index.
pub(super) fn describe_only(
    file: &str,
    tar: &[u8],
    sources: &[String],
) -> Result<(ShardEntry, Bytes), ShardError> {
    let mut samples = reader::scan(tar, file)?;
    let (mut source_samples, mut source_pairs) = (vec![0; sources.len()], vec![0; sources.len()]);
    for sample in &mut samples {
        let source = source_of(&sample.key, sources).ok_or_else(|| ShardError::Member {
            shard: file.to_owned(),
            member: sample.key.clone(),
            offset: sample.text.offset,
            reason: "its key does not begin with a source's name".into(),
        })?;
        sample.source = source;
        if let Some(count) = source_samples.get_mut(source as usize) {
            *count += 1;
            source_pairs[source as usize] += sample.pairs;
        }
    }
    let index_file = format!("{}.index.json", file.trim_end_matches(".tar"));
    let pairs = samples.iter().map(|s| s.pairs).sum();
    let index = ShardIndex {
        schema_version: SCHEMA_VERSION,
        file: file.to_owned(),
        samples,
    };
    let text = serde_json::to_vec(&index).expect("plain data");
    let entry = ShardEntry {
        file: file.to_owned(),
        index_file,
        bytes: tar.len() as u64,
        sha256: sha256(tar),
        index_sha256: sha256(&text),
        samples: index.samples.len() as u32,
        pairs,
        source_samples,
        source_pairs,
    };
    Ok((entry, Bytes::from(text)))
}
