//! The session with the coordinator: finds the leader, connects, and reconnects for ever with a
//! bounded back-off; turns the stream into events. It refuses to know what the messages mean.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use belfry_configs::Timeouts;
use belfry_proto::journal::{self, Entry};
use belfry_proto::v1::coordinator_client::CoordinatorClient;
use belfry_proto::v1::{CoordinatorMessage, WorkerMessage, worker_message as up};
use shard_tools::store::Root;
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Endpoint;

use crate::core::Event;

/// Messages that may wait for a slow coordinator.
const OUTBOX_MAX: usize = 256;
/// The pause between tries is this share of the time without a coordinator: one that is started again
/// at once is found at once, one that is away for long is not stormed.
const BACK_OFF_SHARE: u32 = 8;
const BACK_OFF_MIN: Duration = Duration::from_millis(50);
const BACK_OFF_MAX: Duration = Duration::from_secs(1);
/// A look into a store costs more than one into a file.
const LOOK_PAUSE: Duration = Duration::from_millis(250);
/// What is waited for is said when it changes, and again after so long.
const SAY_AGAIN: Duration = Duration::from_secs(30);

/// Where the coordinator's address is looked up, at every try.
#[derive(Clone, Debug)]
pub enum Whereabouts {
    /// A file that holds `host:port`.
    File(PathBuf),
    /// The newest journal entry of the run: it names the leader wherever it runs.
    Journal(Root),
}

impl Whereabouts {
    /// The leader's address.
    ///
    /// # Errors
    /// Why there is none, in words.
    async fn look(&self) -> Result<String, String> {
        match self {
            Whereabouts::File(file) => {
                let text = tokio::fs::read_to_string(file).await;
                let text = text.map_err(|e| format!("{}: {e}", file.display()))?;
                Ok(text.trim().to_owned())
            }
            Whereabouts::Journal(root) => {
                let listed = root.list(journal::FOLDER).await;
                let listed = listed.map_err(|e| e.to_string())?;
                let mut files = listed.iter().map(|(file, _)| file).rev();
                let Some(newest) = files.find(|file| journal::is_entry(file)) else {
                    return Err(format!(
                        "{root}/{}: nobody leads the run yet",
                        journal::FOLDER
                    ));
                };
                let bytes = root.get(newest).await.map_err(|e| e.to_string())?;
                let entry = Entry::parse(&bytes).map_err(|e| format!("{root}/{newest}: {e}"))?;
                match entry.closed {
                    None => Ok(entry.address),
                    Some(_) => Err(format!("the leader at {} has ended", entry.address)),
                }
            }
        }
    }

    /// The pause before the next try, after so long without a coordinator.
    fn pause(&self, away: Duration) -> Duration {
        let least = match self {
            Whereabouts::File(_) => BACK_OFF_MIN,
            Whereabouts::Journal(_) => LOOK_PAUSE,
        };
        (away / BACK_OFF_SHARE).clamp(least, BACK_OFF_MAX)
    }
}

/// The way out of the worker; what is sent while no session stands is dropped, because the next
/// hello says everything again.
#[derive(Clone)]
pub struct Link {
    outbox: watch::Receiver<Option<mpsc::Sender<WorkerMessage>>>,
    reset: mpsc::Sender<()>,
}

impl Link {
    /// Starts connecting to whatever leader `whereabouts` tells, now and at every try.
    pub fn open(whereabouts: Whereabouts, timeouts: Timeouts, events: mpsc::Sender<Event>) -> Self {
        let (set_outbox, outbox) = watch::channel(None);
        let (reset, resets) = mpsc::channel(1);
        let keeper = Keeper {
            whereabouts,
            timeouts,
            events,
            set_outbox,
            resets,
        };
        tokio::spawn(keeper.keep_connected());
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

type Session = (
    mpsc::Sender<WorkerMessage>,
    tonic::Streaming<CoordinatorMessage>,
);

struct Keeper {
    whereabouts: Whereabouts,
    timeouts: Timeouts,
    events: mpsc::Sender<Event>,
    set_outbox: watch::Sender<Option<mpsc::Sender<WorkerMessage>>>,
    resets: mpsc::Receiver<()>,
}

impl Keeper {
    async fn keep_connected(mut self) {
        let mut away_since = Instant::now();
        let mut told: Option<(String, Instant)> = None;
        while !self.events.is_closed() {
            match self.connect().await {
                Ok((outbox, mut inbox)) => {
                    told = None;
                    while self.resets.try_recv().is_ok() {}
                    self.set_outbox.send_replace(Some(outbox));
                    if self.events.send(Event::LinkUp).await.is_err() {
                        return;
                    }
                    let why = self.converse(&mut inbox).await;
                    self.set_outbox.send_replace(None);
                    tracing::warn!(
                        why,
                        "the session with the coordinator ended; connecting again"
                    );
                    if self.events.send(Event::LinkDown).await.is_err() {
                        return;
                    }
                    away_since = Instant::now();
                }
                Err(why) => {
                    let again =
                        |(text, at): &(String, Instant)| *text != why || at.elapsed() >= SAY_AGAIN;
                    if told.as_ref().is_none_or(again) {
                        let seconds = away_since.elapsed().as_secs();
                        tracing::warn!(why, seconds, "waiting for the coordinator");
                        told = Some((why, Instant::now()));
                    }
                }
            }
            sleep(self.whereabouts.pause(away_since.elapsed())).await;
        }
    }

    /// A session with the leader as it is known now. A process that is frozen takes connections and
    /// answers nothing: everything has its time.
    async fn connect(&self) -> Result<Session, String> {
        let Timeouts {
            connect, silence, ..
        } = self.timeouts;
        let looked = timeout(silence, self.whereabouts.look()).await;
        let address = looked.map_err(|_| {
            let seconds = silence.as_secs_f64();
            format!("where the leader is could not be read within {seconds:.1} s")
        })??;
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|e| format!("`{address}` is no address: {e}"))?
            .connect_timeout(connect)
            .http2_keep_alive_interval(silence / 2)
            .keep_alive_timeout(silence / 2)
            .keep_alive_while_idle(true)
            .tcp_nodelay(true);
        let (outbox, messages) = mpsc::channel(OUTBOX_MAX);
        let open = async {
            let channel = endpoint.connect().await.map_err(|e| e.to_string())?;
            let mut client = CoordinatorClient::new(channel);
            let opened = client.session(ReceiverStream::new(messages)).await;
            opened.map_err(|status| status.to_string())
        };
        let opened = tokio::select! {
            opened = timeout(connect + silence, open) => {
                opened.unwrap_or_else(|_| Err("it does not answer".into()))
            }
            () = self.moved(&address) => Err("another leads now".into()),
        };
        let response = opened.map_err(|why| format!("the coordinator at {address}: {why}"))?;
        Ok((outbox, response.into_inner()))
    }

    /// Resolves when the leader is elsewhere: nobody waits for one that is frozen then.
    async fn moved(&self, from: &str) {
        loop {
            sleep(LOOK_PAUSE).await;
            if self.whereabouts.look().await.is_ok_and(|to| to != from) {
                return;
            }
        }
    }

    async fn converse(&mut self, inbox: &mut tonic::Streaming<CoordinatorMessage>) -> String {
        loop {
            tokio::select! {
                message = inbox.message() => match message {
                    Ok(Some(CoordinatorMessage { body: Some(body) })) => {
                        if self.events.send(Event::Message(body)).await.is_err() {
                            return "this worker ends".into();
                        }
                    }
                    Ok(Some(CoordinatorMessage { body: None })) => {}
                    Ok(None) => return "closed by the coordinator".into(),
                    Err(status) => return status.to_string(),
                },
                _ = self.resets.recv() => return "reset by this worker".into(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_newest_entry_names_the_leader() {
        let root = Root::open("memory://").expect("opens");
        let whereabouts = Whereabouts::Journal(root.clone());
        let none = whereabouts.look().await.expect_err("nobody leads");
        assert!(none.contains("nobody leads the run yet"), "{none}");
        for (seq, address) in [(9, "a:1"), (10, "b:2")] {
            let entry = Entry {
                seq,
                address: address.into(),
                ..Default::default()
            };
            let put = root.put(&journal::file(seq), entry.to_bytes().into()).await;
            put.expect("writes");
        }
        assert_eq!(whereabouts.look().await.as_deref(), Ok("b:2"));
        let last = Entry {
            address: "b:2".into(),
            closed: Some(journal::Closed::Released),
            ..Default::default()
        };
        let put = root.put(&journal::file(11), last.to_bytes().into()).await;
        put.expect("writes");
        let none = whereabouts.look().await.expect_err("nobody leads");
        assert!(none.contains("b:2 has ended"), "{none}");
    }

    #[test]
    fn who_comes_back_at_once_is_found_at_once() {
        let pause = |away| {
            let file = Whereabouts::File(PathBuf::new());
            file.pause(Duration::from_millis(away)).as_millis()
        };
        assert_eq!((pause(0), pause(400), pause(800)), (50, 50, 100));
        assert_eq!(pause(60_000), 1000);
    }
}
