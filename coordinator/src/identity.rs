//! `data.json` below the run's root: what a run trains and validates on.
//!
//! The first worker of a run says what it found, everybody after it must find the same. A manifest
//! holds the hash of every shard and index, so the manifest's hash stands for every byte; packing is
//! deterministic, so the same input packed again is the same dataset.

use belfry_proto::v1;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use shard_tools::store::{Created, Root};

use crate::error::CoordinatorError;

/// The file, relative to the run's root.
pub const DATA_FILE: &str = "data.json";

/// The file's content.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Data {
    datasets: Vec<Dataset>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Dataset {
    key: String,
    path: String,
    manifest_sha256: String,
    pairs: u64,
}

/// What the run trains and validates on, if it was said.
///
/// # Errors
/// [`CoordinatorError`], naming the file.
pub async fn read(root: &Root) -> Result<Option<Vec<v1::Dataset>>, CoordinatorError> {
    let failed = |e| CoordinatorError::store(format!("cannot read {DATA_FILE}"), e);
    if !root.exists(DATA_FILE).await.map_err(failed)? {
        return Ok(None);
    }
    let bytes = root.get(DATA_FILE).await.map_err(failed)?;
    let data: Data = serde_json::from_slice(&bytes).map_err(|e| CoordinatorError::Corrupt {
        file: DATA_FILE.into(),
        reason: e.to_string(),
    })?;
    let datasets = data.datasets.into_iter().map(|d| v1::Dataset {
        key: d.key,
        path: d.path,
        manifest_sha256: d.manifest_sha256,
        pairs: d.pairs,
    });
    Ok(Some(datasets.collect()))
}

/// Writes it down, once and for all.
///
/// # Errors
/// [`CoordinatorError`]: the root failed, or another coordinator has written something else.
pub async fn put(root: &Root, datasets: &[v1::Dataset]) -> Result<(), CoordinatorError> {
    let datasets = datasets.iter().cloned().map(|d| Dataset {
        key: d.key,
        path: d.path,
        manifest_sha256: d.manifest_sha256,
        pairs: d.pairs,
    });
    let data = Data {
        datasets: datasets.collect(),
    };
    let text = Bytes::from(serde_json::to_vec_pretty(&data).expect("plain data"));
    let failed = |e| CoordinatorError::store(format!("cannot write {DATA_FILE}"), e);
    let created = root.create(DATA_FILE, text.clone()).await.map_err(failed)?;
    if created == Created::Exists && root.get(DATA_FILE).await.map_err(failed)? != text {
        return Err(CoordinatorError::Corrupt {
            file: DATA_FILE.into(),
            reason:
                "names other datasets than the workers found; another coordinator leads this run"
                    .into(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_a_run_trains_on_is_written_once() {
        let root = Root::open("memory://").expect("opens");
        assert_eq!(read(&root).await.expect("reads"), None);
        let dataset = |sha256: &str| v1::Dataset {
            key: "data.train".into(),
            path: "s3://bucket/train".into(),
            manifest_sha256: sha256.into(),
            pairs: 7,
        };
        put(&root, &[dataset("a")]).await.expect("writes");
        put(&root, &[dataset("a")]).await.expect("is equal");
        let found = read(&root).await.expect("reads");
        assert_eq!(found, Some(vec![dataset("a")]));
        let refused = put(&root, &[dataset("b")]).await.expect_err("differs");
        assert!(refused.to_string().contains("data.json"), "{refused}");
    }
}
