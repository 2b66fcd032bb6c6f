//! The line from the launcher to the coordinator's events, over the coordinator's restarts.
//!
//! A task of its own, so that nothing else that the launcher does can cut a connection short. It
//! asks again for what it missed, and refuses to know what the events mean.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use belfry_proto::v1::coordinator_client::CoordinatorClient;
use belfry_proto::v1::{RunEvent, WatchRequest};
use tokio::sync::mpsc;
use tonic::transport::Endpoint;

/// Events that may wait to be shown.
const EVENTS_MAX: usize = 1024;
/// Pause between attempts to connect.
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// Watches whatever coordinator `address_file` names. Receipts are asked for from `wanted` on. A
/// coordinator that answers nothing for `silence` is left, another may lead.
pub fn watch(
    address_file: PathBuf,
    wanted: Arc<AtomicU64>,
    silence: Duration,
) -> mpsc::Receiver<RunEvent> {
    let (events, receiver) = mpsc::channel(EVENTS_MAX);
    tokio::spawn(async move {
        while !events.is_closed() {
            let from_step = wanted.load(Ordering::Relaxed);
            let connecting = connect(&address_file, from_step, silence);
            if let Ok(Some(mut stream)) = tokio::time::timeout(silence, connecting).await {
                while let Ok(Some(event)) = stream.message().await {
                    if events.send(event).await.is_err() {
                        return;
                    }
                }
            }
            tokio::time::sleep(RETRY_PAUSE).await;
        }
    });
    receiver
}

async fn connect(
    address_file: &Path,
    from_step: u64,
    silence: Duration,
) -> Option<tonic::Streaming<RunEvent>> {
    let address = tokio::fs::read_to_string(address_file).await.ok()?;
    let endpoint = Endpoint::from_shared(format!("http://{}", address.trim())).ok()?;
    let endpoint = endpoint
        .http2_keep_alive_interval(silence / 2)
        .keep_alive_timeout(silence / 2);
    let channel = endpoint.connect().await.ok()?;
    let request = WatchRequest { from_step };
    let stream = CoordinatorClient::new(channel).watch(request).await.ok()?;
    Some(stream.into_inner())
}
