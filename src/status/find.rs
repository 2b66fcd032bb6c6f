//! Where a run's coordinator is, and what its root says when nobody is there.

use anyhow::{Context as _, bail};
use belfry_coordinator::{RESULT_FILE, stored};
use serde_json::Value;
use shard_tools::store::Root;

use super::Which;

/// What is known without asking the coordinator.
#[derive(Debug, Default)]
pub struct Found {
    /// Where the coordinator is said to be.
    pub address: Option<String>,
    /// The journal's newest entry.
    pub entry: Option<Value>,
    /// Steps of durable checkpoints, ascending.
    pub checkpoints: Vec<u64>,
    /// The result of a run that is over.
    pub result: Option<Value>,
}

impl Found {
    /// The coordinator, in words.
    pub fn told(&self) -> String {
        match &self.address {
            Some(address) => format!("the coordinator at {address}"),
            None => "the coordinator".into(),
        }
    }
}

impl Which {
    /// One way to find the run is needed.
    pub fn check(&self) -> anyhow::Result<()> {
        if self.coordinator.is_none() && self.root.is_none() && self.local.is_none() {
            bail!(
                "which run? name it by --local FOLDER, --root FOLDER_OR_URL or --coordinator HOST:PORT"
            );
        }
        Ok(())
    }
}

/// Looks where the run says that it is.
pub async fn find(which: &Which) -> anyhow::Result<Found> {
    let mut found = Found {
        address: which.coordinator.clone(),
        ..Found::default()
    };
    if let Some(local) = &which.local {
        if !local.is_dir() {
            bail!("--local {}: no such folder", local.display());
        }
        let written = std::fs::read_to_string(local.join("coordinator.address"));
        found.address = found.address.or(written.ok().map(|a| a.trim().to_owned()));
    }
    let root = match (&which.root, &which.local) {
        (Some(root), _) => Some(root.clone()),
        // A run whose root is elsewhere has no journal here.
        (None, Some(local)) if local.join("journal").is_dir() => Some(local.display().to_string()),
        _ => None,
    };
    if let Some(root) = root {
        look(&Root::existing(&root)?, &mut found).await?;
    }
    Ok(found)
}

async fn look(root: &Root, found: &mut Found) -> anyhow::Result<()> {
    let reading = || format!("cannot read {root}");
    let mut entries = root.list("journal").await.with_context(reading)?;
    entries.sort();
    if let Some((file, _)) = entries.last() {
        let bytes = root.get(file).await.with_context(reading)?;
        let entry: Value =
            serde_json::from_slice(&bytes).with_context(|| format!("{root}/{file}"))?;
        let address = entry["address"].as_str().map(str::to_owned);
        found.address = found.address.take().or(address);
        found.entry = Some(entry);
    }
    let folders = stored::list(root).await.with_context(reading)?;
    let made = folders.values().filter(|stored| stored.made.is_some());
    found.checkpoints = made.map(|stored| stored.step).collect();
    if root.exists(RESULT_FILE).await.with_context(reading)? {
        let bytes = root.get(RESULT_FILE).await.with_context(reading)?;
        found.result = serde_json::from_slice(&bytes).ok();
    }
    Ok(())
}
