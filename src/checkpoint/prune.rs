//! `belfry checkpoint prune`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use anyhow::bail;
use belfry_configs::{Checkpoint, ValidConfig};
use belfry_coordinator::stored::retention::kept;
use belfry_coordinator::stored::{self, Stored};
use belfry_coordinator::{RESULT_FILE, evaluations};
use shard_tools::store::Root;

use crate::bench::table::gigabytes;
use crate::run::prepare::of_root;

/// Arguments of `belfry checkpoint prune`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Folder or URL of the run.
    root: String,
    /// Keep so many of the newest; default checkpoint.keep_last of the run; 0: all.
    #[arg(long, value_name = "N")]
    keep_last: Option<u32>,
    /// Keep those of multiples of N; default checkpoint.keep_every_steps of the run; 0: none.
    #[arg(long, value_name = "N")]
    keep_every_steps: Option<u64>,
    /// Also delete those that are marked as corrupt.
    #[arg(long)]
    corrupt: bool,
    /// Only say what would be deleted.
    #[arg(long)]
    dry_run: bool,
    /// Prune although a coordinator leads the run; parts of newer steps than the newest checkpoint,
    /// which may just be written, are left.
    #[arg(long)]
    while_led: bool,
}

/// What is to be deleted, and why.
struct Plan {
    kept: BTreeSet<u64>,
    deleted: Vec<(Stored, &'static str)>,
}

/// Prunes.
pub async fn prune(arguments: &Arguments) -> anyhow::Result<()> {
    let root = Root::existing(&arguments.root)?;
    let config = of_root(&root, &[]).await?;
    let led = refuse_led(&root, &config, arguments).await?;
    let mut settings = config.checkpoint.clone();
    settings.keep_last = arguments.keep_last.unwrap_or(settings.keep_last);
    let every = arguments.keep_every_steps;
    settings.keep_every_steps = every.unwrap_or(settings.keep_every_steps);
    let plan = plan(&root, &settings, arguments.corrupt, led).await?;
    println!(
        "kept: the checkpoints of steps {}",
        super::steps_of(plan.kept.iter().copied())
    );
    let mut bytes = 0;
    for (stored, why) in &plan.deleted {
        let size = gigabytes(stored.bytes() as f64);
        bytes += stored.bytes();
        let verb = match arguments.dry_run {
            true => "would be deleted",
            false => "deleted",
        };
        if !arguments.dry_run {
            stored::delete(&root, stored.step).await?;
        }
        println!("{verb}: step {} ({size}): {why}", stored.step);
    }
    let (count, size) = (plan.deleted.len(), gigabytes(bytes as f64));
    match arguments.dry_run {
        true => println!("{count} folders, {size}; nothing was deleted (--dry-run)"),
        false => println!("{count} folders, {size}"),
    }
    Ok(())
}

/// Whether a coordinator leads the run: its journal's newest entry is younger than the lease.
async fn refuse_led(
    root: &Root,
    config: &ValidConfig,
    arguments: &Arguments,
) -> anyhow::Result<bool> {
    if root.exists(RESULT_FILE).await? {
        return Ok(false);
    }
    let lease = config.cluster.timeouts().lease;
    let entries = root.objects("journal").await?;
    let Some(newest) = entries.last() else {
        return Ok(false);
    };
    // An entry of the future, by another machine's clock, is young.
    let age = SystemTime::now()
        .duration_since(newest.modified)
        .unwrap_or_default();
    if age > lease {
        return Ok(false);
    }
    if !arguments.while_led && !arguments.dry_run {
        bail!(
            "{root} is being led: {} is {:.1} s old, and a lease lasts {:.1} s. Its coordinator prunes \
             by [checkpoint] of the run's configuration. Stop the run first, or say --while-led",
            newest.key,
            age.as_secs_f64(),
            lease.as_secs_f64()
        );
    }
    Ok(true)
}

async fn plan(
    root: &Root,
    settings: &Checkpoint,
    corrupt: bool,
    led: bool,
) -> anyhow::Result<Plan> {
    let found: BTreeMap<u64, Stored> = stored::list(root).await?;
    let usable = found.values().filter(|stored| stored.is_usable());
    let usable: BTreeSet<u64> = usable.map(|stored| stored.step).collect();
    let kept = kept(&usable, settings, &evaluations(root).await?);
    let newest = usable.last().copied().unwrap_or(0);
    let mut deleted = Vec::new();
    for (step, stored) in found {
        let why = match &stored {
            s if s.made.is_none() && led && step > newest => continue,
            s if s.made.is_none() => "parts without a manifest",
            s if s.corrupt && corrupt => "corrupt",
            s if s.corrupt || kept.contains(&step) => continue,
            _ => "no longer kept",
        };
        deleted.push((stored, why));
    }
    Ok(Plan { kept, deleted })
}
