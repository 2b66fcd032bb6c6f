//! The gRPC face: sessions and watchers become channels; nothing is decided here.

use std::pin::Pin;

use belfry_proto::v1::coordinator_server::Coordinator;
use belfry_proto::v1::{self, CoordinatorMessage, WorkerMessage, worker_message as up};
use tokio::sync::{broadcast, mpsc, watch};
use tokio_stream::wrappers::{BroadcastStream, ReceiverStream};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};

/// Messages that may wait for a slow worker; one that lags this far is not following.
const OUTBOX_MAX: usize = 256;

/// What sessions tell the shell's loop.
pub enum FromRpc {
    /// A session began.
    Hello(v1::Hello, mpsc::Sender<Result<CoordinatorMessage, Status>>),
    /// A worker said something.
    Message(u64, u64, up::Body),
    /// A session ended.
    Gone(u64, u64),
}

/// The service.
pub struct Service {
    /// To the loop.
    pub inbox: mpsc::Sender<FromRpc>,
    /// From the loop, to watchers.
    pub events: broadcast::Sender<v1::RunEvent>,
    /// The present status.
    pub status: watch::Receiver<v1::RunEvent>,
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
        tokio::spawn(async move {
            let Ok(Some(WorkerMessage {
                body: Some(up::Body::Hello(hello)),
            })) = messages.message().await
            else {
                return;
            };
            let (id, incarnation) = (hello.worker_id, hello.incarnation);
            if inbox.send(FromRpc::Hello(hello, outbox)).await.is_err() {
                return;
            }
            while let Ok(Some(message)) = messages.message().await {
                if let Some(body) = message.body
                    && inbox
                        .send(FromRpc::Message(id, incarnation, body))
                        .await
                        .is_err()
                {
                    return;
                }
            }
            let _ = inbox.send(FromRpc::Gone(id, incarnation)).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(out))))
    }

    async fn watch(
        &self,
        _: Request<v1::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let later = BroadcastStream::new(self.events.subscribe());
        let first = tokio_stream::once(Ok(self.status.borrow().clone()));
        let later = later.map(|event| {
            event.map_err(|_| Status::data_loss("this watcher lags behind; watch again"))
        });
        Ok(Response::new(Box::pin(first.chain(later))))
    }
}
