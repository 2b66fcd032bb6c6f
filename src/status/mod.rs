//! `belfry status`: how a run stands, from its coordinator; from its root when nobody leads; a plan is
//! shown by [`crate::stages`]. And
//! `belfry drain`, which asks the coordinator to end it in good order.

mod find;
mod json;
mod table;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::bail;
use belfry_proto::v1::coordinator_client::CoordinatorClient;
use belfry_proto::v1::{DrainRequest, RunStatus, StatusRequest};
use clap::Args;
use shard_tools::store::Root;
use tonic::transport::{Channel, Endpoint};

use find::Found;

/// Pause between two looks.
const WATCH_PAUSE: Duration = Duration::from_secs(1);
/// Longest wait for a connection, and for an answer.
const PATIENCE: Duration = Duration::from_secs(3);

/// Which run is meant: one of the three is needed.
#[derive(Args)]
pub struct Which {
    /// The coordinator's address.
    #[arg(long, value_name = "HOST:PORT")]
    coordinator: Option<String>,
    /// Folder or s3:// URL of the run: its journal says who leads.
    #[arg(long)]
    root: Option<String>,
    /// Folder of a run on this machine, for instance runs/quickstart.
    #[arg(long, value_name = "FOLDER")]
    local: Option<PathBuf>,
}

/// Arguments of `belfry status`.
#[derive(Args)]
pub struct StatusArguments {
    #[command(flatten)]
    which: Which,
    /// One JSON object instead of tables.
    #[arg(long)]
    json: bool,
    /// Look again every second.
    #[arg(long)]
    watch: bool,
}

/// Arguments of `belfry drain`.
#[derive(Args)]
pub struct DrainArguments {
    #[command(flatten)]
    which: Which,
}

/// Shows how a run stands; see the module.
pub async fn status(arguments: StatusArguments) -> anyhow::Result<()> {
    arguments.which.check()?;
    loop {
        let text = match of_plan(&arguments).await? {
            Some(text) => text,
            None => of_run(&arguments).await?,
        };
        if arguments.watch && !arguments.json {
            // Clears the screen, as `watch` does.
            print!("\x1b[2J\x1b[H");
        }
        print!("{text}");
        if !arguments.watch {
            return Ok(());
        }
        tokio::time::sleep(WATCH_PAUSE).await;
    }
}

async fn of_run(arguments: &StatusArguments) -> anyhow::Result<String> {
    let found = find::find(&arguments.which).await?;
    let answer = ask(&found).await;
    Ok(match (arguments.json, &answer) {
        (true, _) => json::json(&found, &answer).to_string() + "\n",
        (false, Ok(status)) => table::table(status),
        (false, Err(why)) => table::away(&found, why),
    })
}

/// Where the root is a plan's, the plan.
async fn of_plan(arguments: &StatusArguments) -> anyhow::Result<Option<String>> {
    let which = &arguments.which;
    let local = which
        .local
        .as_ref()
        .map(|local| local.display().to_string());
    // What is no folder is told by whoever looks for a run.
    let root = match (&which.root, local) {
        (Some(root), _) => Root::existing(root)?,
        (None, Some(local)) if Path::new(&local).is_dir() => Root::existing(&local)?,
        _ => return Ok(None),
    };
    crate::stages::show(&root, arguments.json).await
}

/// Asks the coordinator to finish the open step, write a checkpoint and end.
pub async fn drain(arguments: DrainArguments) -> anyhow::Result<()> {
    arguments.which.check()?;
    let found = find::find(&arguments.which).await?;
    if let Err(why) = ask_drain(&found).await {
        bail!("{why}");
    }
    eprintln!(
        "asked: the open step is finished and a checkpoint written; `belfry status` shows it"
    );
    Ok(())
}

/// Asks the coordinator whose address lies in the launcher's folder.
///
/// # Errors
/// In words: nobody leads.
pub async fn ask_to_drain(local: &Path) -> Result<(), String> {
    let which = Which {
        coordinator: None,
        root: None,
        local: Some(local.to_owned()),
    };
    let found = find::find(&which).await.map_err(|e| e.to_string())?;
    ask_drain(&found).await
}

async fn ask_drain(found: &Found) -> Result<(), String> {
    let why = |why: String| format!("nobody leads the run that could end it: {why}");
    let mut client = connect(found).await.map_err(why)?;
    let asked = tokio::time::timeout(PATIENCE, client.drain(DrainRequest {})).await;
    let asked = asked.map_err(|_| why(format!("{} does not answer", found.told())))?;
    asked.map_err(|status| why(status.message().to_owned()))?;
    Ok(())
}

async fn ask(found: &Found) -> Result<RunStatus, String> {
    let mut client = connect(found).await?;
    let asked = client.status(StatusRequest {});
    let answer = tokio::time::timeout(PATIENCE, asked).await;
    let answer = answer.map_err(|_| format!("{} does not answer", found.told()))?;
    let answer = answer.map_err(|status| format!("{}: {}", found.told(), status.message()))?;
    Ok(answer.into_inner())
}

async fn connect(found: &Found) -> Result<CoordinatorClient<Channel>, String> {
    let Some(address) = &found.address else {
        return Err("no coordinator has written where it is".into());
    };
    let endpoint = Endpoint::from_shared(format!("http://{address}"));
    let endpoint = endpoint.map_err(|e| format!("`{address}` is no address: {e}"))?;
    let channel = endpoint.connect_timeout(PATIENCE).connect().await;
    let channel = channel.map_err(|_| format!("nobody answers at {address}"))?;
    Ok(CoordinatorClient::new(channel))
}
