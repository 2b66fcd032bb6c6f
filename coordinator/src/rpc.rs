//! The gRPC face: sessions and watchers become channels; nothing is decided here.

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};

use belfry_proto::v1::coordinator_server::Coordinator;
use belfry_proto::v1::{self, CoordinatorMessage, WorkerMessage, worker_message as up};
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio_stream::wrappers::{BroadcastStream, ReceiverStream};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};

/// Messages that may wait for a slow worker; one that lags this far is not following.
const OUTBOX_MAX: usize = 256;

/// Messages that may come before a session's hello.
const STRAGGLERS_MAX: usize = 256;

/// The way to a worker; its session ends when it is dropped.
pub type Outbox = mpsc::Sender<Result<CoordinatorMessage, Status>>;

/// What sessions and watchers tell the shell's loop. Sessions are numbered and never reused.
pub enum FromRpc {
    /// A session began.
    Hello(u64, v1::Hello, Outbox),
    /// A worker said something.
    Message(u64, up::Body),
    /// A session ended.
    Gone(u64),
    /// Somebody asks that the run ends in good order.
    Drain,
    /// Somebody asks how the run stands.
    Status(oneshot::Sender<v1::RunStatus>),
    /// A watcher asks for what it missed, from this step on.
    Watch(u64, oneshot::Sender<Watched>),
}

/// What a watcher missed, and what comes.
pub struct Watched {
    /// The present status, then receipts.
    pub before: Vec<v1::RunEvent>,
    /// Everything after them.
    pub later: broadcast::Receiver<v1::RunEvent>,
}

/// The service.
pub struct Service {
    inbox: mpsc::Sender<FromRpc>,
    sessions: AtomicU64,
}

impl Service {
    /// A service that tells `inbox` everything.
    pub fn new(inbox: mpsc::Sender<FromRpc>) -> Self {
        let sessions = AtomicU64::new(1);
        Service { inbox, sessions }
    }
}

/// The hello of a session. A heartbeat of the session before may come first.
async fn greeting(messages: &mut Streaming<WorkerMessage>) -> Option<v1::Hello> {
    for _ in 0..STRAGGLERS_MAX {
        match messages.message().await {
            Ok(Some(WorkerMessage {
                body: Some(up::Body::Hello(hello)),
            })) => return Some(hello),
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => return None,
        }
    }
    None
}

type Out<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Coordinator for Service {
    type SessionStream = Out<CoordinatorMessage>;
    type WatchStream = Out<v1::RunEvent>;

    async fn session(
        &self,
        request: Request<Streaming<WorkerMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let mut messages = request.into_inner();
        let (outbox, out) = mpsc::channel(OUTBOX_MAX);
        let inbox = self.inbox.clone();
        let session = self.sessions.fetch_add(1, Ordering::Relaxed);
        tokio::spawn(async move {
            let Some(hello) = greeting(&mut messages).await else {
                return;
            };
            let hello = FromRpc::Hello(session, hello, outbox);
            if inbox.send(hello).await.is_err() {
                return;
            }
            while let Ok(Some(message)) = messages.message().await {
                if let Some(body) = message.body
                    && inbox.send(FromRpc::Message(session, body)).await.is_err()
                {
                    return;
                }
            }
            let _ = inbox.send(FromRpc::Gone(session)).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(out))))
    }

    async fn status(
        &self,
        _: Request<v1::StatusRequest>,
    ) -> Result<Response<v1::RunStatus>, Status> {
        let (answer, status) = oneshot::channel();
        let asked = self.inbox.send(FromRpc::Status(answer)).await;
        asked.map_err(|_| Status::unavailable("the coordinator ends"))?;
        let status = status.await;
        let status = status.map_err(|_| Status::unavailable("the coordinator ends"))?;
        Ok(Response::new(status))
    }

    async fn drain(
        &self,
        _: Request<v1::DrainRequest>,
    ) -> Result<Response<v1::DrainResponse>, Status> {
        let asked = self.inbox.send(FromRpc::Drain).await;
        asked.map_err(|_| Status::unavailable("the coordinator ends"))?;
        Ok(Response::new(v1::DrainResponse {}))
    }

    async fn watch(
        &self,
        request: Request<v1::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let ending = |_| Status::unavailable("the coordinator ends");
        let (answer, watched) = oneshot::channel();
        let wish = FromRpc::Watch(request.into_inner().from_step, answer);
        let asked = self.inbox.send(wish).await;
        asked.map_err(|_| Status::unavailable("the coordinator ends"))?;
        let Watched { before, later } = watched.await.map_err(ending)?;
        let before = tokio_stream::iter(before.into_iter().map(Ok));
        let later = BroadcastStream::new(later).map(|event| {
            event.map_err(|_| Status::data_loss("this watcher lags behind; watch again"))
        });
        Ok(Response::new(Box::pin(before.chain(later))))
    }
}
