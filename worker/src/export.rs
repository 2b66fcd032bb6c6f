//! A checkpoint's weights as one file that PyTorch loads, after the run or beside it.

use std::collections::BTreeSet;

use belfry_configs::ValidConfig;
use belfry_model::ManagerTower;
use shard_tools::store::Root;

use crate::checkpoint::MANIFEST;
use crate::error::WorkerError;
use crate::{checkpoint, weights};

/// Reads the checkpoint of `step`, or the newest, under `root` and gives its step and a safetensors
/// file of its parameters under the authors' names (see [`weights::encode`]).
///
/// # Errors
/// As [`checkpoint_parameters`].
pub async fn export_checkpoint(
    root: &Root,
    config: &ValidConfig,
    step: Option<u64>,
) -> Result<(u64, Vec<u8>), WorkerError> {
    let model = ManagerTower::new(&config.model, config.data.text_len as usize)?;
    let (step, parameters) = checkpoint_parameters(root, &model, step).await?;
    let positions = config.model.text.positions;
    let file = weights::encode(&parameters, &model.table().into(), positions, |_| true);
    Ok((step, file))
}

/// The parameters, flat in name order, of the checkpoint of `step`, or of the newest, with its step.
///
/// # Errors
/// [`WorkerError::NoCheckpoint`] naming the steps that have one, [`WorkerError::Checkpoint`] if a
/// part is not what its manifest says, [`WorkerError::Store`].
pub async fn checkpoint_parameters(
    root: &Root,
    model: &ManagerTower,
    step: Option<u64>,
) -> Result<(u64, Vec<f32>), WorkerError> {
    let steps = checkpoint_steps(root).await?;
    let chosen = match step {
        Some(step) => steps.iter().copied().find(|s| *s == step),
        None => steps.last().copied(),
    };
    let Some(step) = chosen else {
        return Err(WorkerError::NoCheckpoint {
            root: root.to_string(),
            steps,
        });
    };
    let manifest = format!("{}/{MANIFEST}", checkpoint::folder(step));
    let state = checkpoint::load(root, &manifest, model.table()).await?;
    Ok((step, state.parameters))
}

/// What says that a checkpoint was read again and found corrupt.
const CORRUPT: &str = "corrupt.json";

/// Steps whose checkpoint has its manifest and is not marked as corrupt, ascending.
///
/// # Errors
/// [`WorkerError::Store`].
pub async fn checkpoint_steps(root: &Root) -> Result<Vec<u64>, WorkerError> {
    let keys = root.list("checkpoints").await;
    let keys = keys.map_err(|source| WorkerError::Store {
        what: format!("cannot list {root}/checkpoints"),
        source,
    })?;
    let with = |file: &str| -> BTreeSet<u64> {
        let step = |key: &str| {
            let folder = key.strip_suffix(file)?.strip_suffix('/')?;
            folder.strip_prefix("checkpoints/step-")?.parse().ok()
        };
        keys.iter().filter_map(|(key, _)| step(key)).collect()
    };
    let corrupt = with(CORRUPT);
    let steps = with(MANIFEST).into_iter();
    Ok(steps.filter(|step| !corrupt.contains(step)).collect())
}
