//! Notices a dead way to a peer that has nothing to say yet: the kernels ask each other.
//!
//! A peer may compute for minutes before it sends, so silence on its connection says nothing; its
//! machine answers all the same, also while the process is stopped. Where no answer comes any more
//! the reader's end breaks, and the peer is named. It refuses to know what the connection carries.

use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;

/// Questions without an answer before the way counts as dead.
const QUESTIONS: u32 = 2;
/// Kernels count in whole seconds.
const PAUSE_MIN: Duration = Duration::from_secs(1);

/// Breaks `stream` when the peer's machine was out of reach for about `silence`. A system that knows
/// no such question leaves it to the timeouts.
pub(crate) fn ask_whether_reachable(stream: &TcpStream, silence: Duration) {
    let pause = (silence / (QUESTIONS + 1)).max(PAUSE_MIN);
    let asking = TcpKeepalive::new().with_time(pause).with_interval(pause);
    let asking = asking.with_retries(QUESTIONS);
    if let Err(error) = SockRef::from(stream).set_tcp_keepalive(&asking) {
        tracing::warn!(%error, "no keepalive: a cut between two workers is noticed later");
    }
}
