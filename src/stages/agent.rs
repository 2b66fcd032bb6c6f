//! `belfry agent`: one per host. It offers places for workers, starts what the scheduler says, and
//! goes on with that while no scheduler answers. It decides nothing.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use belfry_proto::v1::scheduler_client::SchedulerClient;
use belfry_proto::v1::{AgentReport, Assignment};
use clap::Args;
use shard_tools::store::Root;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tonic::Code;
use tonic::transport::Channel;

use super::client::Whereabouts;
use super::tasks::Tasks;
use crate::roles::{Aside, shutdown, start_log};
use crate::run::due;

/// Between two looks at the processes.
const TEND_INTERVAL: Duration = Duration::from_millis(100);
/// Between two reports: a thousand agents are five thousand small requests a second.
const REPORT_PAUSE: Duration = Duration::from_millis(200);
/// Pause after a report that nobody took.
const AWAY_PAUSE: Duration = Duration::from_millis(500);
/// Time that processes get to end when the agent does.
const STOP_GRACE: Duration = Duration::from_secs(4);

/// Arguments of `belfry agent`.
#[derive(Args)]
pub struct AgentArguments {
    /// The scheduler's address; without it the plan's root says where it is.
    #[arg(long, value_name = "HOST:PORT")]
    scheduler: Option<String>,
    /// Folder or s3:// URL of the plan.
    #[arg(long)]
    root: Option<String>,
    /// Workers that this host holds: one per device.
    #[arg(long)]
    slots: u32,
    /// This agent's own name, the same after a restart; default: the host's.
    #[arg(long)]
    name: Option<String>,
    /// Folder for this host's logs and cache; default: the root where that is a folder, else
    /// runs/agent-NAME.
    #[arg(long)]
    local: Option<PathBuf>,
    /// Address at which other hosts reach this one's processes.
    #[arg(long, default_value = "127.0.0.1")]
    bind: IpAddr,
    /// Write JSON lines here besides the human log on standard error.
    #[arg(long)]
    log: Option<PathBuf>,
    /// End when standard input closes: the launcher holds the other end.
    #[arg(long, hide = true)]
    follow_stdin: bool,
}

/// Runs what a scheduler says; see the module.
pub async fn agent(arguments: AgentArguments) -> anyhow::Result<()> {
    start_log(arguments.log.as_deref())?;
    let whereabouts = Whereabouts::of(arguments.scheduler.as_deref(), arguments.root.as_deref())?;
    let name = arguments.name.clone().unwrap_or_else(host_name);
    let root = arguments.root.as_deref().map(Root::open).transpose()?;
    let folder = root.and_then(|root| root.local_folder());
    let local = arguments.local.clone().or(folder);
    let local = local.unwrap_or_else(|| PathBuf::from("runs").join(format!("agent-{name}")));
    std::fs::create_dir_all(&local).with_context(|| format!("cannot make {}", local.display()))?;
    // Children are told whole paths.
    let local = local
        .canonicalize()
        .with_context(|| format!("{}", local.display()))?;

    let mut tasks = Tasks::new(local, arguments.bind, arguments.slots);
    let mut own = AgentReport {
        agent: name,
        incarnation: incarnation(),
        slots: arguments.slots,
        ..Default::default()
    };
    let (reports, mut answers) = reporter(whereabouts);
    let mut tending = tokio::time::interval(TEND_INTERVAL);
    tending.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut child_ended = signal(SignalKind::child())?;
    let shutdown = shutdown(arguments.follow_stdin);
    tokio::pin!(shutdown);
    let ended = loop {
        tokio::select! {
            () = due(&mut tending, &mut child_ended) => {
                tasks.tend().await?;
                own.children = tasks.report();
                // One that was not taken yet is followed by another in a moment.
                let _ = reports.try_send(own.clone());
            }
            Some(answer) = answers.recv() => match answer {
                Ok(assignment) if assignment.term >= own.term => {
                    own.term = assignment.term;
                    tasks.follow(assignment);
                }
                Ok(old) => tracing::warn!(term = old.term, "a scheduler that leads no more answers"),
                Err(why) => break Err(anyhow::anyhow!(why)),
            },
            () = &mut shutdown => break Err(Aside("the agent was asked to stop".into()).into()),
        }
    };
    tasks.stop(STOP_GRACE).await;
    ended
}

type Answers = mpsc::Receiver<Result<Assignment, String>>;

/// A task of its own carries reports to the scheduler, one at a time; a refusal ends it.
fn reporter(whereabouts: Whereabouts) -> (mpsc::Sender<AgentReport>, Answers) {
    let (reports, mut queue) = mpsc::channel::<AgentReport>(1);
    let (answer, answers) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut client: Option<SchedulerClient<Channel>> = None;
        let mut said = false;
        while let Some(report) = queue.recv().await {
            match ask(&whereabouts, &mut client, report).await {
                Ok(assignment) => {
                    said = false;
                    if answer.send(Ok(assignment)).await.is_err() {
                        return;
                    }
                    tokio::time::sleep(REPORT_PAUSE).await;
                }
                Err(error) if error.downcast_ref::<Refused>().is_some() => {
                    let _ = answer.send(Err(format!("{error:#}"))).await;
                    return;
                }
                Err(error) => {
                    client = None;
                    if !std::mem::replace(&mut said, true) {
                        tracing::warn!("no scheduler: {error:#}; what runs goes on");
                    }
                    tokio::time::sleep(AWAY_PAUSE).await;
                }
            }
        }
    });
    (reports, answers)
}

/// The scheduler wants nothing of this agent.
#[derive(Debug, thiserror::Error)]
#[error("the scheduler refuses this agent: {0}")]
struct Refused(String);

async fn ask(
    whereabouts: &Whereabouts,
    client: &mut Option<SchedulerClient<Channel>>,
    report: AgentReport,
) -> anyhow::Result<Assignment> {
    let connected = match client {
        Some(client) => client,
        None => client.insert(whereabouts.connect().await?),
    };
    match connected.report(report).await {
        Ok(answer) => Ok(answer.into_inner()),
        Err(status) if status.code() == Code::FailedPrecondition => {
            bail!(Refused(status.message().to_owned()))
        }
        Err(status) => bail!("{}", status.message()),
    }
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "host".into(),
        name => name.to_owned(),
    }
}

/// Higher for every later process.
fn incarnation() -> u64 {
    let clock = SystemTime::now().duration_since(UNIX_EPOCH);
    clock.map_or(0, |d| d.as_nanos() as u64)
}
