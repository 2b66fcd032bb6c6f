//! The shell around the core: server, clock, journal. One loop takes an event, lets the core
//! decide and does what it says, in order.

use std::collections::BTreeMap;
use std::future::Future;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use belfry_configs::{Transport, ValidConfig};
use belfry_proto::v1::coordinator_server::CoordinatorServer;
use belfry_proto::v1::{self, CoordinatorMessage, coordinator_message as down};
use sha2::{Digest as _, Sha256};
use shard_tools::store::Root;
use tokio::net::TcpListener;
use tokio::sync::{broadcast, mpsc};
use tokio_stream::wrappers::TcpListenerStream;

use crate::archive::{self, Job};
use crate::core::{Core, Effect, Event, LinkPolicy, Settings};
use crate::error::CoordinatorError;
use crate::identity;
use crate::journal::{Entry, Journal};
use crate::rpc::{FromRpc, Outbox, Service, Watched};
use crate::stored::scrub::scrub;

/// Messages that may wait for the loop.
const INBOX_MAX: usize = 1024;
/// Answers of the archive that may wait for the loop.
const STORED_MAX: usize = 64;
/// Events that a watcher may lag behind.
const EVENTS_MAX: usize = 4096;
/// Steps between journal entries while nothing happens: one put in so many steps, and so many steps
/// that a term which finds nobody alive takes for committed.
const HORIZON_STEPS: u64 = 64;
/// Ticks per longest tolerated silence.
const TICKS_PER_SILENCE: u32 = 20;
/// Time that farewells and last writes get.
const FAREWELL: Duration = Duration::from_secs(5);

/// What a coordinator is told.
pub struct ServeOptions {
    /// The run.
    pub config: ValidConfig,
    /// Where journal, ledger and checkpoints live.
    pub root: Root,
    /// Where workers and watchers come in.
    pub listener: TcpListener,
    /// So many workers are waited for before the first step.
    pub expected_workers: Option<u32>,
    /// Hash of configuration and root.
    pub run_id: String,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Whether it trained to its last step.
    pub success: bool,
    /// In words.
    pub reason: String,
}

/// The identity of a run: its resolved configuration and its root.
pub fn run_id(config: &ValidConfig, root: &str) -> String {
    let hash = Sha256::digest(format!("{}\n{root}", config.sha256()).as_bytes());
    hash.iter().take(16).map(|b| format!("{b:02x}")).collect()
}

/// Leads the run until it ends or `shutdown` resolves.
///
/// # Errors
/// [`CoordinatorError`]: the root or the server failed, or another coordinator leads.
pub async fn serve(
    options: ServeOptions,
    shutdown: impl Future<Output = ()>,
) -> Result<Outcome, CoordinatorError> {
    let address = options.listener.local_addr()?.to_string();
    let clock = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_nanos());
    let nonce = clock as u64 ^ (u64::from(std::process::id()) << 40);
    let journal = Journal::lead(&options.root, address, nonce).await?;
    let settings = settings(&options, &journal);
    let durable = archive::read(&options.root, journal.last()).await?;
    let timeouts = settings.timeouts;
    let begun = Instant::now();

    let (inbox, mut messages) = mpsc::channel(INBOX_MAX);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = tonic::transport::Server::builder()
        .tcp_nodelay(true)
        .http2_keepalive_interval(Some(timeouts.silence / 2))
        .http2_keepalive_timeout(Some(timeouts.silence / 2))
        .add_service(CoordinatorServer::new(Service::new(inbox)))
        .serve_with_incoming_shutdown(TcpListenerStream::new(options.listener), async {
            let _ = stopped.await;
        });
    let server = tokio::spawn(server);

    let (stored, mut answers) = mpsc::channel(STORED_MAX);
    let (archive, writing) = archive::open(options.root.clone(), options.run_id, stored);
    let (found, mut rotten) = mpsc::channel(1);
    let hours = options.config.checkpoint.scrub_hours;
    let scrubbing = (hours > 0.0).then(|| {
        let every = Duration::from_secs_f64(hours * 3600.0);
        tokio::spawn(scrub(options.root.clone(), every, found))
    });
    let mut shell = Shell {
        core: Core::new(0, settings, durable),
        journal,
        root: options.root,
        outboxes: BTreeMap::new(),
        events: broadcast::channel(EVENTS_MAX).0,
        archive,
        outcome: None,
    };
    let mut tick = tokio::time::interval(timeouts.silence / TICKS_PER_SILENCE);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    tokio::pin!(shutdown);
    let outcome = loop {
        let event = tokio::select! {
            Some(message) = messages.recv() => match shell.register(message) {
                Some(event) => event,
                None => continue,
            },
            Some(event) = answers.recv() => event,
            Some(verdict) = rotten.recv() => Event::CheckpointCorrupt {
                step: verdict.step,
                faults: verdict.faults,
            },
            _ = tick.tick() => Event::Tick,
            () = &mut shutdown => {
                let reason = "the coordinator was asked to stop".to_owned();
                break Outcome { success: false, reason };
            }
        };
        let now = begun.elapsed().as_millis() as u64;
        for effect in shell.core.apply(now, event) {
            shell.execute(effect).await?;
        }
        if let Some(outcome) = shell.outcome.take() {
            break outcome;
        }
    };
    drop(answers);
    if let Some(scrubbing) = scrubbing {
        scrubbing.abort();
    }
    // Streams end when their senders are dropped, with everything that was said in them.
    drop(shell);
    let _ = stop.send(());
    let farewell = async {
        let _ = writing.await;
        let _ = server.await;
    };
    let _ = tokio::time::timeout(FAREWELL, farewell).await;
    Ok(outcome)
}

fn settings(options: &ServeOptions, journal: &Journal) -> Settings {
    let config = &options.config;
    let members = journal.last().members.len() as u32;
    let expected = options
        .expected_workers
        .unwrap_or(members.max(config.cluster.min_workers));
    Settings {
        run_id: options.run_id.clone(),
        lanes: config.batch.lanes,
        micro_batches: config.micro_batches(),
        pairs_per_lane: u64::from(config.batch.global_batch / config.batch.lanes),
        steps_total: config.run.steps,
        min_workers: config.cluster.min_workers as usize,
        expected_workers: expected as usize,
        timeouts: config.cluster.timeouts(),
        checkpoint: config.checkpoint.clone(),
        nodes_max: config.cluster.nodes_per_worker_max,
        evaluates: !config.data.validation.is_empty(),
        links: match (config.collective.transport, config.collective.hierarchical) {
            (Transport::Tcp, _) => LinkPolicy::Tcp,
            (Transport::Nccl, hierarchical) => LinkPolicy::Device { hierarchical },
            (Transport::NcclRing, _) => LinkPolicy::Ring,
        },
        quarantine_shards_max: config.data.quarantine_shards_max,
        horizon_steps: HORIZON_STEPS,
        term: journal.last().term,
    }
}

struct Shell {
    core: Core,
    journal: Journal,
    root: Root,
    outboxes: BTreeMap<u64, Outbox>,
    events: broadcast::Sender<v1::RunEvent>,
    archive: mpsc::Sender<Job>,
    outcome: Option<Outcome>,
}

impl Shell {
    /// Keeps the way to a worker; answers watchers.
    fn register(&mut self, message: FromRpc) -> Option<Event> {
        match message {
            FromRpc::Hello(session, hello, outbox) => {
                self.outboxes.insert(session, outbox);
                Some(Event::Hello(session, hello))
            }
            FromRpc::Message(session, body) => Some(Event::Message(session, body)),
            FromRpc::Gone(session) => {
                self.outboxes.remove(&session);
                Some(Event::Gone(session))
            }
            FromRpc::Watch(from_step, answer) => {
                let status = self.core.status();
                let receipts = self.core.receipts_from(from_step);
                let missed = receipts.map(|receipt| v1::RunEvent {
                    committed: Some(receipt.clone()),
                    ..status.clone()
                });
                let watched = Watched {
                    before: std::iter::once(status.clone()).chain(missed).collect(),
                    later: self.events.subscribe(),
                };
                // A watcher that is gone needs no answer.
                let _ = answer.send(watched);
                None
            }
        }
    }

    async fn execute(&mut self, effect: Effect) -> Result<(), CoordinatorError> {
        match effect {
            Effect::Journal {
                generation,
                committed,
                horizon,
                members,
                quarantine,
            } => {
                let entry = Entry {
                    generation,
                    committed,
                    horizon,
                    members,
                    quarantine: quarantine.into_iter().map(Into::into).collect(),
                    ..self.journal.last().clone()
                };
                self.journal.append(entry).await?;
            }
            Effect::StoreData(data) => identity::put(&self.root, &data).await?,
            Effect::Send(session, body) => self.send(session, body),
            Effect::Close(session) => {
                self.outboxes.remove(&session);
            }
            Effect::StoreReceipts(receipts) => self.store(Job::Receipts(receipts)).await,
            Effect::StoreCheckpoint {
                step,
                receipts,
                parts,
            } => self.store(Job::Checkpoint(step, receipts, parts)).await,
            Effect::Prune(steps) => self.store(Job::Prune(steps)).await,
            Effect::StoreCost(step, made) => self.store(Job::Cost(step, made)).await,
            Effect::StoreEvaluation(evaluated) => self.store(Job::Evaluation(evaluated)).await,
            Effect::StoreResult {
                exported,
                last,
                evaluations,
            } => {
                archive::put_result(&self.root, &exported, last.as_ref(), &evaluations).await?;
            }
            Effect::Emit(event) => {
                if !event.notice.is_empty() {
                    tracing::info!(
                        step = event.step,
                        generation = event.generation,
                        reason = event.reason().as_str_name(),
                        worker = event.worker_id,
                        notice = event.notice
                    );
                }
                // Without watchers there is nobody to tell.
                let _ = self.events.send(*event);
            }
            Effect::Finish { success, reason } => {
                self.outcome = Some(Outcome { success, reason });
            }
        }
        Ok(())
    }

    async fn store(&self, job: Job) {
        if self.archive.send(job).await.is_err() {
            tracing::error!("the archive's task is gone; nothing more becomes durable");
        }
    }

    fn send(&mut self, session: u64, body: down::Body) {
        let message = Ok(CoordinatorMessage { body: Some(body) });
        if let Some(outbox) = self.outboxes.get(&session)
            && outbox.try_send(message).is_err()
        {
            // Gone or far behind: its session ends and it will say hello again.
            self.outboxes.remove(&session);
        }
    }
}
