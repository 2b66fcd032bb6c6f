//! What a run file leaves to the data and to other runs: its steps, where it counts in epochs, and
//! the checkpoint that it begins with.
//!
//! Done once, before anything trains; what was found stands in the resolved configuration, so that
//! every process and every restart of the run has the same. `length` looks at manifests, `beginning`
//! at checkpoints. It refuses to know what is trained.

mod beginning;
pub mod length;

use anyhow::Context as _;
use belfry_configs::ValidConfig;
use bytes::Bytes;
use shard_tools::store::{Created, Root, StoreError};

use crate::run::prepare::{RUN_FILE, of_root};

/// The configuration with nothing left open. What the run under `root` was resolved to before stays:
/// the other run may have gone on since, or be gone.
///
/// # Errors
/// What keeps the data's manifests or the other run's checkpoints from being read, by its key.
pub async fn resolve(config: ValidConfig, root: &Root) -> anyhow::Result<ValidConfig> {
    let config = length::resolve(config).await?;
    if !config.needs_beginning() {
        return Ok(config);
    }
    let stored = stored(root).await?;
    if let Some((step, sha256)) = stored
        .as_ref()
        .and_then(|stored| config.beginning_of(stored))
    {
        return Ok(config.with_beginning(step, sha256.to_owned())?);
    }
    beginning(config).await
}

/// The configuration with a checkpoint chosen that it begins with, if it begins with a run.
///
/// # Errors
/// There is no such checkpoint, or none that is right.
pub async fn beginning(config: ValidConfig) -> anyhow::Result<ValidConfig> {
    match config.needs_beginning() {
        true => beginning::choose(&config).await,
        false => Ok(config),
    }
}

/// As [`resolve`], for processes that are started one by one: the first of them writes down under
/// `root` what it found, and the others take that.
///
/// # Errors
/// As [`resolve`].
pub async fn together(config: ValidConfig, root: &Root) -> anyhow::Result<ValidConfig> {
    if !config.needs_epoch_pairs() && !config.needs_beginning() {
        return Ok(config);
    }
    let resolved = resolve(config.clone(), root).await?;
    let text = Bytes::from(resolved.to_toml());
    match root.create(RUN_FILE, text).await? {
        Created::Yes => Ok(resolved),
        Created::Exists => resolve(config, root).await,
    }
}

/// The resolved configuration under `root`, if there is one.
async fn stored(root: &Root) -> anyhow::Result<Option<ValidConfig>> {
    match root.exists(RUN_FILE).await {
        Ok(true) => Ok(Some(of_root(root, &[]).await?)),
        Ok(false) | Err(StoreError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot look for {root}/{RUN_FILE}")),
    }
}
