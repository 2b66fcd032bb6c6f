//! Where things of a plan lie below its root, and whose the root is.

use anyhow::{Context as _, bail};
use belfry_configs::plan::Plan;
use bytes::Bytes;
use shard_tools::store::{Created, Root};

use crate::run::prepare::RUN_FILE;

/// The plan, resolved; its existence makes a root a plan's.
pub const PLAN_FILE: &str = "plan.json";
/// What became of the plan, for programs.
pub const RESULTS_FILE: &str = "results.json";
/// The same for people.
pub const RESULTS_TABLE: &str = "results.md";
/// What an evaluation found, relative to its stage's root.
pub const FIGURES_FILE: &str = "figures.json";

/// A stage's root, relative to the plan's.
pub fn folder(stage: &str) -> String {
    format!("stages/{stage}")
}

/// The location of a stage's root. What a URL says behind its `?` stays there.
pub fn stage_root(root: &str, stage: &str) -> String {
    let (path, query) = match root.split_once('?') {
        Some((path, query)) if root.contains("://") => (path, format!("?{query}")),
        _ => (root, String::new()),
    };
    format!("{}/{}{query}", path.trim_end_matches('/'), folder(stage))
}

/// The plan that a root holds, if it is a plan's.
pub async fn planned(root: &Root) -> anyhow::Result<Option<Plan>> {
    if !root.exists(PLAN_FILE).await? {
        return Ok(None);
    }
    let bytes = root.get(PLAN_FILE).await?;
    let plan = serde_json::from_slice(&bytes).with_context(|| format!("{root}/{PLAN_FILE}"))?;
    Ok(Some(plan))
}

/// Makes the root this plan's, or checks that it is.
pub async fn claim(root: &Root, plan: &Plan, resume: bool) -> anyhow::Result<()> {
    if root.exists(RUN_FILE).await? {
        bail!("{root} holds a run, not a plan; choose another --root");
    }
    let text = serde_json::to_vec_pretty(plan).context("the plan")?;
    if root.create(PLAN_FILE, Bytes::from(text)).await? == Created::Yes {
        return Ok(());
    }
    if !resume {
        bail!("{root} already holds a plan; go on with it by --resume, or choose another --root");
    }
    let Some(before) = planned(root).await? else {
        bail!("{root}/{PLAN_FILE} has gone; start again");
    };
    let differing = plan.stages.iter().filter(|stage| {
        let old = before.stages.iter().find(|s| s.name == stage.name);
        old != Some(*stage)
    });
    let mut differing: Vec<&str> = differing.map(|s| s.name.as_str()).collect();
    let gone = before.stages.iter().map(|s| s.name.as_str());
    differing.extend(gone.filter(|name| !plan.stages.iter().any(|s| s.name == *name)));
    if !differing.is_empty() {
        bail!(
            "{root} holds another plan; these stages differ: {}; undo what was changed, or choose another \
             --root",
            differing.join(", ")
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_lies_below_its_plan() {
        assert_eq!(stage_root("/runs/paper", "pre"), "/runs/paper/stages/pre");
        assert_eq!(stage_root("s3://b/p/", "pre"), "s3://b/p/stages/pre");
        let url = "s3://b/p?endpoint=http://h:1";
        assert_eq!(
            stage_root(url, "pre"),
            "s3://b/p/stages/pre?endpoint=http://h:1"
        );
        assert_eq!(stage_root("/odd?name", "pre"), "/odd?name/stages/pre");
    }
}
