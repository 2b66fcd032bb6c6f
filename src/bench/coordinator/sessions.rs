//! The whole coordinator (gRPC, journal, ledger, core) on this machine, with very many workers in
//! this process that do what they are told at once, each over a connection of its own.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use belfry_configs::Timeouts;
use belfry_coordinator::{Candidacy, Candidate, ServeOptions, lead, run_id, serve};
use belfry_proto::v1::coordinator_client::CoordinatorClient;
use belfry_proto::v1::{
    self, CoordinatorMessage, WorkerMessage, coordinator_message as down, worker_message as up,
};
use belfry_proto::{Digest, LaneRange};
use shard_tools::store::Root;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Endpoint;

use super::super::table::{Report, gigabytes, seconds};
use super::super::timing::{Rounds, peak_bytes, reset_peak};
use super::row;

/// Messages of one worker that may wait.
const OUTBOX_MAX: usize = 16;
/// Connections that are made at a time.
const CONNECTING_MAX: usize = 64;
/// Files of a session: both ends of its connection, and what the process needs besides.
const FILES_PER_SESSION: u64 = 2;
const FILES_BESIDE: u64 = 200;
/// The smallest run file of this repository; its batch is replaced.
const CONFIG: &str = include_str!("../../../configs/tiny.toml");

/// What a worker saw.
enum Seen {
    /// It said that it is ready for this step.
    Ready(u64, Instant),
    /// It was told to commit this step.
    Commit(u64, Instant),
    /// A generation was opened.
    Opened(u64),
}

/// Measures and prints.
pub async fn run(sessions: u32, lanes: Option<u32>, steps: u64) -> anyhow::Result<()> {
    ensure!(
        (1..=100_000).contains(&sessions),
        "--sessions: must lie in 1..=100000"
    );
    allow_files(u64::from(sessions) * FILES_PER_SESSION + FILES_BESIDE)?;
    let lanes = lanes.unwrap_or(sessions.min(4096));
    let folder = tempfile::tempdir()?;
    let settings = [
        format!("batch.lanes={lanes}"),
        format!("batch.global_batch={}", 2 * lanes),
        // One more than are measured: the run never ends by itself.
        format!("run.steps={}", steps + 1),
        format!("checkpoint.every_steps={}", steps + 1),
        "data.validation=[]".into(),
        // Nobody is to be taken for dead while this machine makes all connections.
        "cluster.max_stall_seconds=60".into(),
    ];
    let config = belfry_configs::load_str(CONFIG, "tiny.toml", &settings)?;
    let root = Root::open(&folder.path().display().to_string())?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?.to_string();
    let id = run_id(&config, &root.to_string());
    reset_peak();
    let before = peak_bytes();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let candidate = Candidate {
        address: address.clone(),
        ..Candidate::default()
    };
    let setting = Duration::from_secs_f64(config.cluster.max_stall_seconds);
    let journal = match lead(&root, &candidate, &Timeouts::new(setting)).await? {
        Candidacy::Leads(journal) => *journal,
        Candidacy::Ended(_) => bail!("a new root holds a run that is over"),
    };
    let options = ServeOptions {
        config,
        root,
        listener,
        expected_workers: Some(sessions),
        run_id: id.clone(),
    };
    let coordinator = tokio::spawn(serve(options, journal, async {
        let _ = stopped.await;
    }));
    let begun = Instant::now();
    let (seen, sights) = mpsc::channel(4 * sessions as usize);
    let permits = Arc::new(tokio::sync::Semaphore::new(CONNECTING_MAX));
    let mut workers = tokio::task::JoinSet::new();
    for number in 0..sessions {
        let (address, id, seen) = (address.clone(), id.clone(), seen.clone());
        let permits = Arc::clone(&permits);
        workers.spawn(async move {
            let worker = Worker { number, id, seen };
            worker.work(&address, permits, steps).await
        });
    }
    drop(seen);
    let measured = watch(sights, u64::from(sessions), steps).await?;
    let memory = peak_bytes().zip(before);
    let _ = stop.send(());
    workers.shutdown().await;
    coordinator
        .await
        .context("the coordinator's task failed")??;
    measured.print(sessions, lanes, begun, memory, folder.path())
}

/// Raises this process's limit of open files, if it may.
fn allow_files(needed: u64) -> anyhow::Result<()> {
    let (soft, hard) = rlimit::Resource::NOFILE.get()?;
    if soft >= needed {
        return Ok(());
    }
    let raised = rlimit::Resource::NOFILE.set(needed, hard.max(needed));
    raised.with_context(|| {
        format!("{needed} open files are needed and {hard} are allowed: `ulimit -n {needed}` first")
    })
}

struct Worker {
    number: u32,
    id: String,
    seen: mpsc::Sender<Seen>,
}

impl Worker {
    /// Says hello and does what it is told, until the stream ends.
    async fn work(
        self,
        address: &str,
        permits: Arc<tokio::sync::Semaphore>,
        steps: u64,
    ) -> anyhow::Result<()> {
        let permit = permits.acquire().await?;
        let channel = Endpoint::from_shared(format!("http://{address}"))?
            .tcp_nodelay(true)
            .connect()
            .await?;
        let (outbox, messages) = mpsc::channel(OUTBOX_MAX);
        let hello = v1::Hello {
            run_id: self.id.clone(),
            worker_id: self.number.into(),
            incarnation: 1,
            fingerprint: "bench".into(),
            data_address: format!("127.0.0.1:{}", 1 + self.number % 65_000),
            ..Default::default()
        };
        outbox.send(said(up::Body::Hello(hello))).await?;
        let stream = CoordinatorClient::new(channel)
            .max_decoding_message_size(usize::MAX)
            .session(ReceiverStream::new(messages))
            .await?;
        drop(permit);
        let mut inbox = stream.into_inner();
        let mut open = v1::OpenGeneration::default();
        while let Some(CoordinatorMessage { body: Some(body) }) = inbox.message().await? {
            let at = Instant::now();
            match body {
                down::Body::LoadState(load) => {
                    let ready = v1::StateReady {
                        term: load.term,
                        step: load.step,
                        digest: Digest(1).to_bytes(),
                        request: load.request,
                        ..Default::default()
                    };
                    outbox.send(said(up::Body::StateReady(ready))).await?;
                }
                down::Body::OpenGeneration(opened) => {
                    open = opened;
                    self.seen.send(Seen::Opened(open.generation)).await?;
                    self.ready(&outbox, &open, open.step).await?;
                }
                down::Body::Commit(commit) => {
                    self.seen.send(Seen::Commit(commit.step, at)).await?;
                    if commit.step + 1 < steps {
                        self.ready(&outbox, &open, commit.step + 1).await?;
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    async fn ready(
        &self,
        outbox: &mpsc::Sender<WorkerMessage>,
        open: &v1::OpenGeneration,
        step: u64,
    ) -> anyhow::Result<()> {
        let own = |m: &&v1::Member| m.worker_id == u64::from(self.number);
        let member = open.members.iter().find(own).context("not a member")?;
        let nodes: Vec<LaneRange> = match step == open.step {
            true => member.nodes_now.iter().map(|n| (*n).into()).collect(),
            false => vec![LaneRange {
                start: member.lanes_start,
                end: member.lanes_end,
            }],
        };
        let report = |lane| v1::LaneReport {
            lane,
            pairs: 2,
            pairs_digest: Digest(lane.into()).to_bytes(),
            ..Default::default()
        };
        let ready = v1::Ready {
            term: open.term,
            generation: open.generation,
            step,
            sum_digest: Digest(step.into()).to_bytes(),
            finite: true,
            lanes: nodes
                .iter()
                .flat_map(|n| n.start..n.end)
                .map(report)
                .collect(),
            ..Default::default()
        };
        self.seen.send(Seen::Ready(step, Instant::now())).await?;
        Ok(outbox.send(said(up::Body::Ready(ready))).await?)
    }
}

fn said(body: up::Body) -> WorkerMessage {
    WorkerMessage { body: Some(body) }
}

/// What all workers saw.
#[derive(Default)]
struct Measured {
    /// From the last readiness to each worker's commit.
    latency: Rounds,
    /// From a step's first commit to the next step's.
    steps: Rounds,
    generations: u64,
    first_commit: Option<Instant>,
    last_commit: Option<Instant>,
}

/// Waits until everybody has committed every step.
async fn watch(
    mut sights: mpsc::Receiver<Seen>,
    sessions: u64,
    steps: u64,
) -> anyhow::Result<Measured> {
    let mut measured = Measured::default();
    let mut last_ready = vec![None::<Instant>; steps as usize];
    let mut commits = vec![Vec::new(); steps as usize];
    let mut left = sessions * steps;
    while left > 0 {
        let seen = sights.recv().await;
        match seen.context("a worker's session ended before the last step")? {
            Seen::Ready(step, at) => {
                let last = &mut last_ready[step as usize];
                *last = Some(last.map_or(at, |before| before.max(at)));
            }
            Seen::Commit(step, at) => {
                commits[step as usize].push(at);
                left -= 1;
            }
            Seen::Opened(generation) => measured.generations = measured.generations.max(generation),
        }
    }
    let mut before = None;
    for (last, commits) in last_ready.iter().zip(&commits) {
        let last = last.context("a commit without readiness")?;
        for at in commits {
            measured
                .latency
                .add(at.saturating_duration_since(last).as_secs_f64());
        }
        let first = commits.iter().min().copied();
        if let (Some(first), Some(before)) = (first, before) {
            measured
                .steps
                .add(first.saturating_duration_since(before).as_secs_f64());
        }
        measured.first_commit = measured.first_commit.or(first);
        measured.last_commit = commits.iter().max().copied();
        before = first;
    }
    Ok(measured)
}

impl Measured {
    fn print(
        &self,
        sessions: u32,
        lanes: u32,
        begun: Instant,
        memory: Option<(u64, u64)>,
        root: &Path,
    ) -> anyhow::Result<()> {
        let title = format!(
            "bench coordinator: over gRPC, {sessions} workers with a connection each, {lanes} lanes"
        );
        let mut report = Report::new("coordinator sessions", title);
        report.note(format!(
            "coordinator and workers in this process, root {}; a worker is ready at once, so a step \
             is what the control plane takes",
            root.display()
        ));
        row(&mut report, "commit latency", &self.latency, None);
        if self.steps.count() > 0 {
            row(&mut report, "step", &self.steps, None);
            let rate = 1.0 / self.steps.median();
            report.row("commits", format!("{rate:.1} /s"), "", None);
            report.json("commits_per_second", rate);
        }
        let start = self
            .first_commit
            .map(|at| at.saturating_duration_since(begun));
        let start = start.unwrap_or_default().as_secs_f64();
        report.row("to the first commit", seconds(start), "", None);
        let grown = memory.map(|(after, before)| after.saturating_sub(before) as f64);
        let said = grown.map_or("unknown".into(), gigabytes);
        report.row("memory, workers included", said, "", None);
        report.json("sessions", sessions);
        report.json("lanes", lanes);
        report.json("generations", self.generations);
        report.json("memory_bytes", grown);
        report.print();
        Ok(())
    }
}
