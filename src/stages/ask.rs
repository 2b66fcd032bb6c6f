//! `belfry submit` and `belfry cancel`: what people ask a running scheduler.

use std::path::PathBuf;

use anyhow::{Context as _, anyhow};
use belfry_configs::plan;
use belfry_proto::v1::{CancelRequest, SubmitRequest};
use clap::Args;

use super::client::Whereabouts;

/// Which scheduler is asked.
#[derive(Args)]
pub struct Asked {
    /// The scheduler's address.
    #[arg(long, value_name = "HOST:PORT")]
    to: Option<String>,
    /// The plan's root, whose journal says where the scheduler is.
    #[arg(long)]
    root: Option<String>,
}

/// Arguments of `belfry submit`.
#[derive(Args)]
pub struct SubmitArguments {
    /// A run file or a plan.
    config: PathBuf,
    #[command(flatten)]
    asked: Asked,
    /// Override a key of every run file; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
}

/// Arguments of `belfry cancel`.
#[derive(Args)]
pub struct CancelArguments {
    /// The stage that is not wanted any more. What comes after it is cancelled too.
    stage: String,
    #[command(flatten)]
    asked: Asked,
}

/// Puts the stages of a plan, or a run, into the queue.
pub async fn submit(arguments: SubmitArguments) -> anyhow::Result<()> {
    let file = &arguments.config;
    let text = std::fs::read_to_string(file);
    let text = text.with_context(|| format!("cannot read {}", file.display()))?;
    let plan = match plan::is_plan(&text) {
        true => plan::load(file, &arguments.settings)?,
        false => plan::of_run(file, &arguments.settings)?,
    };
    let mut client = arguments.asked.connect().await?;
    let text = serde_json::to_string(&plan).context("the plan")?;
    let asked = client.submit(SubmitRequest { plan: text }).await;
    asked.map_err(|status| anyhow!("not submitted: {}", status.message()))?;
    let names: Vec<&str> = plan.stages.iter().map(|s| s.name.as_str()).collect();
    eprintln!("submitted: {}", names.join(", "));
    Ok(())
}

/// Takes a stage out of the queue, or ends it.
pub async fn cancel(arguments: CancelArguments) -> anyhow::Result<()> {
    let mut client = arguments.asked.connect().await?;
    let stage = arguments.stage.clone();
    let asked = client.cancel(CancelRequest { stage }).await;
    asked.map_err(|status| anyhow!("not cancelled: {}", status.message()))?;
    eprintln!("cancelled: {}", arguments.stage);
    Ok(())
}

impl Asked {
    async fn connect(
        &self,
    ) -> anyhow::Result<
        belfry_proto::v1::scheduler_client::SchedulerClient<tonic::transport::Channel>,
    > {
        let whereabouts = Whereabouts::of(self.to.as_deref(), self.root.as_deref())?;
        whereabouts.connect().await
    }
}
