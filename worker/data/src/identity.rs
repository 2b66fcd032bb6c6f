//! What data is, in digests: of a dataset by its manifest, of trained pairs by their ids.
//!
//! A manifest holds the hash of every shard and index, so its own hash stands for every byte. This
//! room says what it finds; whether it is the run's data is the coordinator's to say.

use belfry_configs::ValidConfig;
use shard_tools::manifest::{MANIFEST_FILE, Manifest, sha256};
use shard_tools::store::Root;
use xxhash_rust::xxh3::Xxh3;

use crate::error::DataError;
use crate::plane::Split;

/// A dataset as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatasetIdentity {
    /// Where the configuration names it.
    pub split: Split,
    /// As configured.
    pub path: String,
    /// SHA-256 of its manifest's bytes.
    pub manifest_sha256: String,
    /// Pairs in it.
    pub pairs: u64,
}

impl Split {
    /// The configuration's key.
    pub fn key(self) -> &'static str {
        match self {
            Split::Train => "data.train",
            Split::Validation => "data.validation",
        }
    }
}

/// The datasets at `paths`, in order, with their manifests.
///
/// # Errors
/// [`DataError`], naming the manifest.
pub async fn found(
    split: Split,
    paths: impl Iterator<Item = &str>,
) -> Result<Vec<(DatasetIdentity, Manifest)>, DataError> {
    let mut all = Vec::new();
    for path in paths {
        let root = Root::existing(path).map_err(|wrong| DataError::Setting {
            key: split.key(),
            reason: format!("{wrong}; pack it with `belfry shards pack`"),
        })?;
        let bytes = root.get(MANIFEST_FILE).await;
        let bytes = bytes.map_err(shard_tools::ShardError::from)?;
        let manifest = Manifest::parse(&bytes, &format!("{root}/{MANIFEST_FILE}"))?;
        let identity = DatasetIdentity {
            split,
            path: path.to_owned(),
            manifest_sha256: sha256(&bytes),
            pairs: manifest.pairs,
        };
        all.push((identity, manifest));
    }
    Ok(all)
}

/// The datasets that `config` names for `split`, in order; read on a thread that may wait.
///
/// # Errors
/// [`DataError`], naming the manifest.
pub fn identities(config: &ValidConfig, split: Split) -> Result<Vec<DatasetIdentity>, DataError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(|source| DataError::Cache {
        path: "reading manifests".into(),
        source,
    })?;
    let datasets = match split {
        Split::Train => &config.data.train,
        Split::Validation => &config.data.validation,
    };
    let found = runtime.block_on(found(split, datasets.paths()))?;
    Ok(found.into_iter().map(|(identity, _)| identity).collect())
}

/// The digest by which a receipt knows the pairs of a lane's step: xxh3 of their ids in order, eight
/// bytes each, little-endian.
pub fn pairs_digest(ids: impl IntoIterator<Item = u64>) -> u128 {
    let mut digest = Xxh3::new();
    for id in ids {
        digest.update(&id.to_le_bytes());
    }
    digest.digest128()
}
