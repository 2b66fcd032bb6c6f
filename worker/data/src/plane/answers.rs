//! VQA's answer vocabulary: how many classes a dataset's labels mean.

use belfry_configs::{Datasets, Task, ValidConfig};
use shard_tools::manifest::{ANSWERS_FILE, Manifest, sha256};
use shard_tools::store::Root;

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
    let file = manifest.files.iter().find(|f| f.file == ANSWERS_FILE);
    let wrong = |reason: String| DataError::Setting {
        key: "data.train or data.validation",
        reason: format!("{path}/{ANSWERS_FILE}: {reason}"),
    };
    let file = file.ok_or_else(|| wrong("is not in the manifest; pack it for VQA".into()))?;
    let root = Root::existing(path).map_err(shard_tools::ShardError::from)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| wrong(e.to_string()))?;
    let bytes = runtime.block_on(root.get(ANSWERS_FILE));
    let bytes = bytes.map_err(shard_tools::ShardError::from)?;
    if sha256(&bytes) != file.sha256 {
        return Err(wrong(
            "its sha256 is not the manifest's; pack it again".into(),
        ));
    }
    let answers: Vec<String> = serde_json::from_slice(&bytes)
        .map_err(|e| wrong(format!("is not a list of answers: {e}")))?;
    let head = config.model.head.answers;
    if answers.len() != head as usize {
        return Err(DataError::Setting {
            key: "model.head.answers",
            reason: format!("is {head}, and {path}/{ANSWERS_FILE} has {}", answers.len()),
        });
    }
    Ok(answers.len())
}
