//! The shell around the core: server, clock, journal. One loop takes an event, lets the core
//! decide and does what it says, in order: behind a write that is not durable yet everything waits,
//! while events are still taken in.

use std::collections::BTreeMap;
use std::future::Future;
use std::time::{Duration, Instant};

use belfry_configs::{NonFinite, Timeouts, Transport, ValidConfig};
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
use crate::journal::{self, Closed, Entry, Journal};
use crate::outgoing::Outgoing;
use crate::persist::{Persist, Told};
use crate::rpc::{FromRpc, Outbox, Service, Watched};
use crate::stored::scrub::scrub;
use crate::writer;

/// Messages that may wait for the loop.
const INBOX_MAX: usize = 1024;
/// Answers of writing tasks that may wait for the loop.
const TOLD_MAX: usize = 64;
/// The archive's queue keeps room for what one event may ask of it.
const ARCHIVE_ROOM: usize = 8;
/// Events that a watcher may lag behind.
const EVENTS_MAX: usize = 4096;
/// Steps that may be committed while no journal entry can be written: a store that is away for four
/// minutes stops no run of one-second steps. Entries move it on before half of it is used up, and at
/// every renewal. Its price: so many steps a term that finds nobody alive takes for committed.
const HORIZON_STEPS: u64 = 256;
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

/// Leads the run until it ends or `shutdown` resolves, which is no outcome. What its last entry says, that the run is over
/// or that another may lead at once, is read by whoever stands by.
///
/// # Errors
/// [`CoordinatorError`]: the root or the server failed, or another coordinator leads.
pub async fn serve(
    options: ServeOptions,
    journal: Journal,
    shutdown: impl Future<Output = ()>,
) -> Result<Option<Outcome>, CoordinatorError> {
    let setting = Duration::from_secs_f64(options.config.cluster.max_stall_seconds);
    let patience = Timeouts::new(setting).silence;
    let starting = Persist::starting(patience);
    let settings = settings(&options, &journal);
    let read = || archive::read(&options.root, journal.last());
    let durable = starting
        .until_done("what the run made durable", read)
        .await?;
    let timeouts = settings.timeouts;

    let (inbox, messages) = mpsc::channel(INBOX_MAX);
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

    let (tell, told) = mpsc::channel(TOLD_MAX);
    let hours = options.config.checkpoint.scrub_hours;
    let scrubbing = (hours > 0.0).then(|| {
        let every = Duration::from_secs_f64(hours * 3600.0);
        tokio::spawn(scrub(options.root.clone(), every, tell.clone()))
    });
    let persist = Persist::running(patience, tell);
    let leader = journal.last().clone();
    let (archive, mut archiving) =
        archive::open(options.root, options.run_id, leader, persist.clone());
    let (writes, writing) = writer::open(journal, persist);
    let mut shell = Shell {
        core: Core::new(0, settings, durable),
        outgoing: Outgoing::default(),
        writes,
        outboxes: BTreeMap::new(),
        events: broadcast::channel(EVENTS_MAX).0,
        archive,
        ended: None,
    };
    let ended = shell.run(timeouts.silence, messages, told, shutdown).await;
    if let Some(scrubbing) = scrubbing {
        scrubbing.abort();
    }
    // Streams end when their senders are dropped, with everything that was said in them.
    drop(shell);
    let _ = stop.send(());
    if let Ok(Ended::Run(Outcome { success: true, .. })) = &ended {
        // What a run owes the store at its end it owes for as long as the store takes.
        let _ = (&mut archiving).await;
    }
    let farewell = async {
        if !archiving.is_finished() {
            let _ = archiving.await;
        }
        if let (Ok(journal), Ok(ended)) = (writing.await, &ended) {
            close(&journal, ended).await;
        }
        let _ = server.await;
    };
    let _ = tokio::time::timeout(FAREWELL, farewell).await;
    Ok(match ended? {
        Ended::Run(outcome) => Some(outcome),
        Ended::Asked => None,
    })
}

/// Why a leader leads no more.
enum Ended {
    /// The run is over.
    Run(Outcome),
    /// It was asked to stop.
    Asked,
}

/// The last entry. Without it a standby waits for the lease, and that is all.
async fn close(journal: &Journal, ended: &Ended) {
    let closed = match ended {
        Ended::Asked => Closed::Released,
        Ended::Run(Outcome { success, reason }) => Closed::Ended {
            success: *success,
            reason: reason.clone(),
        },
    };
    let last = Entry {
        closed: Some(closed),
        ..journal.next()
    };
    if let Err(error) = journal::put(journal.root(), &last).await {
        tracing::warn!(%error, "the journal does not say that this coordinator ended");
    }
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
        max_workers: config.cluster.max_workers as usize,
        spares: config.cluster.spares as usize,
        skip_non_finite: config.optim.non_finite == NonFinite::Skip,
        expected_workers: expected as usize,
        timeouts: config.cluster.timeouts(),
        checkpoint: config.checkpoint.clone(),
        nodes_max: config.cluster.nodes_per_worker_max,
        audit_every: config.cluster.audit_every_steps,
        evaluates: !config.data.validation.is_empty(),
        rhythm: config.rhythm(),
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
    outgoing: Outgoing,
    /// To the task that writes what others wait for.
    writes: mpsc::Sender<Effect>,
    outboxes: BTreeMap<u64, Outbox>,
    events: broadcast::Sender<v1::RunEvent>,
    archive: mpsc::Sender<Job>,
    ended: Option<Result<Ended, CoordinatorError>>,
}

impl Shell {
    /// Takes an event, lets the core decide, does what it says; until the run ends, or this
    /// coordinator.
    async fn run(
        &mut self,
        silence: Duration,
        mut messages: mpsc::Receiver<FromRpc>,
        mut told: mpsc::Receiver<Told>,
        shutdown: impl Future<Output = ()>,
    ) -> Result<Ended, CoordinatorError> {
        let begun = Instant::now();
        let mut tick = tokio::time::interval(silence / TICKS_PER_SILENCE);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        tokio::pin!(shutdown);
        loop {
            // Answers are always heard; what asks for more waits while too much waits already.
            let open = !self.outgoing.is_full() && self.archive.capacity() > ARCHIVE_ROOM;
            let event = tokio::select! {
                Some(told) = told.recv() => match told {
                    Told::Event(event) => Some(event),
                    Told::Settled(event) => {
                        for effect in self.outgoing.settled() {
                            self.execute(effect).await;
                        }
                        event
                    }
                    Told::End(error) => return Err(error),
                },
                Some(message) = messages.recv(), if open => self.register(message),
                _ = tick.tick(), if open => Some(Event::Tick),
                () = &mut shutdown => return Ok(Ended::Asked),
            };
            if let Some(event) = event {
                let now = begun.elapsed().as_millis() as u64;
                let effects = self.core.apply(now, event);
                for effect in self.outgoing.push(effects) {
                    self.execute(effect).await;
                }
            }
            if let Some(ended) = self.ended.take() {
                return ended;
            }
        }
    }

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
            FromRpc::Drain => Some(Event::Drain),
            FromRpc::Status(answer) => {
                // Whoever does not wait any more needs no answer.
                let _ = answer.send(self.core.report());
                None
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

    async fn execute(&mut self, effect: Effect) {
        match effect {
            Effect::Journal { .. }
            | Effect::StoreData(_)
            | Effect::StoreEvaluation(_)
            | Effect::StoreResult { .. } => {
                if self.writes.send(effect).await.is_err() {
                    tracing::debug!("the writing task has ended and said why");
                }
            }
            Effect::Send(session, body) => self.send(session, body),
            Effect::SendAll(sessions, body) => {
                for session in sessions {
                    self.send(session, (*body).clone());
                }
            }
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
            Effect::ReadReceipts(steps) => self.store(Job::Read(steps)).await,
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
            Effect::StepDown { term } => {
                let address = "an address that the journal tells".into();
                self.ended = Some(Err(CoordinatorError::Superseded { term, address }));
            }
            Effect::Finish { success, reason } => {
                self.ended = Some(Ok(Ended::Run(Outcome { success, reason })));
            }
        }
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
