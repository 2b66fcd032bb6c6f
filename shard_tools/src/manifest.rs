//! A dataset's manifest and its shards' indexes.

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::error::ShardError;
use crate::pair::Contents;

/// The version this code writes and reads.
pub const SCHEMA_VERSION: u32 = 2;
/// File name of the manifest; its existence makes shards a dataset.
pub const MANIFEST_FILE: &str = "manifest.json";
/// File name of a VQA dataset's answer vocabulary: a JSON list, row i names class i.
pub const ANSWERS_FILE: &str = "answers.json";

/// A dataset: totals per shard. What is inside a shard stands in its index.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// A name for people.
    pub dataset: String,
    /// What its pairs carry.
    pub contents: Contents,
    /// Where the samples come from, in order. With several, a sample's key begins with its source's
    /// name and `/`; false images are drawn inside a source.
    pub sources: Vec<Source>,
    /// Files beside the shards that belong to the dataset.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<DataFile>,
    /// Samples in all shards.
    pub samples: u64,
    /// Pairs in all shards.
    pub pairs: u64,
    /// In order.
    pub shards: Vec<ShardEntry>,
}

/// A dataset that went into this one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Its name.
    pub name: String,
    /// Its samples in all shards.
    pub samples: u64,
    /// Its pairs in all shards.
    pub pairs: u64,
}

/// A file beside the shards.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataFile {
    /// The file, beside the manifest.
    pub file: String,
    /// Its bytes.
    pub bytes: u64,
    /// SHA-256.
    pub sha256: String,
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
    /// Samples of each source, where the dataset has several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub source_samples: Vec<u32>,
    /// Pairs of each source, where the dataset has several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub source_pairs: Vec<u32>,
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

/// One image (two for NLVR2) with its pairs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SampleEntry {
    /// webdataset's key.
    pub key: String,
    /// The image members, in order.
    pub images: Vec<Member>,
    /// The member that holds the pairs: `txt` or `pairs.json`.
    pub text: Member,
    /// Number of pairs.
    pub pairs: u32,
    /// Which of the manifest's sources it comes from.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub source: u32,
}

fn is_zero(n: &u32) -> bool {
    *n == 0
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
        let shards = manifest.shards.iter();
        let files = manifest.files.iter().map(|f| &f.file);
        for file in shards.flat_map(|s| [&s.file, &s.index_file]).chain(files) {
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
        manifest.check_sources(origin)?;
        Ok(manifest)
    }

    fn check_sources(&self, origin: &str) -> Result<(), ShardError> {
        let sources = self.sources.len();
        if sources == 0 {
            return Err(wrong(origin, "names no source"));
        }
        for (index, source) in self.sources.iter().enumerate() {
            let name = &source.name;
            let plain = !name.is_empty() && !name.contains(['/', '\\', '.']);
            if !plain || self.sources[..index].iter().any(|s| s.name == *name) {
                let reason = format!("source `{name}` is named twice or is no plain name");
                return Err(wrong(origin, reason));
            }
        }
        let mut totals = vec![0u64; sources];
        for shard in &self.shards {
            let counts = shard.source_pairs(sources);
            let all: u64 = counts.iter().map(|c| u64::from(*c)).sum();
            if counts.len() != sources || all != u64::from(shard.pairs) {
                let reason = format!("{}: source_pairs do not add up to its pairs", shard.file);
                return Err(wrong(origin, reason));
            }
            for (total, count) in totals.iter_mut().zip(counts.iter()) {
                *total += u64::from(*count);
            }
        }
        if self.sources.iter().zip(&totals).any(|(s, t)| s.pairs != *t) {
            return Err(wrong(
                origin,
                "a source's pairs are not those of the shards",
            ));
        }
        Ok(())
    }
}

impl ShardEntry {
    /// Pairs of each of the dataset's `sources`.
    pub fn source_pairs(&self, sources: usize) -> std::borrow::Cow<'_, [u32]> {
        if sources == 1 && self.source_pairs.is_empty() {
            return vec![self.pairs].into();
        }
        (&self.source_pairs[..]).into()
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
        let pairs: u64 = index.samples.iter().map(|s| u64::from(s.pairs)).sum();
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
            .find(|s| s.images.is_empty() || !s.images.iter().all(inside) || !inside(&s.text))
        {
            return Err(wrong(
                origin,
                format!("`{}` lies outside its shard", bad.key),
            ));
        }
        Ok(index)
    }
}
