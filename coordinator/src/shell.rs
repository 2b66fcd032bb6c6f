//! The shell around the core: server, clock, journal, checkpoints made durable. One loop takes an
//! event, lets the core decide and does what it says, in order.

use std::collections::BTreeMap;
use std::future::Future;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use belfry_configs::ValidConfig;
use belfry_proto::v1::coordinator_server::CoordinatorServer;
use belfry_proto::v1::{self, CoordinatorMessage, coordinator_message as down};
use bytes::Bytes;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use shard_tools::store::{Created, Root};
use tokio::net::TcpListener;
use tokio::sync::{broadcast, mpsc, watch};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::Status;

use crate::core::{Core, Effect, Event, Settings};
use crate::error::CoordinatorError;
use crate::journal::Journal;
use crate::rpc::{FromRpc, Service};

/// Messages that may wait for the loop.
const INBOX_MAX: usize = 1024;
/// Events that a watcher may lag behind.
const EVENTS_MAX: usize = 4096;
/// Ticks per longest tolerated silence.
const TICKS_PER_STALL: u32 = 40;

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
    let settings = settings(&options, &journal).await?;
    let stall = Duration::from_millis(settings.stall_ms);
    let begun = Instant::now();
    let core = Core::new(0, settings);

    let (inbox, mut messages) = mpsc::channel(INBOX_MAX);
    let (events, _) = broadcast::channel(EVENTS_MAX);
    let (status, seen) = watch::channel(core.status());
    let service = Service {
        inbox,
        events: events.clone(),
        status: seen,
    };
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = tonic::transport::Server::builder()
        .tcp_nodelay(true)
        .http2_keepalive_interval(Some(stall / 2))
        .http2_keepalive_timeout(Some(stall / 2))
        .add_service(CoordinatorServer::new(service))
        .serve_with_incoming_shutdown(TcpListenerStream::new(options.listener), async {
            let _ = stopped.await;
        });
    let server = tokio::spawn(server);

    let (stored, mut durable) = mpsc::channel(4);
    let mut shell = Shell {
        core,
        journal,
        root: options.root,
        run_id: options.run_id,
        outboxes: BTreeMap::new(),
        events,
        status,
        stored,
        outcome: None,
        result: ResultFile::default(),
    };
    let mut tick = tokio::time::interval(stall / TICKS_PER_STALL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    tokio::pin!(shutdown);
    let outcome = loop {
        let event = tokio::select! {
            Some(message) = messages.recv() => match shell.register(message) {
                Some(event) => event,
                None => continue,
            },
            Some(event) = durable.recv() => event,
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
        shell.status.send_replace(shell.core.status());
        if let Some(outcome) = shell.outcome.take() {
            break outcome;
        }
    };
    // Farewells leave before the server does.
    tokio::time::sleep(Duration::from_millis(200)).await;
    shell.outboxes.clear();
    let _ = stop.send(());
    let _ = tokio::time::timeout(Duration::from_secs(1), server).await;
    Ok(outcome)
}

async fn settings(options: &ServeOptions, journal: &Journal) -> Result<Settings, CoordinatorError> {
    let config = &options.config;
    let root = &options.root;
    let store = |what: &str| {
        let what = what.to_owned();
        move |source| CoordinatorError::Store { what, source }
    };
    let listed = root
        .list("checkpoints")
        .await
        .map_err(store("cannot list the checkpoints"))?;
    let manifests = listed.iter().filter_map(|(key, _)| {
        let folder = key.strip_suffix("/manifest.json")?;
        folder.rsplit_once("step-")?.1.parse().ok()
    });
    let mut receipts = BTreeMap::new();
    for (file, _) in root
        .list("ledger")
        .await
        .map_err(store("cannot list the ledger"))?
    {
        let bytes = root
            .get(&file)
            .await
            .map_err(store("cannot read the ledger"))?;
        for line in String::from_utf8_lossy(&bytes).lines() {
            let corrupt = |reason: String| CoordinatorError::Corrupt {
                file: file.clone(),
                reason,
            };
            let receipt: serde_json::Value =
                serde_json::from_str(line).map_err(|e| corrupt(e.to_string()))?;
            let (step, digest) = (receipt["step"].as_u64(), receipt["sum_digest"].as_str());
            let (Some(step), Some(digest)) = (step, digest) else {
                return Err(corrupt("a receipt without step or digest".into()));
            };
            receipts.insert(step, digest.to_owned());
        }
    }
    let members = journal.last().members.len() as u32;
    let expected = options
        .expected_workers
        .unwrap_or(members.max(config.cluster.min_workers));
    Ok(Settings {
        run_id: options.run_id.clone(),
        lanes: config.batch.lanes,
        micro_batches: config.micro_batches(),
        steps_total: config.run.steps,
        min_workers: config.cluster.min_workers as usize,
        expected_workers: expected as usize,
        stall_ms: (config.cluster.max_stall_seconds * 1000.0) as u64,
        checkpoint_every: config.checkpoint.every_steps,
        checkpoint_parts: config.checkpoint.parts,
        nodes_max: config.cluster.nodes_per_worker_max,
        evaluates: config.data.validation.is_some(),
        receipts,
        manifests: {
            let mut steps: Vec<u64> = manifests.collect();
            steps.sort_unstable();
            steps
        },
        term: journal.last().term,
        generation: journal.last().generation,
    })
}

/// What `result.json` says when the run is over.
#[derive(Default)]
struct ResultFile {
    last: Option<v1::StepRecord>,
    evaluations: BTreeMap<u64, v1::Evaluated>,
}

type Outbox = mpsc::Sender<Result<CoordinatorMessage, Status>>;

struct Shell {
    core: Core,
    journal: Journal,
    root: Root,
    run_id: String,
    outboxes: BTreeMap<u64, (u64, Outbox)>,
    events: broadcast::Sender<v1::RunEvent>,
    status: watch::Sender<v1::RunEvent>,
    stored: mpsc::Sender<Event>,
    outcome: Option<Outcome>,
    result: ResultFile,
}

impl Shell {
    /// Keeps the way to a worker; drops what comes from a session that was replaced.
    fn register(&mut self, message: FromRpc) -> Option<Event> {
        let current = |shell: &Self, id: u64, incarnation: u64| {
            shell
                .outboxes
                .get(&id)
                .is_some_and(|(i, _)| *i == incarnation)
        };
        match message {
            FromRpc::Hello(hello, outbox) => {
                self.outboxes
                    .insert(hello.worker_id, (hello.incarnation, outbox));
                Some(Event::Hello(hello))
            }
            FromRpc::Message(id, incarnation, body) => {
                current(self, id, incarnation).then_some(Event::Message(id, body))
            }
            FromRpc::Gone(worker_id, incarnation) => {
                let gone = Event::Gone {
                    worker_id,
                    incarnation,
                };
                current(self, worker_id, incarnation).then_some(gone)
            }
        }
    }

    async fn execute(&mut self, effect: Effect) -> Result<(), CoordinatorError> {
        match effect {
            Effect::Journal {
                generation,
                committed,
                members,
            } => {
                self.journal.append(generation, committed, members).await?;
            }
            Effect::Send(id, body) => self.send(id, body),
            Effect::Close(id) => {
                self.outboxes.remove(&id);
            }
            Effect::StoreCheckpoint {
                step,
                receipts,
                parts,
            } => {
                let (root, run_id) = (self.root.clone(), self.run_id.clone());
                let stored = self.stored.clone();
                tokio::spawn(async move {
                    let event = store_checkpoint(&root, &run_id, step, &receipts, &parts).await;
                    let _ = stored.send(event).await;
                });
            }
            Effect::Emit(event) => {
                if !event.notice.is_empty() {
                    tracing::info!(
                        step = event.step,
                        generation = event.generation,
                        notice = event.notice
                    );
                }
                if let Some(record) = &event.committed {
                    self.result.last = Some(record.clone());
                }
                if let Some(evaluated) = &event.evaluated {
                    self.result
                        .evaluations
                        .insert(evaluated.step, evaluated.clone());
                }
                if let (Some(exported), "finished") = (&event.exported, event.phase.as_str()) {
                    self.put_result(exported).await?;
                }
                self.status.send_replace((*event).clone());
                // Without watchers there is nobody to tell.
                let _ = self.events.send(*event);
            }
            Effect::Finish { success, reason } => {
                self.outcome = Some(Outcome { success, reason });
            }
        }
        Ok(())
    }

    fn send(&mut self, id: u64, body: down::Body) {
        let message = Ok(CoordinatorMessage { body: Some(body) });
        if let Some((_, outbox)) = self.outboxes.get(&id)
            && outbox.try_send(message).is_err()
        {
            // Gone or far behind: its session ends and it will say hello again.
            self.outboxes.remove(&id);
        }
    }

    async fn put_result(&self, exported: &v1::Exported) -> Result<(), CoordinatorError> {
        let evaluations: Vec<serde_json::Value> = self
            .result
            .evaluations
            .values()
            .map(|e| {
                json!({
                    "step": e.step, "mlm_loss": e.mlm_loss, "mlm_accuracy": e.mlm_accuracy,
                    "itm_loss": e.itm_loss, "itm_accuracy": e.itm_accuracy, "pairs": e.pairs,
                })
            })
            .collect();
        let result = json!({
            "step": exported.step,
            "parameters_sha256": exported.parameters_sha256,
            "optimizer_sha256": exported.optimizer_sha256,
            "export": exported.file,
            "last": self.result.last.as_ref().map(receipt),
            "evaluations": evaluations,
        });
        let text = serde_json::to_vec_pretty(&result).expect("plain data");
        self.root
            .put("result.json", Bytes::from(text))
            .await
            .map_err(|source| CoordinatorError::Store {
                what: "cannot write result.json".into(),
                source,
            })
    }
}

/// A step's receipt: deterministic fields only.
fn receipt(r: &v1::StepRecord) -> serde_json::Value {
    json!({
        "step": r.step, "mlm_loss": r.mlm_loss, "itm_loss": r.itm_loss,
        "mlm_accuracy": r.mlm_accuracy, "itm_accuracy": r.itm_accuracy,
        "mlm_masked": r.mlm_masked, "pairs": r.pairs,
        "unmasked_micro_batches": r.unmasked_micro_batches,
        "sum_digest": r.sum_digest, "pairs_digest": r.pairs_digest,
    })
}

/// Receipts first, the manifest last; both only if absent or equal.
async fn store_checkpoint(
    root: &Root,
    run_id: &str,
    step: u64,
    receipts: &[v1::StepRecord],
    parts: &[v1::PartStored],
) -> Event {
    let mut alarm = false;
    let stored = async {
        if let (Some(first), Some(last)) = (receipts.first(), receipts.last()) {
            let lines: Vec<String> = receipts.iter().map(|r| receipt(r).to_string()).collect();
            let file = format!("ledger/{:09}-{:09}.jsonl", first.step, last.step);
            let text = Bytes::from(lines.join("\n") + "\n");
            if root.create(&file, text.clone()).await? == Created::Exists
                && root.get(&file).await? != text
            {
                alarm = true;
                return Ok(Some(format!(
                    "{file} holds other receipts for the same steps"
                )));
            }
        }
        let parts: Vec<serde_json::Value> = parts
            .iter()
            .map(|p| json!({"part": p.part, "file": p.file, "sha256": p.sha256, "bytes": p.bytes}))
            .collect();
        let manifest = json!({
            "schema_version": 1, "step": step, "run_id": run_id, "parts": parts,
        });
        let text = Bytes::from(serde_json::to_vec_pretty(&manifest).expect("plain data"));
        let file = crate::core::manifest_file(step);
        if root.create(&file, text.clone()).await? == Created::Exists
            && root.get(&file).await? != text
        {
            alarm = true;
            return Ok(Some(format!("{file} names other parts for the same step")));
        }
        Ok(None)
    };
    let outcome: Result<Option<String>, shard_tools::store::StoreError> = stored.await;
    match outcome {
        Ok(None) => Event::CheckpointDurable { step },
        Ok(Some(error)) => Event::CheckpointFailed { step, error, alarm },
        Err(error) => Event::CheckpointFailed {
            step,
            error: error.to_string(),
            alarm: false,
        },
    }
}
