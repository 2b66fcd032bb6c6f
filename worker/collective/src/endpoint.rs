//! The process's listener and the connections of the current generation.
//!
//! Each ordered pair of members has one connection, dialled by the one that writes, greeted with
//! run, generation and number, and kept while the generation lasts. What belongs to an older
//! generation or to another run is refused and counted; what belongs to a newer one waits, unread,
//! until this member gets there.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::alive::ask_whether_reachable;
use crate::error::CollectiveError;
use crate::exchange::{LinkFuture, PeerLinks, Reusable, exchange};
use crate::frame::{BoxLink, Frame, Header, Kind, encode, read_frame};
use crate::gather::{Gather, gather};
use crate::plan::{Reduce, Reduced};
use crate::state_copy::{self, Copied, Published, StateSource};

/// Connections that may be greeting or copying at once: far above any number of members.
const VISITORS_MAX: usize = 1024;
/// Greeted connections that may wait for their exchange.
const WAITING_MAX: usize = 4096;

/// Links are numbered by rank, from here on for sums,
const SUM_LINKS: usize = 0;
/// and from here on for gathering: members that also have links between devices sum in groups of
/// other ranks, so both have links of their own. Far above any number of members.
const GATHER_LINKS: usize = 1 << 20;

/// Time and size limits.
#[derive(Clone, Debug)]
pub struct Limits {
    /// For a TCP connection and for its greeting.
    pub connect_timeout: Duration,
    /// Longest pause of a peer that has begun the exchange.
    pub silence_timeout: Duration,
    /// How much later than this member a living peer may begin: it may still be computing. A dead
    /// one is noticed by its connection.
    pub start_timeout: Duration,
    /// Largest payload.
    pub frame_bytes_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            connect_timeout: Duration::from_secs(5),
            silence_timeout: Duration::from_secs(10),
            start_timeout: Duration::from_secs(600),
            frame_bytes_max: 1 << 20,
        }
    }
}

/// A process's end of all exchanges; outlives generations. Must be made inside a tokio runtime.
pub struct Endpoint {
    local_addr: SocketAddr,
    shared: Arc<Shared>,
    /// The accept loop; aborted with the endpoint.
    _accepting: JoinSet<()>,
}

struct Shared {
    run_id: u64,
    limits: Mutex<Limits>,
    pool: Mutex<Pool>,
    /// Counts arrivals and generation changes.
    changes: watch::Sender<u64>,
    state: Mutex<Option<Published>>,
    refused: AtomicU64,
}

#[derive(Default)]
struct Pool {
    /// The newest generation used here.
    generation: u64,
    /// Generations up to this one failed or were given up here.
    over: Option<u64>,
    /// By number, of the current generation.
    outgoing: BTreeMap<usize, BoxLink>,
    /// By generation and number.
    incoming: BTreeMap<(u64, usize), BoxLink>,
}

impl Pool {
    fn is_over(&self, generation: u64) -> bool {
        generation < self.generation || self.over.is_some_and(|over| generation <= over)
    }

    fn open(&mut self, generation: u64) -> Result<(), CollectiveError> {
        if self.is_over(generation) {
            let held = self.generation;
            return Err(CollectiveError::GenerationOver { generation, held });
        }
        if generation > self.generation {
            self.generation = generation;
            self.outgoing.clear();
            self.incoming.retain(|(g, _), _| *g >= generation);
        }
        Ok(())
    }

    fn close(&mut self, generation: u64) {
        self.over = self.over.max(Some(generation));
        self.incoming.retain(|(g, _), _| *g > generation);
        if self.generation == generation {
            self.outgoing.clear();
        }
    }
}

/// Gives a generation up unless its exchange ended well: a half-written frame must never be
/// continued.
struct Fence<'a> {
    shared: &'a Shared,
    generation: u64,
    ended_well: bool,
}

impl Drop for Fence<'_> {
    fn drop(&mut self) {
        if !self.ended_well {
            self.shared.pool().close(self.generation);
            self.shared.changed();
        }
    }
}

impl Shared {
    fn pool(&self) -> MutexGuard<'_, Pool> {
        // No code panics while it holds the lock, and the pool is sound between statements.
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn limits(&self) -> Limits {
        self.limits
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn changed(&self) {
        self.changes.send_modify(|n| *n = n.wrapping_add(1));
    }
}

impl Endpoint {
    /// Listens on `addr` (port 0 for any free one).
    ///
    /// # Errors
    /// [`CollectiveError::Bind`].
    pub async fn bind(
        addr: SocketAddr,
        run_id: u64,
        limits: Limits,
    ) -> Result<Arc<Self>, CollectiveError> {
        let bind = |source| CollectiveError::Bind { addr, source };
        let listener = TcpListener::bind(addr).await.map_err(bind)?;
        let local_addr = listener.local_addr().map_err(bind)?;
        let shared = Arc::new(Shared {
            run_id,
            limits: Mutex::new(limits),
            pool: Mutex::default(),
            changes: watch::Sender::new(0),
            state: Mutex::new(None),
            refused: AtomicU64::new(0),
        });
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(listener, Arc::clone(&shared)));
        Ok(Arc::new(Endpoint {
            local_addr,
            shared,
            _accepting: accepting,
        }))
    }

    /// Where peers reach this endpoint.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// The limits of what begins now.
    pub fn limits(&self) -> Limits {
        self.shared.limits()
    }

    /// Other limits, for what begins from now on.
    pub fn set_limits(&self, limits: Limits) {
        let held = self.shared.limits.lock();
        *held.unwrap_or_else(PoisonError::into_inner) = limits;
    }

    /// Connections refused so far: stale generation, other run, or no sound greeting.
    pub fn refused(&self) -> u64 {
        self.shared.refused.load(Ordering::Relaxed)
    }

    /// Takes part in one exchange. A generation whose exchange failed or was dropped is over: its
    /// sockets are closed, and only a newer one can repeat the exchange.
    ///
    /// # Errors
    /// [`CollectiveError`], naming the peer where one is to blame.
    pub async fn all_reduce(self: &Arc<Self>, request: Reduce) -> Result<Reduced, CollectiveError> {
        request.check()?;
        let place = (request.generation, request.step, request.rank);
        let addresses = request.members.iter().map(|m| m.addr);
        let links = (addresses.collect(), SUM_LINKS);
        let request = Arc::new(request);
        let exchange = |run_id, limits, links| exchange(request, run_id, limits, links);
        self.fenced(place, links, exchange).await
    }

    /// Takes part in the gathering of all lanes' blocks; all of them by lane are given back. Fenced
    /// as [`Endpoint::all_reduce`], whose generation it shares: if one fails, both are over.
    ///
    /// # Errors
    /// [`CollectiveError`], naming the peer where one is to blame.
    pub async fn gather(
        self: &Arc<Self>,
        request: Gather,
    ) -> Result<BTreeMap<u32, Bytes>, CollectiveError> {
        request.check()?;
        let place = (request.generation, request.step, request.rank);
        let addresses = request.members.iter().map(|m| m.addr);
        let links = (addresses.collect(), GATHER_LINKS);
        let request = Arc::new(request);
        let gather = |run_id, limits, links| gather(request, run_id, limits, links);
        self.fenced(place, links, gather).await
    }

    /// What the member at `(generation, step, rank)` does with all others, over links with numbers
    /// from `first` on. Unless it ends well, the generation is over.
    async fn fenced<T, F>(
        self: &Arc<Self>,
        (generation, step, rank): (u64, u64, usize),
        (addresses, first): (Vec<SocketAddr>, usize),
        work: impl FnOnce(u64, Limits, BTreeMap<usize, PeerLinks>) -> F,
    ) -> Result<T, CollectiveError>
    where
        F: Future<Output = Result<(T, Reusable), CollectiveError>>,
    {
        self.shared.pool().open(generation)?;
        self.shared.changed();
        let mut fence = Fence {
            shared: &self.shared,
            generation,
            ended_well: false,
        };
        let links = self.all_links((generation, step, rank), addresses, first);
        let worked = work(self.shared.run_id, self.shared.limits(), links).await;
        let (result, reusable) = match worked {
            Ok(worked) => worked,
            Err(error) => {
                // Before the probe, so that peers learn at once.
                drop(fence);
                return Err(self.blame(error, generation).await);
            }
        };
        fence.ended_well = true;
        self.keep(generation, reusable, first);
        Ok(result)
    }

    /// What peers may copy from now on.
    pub fn publish_state(&self, state: Option<Arc<dyn StateSource>>) {
        let old = std::mem::replace(
            &mut *self
                .shared
                .state
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
            state.map(Published::new),
        );
        // Freed outside the lock: it may be gigabytes.
        drop(old);
    }

    /// Copies `tensors` tensors of `len` floats each, as of `step`, from all `sources` at once, and
    /// verifies them against what most sources hold. `arrived` counts bytes, also of a copy that
    /// fails.
    ///
    /// # Errors
    /// [`CollectiveError::StateGone`] if the sources went on, [`CollectiveError::NoSource`] if all
    /// of them failed, [`CollectiveError::Disagree`] if nobody knows what is right.
    pub async fn copy_state(
        &self,
        sources: &[SocketAddr],
        step: u64,
        (tensors, len): (usize, usize),
        arrived: &AtomicU64,
    ) -> Result<Copied, CollectiveError> {
        let (run_id, limits) = (self.shared.run_id, self.shared.limits());
        state_copy::copy(sources, run_id, limits, step, (tensors, len), arrived).await
    }

    /// Links with all peers of the member at `(generation, step, rank)`, by rank.
    fn all_links(
        &self,
        (generation, step, rank): (u64, u64, usize),
        addresses: Vec<SocketAddr>,
        first: usize,
    ) -> BTreeMap<usize, PeerLinks> {
        let peers = addresses
            .into_iter()
            .enumerate()
            .filter(|(peer, _)| *peer != rank);
        let mut hello = Header::new(Kind::Hello, self.shared.run_id, generation, step);
        hello.bucket = (first + rank) as u32;
        peers
            .map(|(peer, addr)| (peer, self.links(hello, (peer, addr), first)))
            .collect()
    }

    fn links(&self, hello: Header, (rank, addr): (usize, SocketAddr), first: usize) -> PeerLinks {
        let kept = self.shared.pool().outgoing.remove(&(first + rank));
        let limit = self.shared.limits().connect_timeout;
        let outgoing: LinkFuture = match kept {
            Some(link) => Box::pin(async move { Ok(link) }),
            None => Box::pin(async move {
                let dialled = dial(addr, hello, limit).await;
                dialled.map_err(|source| CollectiveError::PeerLost { rank, addr, source })
            }),
        };
        let from = (hello.generation, first + rank);
        let incoming = Box::pin(wait_for(Arc::clone(&self.shared), from));
        PeerLinks { outgoing, incoming }
    }

    /// One dead member makes the others close their connections too. A peer that still listens is
    /// not the dead one.
    async fn blame(&self, error: CollectiveError, generation: u64) -> CollectiveError {
        let CollectiveError::PeerLost { rank, addr, source } = &error else {
            return error;
        };
        if source.kind() == io::ErrorKind::TimedOut {
            // Out of reach. To ask again takes as long again, and others are heard meanwhile whose
            // connections only broke because this member gave up.
            return error;
        }
        let (rank, addr) = (*rank, *addr);
        match timeout(
            self.shared.limits().connect_timeout,
            TcpStream::connect(addr),
        )
        .await
        {
            Ok(Ok(_)) => CollectiveError::GaveUp {
                rank,
                addr,
                generation,
            },
            Ok(Err(_)) | Err(_) => error,
        }
    }

    fn keep(&self, generation: u64, reusable: Reusable, first: usize) {
        let mut pool = self.shared.pool();
        if pool.generation == generation && !pool.is_over(generation) {
            let outgoing = reusable.outgoing.into_iter();
            pool.outgoing
                .extend(outgoing.map(|(rank, link)| (first + rank, link)));
            let incoming = reusable.incoming.into_iter();
            pool.incoming
                .extend(incoming.map(|(rank, link)| ((generation, first + rank), link)));
        }
    }
}

/// Connects and greets.
pub(crate) async fn dial(addr: SocketAddr, hello: Header, limit: Duration) -> io::Result<BoxLink> {
    let dialled = timeout(limit, async {
        let mut stream = TcpStream::connect(addr).await?;
        stream.set_nodelay(true)?;
        stream.write_all(&encode(hello, &[])).await?;
        Ok::<_, io::Error>(stream)
    });
    let stream = dialled
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    Ok(Box::new(stream))
}

/// Waits until this endpoint was dialled under a number for `generation`.
async fn wait_for(
    shared: Arc<Shared>,
    (generation, number): (u64, usize),
) -> Result<BoxLink, CollectiveError> {
    let mut changes = shared.changes.subscribe();
    loop {
        {
            let mut pool = shared.pool();
            if let Some(link) = pool.incoming.remove(&(generation, number)) {
                return Ok(link);
            }
            if pool.is_over(generation) {
                let held = pool.generation;
                return Err(CollectiveError::GenerationOver { generation, held });
            }
        }
        let changed = changes.changed().await;
        changed.map_err(|_| CollectiveError::Internal("the endpoint is gone".into()))?;
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let visitors = Arc::new(Semaphore::new(VISITORS_MAX));
    let mut greeting = JoinSet::new();
    loop {
        let permit = Arc::clone(&visitors).acquire_owned().await;
        let permit = permit.expect("the semaphore is never closed");
        let accepted = loop {
            tokio::select! {
                accepted = listener.accept() => break accepted,
                Some(_) = greeting.join_next() => {}
            }
        };
        match accepted {
            Ok((stream, from)) => {
                let shared = Arc::clone(&shared);
                greeting.spawn(async move {
                    if let Err(reason) = greet(stream, &shared).await {
                        shared.refused.fetch_add(1, Ordering::Relaxed);
                        tracing::warn!(%from, reason, "refused a connection");
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                // Out of file descriptors, or a peer that hung up: both pass.
                tracing::warn!(%error, "could not accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// Reads the first frame and puts the connection where it belongs.
async fn greet(mut stream: TcpStream, shared: &Shared) -> Result<(), String> {
    let limit = shared.limits().connect_timeout;
    stream.set_nodelay(true).map_err(|e| e.to_string())?;
    ask_whether_reachable(&stream, shared.limits().silence_timeout);
    let mut byte = [0];
    if let Ok(Ok(0)) = timeout(limit, stream.peek(&mut byte)).await {
        // A peer only wanted to know whether this process lives.
        return Ok(());
    }
    let first = timeout(limit, read_frame(&mut stream, 0)).await;
    let first = first.map_err(|_| "no greeting".to_string())?;
    let Frame { header, .. } = first.map_err(|e| format!("{e:?}"))?;
    let refusal = if header.run_id != shared.run_id {
        format!("run {:016x} is not this one", header.run_id)
    } else {
        match header.kind {
            Kind::StateRequest | Kind::StateDigests => {
                let state = || {
                    shared
                        .state
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .clone()
                };
                return state_copy::serve(stream, header, &shared.limits(), state).await;
            }
            Kind::Hello => match park(stream, header, shared) {
                Ok(()) => return Ok(()),
                Err((back, reason)) => {
                    stream = back;
                    reason
                }
            },
            kind => return Err(format!("a greeting of kind {kind:?}")),
        }
    };
    let held = shared.pool().generation;
    let answer = encode(Header::new(Kind::Refused, shared.run_id, held, 0), &[]);
    // The refusal stands whether or not it can be said.
    let _ = timeout(limit, stream.write_all(&answer)).await;
    // Only then may the connection go: closing it with unread bytes could outrun the answer.
    let _ = stream.shutdown().await;
    let mut rest = [0; 4096];
    let drain = async { while matches!(stream_read(&mut stream, &mut rest).await, Ok(1..)) {} };
    let _ = timeout(limit, drain).await;
    Err(refusal)
}

async fn stream_read(stream: &mut TcpStream, into: &mut [u8]) -> io::Result<usize> {
    tokio::io::AsyncReadExt::read(stream, into).await
}

fn park(stream: TcpStream, hello: Header, shared: &Shared) -> Result<(), (TcpStream, String)> {
    let mut pool = shared.pool();
    if pool.is_over(hello.generation) {
        let reason = format!("generation {} is over", hello.generation);
        return Err((stream, reason));
    }
    if pool.incoming.len() >= WAITING_MAX {
        return Err((
            stream,
            "too many connections wait for their exchange".into(),
        ));
    }
    pool.incoming
        .insert((hello.generation, hello.bucket as usize), Box::new(stream));
    drop(pool);
    shared.changed();
    Ok(())
}
