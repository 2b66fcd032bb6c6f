//! A newcomer copies the state of its peers: chunks from all of them at once, each checked.
//!
//! Knows nothing of what the tensors are. A source that fails gives its chunk back to the others.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::endpoint::{Limits, dial};
use crate::error::CollectiveError;
use crate::frame::{BoxLink, Frame, Header, Kind, encode, floats, read_frame};

/// Sources asked at once; more would only share the same link of the newcomer.
const SOURCES_MAX: usize = 64;

/// A state that peers may copy; it must not change while it is published.
pub trait StateSource: Send + Sync {
    /// Updates applied.
    fn step(&self) -> u64;
    /// Number of tensors.
    fn tensors(&self) -> usize;
    /// One of them.
    fn tensor(&self, index: usize) -> &[f32];
}

#[derive(Clone, Copy)]
struct Chunk {
    tensor: usize,
    offset: usize,
    len: usize,
}

enum Failure {
    Gone,
    Broken(String),
}

/// See [`crate::Endpoint::copy_state`]; `shape` is tensors and floats per tensor.
pub async fn copy(
    sources: &[SocketAddr],
    run_id: u64,
    limits: Limits,
    step: u64,
    shape: (usize, usize),
) -> Result<Vec<Vec<f32>>, CollectiveError> {
    let (tensors, len) = shape;
    let bad = |reason: &str| CollectiveError::BadCopy(reason.into());
    let total = len
        .checked_mul(tensors)
        .filter(|n| *n <= isize::MAX as usize / 4);
    total.ok_or_else(|| bad("the tensors are larger than memory can address"))?;
    let chunk_len = (limits.frame_bytes_max / 4).max(1);
    let mut pending: VecDeque<Chunk> = (0..tensors)
        .flat_map(|tensor| {
            (0..len).step_by(chunk_len).map(move |offset| {
                let len = chunk_len.min(len - offset);
                Chunk {
                    tensor,
                    offset,
                    len,
                }
            })
        })
        .collect();
    let mut out = vec![vec![0.0; len]; tensors];
    let mut left = pending.len();
    if left == 0 {
        return Ok(out);
    }
    let sources = &sources[..sources.len().min(SOURCES_MAX)];
    let mut last = None;
    let mut tasks = JoinSet::new();
    let (results, mut arrivals) = mpsc::channel(SOURCES_MAX);
    // One chunk is under way per source, so a channel of one never fills.
    let mut orders = BTreeMap::new();
    let mut idle = VecDeque::new();
    for (index, addr) in sources.iter().enumerate() {
        let (order, chunks) = mpsc::channel(1);
        orders.insert(index, order);
        idle.push_back(index);
        let pull = Pull {
            index,
            addr: *addr,
            run_id,
            step,
            limits: limits.clone(),
        };
        tasks.spawn(pull.run(chunks, results.clone()));
    }
    drop(results);
    while left > 0 {
        while !pending.is_empty()
            && let Some(index) = idle.pop_front()
        {
            let chunk = pending.pop_front().expect("checked not empty");
            if orders
                .get(&index)
                .is_none_or(|order| order.try_send(chunk).is_err())
            {
                return Err(CollectiveError::Internal("a source took no chunk".into()));
            }
        }
        if orders.is_empty() {
            break;
        }
        let Some((index, chunk, result)) = arrivals.recv().await else {
            break;
        };
        match result {
            Ok(frame) => {
                let to = &mut out[chunk.tensor][chunk.offset..chunk.offset + chunk.len];
                to.iter_mut()
                    .zip(floats(&frame.payload))
                    .for_each(|(to, value)| *to = value);
                left -= 1;
                idle.push_back(index);
            }
            Err(failure) => {
                pending.push_front(chunk);
                orders.remove(&index);
                last = Some((sources[index], failure));
            }
        }
    }
    match last {
        _ if left == 0 => Ok(out),
        Some((addr, Failure::Gone)) => Err(CollectiveError::StateGone { step, addr }),
        Some((addr, Failure::Broken(reason))) => {
            Err(CollectiveError::NoSource { step, addr, reason })
        }
        None => Err(bad("no sources were named")),
    }
}

/// One source's side of a copy.
struct Pull {
    index: usize,
    addr: SocketAddr,
    run_id: u64,
    step: u64,
    limits: Limits,
}

type Arrival = (usize, Chunk, Result<Frame, Failure>);

impl Pull {
    async fn run(self, mut chunks: mpsc::Receiver<Chunk>, results: mpsc::Sender<Arrival>) {
        let mut link = None;
        while let Some(chunk) = chunks.recv().await {
            let result = self.pull(&mut link, chunk).await;
            let failed = result.is_err();
            if results.send((self.index, chunk, result)).await.is_err() || failed {
                return;
            }
        }
    }

    async fn pull(&self, link: &mut Option<BoxLink>, chunk: Chunk) -> Result<Frame, Failure> {
        let broken = |reason: String| Failure::Broken(reason);
        let mut request = Header::new(Kind::StateRequest, self.run_id, 0, self.step);
        request.bucket = chunk.tensor as u32;
        request.offset = chunk.offset as u64;
        request.node.end = chunk.len as u32;
        let link = match link {
            Some(open) => {
                let frame = encode(request, &[]);
                let sent = timeout(self.limits.silence_timeout, open.write_all(&frame));
                let sent = sent.await.map_err(|_| broken("silent".into()))?;
                sent.map_err(|e| broken(e.to_string()))?;
                open
            }
            None => {
                let dialled = dial(self.addr, request, self.limits.connect_timeout).await;
                link.insert(dialled.map_err(|e| broken(e.to_string()))?)
            }
        };
        let answer = read_frame(link, self.limits.frame_bytes_max);
        let answer = timeout(self.limits.silence_timeout, answer).await;
        let answer = answer.map_err(|_| broken("silent".into()))?;
        let frame = answer.map_err(|e| broken(format!("{e:?}")))?;
        let expected = Header {
            kind: Kind::StateChunk,
            bytes: chunk.len as u32 * 4,
            ..request
        };
        match frame.header.kind {
            Kind::StateGone => Err(Failure::Gone),
            Kind::StateChunk if frame.header == expected => Ok(frame),
            kind => Err(broken(format!("answered {kind:?} of another chunk"))),
        }
    }
}

/// Answers requests on `stream`, beginning with `request`, until the peer hangs up.
///
/// # Errors
/// What was wrong with the peer.
pub async fn serve(
    mut stream: TcpStream,
    mut request: Header,
    limits: &Limits,
    state: impl Fn() -> Option<Arc<dyn StateSource>>,
) -> Result<(), String> {
    loop {
        // Taken per request, so that a slow copy never keeps an old state in memory.
        let answer = answer(request, limits, state().as_deref());
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

fn answer(request: Header, limits: &Limits, state: Option<&dyn StateSource>) -> Vec<u8> {
    let gone = || {
        encode(
            Header {
                kind: Kind::StateGone,
                bytes: 0,
                ..request
            },
            &[],
        )
    };
    let Some(state) = state.filter(|s| s.step() == request.step) else {
        return gone();
    };
    let (tensor, len) = (request.bucket as usize, request.node.end as usize);
    if tensor >= state.tensors() || len > limits.frame_bytes_max / 4 {
        return gone();
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
        None => gone(),
    }
}
