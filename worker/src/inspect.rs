//! Looking at what a checkpoint's managers do, on data: `belfry inspect` without its files and figures.

use std::path::Path;

use belfry_configs::ValidConfig;
use belfry_data::{DataPlane, Split};
use belfry_model::{Device, Inspection, ManagerTower, Weights};

use crate::error::WorkerError;

/// Runs up to `pairs_max` pairs of `data.validation` through the model with these parameters (flat,
/// name order), and tells `progress` (pairs done, pairs to do) after each micro-batch.
///
/// # Errors
/// [`WorkerError::Data`], [`WorkerError::Model`] if the system has no managers.
pub fn inspect(
    config: &ValidConfig,
    parameters: &[f32],
    cache_dir: &Path,
    pairs_max: u64,
    mut progress: impl FnMut(u64, u64),
) -> Result<Inspection, WorkerError> {
    let model = ManagerTower::new(&config.model, config.data.text_len as usize)?;
    let mut inspection = Inspection::new(&config.model)?;
    let data = DataPlane::open(config, cache_dir, Split::Validation)?;
    let weights = Weights::load(model.table(), parameters, &Device::flex())?;
    let size = u64::from(config.batch.micro_batch);
    let pairs = data.pairs().min(pairs_max);
    for batch in data
        .evaluation_batches()
        .take(pairs.div_ceil(size) as usize)
    {
        let batch = batch?;
        let mask: Vec<f32> = batch.text_mask.iter().map(|m| f32::from(*m)).collect();
        model.inspect(
            &weights,
            (&batch.ids, &mask),
            &batch.images,
            &mut inspection,
        )?;
        progress(inspection.pairs(), pairs);
    }
    Ok(inspection)
}
