//! A dataset's manifest and its shards' indexes.

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::error::ShardError;

/// The version this code writes and reads.
pub const SCHEMA_VERSION: u32 = 1;
/// File name of the manifest; its existence makes shards a dataset.
pub const MANIFEST_FILE: &str = "manifest.json";

/// A dataset: totals per shard. What is inside a shard stands in its index.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// A name for people.
    pub dataset: String,
    /// Samples in all shards.
    pub samples: u64,
    /// Pairs in all shards.
    pub pairs: u64,
    /// In order.
    pub shards: Vec<ShardEntry>,
}

/// One shard's totals and hashes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardEntry {
    /// The tar, beside the manifest.
    pub file: String,
    /// Its index, beside the manifest.
    pub index_file: String,
    /// Bytes of the tar.
    pub bytes: u64,
    /// SHA-256 of the tar.
    pub sha256: String,
    /// SHA-256 of the index.
    pub index_sha256: String,
    /// Samples.
    pub samples: u32,
    /// Pairs.
    pub pairs: u32,
}

/// A shard's samples, in the order of the tar.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardIndex {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// The tar.
    pub file: String,
    /// In order.
    pub samples: Vec<SampleEntry>,
}

/// One image with its captions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SampleEntry {
    /// webdataset's key.
    pub key: String,
    /// The image member.
    pub image: Member,
    /// The captions member.
    pub text: Member,
    /// Number of captions.
    pub captions: u32,
}

/// A tar member's data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// Name in the tar.
    pub name: String,
    /// Offset of its data in the tar.
    pub offset: u64,
    /// Length of its data.
    pub bytes: u64,
}

/// Lower-case hexadecimal SHA-256.
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}

fn wrong(origin: &str, reason: impl Into<String>) -> ShardError {
    ShardError::Manifest {
        origin: origin.to_owned(),
        reason: reason.into(),
    }
}

fn parse<T: for<'a> Deserialize<'a>>(bytes: &[u8], origin: &str) -> Result<T, ShardError> {
    serde_json::from_slice(bytes).map_err(|e| wrong(origin, format!("not as expected: {e}")))
}

fn check_version(version: u32, origin: &str) -> Result<(), ShardError> {
    if version != SCHEMA_VERSION {
        let reason = format!("schema version {version}, this program reads {SCHEMA_VERSION}");
        return Err(wrong(origin, reason));
    }
    Ok(())
}

impl Manifest {
    /// Reads and checks a manifest; `origin` names it in errors.
    ///
    /// # Errors
    /// [`ShardError::Manifest`].
    pub fn parse(bytes: &[u8], origin: &str) -> Result<Self, ShardError> {
        let manifest: Manifest = parse(bytes, origin)?;
        check_version(manifest.schema_version, origin)?;
        for file in manifest
            .shards
            .iter()
            .flat_map(|s| [&s.file, &s.index_file])
        {
            if file.is_empty() || file.contains(['/', '\\']) || file.starts_with('.') {
                return Err(wrong(origin, format!("`{file}` is not a plain file name")));
            }
        }
        let samples: u64 = manifest.shards.iter().map(|s| u64::from(s.samples)).sum();
        let pairs: u64 = manifest.shards.iter().map(|s| u64::from(s.pairs)).sum();
        if (samples, pairs) != (manifest.samples, manifest.pairs) {
            let reason = format!(
                "says {} samples and {} pairs, its shards have {samples} and {pairs}",
                manifest.samples, manifest.pairs
            );
            return Err(wrong(origin, reason));
        }
        Ok(manifest)
    }
}

impl ShardIndex {
    /// Reads and checks an index against its entry; `origin` names it in errors.
    ///
    /// # Errors
    /// [`ShardError::Manifest`].
    pub fn parse(bytes: &[u8], entry: &ShardEntry, origin: &str) -> Result<Self, ShardError> {
        if sha256(bytes) != entry.index_sha256 {
            return Err(wrong(
                origin,
                "its sha256 is not the manifest's; fetch or pack it again",
            ));
        }
        let index: ShardIndex = parse(bytes, origin)?;
        check_version(index.schema_version, origin)?;
        let pairs: u64 = index.samples.iter().map(|s| u64::from(s.captions)).sum();
        if index.samples.len() != entry.samples as usize || pairs != u64::from(entry.pairs) {
            return Err(wrong(origin, "its totals are not the manifest's"));
        }
        let inside = |m: &Member| {
            m.offset
                .checked_add(m.bytes)
                .is_some_and(|e| e <= entry.bytes)
        };
        if let Some(bad) = index
            .samples
            .iter()
            .find(|s| !inside(&s.image) || !inside(&s.text))
        {
            return Err(wrong(
                origin,
                format!("`{}` lies outside its shard", bad.key),
            ));
        }
        Ok(index)
    }
}
