//! Epochs to steps: how many pairs the training data has.

use anyhow::Context as _;
use belfry_configs::ValidConfig;
use belfry_data::{Split, found};

/// The configuration with its steps, where they hang on the data.
///
/// # Errors
/// What keeps a manifest of `data.train` from being read.
pub async fn resolve(config: ValidConfig) -> anyhow::Result<ValidConfig> {
    if !config.needs_epoch_pairs() {
        return Ok(config);
    }
    let datasets = found(Split::Train, config.data.train.paths()).await;
    let datasets = datasets.context(UNKNOWN)?;
    let pairs = datasets.iter().map(|(identity, _)| identity.pairs).sum();
    Ok(config.with_epoch_pairs(pairs)?)
}

/// What cannot be said without the data.
const UNKNOWN: &str = "run.epochs and run.evaluate_every_epochs are turned into steps by the manifests \
                       of data.train; --set run.steps=N does without";

/// What follows from the epochs, in words; nothing for a run that is counted in steps.
pub fn told(config: &ValidConfig) -> Option<String> {
    let (epochs, pairs) = (config.run.epochs?, config.run.epoch_pairs?);
    let unused = config.unused_pairs()?;
    let (steps, batch) = (config.run.steps, config.batch.global_batch);
    Some(format!(
        "{epochs} epochs of {pairs} pairs in batches of {batch}: {steps} steps; {unused} pairs at the \
         end of the last epoch fill no batch and are not trained"
    ))
}
