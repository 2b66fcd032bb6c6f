//! The worker's shell: one loop that takes an event, lets the core decide, and does what it says.
//!
//! Sockets, threads, files and clocks live here and in the rooms it calls; decisions live in
//! [`crate::core`].

use std::collections::BTreeMap;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use belfry_collective::{DeviceLinks, Endpoint, Floats, Limits, Member, Reduce, Transport};
use belfry_configs::{Timeouts, ValidConfig};
use belfry_model::ManagerTower;
use belfry_proto::{
    Digest, LaneRange, v1, v1::coordinator_message as down, v1::worker_message as up,
};
use shard_tools::store::Root;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use xxhash_rust::xxh3::xxh3_64;

use crate::core::{Copied, Core, Digests, Effect, Event, Exchange, Identity, LateReports};
use crate::error::WorkerError;
use crate::held::HeldState;
use crate::inject::{Inject, Injection};
use crate::link::{Link, Whereabouts};
use crate::optimizer::AdamW;
use crate::progress::Progress;
use crate::pulse::Pulse;
use crate::snapshot::Snapshots;
use crate::staging::{self, Staged, Staging};
use crate::state::{TrainState, optimizer};
use crate::train_step::{Compute, Job};
use crate::{checkpoint, contrast, digests, fingerprint, gathering, transport};

/// Events that may wait for the loop.
const EVENTS_MAX: usize = 256;
/// Elements of a bucket: 4 MiB of f32, enough of them to overlap, few enough to keep frames large.
const BUCKET_LEN: usize = 1 << 20;

/// What a worker process is told.
#[derive(Debug)]
pub struct WorkerOptions {
    /// The run.
    pub config: ValidConfig,
    /// Where its checkpoints and exports live.
    pub root: Root,
    /// Hash of both.
    pub run_id: String,
    /// Lasts over restarts.
    pub worker_id: u64,
    /// Where the coordinator's address is looked up, at every connection.
    pub coordinator: Whereabouts,
    /// The shard cache of this host.
    pub cache_dir: PathBuf,
    /// Address at which peers reach this worker.
    pub bind: IpAddr,
    /// A fault of memory to order, for tests.
    pub inject: Option<Injection>,
}

/// Runs a worker until the coordinator ends the run, or `shutdown` resolves and the open step is
/// left in peace.
///
/// # Errors
/// [`WorkerError`]: what no restart of this process would mend.
pub async fn run(
    options: WorkerOptions,
    shutdown: impl Future<Output = ()>,
) -> Result<(), WorkerError> {
    let (events, mut inbox) = mpsc::channel(EVENTS_MAX);
    let (arrivals, mut arrived) = mpsc::channel(1);
    let mut shell = Shell::open(options, events, arrivals).await?;
    tokio::pin!(shutdown);
    let mut leaving = false;
    loop {
        let mut event = tokio::select! {
            event = inbox.recv() => match event.expect("the shell itself holds a sender") {
                Event::Message(down::Body::Echo(echo)) => {
                    shell.pulse.echoed(echo.number);
                    continue;
                }
                Event::Message(down::Body::Wait(wait)) => {
                    let seconds = wait.for_ms as f64 / 1000.0;
                    tracing::info!(why = wait.why, seconds, "nothing to do for this worker yet");
                    continue;
                }
                event => event,
            },
            arrival = arrived.recv() => {
                match shell.arrived(arrival.expect("the shell itself holds a sender")) {
                    Some(event) => event,
                    None => continue,
                }
            }
            () = &mut shutdown, if !leaving => {
                leaving = true;
                let events = shell.events.clone();
                // The coordinator says good-bye after the open step, if it is there.
                let grace = shell.times.stuck + shell.times.silence;
                tokio::spawn(async move {
                    tokio::time::sleep(grace).await;
                    let goodbye = v1::Finished { success: true, reason: "left".into() };
                    let body = down::Body::Finished(goodbye);
                    let _ = events.send(Event::Message(body)).await;
                });
                Event::Shutdown
            }
        };
        shell.inject.event(&mut event);
        if let Event::Message(v1::coordinator_message::Body::Commit(commit)) = &event {
            shell.snapshots.close(commit.closed);
        }
        let effects = shell.core.apply(event);
        shell.pulse.says(shell.core.heartbeat());
        for effect in effects {
            if let Some(end) = shell.execute(effect)? {
                // A last word (fatal, leaving) gets a moment to leave the process.
                tokio::time::sleep(Duration::from_millis(100)).await;
                return end;
            }
        }
    }
}

struct Shell {
    config: ValidConfig,
    root: Root,
    core: Core,
    link: Link,
    pulse: Pulse,
    /// Before anything was measured, and now.
    timeouts: Timeouts,
    times: Timeouts,
    endpoint: Arc<Endpoint>,
    /// What sums gradients: the endpoint, or device links beside it.
    transport: Arc<dyn Transport>,
    compute: Compute,
    optimizer: Arc<AdamW>,
    state: Option<Arc<HeldState>>,
    snapshots: Snapshots,
    staging: Staging,
    /// Whether the last exchange went over links between devices.
    linked: bool,
    exchange: Option<JoinHandle<()>>,
    /// Number of the init, load or copy that is under way or was the last.
    acquisition: u64,
    acquiring: Option<JoinHandle<()>>,
    events: mpsc::Sender<Event>,
    arrivals: mpsc::Sender<Arrival>,
    inject: Inject,
}

impl Shell {
    async fn open(
        options: WorkerOptions,
        events: mpsc::Sender<Event>,
        arrivals: mpsc::Sender<Arrival>,
    ) -> Result<Self, WorkerError> {
        let config = options.config;
        let timeouts = config.cluster.timeouts();
        let bind = SocketAddr::new(options.bind, 0);
        let run_id = xxh3_64(options.run_id.as_bytes());
        let endpoint = Endpoint::bind(bind, run_id, limits(&timeouts)).await?;
        // Opening data reads manifests and may wait for a store: not on the loop's thread.
        let opening = {
            let (config, cache, events) = (config.clone(), options.cache_dir, events.clone());
            let root = options.root.clone();
            tokio::task::spawn_blocking(move || Compute::start(&config, (&root, &cache), events))
        };
        let opened = opening.await;
        let compute = opened.map_err(|e| WorkerError::Internal(e.to_string()))??;
        let transport::Opened {
            transport,
            device,
            orders,
        } = tokio::task::block_in_place(|| transport::open(&config, &endpoint));
        let identity = Identity {
            run_id: options.run_id,
            worker_id: options.worker_id,
            incarnation: u64::from(std::process::id()) << 32 | u64::from(clock_nanos()),
            fingerprint: fingerprint::fingerprint(&config) + &orders,
            data_address: endpoint.local_addr().to_string(),
            lanes: config.batch.lanes,
            gathers: config.gathers(),
            device,
            data: compute.identity.clone(),
        };
        tracing::info!(?identity, "worker is up");
        let snapshots = Snapshots::new(
            options.root.clone(),
            Arc::clone(&compute.model),
            &config,
            events.clone(),
        );
        let link = Link::open(options.coordinator, timeouts, events.clone());
        let core = Core::new(identity);
        Ok(Shell {
            optimizer: Arc::new(optimizer(&config, &compute.model)),
            snapshots,
            pulse: Pulse::start(link.clone(), timeouts.heartbeat, core.heartbeat()),
            link,
            timeouts,
            times: timeouts,
            core,
            root: options.root,
            state: None,
            staging: Staging::default(),
            linked: false,
            exchange: None,
            acquisition: 0,
            acquiring: None,
            config,
            endpoint,
            transport,
            compute,
            events,
            arrivals,
            inject: Inject::new(options.inject),
        })
    }

    /// Does one thing; an end of the process is returned.
    fn execute(&mut self, effect: Effect) -> Result<Option<Result<(), WorkerError>>, WorkerError> {
        match effect {
            Effect::Send(up::Body::Hello(hello)) => {
                self.link.send(up::Body::Hello(hello));
                if let Some(held) = self.snapshots.held() {
                    self.link.send(up::Body::SnapshotHeld(held));
                }
            }
            Effect::Send(up::Body::Applied(mut applied)) => {
                self.snapshots.tell_stall(&mut applied);
                self.link.send(up::Body::Applied(applied));
            }
            Effect::Send(body) => self.link.send(body),
            Effect::Measured { step, round_trip } => {
                self.times = self.timeouts.measured(step, round_trip);
                self.pulse.every(self.times.heartbeat);
                self.endpoint.set_limits(limits(&self.times));
            }
            Effect::Reconnect => self.link.reset(),
            Effect::Compute {
                step,
                lane,
                quarantine,
                features,
            } => {
                let state = self.state_of(step)?;
                self.compute.submit(Job::Lane {
                    lane,
                    state,
                    quarantine,
                    features,
                })?;
            }
            Effect::ComputeFeatures {
                step,
                lane,
                quarantine,
            } => {
                let state = self.state_of(step)?;
                self.compute.submit(Job::Features {
                    lane,
                    state,
                    quarantine,
                })?;
            }
            Effect::Gather(gathering) => {
                self.abort_reduce();
                let shape = (self.config.batch.lanes, contrast::block_bytes(&self.config));
                let events = self.events.clone();
                let begun = gathering::begin(&self.endpoint, gathering, shape, events)?;
                self.exchange = Some(begun);
            }
            Effect::DigestLane {
                attempt,
                gradient,
                seconds,
            } => digests::of_lane(attempt, gradient, seconds, self.events.clone()),
            Effect::DigestState { step } => {
                digests::of_state(self.state_of(step)?, self.events.clone());
            }
            // Links between devices read a node where it is.
            Effect::Stage { .. } if self.linked => {}
            Effect::Stage { step, node, sum } => self.staging.begin(step, node, sum),
            Effect::Unstage => self.staging.clear(),
            Effect::Prefetch { step, lanes, .. } => self.compute.data.prefetch(step, &lanes),
            Effect::MakeId { generation } => self.make_id(generation),
            Effect::Reduce(exchange) => self.reduce(exchange)?,
            Effect::AbortReduce => self.abort_reduce(),
            Effect::Apply {
                step,
                sum,
                snapshot_parts,
                skip,
            } => self.apply(step, (!skip).then_some(sum), snapshot_parts)?,
            Effect::Load { step, manifest } => self.load(step, manifest),
            Effect::Copy { step, sources } => self.copy(step, sources),
            Effect::StoreParts { step, parts } => {
                let state = self.state_of(step)?;
                self.snapshots.store(&state, parts);
            }
            Effect::Evaluate(ask) => {
                let state = self.state_of(ask.step)?;
                self.compute.submit(Job::Evaluate { state, ask })?;
            }
            Effect::Export { step } => self.export(step)?,
            Effect::Exit { success, reason } => {
                tracing::info!(success, reason, "worker ends");
                return Ok(Some(if success {
                    Ok(())
                } else {
                    Err(WorkerError::Ended(reason))
                }));
            }
        }
        Ok(None)
    }

    fn state_of(&self, step: u64) -> Result<Arc<HeldState>, WorkerError> {
        let state = self.state.as_ref().filter(|s| s.step() == step);
        state.cloned().ok_or_else(|| {
            WorkerError::Internal(format!(
                "asked for the state of step {step}, which is not here"
            ))
        })
    }

    fn abort_reduce(&mut self) {
        if let Some(task) = self.exchange.take() {
            task.abort();
        }
    }

    /// The id for a generation's device links; a library may take its time.
    fn make_id(&self, generation: u64) {
        let (transport, events) = (Arc::clone(&self.transport), self.events.clone());
        tokio::spawn(async move {
            let made = tokio::task::spawn_blocking(move || transport.new_id()).await;
            let id = match made {
                Ok(id) => id.map_err(|e| e.to_string()),
                Err(error) => Err(error.to_string()),
            };
            let _ = events.send(Event::IdMade { generation, id }).await;
        });
    }

    fn reduce(&mut self, exchange: Exchange) -> Result<(), WorkerError> {
        self.abort_reduce();
        let members = gathering::resolved(exchange.members, |addr, nodes| Member { addr, nodes })?;
        let (generation, step) = (exchange.generation, exchange.step);
        let lanes: Vec<u32> = exchange
            .partials
            .keys()
            .flat_map(|n| n.start..n.end)
            .collect();
        let late = self.late_reports(step, lanes)?;
        let state = self.state_of(step)?;
        self.linked = exchange.links.is_some();
        let nodes = match self.linked {
            true => staging::where_they_are(exchange.partials),
            false => self.staging.staged(step, exchange.partials),
        };
        let request = Reduce {
            generation,
            step,
            lanes: self.config.batch.lanes,
            rank: exchange.rank,
            members,
            partials: BTreeMap::new(),
            len: self.compute.model.table().elements(),
            divide_by: self.config.micro_batches(),
            bucket_len: BUCKET_LEN,
        };
        let links = exchange.links.map(|l| transport::links(&self.config, l));
        let (transport, events) = (Arc::clone(&self.transport), self.events.clone());
        self.exchange = Some(tokio::spawn(async move {
            let hashed = tokio::task::spawn_blocking(move || digests::of_step(&state));
            let event = exchanged(transport, (request, links), nodes, late, hashed).await;
            let _ = events.send(event).await;
        }));
        Ok(())
    }

    /// What a device of its own still has to say of the step's lanes.
    fn late_reports(
        &self,
        step: u64,
        lanes: Vec<u32>,
    ) -> Result<Option<oneshot::Receiver<Result<LateReports, String>>>, WorkerError> {
        if !self.compute.place().is_apart() {
            return Ok(None);
        }
        let (answer, late) = oneshot::channel();
        self.compute.submit(Job::Reports {
            step,
            lanes,
            answer,
        })?;
        Ok(Some(late))
    }

    /// Without a sum the step only counts.
    fn apply(
        &mut self,
        step: u64,
        sum: Option<Arc<Vec<f32>>>,
        snapshot_parts: Vec<u32>,
    ) -> Result<(), WorkerError> {
        let state = self.state_of(step)?;
        // Nobody but a snapshot may still hold the old state, so the update happens in place.
        self.endpoint.publish_state(None);
        self.state = None;
        self.staging.clear();
        let (snapshots, optimizer) = (&mut self.snapshots, &self.optimizer);
        let mut updated = tokio::task::block_in_place(move || {
            let mut state = state;
            match sum {
                Some(sum) => snapshots.update(&mut state, optimizer, &sum),
                None => HeldState::skip(&mut state),
            }
            state
        });
        self.inject.state(step, &mut updated);
        self.hold(&updated);
        if !snapshot_parts.is_empty() {
            self.snapshots.store(&updated, snapshot_parts);
        }
        let events = self.events.clone();
        tokio::spawn(async move { events.send(Event::Applied { step }).await });
        Ok(())
    }

    fn hold(&mut self, state: &Arc<HeldState>) {
        self.state = Some(Arc::clone(state));
        self.endpoint
            .publish_state(Some(Arc::clone(state) as Arc<_>));
    }

    /// Runs `acquire` and hands what it brings to the loop.
    fn acquire<F>(&mut self, step: u64, progress: Arc<Progress>, acquire: F)
    where
        F: Future<Output = Result<TrainState, WorkerError>> + Send + 'static,
    {
        self.abort_reduce();
        self.endpoint.publish_state(None);
        self.state = None;
        // An earlier one may still be under way, or its arrival in the channel: neither counts.
        if let Some(earlier) = self.acquiring.take() {
            earlier.abort();
        }
        self.acquisition += 1;
        let acquisition = self.acquisition;
        let arrivals = self.arrivals.clone();
        let place = self.compute.place().clone();
        self.acquiring = Some(tokio::spawn(async move {
            let result = acquire.await.and_then(|state| {
                if state.step == step {
                    let digest = state.digest();
                    return Ok((digest, Arc::new(place.hold(state))));
                }
                let held = state.step;
                Err(WorkerError::Ended(format!(
                    "holds step {held}, step {step} was asked for"
                )))
            });
            let arrival = Arrival {
                acquisition,
                step,
                result,
                copied: progress.told(),
            };
            let _ = arrivals.send(arrival).await;
        }));
    }

    /// Takes a state that was initialised, loaded or copied; one that was asked for before the
    /// last is dropped.
    fn arrived(&mut self, arrival: Arrival) -> Option<Event> {
        if arrival.acquisition != self.acquisition {
            return None;
        }
        let step = arrival.step;
        Some(match arrival.result {
            Ok((digest, state)) => {
                self.hold(&state);
                Event::StateArrived {
                    step,
                    digest,
                    copied: arrival.copied,
                }
            }
            Err(error) => {
                tracing::error!(step, %error, "no state");
                let error = error.to_string();
                Event::StateFailed {
                    step,
                    error,
                    copied: arrival.copied,
                }
            }
        })
    }

    fn load(&mut self, step: u64, manifest: String) {
        let (root, config) = (self.root.clone(), self.config.clone());
        let model = Arc::clone(&self.compute.model);
        self.acquire(step, Progress::of_bytes(0), async move {
            if manifest.is_empty() {
                return TrainState::init(&config, &model).await;
            }
            checkpoint::load(&root, &manifest, model.table()).await
        });
    }

    fn copy(&mut self, step: u64, sources: Vec<String>) {
        let endpoint = Arc::clone(&self.endpoint);
        let len = self.compute.model.table().elements();
        let progress = Progress::of_bytes(3 * 4 * len as u64);
        let seen = Arc::clone(&progress);
        self.acquire(step, progress, async move {
            let sources: Vec<SocketAddr> = sources.iter().filter_map(|s| s.parse().ok()).collect();
            let copied = endpoint.copy_state(&sources, step, (3, len), &seen.bytes);
            let copied = copied.await?;
            seen.names(copied.liars);
            TrainState::from_tensors(step, copied.tensors)
                .ok_or_else(|| WorkerError::Internal("a copy without its three tensors".into()))
        });
    }

    fn export(&self, step: u64) -> Result<(), WorkerError> {
        let state = self.state_of(step)?;
        let (root, events) = (self.root.clone(), self.events.clone());
        let model = Arc::clone(&self.compute.model);
        let positions = self.config.model.text.positions;
        tokio::spawn(async move {
            let exported = match exported(&root, &state, &model, positions).await {
                Ok(exported) => exported,
                Err(error) => v1::Exported {
                    step,
                    error: error.to_string(),
                    ..Default::default()
                },
            };
            let _ = events
                .send(Event::Report(up::Body::Exported(exported)))
                .await;
        });
        Ok(())
    }
}

/// Waits for the device, brings the nodes to the exchange and sums them with the others'.
async fn exchanged(
    transport: Arc<dyn Transport>,
    (mut request, links): (Reduce<Floats>, Option<DeviceLinks>),
    nodes: BTreeMap<LaneRange, Staged>,
    late: Option<oneshot::Receiver<Result<LateReports, String>>>,
    hashed: JoinHandle<Result<Digest, String>>,
) -> Event {
    let (generation, step) = (request.generation, request.step);
    let mut reports = LateReports::default();
    if let Some(late) = late {
        match late.await {
            Ok(Ok(late)) => reports = late,
            Ok(Err(error)) => return Event::Failed(error),
            Err(_) => return Event::Failed(format!("step {step}: the compute thread is gone")),
        }
    }
    for (node, staged) in nodes {
        match staged.await {
            Ok(floats) => request.partials.insert(node, floats),
            Err(error) => return Event::Failed(format!("step {step}, lanes {node}: {error}")),
        };
    }
    let reduced = transport.reduce(request, links).await;
    let state = match hashed.await.unwrap_or_else(|e| Err(e.to_string())) {
        Ok(digest) => Some(digest),
        Err(error) => {
            return Event::Failed(format!("step {step}: no digest of the state: {error}"));
        }
    };
    match reduced {
        Ok(reduced) => Event::Reduced {
            generation,
            step,
            finite: reduced.sum.iter().all(|x| x.is_finite()),
            digest: Digest(reduced.digest),
            sum: reduced.sum,
            late: reports,
            digests: Digests {
                nodes: reduced
                    .node_digests
                    .iter()
                    .map(|(n, d)| (*n, *d as u64))
                    .collect(),
                sum_parts: reduced.parts,
                state,
            },
        },
        Err(error) => {
            tracing::warn!(generation, step, %error, "the all-reduce failed");
            Event::ReduceFailed {
                generation,
                step,
                ranks: error.ranks(),
                detail: error.to_string(),
            }
        }
    }
}

/// Writes the export and says what it is.
async fn exported(
    root: &Root,
    state: &HeldState,
    model: &ManagerTower,
    positions: u32,
) -> Result<v1::Exported, WorkerError> {
    let state = state.host()?;
    Ok(v1::Exported {
        step: state.step,
        file: checkpoint::export(root, state, model.table(), positions).await?,
        parameters_sha256: state.parameters_sha256(),
        optimizer_sha256: state.optimizer_sha256(),
        error: String::new(),
    })
}

/// The outcome of an init, load or copy.
struct Arrival {
    acquisition: u64,
    step: u64,
    result: Result<(Digest, Arc<HeldState>), WorkerError>,
    copied: Copied,
}

/// What the collective is told of the run's times.
fn limits(timeouts: &Timeouts) -> Limits {
    Limits {
        connect_timeout: timeouts.connect,
        silence_timeout: timeouts.silence,
        start_timeout: timeouts.start,
        ..Limits::default()
    }
}

fn clock_nanos() -> u32 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |d| d.subsec_nanos())
}
