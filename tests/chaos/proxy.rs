//! A TCP proxy on the hub that delays what passes, or flips one bit of it. The kernels of test
//! machines have no delay of their own (netem), and no rule of theirs keeps TCP's checksum right
//! around a changed payload, as a broken network card or switch would.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use crate::apart::runtime;
use crate::network::HUB;

/// Pieces under way in one direction.
const PIECES_MAX: usize = 1024;
const PIECE_BYTES: usize = 64 << 10;
/// A bit flips this far into a connection's bytes: in the payload of its first frames, behind the
/// greeting.
const FLIP_AFTER_BYTES: u64 = 4096;

/// What happens to what passes.
#[derive(Debug, Default)]
pub struct Effects {
    /// One way.
    pub delay: Duration,
    /// One bit is still to be flipped.
    pub flip: AtomicBool,
    pub flipped: AtomicU64,
    pub bytes: AtomicU64,
}

/// A proxy; it ends with the program.
pub struct Proxy {
    pub address: SocketAddr,
    pub effects: Arc<Effects>,
}

impl Proxy {
    /// Leads every connection to where `target` says when it comes in.
    pub fn open(
        effects: Effects,
        target: impl Fn() -> Option<SocketAddr> + Send + Sync + 'static,
    ) -> Self {
        let listener = std::net::TcpListener::bind((HUB, 0)).expect("binds");
        listener.set_nonblocking(true).expect("is a socket");
        let address = listener.local_addr().expect("is bound");
        let effects = Arc::new(effects);
        let shared = Arc::clone(&effects);
        std::thread::spawn(move || {
            runtime().block_on(serve(listener, shared, target));
        });
        Proxy { address, effects }
    }
}

async fn serve(
    listener: std::net::TcpListener,
    effects: Arc<Effects>,
    target: impl Fn() -> Option<SocketAddr>,
) {
    let listener = TcpListener::from_std(listener).expect("inside a runtime");
    while let Ok((near, _)) = listener.accept().await {
        let Some(target) = target() else {
            continue;
        };
        let effects = Arc::clone(&effects);
        tokio::spawn(async move {
            let Ok(far) = TcpStream::connect(target).await else {
                return;
            };
            let _ = (near.set_nodelay(true), far.set_nodelay(true));
            let (near_in, near_out) = near.into_split();
            let (far_in, far_out) = far.into_split();
            tokio::join!(
                pass(near_in, far_out, &effects, true),
                pass(far_in, near_out, &effects, false)
            );
        });
    }
}

/// One direction: a reader that stamps pieces, a writer that lets each rest for the delay.
async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    effects: &Effects,
    flips: bool,
) {
    let (sender, mut pieces) = mpsc::channel::<(Instant, Vec<u8>)>(PIECES_MAX);
    let reading = async move {
        let mut passed = 0u64;
        loop {
            let mut piece = vec![0; PIECE_BYTES];
            let Ok(length @ 1..) = from.read(&mut piece).await else {
                return;
            };
            piece.truncate(length);
            let deep = flips && passed >= FLIP_AFTER_BYTES && length > 256;
            if deep && effects.flip.swap(false, Ordering::Relaxed) {
                piece[length / 2] ^= 1;
                effects.flipped.fetch_add(1, Ordering::Relaxed);
            }
            passed += length as u64;
            effects.bytes.fetch_add(length as u64, Ordering::Relaxed);
            if sender.send((Instant::now(), piece)).await.is_err() {
                return;
            }
        }
    };
    let writing = async move {
        while let Some((at, piece)) = pieces.recv().await {
            tokio::time::sleep_until((at + effects.delay).into()).await;
            if to.write_all(&piece).await.is_err() {
                return;
            }
        }
        let _ = to.shutdown().await;
    };
    tokio::join!(reading, writing);
}
