//! Follows a run by the coordinator's own stream of events, over its restarts, and stamps each event
//! with this process's clock: every time that the suite prints is a difference on it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use belfry_proto::v1::coordinator_client::CoordinatorClient;
use belfry_proto::v1::{RunEvent, WatchRequest};
use tonic::transport::Endpoint;

use crate::apart::runtime;

/// Events that may wait for the test.
const EVENTS_MAX: usize = 1 << 16;
/// Pause between attempts to connect; it bounds what a restart's stall is overstated by.
const RETRY_PAUSE: Duration = Duration::from_millis(10);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// A coordinator that a fault has silenced is asked again after this.
const SILENCE: Duration = Duration::from_secs(2);

/// An event, and when it was heard.
#[derive(Clone, Debug)]
pub struct Seen {
    pub at: Instant,
    pub event: RunEvent,
}

/// The line to whatever coordinator an address file names.
pub struct Watch {
    pub events: Receiver<Seen>,
    stop: Arc<AtomicBool>,
}

impl Watch {
    pub fn new(address_file: PathBuf) -> Self {
        let (sender, events) = sync_channel(EVENTS_MAX);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        std::thread::spawn(move || {
            runtime().block_on(follow(&address_file, &sender, &stopped));
        });
        Watch { events, stop }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

async fn follow(address_file: &Path, seen: &SyncSender<Seen>, stop: &AtomicBool) {
    let mut wanted = 0;
    while !stop.load(Ordering::Relaxed) {
        if let Some(mut stream) = connect(address_file, wanted).await {
            while let Ok(Some(event)) = stream.message().await {
                let at = Instant::now();
                if let Some(record) = &event.committed {
                    wanted = wanted.max(record.step + 1);
                }
                if seen.send(Seen { at, event }).is_err() {
                    return;
                }
            }
        }
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}

async fn connect(address_file: &Path, from_step: u64) -> Option<tonic::Streaming<RunEvent>> {
    let address = tokio::fs::read_to_string(address_file).await.ok()?;
    let endpoint = Endpoint::from_shared(format!("http://{}", address.trim())).ok()?;
    let endpoint = endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(SILENCE)
        .keep_alive_timeout(SILENCE)
        .keep_alive_while_idle(true);
    let channel = endpoint.connect().await.ok()?;
    let request = WatchRequest { from_step };
    let stream = CoordinatorClient::new(channel).watch(request).await.ok()?;
    Some(stream.into_inner())
}
