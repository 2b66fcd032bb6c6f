//! A newcomer copies the state of its peers: slices from all of them at once, each verified.
//!
//! Every source also tells the digests of all its slices. What most of them agree on is what the
//! copy must be; a source that sends or holds something else is named, and its slices come from the
//! others. A source that fails gives its slices back. Chunks are asked for ahead of their arrival, so
//! that a long way costs no speed, and arrive where they belong: nothing is copied twice. Knows
//! nothing of what the tensors are.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use futures::stream::{FuturesUnordered, StreamExt};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::timeout;

use crate::digest::{SLICE_FLOATS, digest_of, slice_digests, state_digest};
use crate::endpoint::{Limits, dial};
use crate::error::CollectiveError;
use crate::frame::{
    BoxLink, Frame, Header, Kind, ReadError, encode, encode_bytes, read_frame, read_into,
};

/// Sources asked at once; more would only share the same link of the newcomer.
const SOURCES_MAX: usize = 64;
/// Chunks asked of a source and not there yet: 8 MiB, what 1 Gbit/s carries in 64 ms and 10 Gbit/s
/// in 6 ms.
const CHUNKS_AHEAD: usize = 8;

/// A state that peers may copy; it must not change while it is published.
pub trait StateSource: Send + Sync {
    /// Updates applied.
    fn step(&self) -> u64;
    /// Number of tensors.
    fn tensors(&self) -> usize;
    /// One of them.
    fn tensor(&self, index: usize) -> &[f32];
}

/// A published state, with the digests of its slices once somebody asked for them.
#[derive(Clone)]
pub(crate) struct Published {
    pub state: Arc<dyn StateSource>,
    digests: Arc<OnceLock<Vec<u128>>>,
}

impl Published {
    pub fn new(state: Arc<dyn StateSource>) -> Self {
        Published {
            state,
            digests: Arc::default(),
        }
    }

    /// Hashes the state, once.
    fn digests(&self) -> &[u128] {
        self.digests.get_or_init(|| {
            let tensors: Vec<&[f32]> = (0..self.state.tensors())
                .map(|t| self.state.tensor(t))
                .collect();
            slice_digests(&tensors)
        })
    }
}

/// A state that was copied and is what its sources agree on.
#[derive(Debug)]
pub struct Copied {
    /// The tensors.
    pub tensors: Vec<Vec<f32>>,
    /// Of the whole state, see [`crate::digest::state_digest`].
    pub digest: u128,
    /// Sources that hold or sent something else.
    pub liars: Vec<SocketAddr>,
}

/// A part of the copy that comes from one source.
struct Slice<'a> {
    index: usize,
    tensor: usize,
    offset: usize,
    into: &'a mut [f32],
}

enum Failure {
    Gone,
    Broken(String),
}

/// What all sources' tasks share.
struct Board<'a> {
    pending: VecDeque<Slice<'a>>,
    /// Complete, but nobody knows yet whether they are right.
    unverified: Vec<(usize, u128, Slice<'a>)>,
    /// Slices that are not verified.
    left: usize,
    agreed: Option<Vec<u128>>,
    liars: BTreeSet<usize>,
}

struct Copy<'a> {
    sources: &'a [SocketAddr],
    run_id: u64,
    step: u64,
    limits: Limits,
    /// Bytes that arrived, for whoever must know how fast this goes.
    arrived: &'a AtomicU64,
    board: Mutex<Board<'a>>,
    /// Something came back to the board, or all is done.
    changed: Notify,
}

/// See [`crate::Endpoint::copy_state`]; `shape` is tensors and floats per tensor.
pub async fn copy(
    sources: &[SocketAddr],
    run_id: u64,
    limits: Limits,
    step: u64,
    shape: (usize, usize),
    arrived: &AtomicU64,
) -> Result<Copied, CollectiveError> {
    let (tensors, len) = shape;
    let bad = |reason: &str| CollectiveError::BadCopy(reason.into());
    let total = len.checked_mul(tensors);
    let total = total.filter(|n| *n <= isize::MAX as usize / 4);
    total.ok_or_else(|| bad("the tensors are larger than memory can address"))?;
    if sources.is_empty() {
        return Err(bad("no sources were named"));
    }
    let sources = &sources[..sources.len().min(SOURCES_MAX)];
    let mut out: Vec<Vec<f32>> = (0..tensors).map(|_| vec![0.0; len]).collect();
    let (agreed, liars) = {
        let mut pending = VecDeque::new();
        for (tensor, values) in out.iter_mut().enumerate() {
            for (number, into) in values.chunks_mut(SLICE_FLOATS).enumerate() {
                pending.push_back(Slice {
                    index: pending.len(),
                    tensor,
                    offset: number * SLICE_FLOATS,
                    into,
                });
            }
        }
        let copy = Copy {
            sources,
            run_id,
            step,
            limits,
            arrived,
            changed: Notify::new(),
            board: Mutex::new(Board {
                left: pending.len(),
                pending,
                unverified: Vec::new(),
                agreed: None,
                liars: BTreeSet::new(),
            }),
        };
        copy.run().await?
    };
    Ok(Copied {
        digest: state_digest(step, &agreed),
        liars: liars.into_iter().map(|i| sources[i]).collect(),
        tensors: out,
    })
}

impl<'a> Copy<'a> {
    fn board(&self) -> MutexGuard<'_, Board<'a>> {
        // No code panics while it holds the lock, and the board is sound between statements.
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pulls from all sources until every slice is verified, or none is left.
    async fn run(self) -> Result<(Vec<u128>, BTreeSet<usize>), CollectiveError> {
        let all = 0..self.sources.len();
        let mut pulls: FuturesUnordered<_> = all.map(|source| self.pull(source)).collect();
        let agree = self.agree();
        tokio::pin!(agree);
        let (mut agreeing, mut last) = (true, None);
        loop {
            tokio::select! {
                agreed = &mut agree, if agreeing => {
                    agreed?;
                    agreeing = false;
                }
                Some((source, ended)) = pulls.next() => {
                    if let Err(failure) = ended {
                        last = Some((source, failure));
                    }
                }
                else => break,
            }
        }
        drop(pulls);
        let mut board = self.board();
        if board.left == 0
            && let Some(agreed) = board.agreed.take()
        {
            return Ok((agreed, std::mem::take(&mut board.liars)));
        }
        drop(board);
        Err(self.failed(last))
    }

    fn failed(&self, last: Option<(usize, Failure)>) -> CollectiveError {
        let step = self.step;
        match last {
            Some((source, Failure::Gone)) => {
                let addr = self.sources[source];
                CollectiveError::StateGone { step, addr }
            }
            Some((source, Failure::Broken(reason))) => {
                let addr = self.sources[source];
                CollectiveError::NoSource { step, addr, reason }
            }
            None => CollectiveError::Internal("a copy ended without its slices".into()),
        }
    }

    /// Asks every source what its slices should be, and takes what most of them say.
    async fn agree(&self) -> Result<(), CollectiveError> {
        let asked = self.sources.iter().enumerate();
        let asked = asked.map(|(i, addr)| async move { (i, self.ask_digests(*addr).await) });
        let mut answers: FuturesUnordered<_> = asked.collect();
        let mut camps: BTreeMap<Vec<u128>, BTreeSet<usize>> = BTreeMap::new();
        let mut last = None;
        while let Some((source, answer)) = answers.next().await {
            match answer {
                Ok(digests) => {
                    camps.entry(digests).or_default().insert(source);
                }
                // It has no vote.
                Err(failure) => last = Some((source, failure)),
            }
        }
        let votes: usize = camps.values().map(BTreeSet::len).sum();
        let majority = camps.iter().find(|(_, camp)| 2 * camp.len() > votes);
        if let Some(agreed) = majority.map(|(digests, _)| digests.clone()) {
            camps.remove(&agreed);
            let liars = camps.into_values().flatten().collect();
            self.judge(agreed, liars);
            return Ok(());
        }
        if votes == 0 {
            return Err(self.failed(last));
        }
        let told: Vec<String> = camps
            .values()
            .flatten()
            .map(|i| self.sources[*i].to_string())
            .collect();
        Err(CollectiveError::Disagree {
            step: self.step,
            sources: told.join(", "),
        })
    }

    /// What is right is known: what came before is judged by it.
    fn judge(&self, agreed: Vec<u128>, liars: BTreeSet<usize>) {
        let mut board = self.board();
        board.liars.extend(liars);
        for (source, digest, slice) in std::mem::take(&mut board.unverified) {
            if agreed.get(slice.index) == Some(&digest) {
                board.left -= 1;
            } else {
                board.liars.insert(source);
                board.pending.push_back(slice);
            }
        }
        board.agreed = Some(agreed);
        drop(board);
        self.changed.notify_waiters();
    }

    async fn ask_digests(&self, addr: SocketAddr) -> Result<Vec<u128>, Failure> {
        let request = Header::new(Kind::StateDigests, self.run_id, 0, self.step);
        let mut link = self.dial(addr, request).await?;
        // Hashing a big state takes a moment: as long as a peer may take to begin.
        let answer = read_frame(&mut link, self.limits.frame_bytes_max);
        let answer = timeout(self.limits.start_timeout, answer).await;
        let frame = answer.map_err(|_| silent())?.map_err(broken)?;
        if frame.header.kind != Kind::StateDigests {
            return Err(Failure::Gone);
        }
        let digests = frame.payload.chunks_exact(16);
        Ok(digests
            .map(|d| u128::from_le_bytes(d.try_into().unwrap_or_default()))
            .collect())
    }

    async fn dial(&self, addr: SocketAddr, greeting: Header) -> Result<BoxLink, Failure> {
        let dialled = dial(addr, greeting, self.limits.connect_timeout).await;
        dialled.map_err(|e| Failure::Broken(e.to_string()))
    }

    /// One source's side: slices from it as long as there are any and it is believed.
    async fn pull(&self, source: usize) -> (usize, Result<(), Failure>) {
        let mut pull = Pull {
            copy: self,
            source,
            link: None,
            held: VecDeque::new(),
            asked: VecDeque::new(),
        };
        let ended = pull.run().await;
        let back = std::mem::take(&mut pull.held);
        self.board()
            .pending
            .extend(back.into_iter().map(|held| held.slice));
        self.changed.notify_waiters();
        (source, ended)
    }

    /// Takes a complete slice; says whether its source is still believed.
    fn complete(&self, source: usize, slice: Slice<'a>) -> bool {
        let digest = digest_of(slice.into);
        let mut board = self.board();
        match board
            .agreed
            .as_ref()
            .map(|a| a.get(slice.index) == Some(&digest))
        {
            None => board.unverified.push((source, digest, slice)),
            Some(true) => board.left -= 1,
            Some(false) => {
                board.liars.insert(source);
                board.pending.push_back(slice);
            }
        }
        let believed = !board.liars.contains(&source);
        let done = board.left == 0;
        drop(board);
        if done || !believed {
            self.changed.notify_waiters();
        }
        believed
    }
}

/// A slice on its way: so many of its floats were asked for, and so many are there.
struct Held<'a> {
    slice: Slice<'a>,
    asked: usize,
    there: usize,
}

struct Pull<'c, 'a> {
    copy: &'c Copy<'a>,
    source: usize,
    link: Option<BoxLink>,
    held: VecDeque<Held<'a>>,
    /// Requests that are not answered, in order.
    asked: VecDeque<Header>,
}

impl Pull<'_, '_> {
    async fn run(&mut self) -> Result<(), Failure> {
        let copy = self.copy;
        loop {
            let changed = copy.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if copy.board().liars.contains(&self.source) {
                let reason = "its state is not what most sources hold".to_owned();
                return Err(Failure::Broken(reason));
            }
            self.ask().await?;
            if !self.asked.is_empty() {
                self.receive().await?;
                continue;
            }
            if copy.board().left == 0 {
                return Ok(());
            }
            // What others hold may come back, or must still be judged.
            changed.await;
        }
    }

    /// Fills the window of requests.
    async fn ask(&mut self) -> Result<(), Failure> {
        let chunk_len = (self.copy.limits.frame_bytes_max / 4).max(1);
        let mut requests = Vec::new();
        while self.asked.len() < CHUNKS_AHEAD {
            let full = self
                .held
                .back()
                .is_none_or(|h| h.asked == h.slice.into.len());
            if full {
                let Some(slice) = self.copy.board().pending.pop_front() else {
                    break;
                };
                let (asked, there) = (0, 0);
                self.held.push_back(Held {
                    slice,
                    asked,
                    there,
                });
            }
            let Some(held) = self.held.back_mut() else {
                break;
            };
            let len = chunk_len.min(held.slice.into.len() - held.asked);
            let mut request = Header::new(Kind::StateRequest, self.copy.run_id, 0, self.copy.step);
            request.bucket = held.slice.tensor as u32;
            request.offset = (held.slice.offset + held.asked) as u64;
            request.node.end = len as u32;
            held.asked += len;
            self.asked.push_back(request);
            if self.link.is_none() {
                let addr = self.copy.sources[self.source];
                self.link = Some(self.copy.dial(addr, request).await?);
            } else {
                requests.extend(encode(request, &[]));
            }
        }
        if let Some(link) = &mut self.link
            && !requests.is_empty()
        {
            let sent = timeout(self.copy.limits.silence_timeout, link.write_all(&requests));
            let sent = sent.await.map_err(|_| silent())?;
            sent.map_err(|e| Failure::Broken(e.to_string()))?;
        }
        Ok(())
    }

    /// Takes the oldest answer, straight to where it belongs.
    async fn receive(&mut self) -> Result<(), Failure> {
        let (Some(link), Some(request)) = (&mut self.link, self.asked.pop_front()) else {
            return Ok(());
        };
        let Some(held) = self.held.front_mut() else {
            return Ok(());
        };
        let len = request.node.end as usize;
        let into = &mut held.slice.into[held.there..held.there + len];
        let answer = timeout(self.copy.limits.silence_timeout, read_into(link, into)).await;
        let header = answer.map_err(|_| silent())?.map_err(broken)?;
        let expected = Header {
            kind: Kind::StateChunk,
            bytes: request.node.end * 4,
            ..request
        };
        match header.kind {
            Kind::StateGone => return Err(Failure::Gone),
            Kind::StateChunk if header == expected => {}
            kind => {
                let reason = format!("answered {kind:?} of another chunk");
                return Err(Failure::Broken(reason));
            }
        }
        held.there += len;
        self.copy
            .arrived
            .fetch_add(4 * len as u64, Ordering::Relaxed);
        if held.there == held.slice.into.len()
            && let Some(held) = self.held.pop_front()
        {
            // Its next turn tells whether the source is still believed.
            self.copy.complete(self.source, held.slice);
        }
        Ok(())
    }
}

fn silent() -> Failure {
    Failure::Broken("silent".into())
}

fn broken(error: ReadError) -> Failure {
    Failure::Broken(format!("{error:?}"))
}

/// Answers requests on `stream`, beginning with `request`, until the peer hangs up.
///
/// # Errors
/// What was wrong with the peer.
pub(crate) async fn serve(
    mut stream: TcpStream,
    mut request: Header,
    limits: &Limits,
    state: impl Fn() -> Option<Published>,
) -> Result<(), String> {
    loop {
        // Taken per request, so that a slow copy never keeps an old state in memory.
        let answer = match request.kind {
            Kind::StateDigests => told_digests(request, limits, state()).await?,
            _ => answer(request, limits, state().as_ref()),
        };
        let sent = timeout(limits.silence_timeout, stream.write_all(&answer)).await;
        sent.map_err(|_| "a copy does not read".to_string())?
            .map_err(|e| e.to_string())?;
        let next = timeout(limits.silence_timeout, read_frame(&mut stream, 0)).await;
        match next {
            Ok(Ok(Frame { header, .. }))
                if header.kind == Kind::StateRequest && header.run_id == request.run_id =>
            {
                request = header;
            }
            Ok(Ok(Frame { header, .. })) => return Err(format!("a copy sent {:?}", header.kind)),
            // The end of a copy is the end of its connection.
            Ok(Err(_)) | Err(_) => return Ok(()),
        }
    }
}

fn gone(request: Header) -> Vec<u8> {
    let header = Header {
        kind: Kind::StateGone,
        bytes: 0,
        ..request
    };
    encode(header, &[])
}

async fn told_digests(
    request: Header,
    limits: &Limits,
    published: Option<Published>,
) -> Result<Vec<u8>, String> {
    let Some(published) = published.filter(|p| p.state.step() == request.step) else {
        return Ok(gone(request));
    };
    let hashed = tokio::task::spawn_blocking(move || {
        let digests = published.digests().iter();
        digests.flat_map(|d| d.to_le_bytes()).collect::<Vec<u8>>()
    });
    let bytes = hashed.await.map_err(|e| e.to_string())?;
    if bytes.len() > limits.frame_bytes_max {
        return Ok(gone(request));
    }
    Ok(encode_bytes(request, &bytes))
}

fn answer(request: Header, limits: &Limits, published: Option<&Published>) -> Vec<u8> {
    let state = published.map(|p| &p.state);
    let Some(state) = state.filter(|s| s.step() == request.step) else {
        return gone(request);
    };
    let (tensor, len) = (request.bucket as usize, request.node.end as usize);
    if tensor >= state.tensors() || len > limits.frame_bytes_max / 4 {
        return gone(request);
    }
    let start = usize::try_from(request.offset).ok();
    let range = start.and_then(|start| Some(start..start.checked_add(len)?));
    match range.and_then(|range| state.tensor(tensor).get(range)) {
        Some(values) => encode(
            Header {
                kind: Kind::StateChunk,
                ..request
            },
            values,
        ),
        None => gone(request),
    }
}
