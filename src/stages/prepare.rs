//! Before a stage begins: its run resolved and claimed below the plan's root, its data packed. It
//! refuses to know who will run it.

use anyhow::Context as _;
use belfry_configs::plan::{Stage, Work};
use belfry_configs::{ValidConfig, load_str};
use belfry_coordinator::RESULT_FILE;
use belfry_coordinator::plan::Ready;
use bytes::Bytes;
use shard_tools::store::Root;

use super::command;
use super::place::{FIGURES_FILE, stage_root};
use crate::resolve;
use crate::run::prepare::{self, RUN_FILE};

/// Makes a stage ready to begin. May be repeated.
///
/// A run that was resolved once stays as it is, whatever has changed since: the checkpoint with which
/// it begins is part of what it is.
pub async fn prepare(root: &str, stage: &Stage) -> anyhow::Result<Ready> {
    let own = Root::open(&stage_root(root, &stage.name))?;
    let Work::Train { run, init_from } = &stage.work else {
        return match own.exists(FIGURES_FILE).await? {
            true => Ok(Ready::Over),
            false => Ok(Ready::Begin {
                arguments: command::evaluation(root, &stage.work),
            }),
        };
    };
    if own.exists(RESULT_FILE).await? {
        return Ok(Ready::Over);
    }
    if own.exists(RUN_FILE).await? {
        prepare::pack(&prepare::of_root(&own, &[]).await?).await?;
    } else {
        let config = begun(root, stage, run, init_from.as_deref())?;
        // Epochs are counted in packed pairs.
        prepare::pack(&config).await?;
        let config = resolve::resolve(config, &own).await?;
        own.create(RUN_FILE, Bytes::from(config.to_toml())).await?;
    }
    Ok(Ready::Begin {
        arguments: Vec::new(),
    })
}

/// The stage's run, begun with what another stage trained where it says so.
fn begun(
    root: &str,
    stage: &Stage,
    run: &str,
    init_from: Option<&str>,
) -> anyhow::Result<ValidConfig> {
    let origin = format!("stage `{}`", stage.name);
    let source = init_from.map(|from| format!("init.run={}", stage_root(root, from)));
    let settings: Vec<String> = source.into_iter().collect();
    load_str(run, &origin, &settings).with_context(|| format!("{origin} cannot begin"))
}
