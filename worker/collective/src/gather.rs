//! Every lane's block of bytes to everybody: what looks across samples needs all lanes' features
//! before any gradient.
//!
//! Each member writes the blocks of its lanes to each other one. Nothing is added, so nothing can
//! depend on who brings a block; blocks of one step are equally long. Knows nothing of what they
//! mean.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use belfry_proto::LaneRange;
use belfry_proto::lanes::tiles_exactly;
use bytes::Bytes;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::task::JoinSet;

use crate::endpoint::Limits;
use crate::error::CollectiveError;
use crate::exchange::{LinkFuture, PeerLinks, Reusable};
use crate::frame::{BoxLink, Frame, Kind, encode_bytes};
use crate::peer::Peer;

/// Bytes of an element of a frame.
const WORD: usize = 4;

/// A participant of a gathering.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GatherMember {
    /// Where its endpoint listens.
    pub addr: SocketAddr,
    /// The lanes whose blocks it brings; none for one that only receives.
    pub lanes: Vec<u32>,
}

/// One gathering. All members must pass the same values but for `rank` and `blocks`.
#[derive(Clone, Debug)]
pub struct Gather {
    /// Fencing: grows with every change of the members.
    pub generation: u64,
    /// The open step.
    pub step: u64,
    /// Lanes of the run.
    pub lanes: u32,
    /// This member's place in `members`.
    pub rank: usize,
    /// By rank; every lane is one member's.
    pub members: Vec<GatherMember>,
    /// The blocks of the own lanes; others are not sent. Only read, so a gathering can be repeated.
    pub blocks: BTreeMap<u32, Bytes>,
    /// Bytes of a block, a multiple of four.
    pub block_bytes: usize,
}

impl Gather {
    /// Checks what can be checked without the peers.
    pub(crate) fn check(&self) -> Result<(), CollectiveError> {
        let bad = |reason: String| Err(CollectiveError::BadNodes(reason));
        let Some(me) = self.members.get(self.rank) else {
            let members = self.members.len();
            return bad(format!("rank {} of {members} members", self.rank));
        };
        if self.block_bytes == 0 || !self.block_bytes.is_multiple_of(WORD) {
            return bad(format!("blocks of {} bytes", self.block_bytes));
        }
        let leaf = |lane: &u32| LaneRange {
            start: *lane,
            end: lane + 1,
        };
        let lanes = self.members.iter().flat_map(|m| m.lanes.iter().map(leaf));
        tiles_exactly(self.lanes, lanes).or_else(bad)?;
        for lane in &me.lanes {
            match self.blocks.get(lane).map(Bytes::len) {
                Some(bytes) if bytes == self.block_bytes => {}
                Some(bytes) => {
                    let expected = self.block_bytes;
                    return bad(format!(
                        "lane {lane}'s block has {bytes} bytes, not {expected}"
                    ));
                }
                None => return bad(format!("lane {lane}'s block is not here")),
            }
        }
        Ok(())
    }
}

enum Ended {
    Wrote(usize, BoxLink),
    Read(usize, BoxLink, BTreeMap<u32, Bytes>),
}

/// Runs one gathering; dropping the future aborts its tasks and closes its links.
///
/// # Errors
/// [`CollectiveError`], naming the peer.
pub(crate) async fn gather(
    request: Arc<Gather>,
    run_id: u64,
    limits: Limits,
    links: BTreeMap<usize, PeerLinks>,
) -> Result<(BTreeMap<u32, Bytes>, Reusable), CollectiveError> {
    request.check()?;
    let own = request.members[request.rank].lanes.iter();
    let own = own.map(|lane| (*lane, request.blocks[lane].clone()));
    let mut blocks: BTreeMap<u32, Bytes> = own.collect();
    let mut tasks = JoinSet::new();
    for (rank, links) in links {
        let Some(addr) = request.members.get(rank).map(|m| m.addr) else {
            let reason = format!("a link to rank {rank}, no member");
            return Err(CollectiveError::Internal(reason));
        };
        let at = (run_id, request.generation, request.step);
        let peer = Peer::new(rank, addr, at, limits.clone());
        tasks.spawn(write(peer.clone(), links.outgoing, Arc::clone(&request)));
        tasks.spawn(read(peer, links.incoming, Arc::clone(&request)));
    }
    let mut reusable = Reusable::default();
    while let Some(ended) = tasks.join_next().await {
        match ended.map_err(|e| CollectiveError::Internal(e.to_string()))?? {
            Ended::Wrote(rank, link) => {
                reusable.outgoing.insert(rank, link);
            }
            Ended::Read(rank, link, theirs) => {
                reusable.incoming.insert(rank, link);
                blocks.extend(theirs);
            }
        }
    }
    Ok((blocks, reusable))
}

/// Writes the own lanes' blocks, while watching for the peer's refusal or end.
async fn write(
    peer: Peer,
    outgoing: LinkFuture,
    request: Arc<Gather>,
) -> Result<Ended, CollectiveError> {
    let (mut reader, mut writer) = tokio::io::split(outgoing.await?);
    let writing = write_all(&peer, &request, &mut writer);
    peer.watching(&mut reader, writing).await?;
    Ok(Ended::Wrote(peer.rank, reader.unsplit(writer)))
}

async fn write_all(
    peer: &Peer,
    request: &Gather,
    writer: &mut (impl AsyncWrite + Unpin),
) -> Result<u64, CollectiveError> {
    let mut bytes = 0;
    let chunk_bytes = (peer.limits.frame_bytes_max / WORD * WORD).max(WORD);
    for lane in &request.members[request.rank].lanes {
        let mut header = peer.header(Kind::Block);
        header.bucket = *lane;
        for chunk in request.blocks[lane].chunks(chunk_bytes) {
            bytes += peer.send(writer, &encode_bytes(header, chunk)).await?;
            header.offset += (chunk.len() / WORD) as u64;
        }
    }
    bytes += peer.say(writer, Kind::Done).await?;
    writer.flush().await.map_err(|e| peer.lost(e))?;
    Ok(bytes)
}

/// Reads the peer's blocks until it says that it is done.
async fn read(
    peer: Peer,
    incoming: LinkFuture,
    request: Arc<Gather>,
) -> Result<Ended, CollectiveError> {
    let lanes = &request.members[peer.rank].lanes;
    let mut blocks: BTreeMap<u32, Vec<u8>> = lanes.iter().map(|l| (*l, Vec::new())).collect();
    let mut reader = peer.reader(incoming).await?;
    while let Some(frame) = reader.next().await? {
        take(&mut blocks, &frame, request.block_bytes).map_err(|reason| peer.unexpected(reason))?;
    }
    let short = blocks
        .iter()
        .find(|(_, block)| block.len() < request.block_bytes);
    if let Some((lane, block)) = short {
        let (found, whole) = (block.len(), request.block_bytes);
        let reason = format!("done with {found} of {whole} bytes of lane {lane}");
        return Err(peer.unexpected(reason));
    }
    let blocks = blocks.into_iter().map(|(lane, block)| (lane, block.into()));
    let (link, _) = reader.finish();
    Ok(Ended::Read(peer.rank, link, blocks.collect()))
}

/// Takes a slice of a block; slices come in order.
fn take(
    blocks: &mut BTreeMap<u32, Vec<u8>>,
    frame: &Frame,
    block_bytes: usize,
) -> Result<(), String> {
    let (header, bytes) = (frame.header, frame.payload.len());
    let lane = header.bucket;
    let block = match blocks.get_mut(&lane) {
        Some(block) if header.kind == Kind::Block => block,
        _ => {
            return Err(format!(
                "{:?} of lane {lane}, which it does not bring",
                header.kind
            ));
        }
    };
    let held = block.len();
    let at = header.offset.saturating_mul(WORD as u64);
    if at != held as u64 || bytes == 0 || held + bytes > block_bytes {
        return Err(format!(
            "{bytes} bytes at {at} of lane {lane}, which holds {held} of {block_bytes}"
        ));
    }
    block.reserve_exact(block_bytes - held);
    block.extend_from_slice(&frame.payload);
    Ok(())
}

#[cfg(test)]
mod tests;
