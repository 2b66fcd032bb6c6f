//! The way to a plan's scheduler: by its address, or by the newest entry of the plan's journal.

use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use belfry_coordinator::journal;
use belfry_proto::v1::scheduler_client::SchedulerClient;
use shard_tools::store::Root;
use tonic::transport::{Channel, Endpoint};

/// Longest wait for a connection, and for an answer.
pub const PATIENCE: Duration = Duration::from_secs(3);

/// Where a scheduler is looked for.
#[derive(Clone, Debug)]
pub enum Whereabouts {
    /// There.
    Address(String),
    /// Where the journal of this root says.
    Journal(Root),
}

impl Whereabouts {
    /// From the options `--to` (or `--scheduler`) and `--root`.
    pub fn of(address: Option<&str>, root: Option<&str>) -> anyhow::Result<Self> {
        match (address, root) {
            (Some(address), _) => Ok(Whereabouts::Address(address.to_owned())),
            (None, Some(root)) => Ok(Whereabouts::Journal(Root::existing(root)?)),
            (None, None) => {
                bail!("which scheduler? name it by HOST:PORT, or by the plan's root with --root")
            }
        }
    }

    async fn address(&self) -> anyhow::Result<String> {
        match self {
            Whereabouts::Address(address) => Ok(address.clone()),
            Whereabouts::Journal(root) => {
                let newest = journal::newest(root).await?;
                let entry = newest.ok_or_else(|| anyhow!("{root}: no scheduler was here yet"))?;
                if entry.queue.is_none() {
                    bail!("{root} holds a run, not a plan");
                }
                Ok(entry.address)
            }
        }
    }

    /// Connects to the scheduler that leads now.
    pub async fn connect(&self) -> anyhow::Result<SchedulerClient<Channel>> {
        let address = tokio::time::timeout(PATIENCE, self.address()).await;
        let address = address.context("the plan's root does not answer")??;
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .with_context(|| format!("`{address}` is no address"))?;
        let endpoint = endpoint.connect_timeout(PATIENCE).timeout(PATIENCE);
        let channel = endpoint.connect().await;
        let channel = channel.with_context(|| format!("no scheduler answers at {address}"))?;
        Ok(SchedulerClient::new(channel))
    }
}
