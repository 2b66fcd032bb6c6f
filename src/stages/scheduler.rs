//! `belfry scheduler`: the shell around a plan's core. One loop takes an event, lets the core decide
//! and does what it says, in order; nobody is answered before the journal is durable.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use belfry_configs::Timeouts;
use belfry_configs::plan;
use belfry_coordinator::journal::{self, Entry, Journal};
use belfry_coordinator::plan::{Effect, End, Event, Queue, Queued, Scheduler, Settings};
use belfry_coordinator::{Candidacy, Candidate, CoordinatorError, lead};
use belfry_proto::v1;
use belfry_proto::v1::scheduler_server::SchedulerServer;
use bytes::Bytes;
use clap::Args;
use shard_tools::store::Root;
use tokio::net::TcpListener;
use tokio::sync::{Mutex, mpsc};
use tokio_stream::wrappers::TcpListenerStream;

use super::place::{self, FIGURES_FILE};
use super::rpc::{Answer, FromRpc, Service};
use super::{prepare, results};
use crate::roles::{Aside, advertised, aside, shutdown, start_log};

/// Requests that may wait for the loop: each agent has one under way.
const INBOX_MAX: usize = 1024;
/// Preparations whose outcome may wait for the loop.
const PREPARED_MAX: usize = 16;
/// Bytes of a submitted plan: hundreds of stages with their run files.
const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Between two looks at the time.
const TICK: Duration = Duration::from_millis(200);
/// Agents report five times a second; so many reports missed are a host's death, not its haste.
const AGENT_SILENCE: Duration = Duration::from_secs(10);
/// Agents that live report to a new scheduler within this time.
const SETTLE: Duration = Duration::from_secs(5);
/// Before the first retry of a stage; doubles each time, for what another host or an hour mends.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(300);
/// From how long a store's silence follows how long its first answer is waited for.
const STORE_PATIENCE: Duration = Duration::from_secs(10);
/// Pauses between tries of a write.
const WRITE_PAUSE: Duration = Duration::from_millis(200);
/// Entries between two prunings of the journal.
const PRUNE_EVERY: u64 = 256;

/// Arguments of `belfry scheduler`.
#[derive(Args)]
pub struct SchedulerArguments {
    /// A plan for an empty root; later ones come by `belfry submit`.
    plan: Option<PathBuf>,
    /// Folder or s3:// URL of the plan: queue, results, and the roots of all stages.
    #[arg(long)]
    root: String,
    /// Override a key of every run file; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
    /// Where to listen; port 0 takes any.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: String,
    /// Where agents reach this scheduler when that is not --listen.
    #[arg(long, value_name = "HOST[:PORT]")]
    advertise: Option<String>,
    /// Go on with the plan that stands under the root.
    #[arg(long)]
    resume: bool,
    /// Try again what failed or was cancelled.
    #[arg(long)]
    revive: bool,
    /// End when every stage has ended.
    #[arg(long)]
    until_done: bool,
    /// Write JSON lines here besides the human log on standard error.
    #[arg(long)]
    log: Option<PathBuf>,
    /// End when standard input closes: the launcher holds the other end.
    #[arg(long, hide = true)]
    follow_stdin: bool,
}

/// Schedules a plan until it is over, or for good; see the module.
pub async fn scheduler(arguments: SchedulerArguments) -> anyhow::Result<()> {
    start_log(arguments.log.as_deref())?;
    let root = Root::open(&arguments.root)?;
    if let Some(file) = &arguments.plan {
        let plan = plan::load(file, &arguments.settings)?;
        place::claim(&root, &plan, arguments.resume).await?;
    }
    let listener = TcpListener::bind(&arguments.listen).await;
    let listener = listener.with_context(|| {
        let listen = &arguments.listen;
        format!("cannot listen on {listen}; choose another --listen or free the port")
    })?;
    let candidate = Candidate {
        address: advertised(listener.local_addr()?, arguments.advertise.as_deref())?,
        name: "scheduler".into(),
        standby: false,
    };
    let candidacy = lead(&root, &candidate, &Timeouts::new(STORE_PATIENCE)).await;
    let Candidacy::Leads(journal) = aside(candidacy)? else {
        bail!("only a standby waits for another's end");
    };
    let shell = Shell::new(&arguments, root, *journal).await?;
    let (inbox, requests) = mpsc::channel(INBOX_MAX);
    let service = SchedulerServer::new(Service::new(inbox));
    let service = service.max_decoding_message_size(MESSAGE_BYTES_MAX);
    let server = tonic::transport::Server::builder().add_service(service);
    let server = server.serve_with_incoming(TcpListenerStream::new(listener));
    let server = tokio::spawn(server);
    let ended = shell.run(requests, shutdown(arguments.follow_stdin)).await;
    server.abort();
    ended
}

/// The way back of a request that the core answers.
enum Reply {
    Assignment(Answer<v1::Assignment>),
    Done(Answer<()>),
}

struct Shell {
    core: Scheduler,
    journal: Journal,
    root: Root,
    /// As agents are told it.
    location: String,
    replies: BTreeMap<u64, Reply>,
    requests: u64,
    /// One stage is prepared at a time: two may share the data that they pack.
    preparing: Arc<Mutex<()>>,
    prepared: (mpsc::Sender<Event>, mpsc::Receiver<Event>),
    until_done: bool,
    over: bool,
    begun: Instant,
}

impl Shell {
    async fn new(
        arguments: &SchedulerArguments,
        root: Root,
        journal: Journal,
    ) -> anyhow::Result<Self> {
        let folder = root.local_folder().map(|f| f.display().to_string());
        let location = folder.unwrap_or_else(|| arguments.root.clone());
        let queue = match &journal.last().queue {
            Some(queue) => serde_json::from_value(queue.clone())
                .context("the journal's queue is not one of this version")?,
            None => Queue::default(),
        };
        let millis = |time: Duration| time.as_millis() as u64;
        let settings = Settings {
            term: journal.last().term,
            root: location.clone(),
            agent_silence: millis(AGENT_SILENCE),
            settle: millis(SETTLE),
            retry_pause: millis(RETRY_PAUSE),
            retry_pause_max: millis(RETRY_PAUSE_MAX),
        };
        let fresh = queue.stages.is_empty();
        let mut shell = Shell {
            core: Scheduler::new(0, settings, queue),
            journal,
            root,
            location,
            replies: BTreeMap::new(),
            requests: 0,
            preparing: Arc::default(),
            prepared: mpsc::channel(PREPARED_MAX),
            until_done: arguments.until_done,
            over: false,
            begun: Instant::now(),
        };
        // Written at once: whoever finds the root finds a plan's scheduler.
        shell.keep(shell.core.queue().clone()).await?;
        if fresh && let Some(plan) = place::planned(&shell.root).await? {
            let request = shell.request();
            shell.apply(Event::Submit { request, plan }).await?;
        }
        if arguments.revive {
            shell.apply(Event::Revive).await?;
        }
        Ok(shell)
    }

    async fn run(
        mut self,
        mut requests: mpsc::Receiver<FromRpc>,
        shutdown: impl Future<Output = ()>,
    ) -> anyhow::Result<()> {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        tokio::pin!(shutdown);
        loop {
            let event = tokio::select! {
                Some(prepared) = self.prepared.1.recv() => Some(prepared),
                Some(request) = requests.recv() => self.register(request)?,
                _ = tick.tick() => Some(Event::Tick),
                () = &mut shutdown => bail!(Aside("the scheduler was asked to stop".into())),
            };
            if let Some(event) = event {
                self.apply(event).await?;
            }
            if self.over && self.until_done {
                return self.outcome();
            }
        }
    }

    fn now(&self) -> u64 {
        self.begun.elapsed().as_millis() as u64
    }

    fn request(&mut self) -> u64 {
        self.requests += 1;
        self.requests
    }

    /// Keeps the way back; answers what needs no decision.
    fn register(&mut self, request: FromRpc) -> anyhow::Result<Option<Event>> {
        let number = self.request();
        let (reply, event) = match request {
            FromRpc::Report(report, answer) => {
                let own = self.journal.last().term;
                if report.term > own {
                    let words = format!(
                        "a scheduler of term {} leads, this one has {own}",
                        report.term
                    );
                    bail!(Aside(words));
                }
                let request = number;
                (Reply::Assignment(answer), Event::Report { request, report })
            }
            FromRpc::Submit(plan, answer) => {
                let request = number;
                (Reply::Done(answer), Event::Submit { request, plan })
            }
            FromRpc::Cancel(stage, answer) => {
                let request = number;
                (Reply::Done(answer), Event::Cancel { request, stage })
            }
            FromRpc::Status(answer) => {
                // Whoever does not wait any more needs no answer.
                let _ = answer.send(Ok(self.core.status(self.now())));
                return Ok(None);
            }
        };
        self.replies.insert(number, reply);
        Ok(Some(event))
    }

    async fn apply(&mut self, event: Event) -> anyhow::Result<()> {
        let effects = self.core.apply(self.now(), event);
        for effect in effects {
            self.execute(effect).await?;
        }
        Ok(())
    }

    async fn execute(&mut self, effect: Effect) -> anyhow::Result<()> {
        match effect {
            Effect::StoreFigures { stage, figures } => {
                let file = format!("{}/{FIGURES_FILE}", place::folder(&stage));
                let text = Bytes::from(figures);
                until_done(&file, || self.root.put(&file, text.clone())).await;
            }
            Effect::Journal(queue) => self.keep(queue).await?,
            Effect::Prepare { stage, attempt } => self.prepare(&stage, attempt),
            Effect::Assign {
                request,
                assignment,
            } => {
                if let Some(Reply::Assignment(answer)) = self.replies.remove(&request) {
                    let _ = answer.send(Ok(assignment));
                }
            }
            Effect::Accept { request } => {
                if let Some(Reply::Done(answer)) = self.replies.remove(&request) {
                    let _ = answer.send(Ok(()));
                }
            }
            Effect::Refuse { request, why } => match self.replies.remove(&request) {
                Some(Reply::Assignment(answer)) => drop(answer.send(Err(why))),
                Some(Reply::Done(answer)) => drop(answer.send(Err(why))),
                None => bail!("the plan under {} is refused: {why}", self.location),
            },
            Effect::Notice(text) => tracing::info!("{text}"),
            Effect::AllEnded => {
                let status = self.core.status(self.now());
                results::keep(&self.root, self.core.queue(), &status).await?;
                self.over = true;
            }
        }
        Ok(())
    }

    /// Makes the queue durable, or ends because another leads.
    async fn keep(&mut self, queue: Queue) -> anyhow::Result<()> {
        let entry = Entry {
            queue: Some(serde_json::to_value(&queue).context("the queue")?),
            ..self.journal.next()
        };
        let root = self.root.clone();
        let mut said = false;
        loop {
            match journal::put(&root, &entry).await {
                Ok(()) => break,
                Err(error @ CoordinatorError::Store { .. }) => {
                    if !std::mem::replace(&mut said, true) {
                        tracing::warn!(%error, "the queue is not durable yet; trying until it is");
                    }
                    tokio::time::sleep(WRITE_PAUSE).await;
                }
                Err(error) => return aside(Err(error)),
            }
        }
        let seq = entry.seq;
        self.journal.settled(entry);
        self.over = false;
        if seq.is_multiple_of(PRUNE_EVERY)
            && let Err(error) = journal::prune(&root).await
        {
            tracing::warn!(%error, "old entries of the journal stay");
        }
        Ok(())
    }

    fn prepare(&self, stage: &str, attempt: u32) {
        let queued = self.core.queue().stages.iter();
        let Some(queued) = queued.map(|q| &q.stage).find(|s| s.name == stage) else {
            return;
        };
        let (stage, location) = (queued.clone(), self.location.clone());
        let (tell, one) = (self.prepared.0.clone(), Arc::clone(&self.preparing));
        let runtime = tokio::runtime::Handle::current();
        // Packing computes: not on a thread that answers requests.
        tokio::task::spawn_blocking(move || {
            runtime.block_on(async {
                let _one = one.lock().await;
                let outcome = prepare::prepare(&location, &stage).await;
                let event = Event::Prepared {
                    stage: stage.name.clone(),
                    attempt,
                    outcome: outcome.map_err(|error| crate::told(&error)),
                };
                // A scheduler that ended needs to hear nothing.
                let _ = tell.send(event).await;
            });
        });
    }

    /// What the plan came to.
    fn outcome(&self) -> anyhow::Result<()> {
        let stages = self.core.queue().stages.iter();
        let told = |q: &Queued| match &q.end {
            Some(End::Done) | None => None,
            Some(end) => Some(format!("{} {}: {}", q.stage.name, end.word(), end.reason())),
        };
        let unwell: Vec<String> = stages.filter_map(told).collect();
        anyhow::ensure!(
            unwell.is_empty(),
            "the plan ended, but not well: {}",
            unwell.join("; ")
        );
        Ok(())
    }
}

/// Repeats a write for as long as the store takes.
async fn until_done<F>(what: &str, write: impl Fn() -> F)
where
    F: Future<Output = Result<(), shard_tools::store::StoreError>>,
{
    let mut said = false;
    while let Err(error) = write().await {
        if !std::mem::replace(&mut said, true) {
            tracing::warn!(%error, what, "the store cannot do it yet; trying until it can");
        }
        tokio::time::sleep(WRITE_PAUSE).await;
    }
}
