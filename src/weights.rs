//! `belfry import` and `belfry export`: weights in and out, outside a run.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use belfry_configs::ValidConfig;
use belfry_model::ManagerTower;
use belfry_worker::{export_checkpoint, weights};
use clap::Args;
use shard_tools::store::Root;

use crate::resolve;
use crate::run::prepare::of_root;

/// Arguments of `belfry import`.
#[derive(Args)]
pub struct ImportArguments {
    /// The run file whose [model] is filled.
    config: PathBuf,
    /// A safetensors or PyTorch file: a path or an s3:// URL; may be repeated, later files are laid
    /// over earlier ones. Default: init.from of the run file.
    #[arg(long = "from", value_name = "FILE_OR_URL")]
    from: Vec<String>,
    /// Where to write safetensors: a path or an s3:// URL.
    #[arg(long, value_name = "FILE_OR_URL")]
    to: String,
    /// A prefix of names that are not taken from any file; may be repeated.
    #[arg(long, value_name = "PREFIX")]
    fresh: Vec<String>,
    /// Also write the tensors that no file holds, as run.seed draws them.
    #[arg(long)]
    complete: bool,
    /// Write what happened to every name here, as JSON.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Override a key; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
}

/// Arguments of `belfry export`.
#[derive(Args)]
pub struct ExportArguments {
    /// Folder or s3:// URL of the run.
    root: String,
    /// The checkpoint's step; default the newest.
    #[arg(long)]
    step: Option<u64>,
    /// Where to write safetensors: a path or an s3:// URL.
    #[arg(long, value_name = "FILE_OR_URL")]
    to: String,
}

/// Reads, reports and writes; see [`ImportArguments`].
pub async fn import(arguments: ImportArguments) -> anyhow::Result<()> {
    let settings = with_files(arguments.settings, &arguments.from, &arguments.fresh);
    let config = belfry_configs::load(&arguments.config, &settings)?;
    if config.init.is_fresh() {
        bail!(
            "--from: name a file of weights, or list some as init.from in the run file, or a run as \
             init.run"
        );
    }
    let config = resolve::beginning(config).await?;
    let model = ManagerTower::new(&config.model, config.data.text_len as usize)?;
    let targets = weights::Targets::from(model.table());
    let fresh = model.table().init(config.run.seed);
    let (flat, report) = weights::import(&config.init, &targets, fresh).await?;
    eprint!("{report}");
    if let Some(file) = &arguments.report {
        std::fs::write(file, serde_json::to_vec_pretty(&report)?)
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    // What the seed drew stays out unless asked for, so that it can never pass for trained weights.
    let keep = |name: &str| arguments.complete || report.holds(name);
    let bytes = weights::encode(&flat, &targets, config.model.text.positions, keep);
    weights::put(&arguments.to, bytes).await?;
    eprintln!("wrote {}", arguments.to);
    Ok(())
}

/// Reads a checkpoint and writes its weights; see [`ExportArguments`].
pub async fn export(arguments: ExportArguments) -> anyhow::Result<()> {
    let (root, config) = open_run(&arguments.root, &[]).await?;
    let (step, bytes) = export_checkpoint(&root, &config, arguments.step).await?;
    weights::put(&arguments.to, bytes).await?;
    eprintln!("wrote the weights of step {step} to {}", arguments.to);
    Ok(())
}

/// Settings with the files of `[init]`: as settings, so that the same checks hold as in a run file.
pub fn with_files(mut settings: Vec<String>, from: &[String], fresh: &[String]) -> Vec<String> {
    for (key, values) in [("from", from), ("fresh", fresh)] {
        if !values.is_empty() {
            let values: Vec<String> = values.iter().map(|v| format!("{v:?}")).collect();
            settings.push(format!("init.{key}=[{}]", values.join(",")));
        }
    }
    if !from.is_empty() {
        // These files and nothing else.
        settings.push("init.run=".into());
    }
    settings
}

/// A run's root and the resolved configuration that it left there, with `settings` over it.
pub async fn open_run(location: &str, settings: &[String]) -> anyhow::Result<(Root, ValidConfig)> {
    let root = Root::existing(location).context("give the --root of a run")?;
    let config = of_root(&root, settings).await?;
    Ok((root, config))
}
