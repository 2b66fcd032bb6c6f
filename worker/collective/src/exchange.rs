//! One exchange: a writer and a reader task per peer, and one loop that owns all numbers.
//!
//! A writer sends the own nodes' slices of the peer's buckets in ascending order and, in between,
//! the sums of the own buckets as they are ready; it never waits for a sum while slices are left.
//! A reader holds back slices that are more than a few buckets ahead of the oldest open one, so an
//! owner's memory is bounded; because slices never wait for sums, the oldest always makes progress.
//! Knows nothing of listeners and pools: links come as futures, from TCP or from memory.

use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use belfry_proto::LaneRange;
use belfry_proto::lanes::root;
use bytes::Bytes;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use xxhash_rust::xxh3::Xxh3;

use crate::digest::{digest_of, hash_floats};
use crate::endpoint::Limits;
use crate::error::CollectiveError;
use crate::floats::Length;
use crate::fold::tree_sum;
use crate::frame::{BoxLink, Frame, Header, Kind, encode, floats};
use crate::peer::Peer;
use crate::plan::{Reduce, Reduced};

/// Open buckets per owner: enough to keep all links busy while one is combined.
const BUCKETS_AHEAD: usize = 4;
/// Frames between the readers and the loop; each up to [`FRAME_FLOATS`].
const INBOX_FRAMES: usize = 32;
/// Floats of a frame: 256 KiB, which amortises a system call and stays within a cache.
const FRAME_FLOATS: usize = 64 << 10;
/// Signs of life per longest tolerated silence.
const ALIVE_PER_SILENCE: u32 = 4;

/// A link that is still being made.
pub type LinkFuture = Pin<Box<dyn Future<Output = Result<BoxLink, CollectiveError>> + Send>>;

/// Both directions of one peer.
pub struct PeerLinks {
    /// This member writes to it.
    pub outgoing: LinkFuture,
    /// This member reads from it.
    pub incoming: LinkFuture,
}

/// Links at a frame boundary, good for the next exchange of the generation.
#[derive(Default)]
pub struct Reusable {
    /// By rank.
    pub outgoing: BTreeMap<usize, BoxLink>,
    /// By rank.
    pub incoming: BTreeMap<usize, BoxLink>,
}

enum Ended {
    Wrote {
        rank: usize,
        link: BoxLink,
        bytes: u64,
    },
    Read {
        rank: usize,
        link: BoxLink,
        bytes: u64,
    },
}

/// Runs one exchange; dropping the future aborts its tasks and closes its links.
///
/// # Errors
/// [`CollectiveError`], naming the peer.
pub async fn exchange(
    request: Arc<Reduce>,
    run_id: u64,
    limits: Limits,
    links: BTreeMap<usize, PeerLinks>,
) -> Result<(Reduced, Reusable), CollectiveError> {
    request.check()?;
    let hashed = Arc::clone(&request);
    let node_digests = tokio::task::spawn_blocking(move || node_digests(&hashed));
    let (inbox, mut frames) = mpsc::channel(INBOX_FRAMES);
    let (oldest, gate) = watch::channel(0);
    let frames_max = frame_floats(&limits);
    let own_buckets = request.owned(request.rank);
    let sum_frames: usize = own_buckets
        .map(|b| request.bounds(b).len().div_ceil(frames_max))
        .sum();
    let mut outboxes = BTreeMap::new();
    let mut tasks = JoinSet::new();
    for (rank, links) in links {
        let Some(addr) = request.members.get(rank).map(|m| m.addr) else {
            return Err(CollectiveError::Internal(format!(
                "a link to rank {rank}, no member"
            )));
        };
        let at = (run_id, request.generation, request.step);
        let peer = Peer::new(rank, addr, at, limits.clone());
        // All sums of this owner fit, so the loop never waits for a slow peer.
        let (outbox, sums) = mpsc::channel(sum_frames.max(1));
        outboxes.insert(rank, outbox);
        let own = Arc::clone(&request);
        tasks.spawn(write((peer.clone(), own), links.outgoing, sums));
        let incoming = (links.incoming, request.members.len());
        tasks.spawn(read(peer, incoming, inbox.clone(), gate.clone()));
    }
    drop(inbox);
    let mut owner = Owner::new(Arc::clone(&request), run_id, frames_max, outboxes, oldest);
    let mut reusable = Reusable::default();
    loop {
        if owner.combine_one()? {
            tokio::task::yield_now().await;
            if !owner.ready.is_empty() {
                continue;
            }
        }
        tokio::select! {
            biased;
            Some(ended) = tasks.join_next() => {
                let ended = ended.map_err(|e| CollectiveError::Internal(e.to_string()))??;
                match ended {
                    Ended::Wrote { rank, link, bytes } => {
                        owner.bytes_sent += bytes;
                        reusable.outgoing.insert(rank, link);
                    }
                    Ended::Read { rank, link, bytes } => {
                        owner.bytes_received += bytes;
                        reusable.incoming.insert(rank, link);
                    }
                }
            }
            Some((rank, frame)) = frames.recv() => owner.take(rank, &frame)?,
            else => break,
        }
    }
    let node_digests = node_digests.await;
    let node_digests = node_digests.map_err(|e| CollectiveError::Internal(e.to_string()))?;
    Ok((owner.finish(node_digests)?, reusable))
}

fn frame_floats(limits: &Limits) -> usize {
    FRAME_FLOATS.min(limits.frame_bytes_max / 4).max(1)
}

/// Digests of the own nodes that lie in host memory.
pub(crate) fn node_digests<P: Length>(request: &Reduce<P>) -> Vec<(LaneRange, u128)> {
    let nodes = request.members[request.rank].nodes.iter();
    let here = nodes.filter_map(|node| Some((*node, request.partials[node].values()?)));
    here.map(|(node, values)| (node, digest_of(values)))
        .collect()
}

/// The loop's state: open buckets, the sum, and what goes out.
struct Owner {
    request: Arc<Reduce>,
    run_id: u64,
    frame_floats: usize,
    outboxes: BTreeMap<usize, mpsc::Sender<Bytes>>,
    oldest: watch::Sender<usize>,
    /// Slices of own buckets, by bucket and node, filled from the front.
    open: BTreeMap<usize, BTreeMap<LaneRange, Vec<f32>>>,
    /// Floats still missing, by own bucket.
    missing: BTreeMap<usize, usize>,
    ready: VecDeque<usize>,
    sum: Vec<f32>,
    /// Floats of the sum that are there, by bucket.
    filled: Vec<usize>,
    hash: Xxh3,
    /// Of the buckets of some owners each, see [`Reduced::parts`].
    parts: Vec<Xxh3>,
    hashed: usize,
    bytes_sent: u64,
    bytes_received: u64,
}

impl Owner {
    fn new(
        request: Arc<Reduce>,
        run_id: u64,
        frame_floats: usize,
        outboxes: BTreeMap<usize, mpsc::Sender<Bytes>>,
        oldest: watch::Sender<usize>,
    ) -> Self {
        let others = request
            .members
            .iter()
            .enumerate()
            .filter(|(r, _)| *r != request.rank);
        let nodes: usize = others.map(|(_, m)| m.nodes.len()).sum();
        let own = request.owned(request.rank);
        let missing: BTreeMap<usize, usize> =
            own.map(|b| (b, nodes * request.bounds(b).len())).collect();
        let ready = missing
            .iter()
            .filter(|(_, n)| **n == 0)
            .map(|(b, _)| *b)
            .collect();
        let mut owner = Owner {
            sum: vec![0.0; request.len],
            filled: vec![0; request.buckets()],
            parts: vec![Xxh3::new(); request.parts()],
            request,
            run_id,
            frame_floats,
            outboxes,
            oldest,
            open: BTreeMap::new(),
            missing,
            ready,
            hash: Xxh3::new(),
            hashed: 0,
            bytes_sent: 0,
            bytes_received: 0,
        };
        owner.close_if_all_combined();
        owner
    }

    /// Combines one complete bucket and hands its sum to the writers.
    fn combine_one(&mut self) -> Result<bool, CollectiveError> {
        let Some(bucket) = self.ready.pop_front() else {
            return Ok(false);
        };
        let bounds = self.request.bounds(bucket);
        let mut parts = self.open.remove(&bucket).unwrap_or_default();
        for node in &self.request.members[self.request.rank].nodes {
            parts.insert(*node, self.request.partials[node][bounds.clone()].to_vec());
        }
        let sum = tree_sum(root(self.request.lanes), &mut parts).ok_or_else(|| {
            CollectiveError::Internal(format!("bucket {bucket} was combined with a gap"))
        })?;
        let divisor = self.request.divide_by as f32;
        for (to, value) in self.sum[bounds.clone()].iter_mut().zip(sum) {
            *to = value / divisor;
        }
        self.filled[bucket] = bounds.len();
        let mut header = self.header(Kind::Sum, bucket);
        for chunk in self.sum[bounds].chunks(self.frame_floats) {
            let frame = Bytes::from(encode(header, chunk));
            header.offset += chunk.len() as u64;
            for outbox in self.outboxes.values() {
                // A closed outbox means that its writer failed; joining it says why.
                let _ = outbox.try_send(frame.clone());
            }
        }
        self.missing.remove(&bucket);
        let members = self.request.members.len();
        self.oldest.send_replace(
            self.missing
                .keys()
                .next()
                .map_or(usize::MAX, |b| b / members),
        );
        self.close_if_all_combined();
        self.hash_on();
        Ok(true)
    }

    /// No more sums: the writers may say that they are done.
    fn close_if_all_combined(&mut self) {
        if self.missing.is_empty() {
            self.outboxes.clear();
        }
    }

    fn header(&self, kind: Kind, bucket: usize) -> Header {
        let r = &self.request;
        let mut header = Header::new(kind, self.run_id, r.generation, r.step);
        header.bucket = bucket as u32;
        header
    }

    /// Takes a slice of a node or of a sum.
    fn take(&mut self, rank: usize, frame: &Frame) -> Result<(), CollectiveError> {
        let header = frame.header;
        let addr = self.request.members[rank].addr;
        let unexpected = |reason: String| CollectiveError::Unexpected { rank, addr, reason };
        let bucket = header.bucket as usize;
        if bucket >= self.filled.len() {
            return Err(unexpected(format!(
                "bucket {bucket} of {}",
                self.filled.len()
            )));
        }
        let (bounds, owner) = (self.request.bounds(bucket), self.request.owner(bucket));
        let count = frame.payload.len() / 4;
        let fits = |filled: usize| {
            let contiguous = header.offset == filled as u64 && filled + count <= bounds.len();
            if contiguous && count > 0 {
                return Ok(());
            }
            Err(unexpected(format!(
                "{count} floats at {} of bucket {bucket}, which holds {filled} of {}",
                header.offset,
                bounds.len()
            )))
        };
        match header.kind {
            Kind::Sum if owner == rank => {
                let filled = self.filled[bucket];
                fits(filled)?;
                let to = &mut self.sum[bounds.start + filled..][..count];
                to.iter_mut()
                    .zip(floats(&frame.payload))
                    .for_each(|(to, value)| *to = value);
                self.filled[bucket] += count;
                self.hash_on();
            }
            Kind::Part
                if owner == self.request.rank
                    && self.request.members[rank].nodes.contains(&header.node) =>
            {
                let parts = self.open.entry(bucket).or_default();
                let part = parts.entry(header.node).or_default();
                fits(part.len())?;
                part.reserve_exact(bounds.len() - part.len());
                part.extend(floats(&frame.payload));
                let missing = self.missing.get_mut(&bucket).ok_or_else(|| {
                    unexpected(format!("a slice of bucket {bucket}, which is combined"))
                })?;
                *missing -= count;
                if *missing == 0 {
                    self.ready.push_back(bucket);
                }
            }
            kind => {
                let node = header.node;
                return Err(unexpected(format!(
                    "{kind:?} of bucket {bucket}, node {node}"
                )));
            }
        }
        Ok(())
    }

    /// Hashes the buckets that are complete, in order.
    fn hash_on(&mut self) {
        while let Some(filled) = self.filled.get(self.hashed) {
            let bounds = self.request.bounds(self.hashed);
            if *filled < bounds.len() {
                return;
            }
            let part = self.request.owner(self.hashed) % self.parts.len();
            hash_floats(&mut self.hash, &self.sum[bounds.clone()]);
            // The bucket is still in the processor's cache.
            hash_floats(&mut self.parts[part], &self.sum[bounds]);
            self.hashed += 1;
        }
    }

    fn finish(self, node_digests: Vec<(LaneRange, u128)>) -> Result<Reduced, CollectiveError> {
        if self.hashed < self.filled.len() {
            let rank = self.request.owner(self.hashed);
            return Err(CollectiveError::Unexpected {
                rank,
                addr: self.request.members[rank].addr,
                reason: format!("done without the sum of bucket {}", self.hashed),
            });
        }
        Ok(Reduced {
            sum: self.sum,
            digest: self.hash.digest128(),
            parts: self.parts.iter().map(Xxh3::digest).collect(),
            node_digests,
            bytes_sent: self.bytes_sent,
            bytes_received: self.bytes_received,
            on_device: None,
        })
    }
}

/// Writes everything that the peer needs, while watching for its refusal or end.
async fn write(
    (peer, request): (Peer, Arc<Reduce>),
    outgoing: LinkFuture,
    mut sums: mpsc::Receiver<Bytes>,
) -> Result<Ended, CollectiveError> {
    let (mut reader, mut writer) = tokio::io::split(outgoing.await?);
    let writing = write_all(&peer, &request, &mut writer, &mut sums);
    let bytes = peer.watching(&mut reader, writing).await?;
    let (rank, link) = (peer.rank, reader.unsplit(writer));
    Ok(Ended::Wrote { rank, link, bytes })
}

async fn write_all(
    peer: &Peer,
    request: &Reduce,
    writer: &mut (impl AsyncWrite + Unpin),
    sums: &mut mpsc::Receiver<Bytes>,
) -> Result<u64, CollectiveError> {
    let mut bytes = peer.say(writer, Kind::Alive).await?;
    let chunk_floats = frame_floats(&peer.limits);
    for bucket in request.owned(peer.rank) {
        for node in &request.members[request.rank].nodes {
            let mut header = peer.header(Kind::Part);
            (header.bucket, header.node) = (bucket as u32, *node);
            for chunk in request.partials[node][request.bounds(bucket)].chunks(chunk_floats) {
                bytes += peer.send(writer, &encode(header, chunk)).await?;
                header.offset += chunk.len() as u64;
                if let Ok(sum) = sums.try_recv() {
                    bytes += peer.send(writer, &sum).await?;
                }
            }
        }
    }
    loop {
        match timeout(peer.limits.silence_timeout / ALIVE_PER_SILENCE, sums.recv()).await {
            Ok(Some(sum)) => bytes += peer.send(writer, &sum).await?,
            Ok(None) => break,
            Err(_) => bytes += peer.say(writer, Kind::Alive).await?,
        }
    }
    bytes += peer.say(writer, Kind::Done).await?;
    writer.flush().await.map_err(|e| peer.lost(e))?;
    Ok(bytes)
}

/// Reads until the peer says that it is done.
async fn read(
    peer: Peer,
    (incoming, members): (LinkFuture, usize),
    inbox: mpsc::Sender<(usize, Frame)>,
    mut gate: watch::Receiver<usize>,
) -> Result<Ended, CollectiveError> {
    let mut reader = peer.reader(incoming).await?;
    while let Some(frame) = reader.next().await? {
        if frame.header.kind == Kind::Part {
            let index = frame.header.bucket as usize / members;
            let near = |oldest: &usize| index < oldest.saturating_add(BUCKETS_AHEAD);
            let open = gate.wait_for(near).await.map(|_| ());
            open.map_err(|_| CollectiveError::Internal("the exchange is gone".into()))?;
        }
        let sent = inbox.send((peer.rank, frame)).await;
        sent.map_err(|_| CollectiveError::Internal("the exchange is gone".into()))?;
    }
    let (rank, (link, bytes)) = (peer.rank, reader.finish());
    Ok(Ended::Read { rank, link, bytes })
}
