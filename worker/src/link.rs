//! The session with the coordinator: connects, reconnects for ever with a bounded back-off, and
//! turns the stream into events. It refuses to know what the messages mean.

use std::path::PathBuf;
use std::time::Duration;

use belfry_proto::v1::coordinator_client::CoordinatorClient;
use belfry_proto::v1::{CoordinatorMessage, WorkerMessage, worker_message as up};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Endpoint;

use crate::core::Event;

/// Messages that may wait for a slow coordinator.
const OUTBOX_MAX: usize = 256;
const BACK_OFF_MIN: Duration = Duration::from_millis(50);
const BACK_OFF_MAX: Duration = Duration::from_secs(1);

/// The way out of the worker; what is sent while no session stands is dropped, because the next
/// hello says everything again.
#[derive(Clone)]
pub struct Link {
    outbox: watch::Receiver<Option<mpsc::Sender<WorkerMessage>>>,
    reset: mpsc::Sender<()>,
}

impl Link {
    /// Starts connecting to whatever address `address_file` holds, now and at every retry.
    pub fn open(
        address_file: PathBuf,
        connect_timeout: Duration,
        events: mpsc::Sender<Event>,
    ) -> Self {
        let (set_outbox, outbox) = watch::channel(None);
        let (reset, resets) = mpsc::channel(1);
        let way = Way {
            address_file,
            connect_timeout,
        };
        tokio::spawn(keep_connected(way, events, set_outbox, resets));
        Link { outbox, reset }
    }

    /// Says `body` if a session stands.
    pub fn send(&self, body: up::Body) {
        let Some(outbox) = self.outbox.borrow().clone() else {
            return;
        };
        if outbox.try_send(WorkerMessage { body: Some(body) }).is_err() {
            self.reset();
        }
    }

    /// Drops the session; a new one begins with a hello.
    pub fn reset(&self) {
        // A full channel means that a reset is already on its way.
        let _ = self.reset.try_send(());
    }
}

/// Where the coordinator is, and how long a connection may take.
struct Way {
    address_file: PathBuf,
    connect_timeout: Duration,
}

type SetOutbox = watch::Sender<Option<mpsc::Sender<WorkerMessage>>>;

async fn keep_connected(
    way: Way,
    events: mpsc::Sender<Event>,
    set_outbox: SetOutbox,
    mut resets: mpsc::Receiver<()>,
) {
    let mut back_off = BACK_OFF_MIN;
    let mut told = String::new();
    while !events.is_closed() {
        match connect(&way).await {
            Ok((outbox, mut inbox)) => {
                back_off = BACK_OFF_MIN;
                told.clear();
                while resets.try_recv().is_ok() {}
                set_outbox.send_replace(Some(outbox));
                if events.send(Event::LinkUp).await.is_err() {
                    return;
                }
                let why = converse(&mut inbox, &events, &mut resets).await;
                set_outbox.send_replace(None);
                tracing::warn!(
                    why,
                    "the session with the coordinator ended; connecting again"
                );
                if events.send(Event::LinkDown).await.is_err() {
                    return;
                }
            }
            Err(why) => {
                if told != why {
                    tracing::warn!(why, "waiting for the coordinator");
                    told = why;
                }
            }
        }
        tokio::time::sleep(back_off).await;
        back_off = (back_off * 2).min(BACK_OFF_MAX);
    }
}

type Session = (
    mpsc::Sender<WorkerMessage>,
    tonic::Streaming<CoordinatorMessage>,
);

async fn connect(way: &Way) -> Result<Session, String> {
    let address_file = &way.address_file;
    let text = tokio::fs::read_to_string(address_file).await;
    let address = text.map_err(|e| format!("{}: {e}", address_file.display()))?;
    let address = address.trim();
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|e| format!("{}: `{address}`: {e}", address_file.display()))?
        .connect_timeout(way.connect_timeout)
        .tcp_nodelay(true);
    let channel = endpoint
        .connect()
        .await
        .map_err(|e| format!("{address}: {e}"))?;
    let (outbox, messages) = mpsc::channel(OUTBOX_MAX);
    let response = CoordinatorClient::new(channel)
        .session(ReceiverStream::new(messages))
        .await
        .map_err(|status| format!("{address}: {status}"))?;
    Ok((outbox, response.into_inner()))
}

async fn converse(
    inbox: &mut tonic::Streaming<CoordinatorMessage>,
    events: &mpsc::Sender<Event>,
    resets: &mut mpsc::Receiver<()>,
) -> String {
    loop {
        tokio::select! {
            message = inbox.message() => match message {
                Ok(Some(CoordinatorMessage { body: Some(body) })) => {
                    if events.send(Event::Message(body)).await.is_err() {
                        return "this worker ends".into();
                    }
                }
                Ok(Some(CoordinatorMessage { body: None })) => {}
                Ok(None) => return "closed by the coordinator".into(),
                Err(status) => return status.to_string(),
            },
            _ = resets.recv() => return "reset by this worker".into(),
        }
    }
}
