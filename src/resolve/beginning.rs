//! `init.run`: which checkpoint of another run this run begins with.
//!
//! The newest that verifies, or the one of a step, or the best by a figure. Each candidate is read
//! whole before it is believed, and what is not as its manifest says is passed over loudly, here and
//! never later: what is chosen is pinned by its manifest's hash.

use std::collections::BTreeSet;

use anyhow::{Context as _, bail};
use belfry_configs::{Init, ValidConfig};
use belfry_coordinator::evaluations;
use belfry_coordinator::stored::retention::best_first;
use belfry_coordinator::stored::verify::Pace;
use belfry_coordinator::stored::{self, Stored};
use shard_tools::manifest::sha256;
use shard_tools::store::Root;

use crate::checkpoint::{steps_of, verify_with_progress};

/// Chooses a checkpoint of `init.run` and pins it.
///
/// # Errors
/// There is no such run, no such checkpoint, or none that is right.
pub async fn choose(config: &ValidConfig) -> anyhow::Result<ValidConfig> {
    let init = &config.init;
    let location = init.run.as_deref().unwrap_or_default();
    let root = Root::existing(location).context("init.run: give the root of a run")?;
    let found = stored::list(&root).await;
    let mut found = found.with_context(|| format!("init.run: cannot list {root}"))?;
    found.retain(|_, stored| stored.made.is_some());
    if found.is_empty() {
        bail!(
            "init.run: {root} holds no checkpoint; is it the root of a run that has written one?"
        );
    }
    let candidates = candidates(init, &root, &found.keys().copied().collect()).await?;
    let mut faults = Vec::new();
    for step in &candidates {
        let Some(candidate) = found.get(step) else {
            continue;
        };
        match faults_of(&root, candidate).await? {
            None => {
                let text = root.get(&stored::manifest_file(*step)).await?;
                eprintln!("begins with the parameters of step {step} of {root}");
                return Ok(config.with_beginning(*step, sha256(&text))?);
            }
            Some(fault) => {
                eprintln!(
                    "warning: init.run: the checkpoint of step {step} of {root} is corrupt and is not \
                     begun with: {fault}"
                );
                faults.push(format!("of step {step}: {fault}"));
            }
        }
    }
    bail!(
        "init.run: no checkpoint of {root} that may be begun with is right: {}; bring one back, or name \
         another by init.step: it has those of steps {}",
        faults.join("; "),
        steps_of(found.into_keys())
    )
}

/// Steps in the order in which they are tried.
async fn candidates(init: &Init, root: &Root, steps: &BTreeSet<u64>) -> anyhow::Result<Vec<u64>> {
    if let Some(step) = init.step {
        if !steps.contains(&step) {
            bail!(
                "init.step: {root} has no checkpoint of step {step}; it has those of steps {}",
                steps_of(steps.iter().copied())
            );
        }
        return Ok(vec![step]);
    }
    if let Some(figure) = &init.best {
        let evaluations = evaluations(root).await.context("init.best")?;
        let best = best_first(steps, figure, &evaluations);
        if best.is_empty() {
            bail!(
                "init.best: no checkpoint of {root} was evaluated for {figure}; it has those of steps {}",
                steps_of(steps.iter().copied())
            );
        }
        return Ok(best);
    }
    Ok(steps.iter().rev().copied().collect())
}

/// What is wrong with a checkpoint, if anything is.
async fn faults_of(root: &Root, candidate: &Stored) -> anyhow::Result<Option<String>> {
    let mut pace = Pace::new(f64::INFINITY);
    let verdict = verify_with_progress(root, candidate, &mut pace).await?;
    Ok((!verdict.faults.is_empty()).then(|| verdict.faults.join("; ")))
}
