//! The shell's side of a gathering: from the core's words to the endpoint and back as an event.

use std::net::SocketAddr;
use std::sync::Arc;

use belfry_collective::{Endpoint, Gather, GatherMember};
use belfry_proto::LaneRange;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::core::{Event, Gathering};
use crate::error::WorkerError;

/// Begins a gathering of blocks of `block_bytes` over `lanes`; its outcome arrives as an event.
///
/// # Errors
/// [`WorkerError::Internal`] if a member's address is none.
pub(crate) fn begin(
    endpoint: &Arc<Endpoint>,
    gathering: Gathering,
    (lanes, block_bytes): (u32, usize),
    events: mpsc::Sender<Event>,
) -> Result<JoinHandle<()>, WorkerError> {
    let (generation, step) = (gathering.generation, gathering.step);
    let request = Gather {
        generation,
        step,
        lanes,
        rank: gathering.rank,
        members: resolved(gathering.members, |addr, nodes| GatherMember {
            addr,
            lanes: nodes.iter().flat_map(|n| n.start..n.end).collect(),
        })?,
        blocks: gathering.features,
        block_bytes,
    };
    let endpoint = Arc::clone(endpoint);
    Ok(tokio::spawn(async move {
        let event = match endpoint.gather(request).await {
            Ok(features) => Event::Gathered {
                generation,
                step,
                features,
            },
            Err(error) => {
                tracing::warn!(generation, step, %error, "the gathering of features failed");
                Event::ReduceFailed {
                    generation,
                    step,
                    ranks: error.ranks(),
                    detail: error.to_string(),
                }
            }
        };
        // The loop is gone only with the process.
        let _ = events.send(event).await;
    }))
}

/// Members with their addresses resolved.
///
/// # Errors
/// [`WorkerError::Internal`] naming one that is no address.
pub(crate) fn resolved<M>(
    members: Vec<(String, Vec<LaneRange>)>,
    member: impl Fn(SocketAddr, Vec<LaneRange>) -> M,
) -> Result<Vec<M>, WorkerError> {
    let resolve = |(address, nodes): (String, Vec<LaneRange>)| {
        let addr = address.parse().map_err(|_| {
            WorkerError::Internal(format!("a member's address `{address}` is not ip:port"))
        })?;
        Ok(member(addr, nodes))
    };
    members.into_iter().map(resolve).collect()
}
