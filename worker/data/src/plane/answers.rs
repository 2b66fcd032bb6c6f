//! VQA's answer vocabulary: how many classes a dataset's labels mean.

use belfry_configs::{Datasets, Task, ValidConfig};
use shard_tools::manifest::{ANSWERS_FILE, Manifest, sha256};
use shard_tools::store::Root;
use shard_tools::verify;

use crate::error::DataError;

/// Rows of the datasets' answer file, 0 for tasks without one; a split's datasets have the same.
///
/// # Errors
/// [`DataError::Shard`], [`DataError::Setting`]: no such file, not the manifest's, or not as many
/// answers as the model's head.
pub fn count(
    config: &ValidConfig,
    datasets: &Datasets,
    manifests: &[Manifest],
) -> Result<usize, DataError> {
    let first = datasets.paths().zip(manifests).next();
    let (Task::Vqa, Some((path, manifest))) = (config.model.task, first) else {
        return Ok(0);
    };
    let answers = waiting(path, stored(path, manifest))?;
    let head = config.model.head.answers;
    if answers.len() != head as usize {
        return Err(DataError::Setting {
            key: "model.head.answers",
            reason: format!("is {head}, and {path}/{ANSWERS_FILE} has {}", answers.len()),
        });
    }
    Ok(answers.len())
}

/// The answers of the dataset at `path`, class i at place i; read on a thread that may wait.
///
/// # Errors
/// [`DataError::Shard`], [`DataError::Setting`]: no dataset, no such file, or not the manifest's.
pub fn answers(path: &str) -> Result<Vec<String>, DataError> {
    waiting(path, async {
        let root = Root::existing(path).map_err(shard_tools::ShardError::from)?;
        let manifest = verify::manifest(&root).await?;
        stored(path, &manifest).await
    })
}

async fn stored(path: &str, manifest: &Manifest) -> Result<Vec<String>, DataError> {
    let file = manifest.files.iter().find(|f| f.file == ANSWERS_FILE);
    let file = file.ok_or_else(|| wrong(path, "is not in the manifest; pack it for VQA"))?;
    let root = Root::existing(path).map_err(shard_tools::ShardError::from)?;
    let bytes = root.get(ANSWERS_FILE).await;
    let bytes = bytes.map_err(shard_tools::ShardError::from)?;
    if sha256(&bytes) != file.sha256 {
        let reason = "its sha256 is not the manifest's; pack it again";
        return Err(wrong(path, reason));
    }
    serde_json::from_slice(&bytes)
        .map_err(|e| wrong(path, format!("is not a list of answers: {e}")))
}

fn waiting<T>(
    path: &str,
    reading: impl Future<Output = Result<T, DataError>>,
) -> Result<T, DataError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| wrong(path, e.to_string()))?;
    runtime.block_on(reading)
}

fn wrong(path: &str, reason: impl std::fmt::Display) -> DataError {
    DataError::Setting {
        key: "data.train or data.validation",
        reason: format!("{path}/{ANSWERS_FILE}: {reason}"),
    }
}
