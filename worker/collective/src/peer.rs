//! One peer of an exchange: how frames are written to it and read from it, and what its silence, its
//! end or a wrong frame means.
//!
//! Knows the links and the limits; refuses to know what an exchange is for.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::{AsyncWrite, AsyncWriteExt, ReadHalf};
use tokio::time::{Instant, timeout};

use crate::endpoint::Limits;
use crate::error::CollectiveError;
use crate::exchange::LinkFuture;
use crate::frame::{BoxLink, Frame, HEADER_BYTES, Header, Kind, ReadError, encode, read_frame};

/// The peer of a task, and the exchange it serves.
#[derive(Clone)]
pub(crate) struct Peer {
    pub rank: usize,
    pub addr: SocketAddr,
    run_id: u64,
    generation: u64,
    step: u64,
    pub limits: Limits,
    /// Set by the first frame of this exchange: before it the peer may still be computing.
    begun: Arc<AtomicBool>,
}

/// What a peer writes in one exchange, frame by frame.
pub(crate) struct Reader<'a> {
    peer: &'a Peer,
    link: BoxLink,
    limit: Duration,
    bytes: u64,
}

impl Peer {
    /// In the exchange `(run_id, generation, step)`.
    pub fn new(
        rank: usize,
        addr: SocketAddr,
        (run_id, generation, step): (u64, u64, u64),
        limits: Limits,
    ) -> Self {
        Peer {
            rank,
            addr,
            run_id,
            generation,
            step,
            limits,
            begun: Arc::default(),
        }
    }

    pub fn lost(&self, source: io::Error) -> CollectiveError {
        CollectiveError::PeerLost {
            rank: self.rank,
            addr: self.addr,
            source,
        }
    }

    fn silent(&self, limit: Duration) -> CollectiveError {
        let seconds = limit.as_secs_f64();
        CollectiveError::PeerSilent {
            rank: self.rank,
            addr: self.addr,
            seconds,
        }
    }

    fn broken(&self, error: ReadError) -> CollectiveError {
        let (rank, addr) = (self.rank, self.addr);
        match error {
            ReadError::Io(source) => self.lost(source),
            ReadError::Corrupt {
                bucket,
                offset,
                reason,
            } => CollectiveError::Corrupt {
                rank,
                addr,
                bucket,
                offset,
                reason,
            },
        }
    }

    pub fn header(&self, kind: Kind) -> Header {
        Header::new(kind, self.run_id, self.generation, self.step)
    }

    /// What an acceptor's answer to a greeting means.
    fn refused(&self, header: Header) -> CollectiveError {
        let (rank, addr) = (self.rank, self.addr);
        if header.run_id != self.run_id {
            return CollectiveError::OtherRun {
                rank,
                addr,
                theirs: header.run_id,
            };
        }
        let generation = self.generation;
        CollectiveError::StaleGeneration {
            rank,
            addr,
            generation,
            held: header.generation,
        }
    }

    /// A frame that is intact but does not belong here.
    pub fn unexpected(&self, reason: String) -> CollectiveError {
        let (rank, addr) = (self.rank, self.addr);
        CollectiveError::Unexpected { rank, addr, reason }
    }

    /// Checks that a frame belongs to this exchange.
    fn check(&self, header: Header) -> Result<(), CollectiveError> {
        let ours = (self.run_id, self.generation, self.step);
        let theirs = (header.run_id, header.generation, header.step);
        if ours == theirs {
            return Ok(());
        }
        let reason = format!("(run, generation, step) is {theirs:?}, not {ours:?}");
        Err(self.unexpected(reason))
    }

    /// Lets `writing` go on while watching for the peer's refusal or end.
    pub async fn watching(
        &self,
        reader: &mut ReadHalf<BoxLink>,
        writing: impl Future<Output = Result<u64, CollectiveError>>,
    ) -> Result<u64, CollectiveError> {
        tokio::select! {
            // What the peer answers says more than the write that fails because of it.
            biased;
            answer = read_frame(reader, 0) => Err(match answer {
                Ok(frame) => self.refused(frame.header),
                Err(error) => self.broken(error),
            }),
            written = writing => written,
        }
    }

    /// Writes a frame without payload.
    pub async fn say(
        &self,
        writer: &mut (impl AsyncWrite + Unpin),
        kind: Kind,
    ) -> Result<u64, CollectiveError> {
        self.send(writer, &encode(self.header(kind), &[])).await
    }

    /// Writes one frame. A peer that has not begun yet may leave it lying for longer.
    pub async fn send(
        &self,
        writer: &mut (impl AsyncWrite + Unpin),
        frame: &[u8],
    ) -> Result<u64, CollectiveError> {
        let began = Instant::now();
        let written = writer.write_all(frame);
        tokio::pin!(written);
        loop {
            match timeout(self.limits.silence_timeout, &mut written).await {
                Ok(result) => {
                    return result
                        .map(|()| frame.len() as u64)
                        .map_err(|e| self.lost(e));
                }
                Err(_) if self.begun.load(Ordering::Acquire) => {
                    return Err(self.silent(self.limits.silence_timeout));
                }
                Err(_) if began.elapsed() > self.limits.start_timeout => {
                    return Err(self.silent(self.limits.start_timeout));
                }
                Err(_) => {}
            }
        }
    }

    /// What the peer writes, once its link is there.
    pub async fn reader(&self, incoming: LinkFuture) -> Result<Reader<'_>, CollectiveError> {
        let limit = self.limits.start_timeout;
        let opened = timeout(limit, incoming).await;
        Ok(Reader {
            peer: self,
            link: opened.map_err(|_| self.silent(limit))??,
            limit,
            bytes: 0,
        })
    }
}

impl Reader<'_> {
    /// The next frame of this exchange that carries something; `None` when the peer is done.
    pub async fn next(&mut self) -> Result<Option<Frame>, CollectiveError> {
        let peer = self.peer;
        loop {
            let frame = read_frame(&mut self.link, peer.limits.frame_bytes_max);
            let frame = timeout(self.limit, frame).await;
            let frame = frame
                .map_err(|_| peer.silent(self.limit))?
                .map_err(|e| peer.broken(e))?;
            peer.check(frame.header)?;
            peer.begun.store(true, Ordering::Release);
            self.limit = peer.limits.silence_timeout;
            self.bytes += (HEADER_BYTES + frame.payload.len()) as u64;
            match frame.header.kind {
                Kind::Alive => {}
                Kind::Done => return Ok(None),
                _ => return Ok(Some(frame)),
            }
        }
    }

    /// The link, at a frame boundary, and the bytes that were read from it.
    pub fn finish(self) -> (BoxLink, u64) {
        (self.link, self.bytes)
    }
}
