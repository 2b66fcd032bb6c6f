//! What one exchange is: the request, its check, and how the floats are cut into buckets.
//!
//! Pure. Bucket boundaries depend on lengths and the number of members only, and never on bits.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;

use belfry_proto::LaneRange;
use belfry_proto::lanes::tiles_exactly;

use crate::error::CollectiveError;
use crate::floats::{DeviceFloats, Length};

/// Parts by which the digests of a sum tell owners apart: one for each up to so many, which is half
/// a kilobyte in a message.
const PARTS_MAX: usize = 64;

/// A participant of an exchange.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Where its endpoint listens.
    pub addr: SocketAddr,
    /// The tree nodes that it brings; none for a newcomer, which only receives.
    pub nodes: Vec<LaneRange>,
}

/// One all-reduce. All members must pass the same values but for `rank` and `partials`, whose
/// floats lie in host memory for TCP, and may lie on a device for a [`Transport`](crate::Transport).
#[derive(Clone, Debug)]
pub struct Reduce<P = Arc<Vec<f32>>> {
    /// Fencing: grows with every change of the members.
    pub generation: u64,
    /// The open step.
    pub step: u64,
    /// Lanes of the tree.
    pub lanes: u32,
    /// This member's place in `members`.
    pub rank: usize,
    /// By rank; their nodes tile all lanes.
    pub members: Vec<Member>,
    /// The own nodes, each of `len` floats. Only read, so an exchange can be repeated.
    pub partials: BTreeMap<LaneRange, P>,
    /// Floats of a gradient.
    pub len: usize,
    /// What the sum is divided by, once.
    pub divide_by: u32,
    /// Floats of a bucket, at most.
    pub bucket_len: usize,
}

/// What every member of an exchange gets.
#[derive(Clone, Debug)]
pub struct Reduced {
    /// The tree sum over all lanes, divided once.
    pub sum: Vec<f32>,
    /// XXH3-128 over the sum's little-endian bytes: the same for every number of members.
    pub digest: u128,
    /// XXH3-64 over the buckets of some owners each: of n parts, part i is of ranks i, i + n, …. Empty
    /// where the sum did not come from owners.
    pub parts: Vec<u64>,
    /// The same over each of the own nodes that lie in host memory.
    pub node_digests: Vec<(LaneRange, u128)>,
    /// Bytes written to peers, headers included.
    pub bytes_sent: u64,
    /// Bytes read from peers, headers included.
    pub bytes_received: u64,
    /// The sum once more, where a device added it.
    pub on_device: Option<DeviceFloats>,
}

impl<P> Reduce<P> {
    /// The same request with other partials.
    pub(crate) fn with<Q>(&self, partials: BTreeMap<LaneRange, Q>) -> Reduce<Q> {
        Reduce {
            generation: self.generation,
            step: self.step,
            lanes: self.lanes,
            rank: self.rank,
            members: self.members.clone(),
            partials,
            len: self.len,
            divide_by: self.divide_by,
            bucket_len: self.bucket_len,
        }
    }
}

impl<P: Length> Reduce<P> {
    /// Checks what can be checked without the peers.
    pub(crate) fn check(&self) -> Result<(), CollectiveError> {
        let bad = |reason: String| Err(CollectiveError::BadNodes(reason));
        let Some(me) = self.members.get(self.rank) else {
            return bad(format!(
                "rank {} of {} members",
                self.rank,
                self.members.len()
            ));
        };
        if self.lanes == 0 || self.divide_by == 0 || self.bucket_len == 0 {
            return bad("lanes, divide_by and bucket_len must be above zero".into());
        }
        if self.buckets() > u32::MAX as usize {
            return bad(format!("{} buckets; raise bucket_len", self.buckets()));
        }
        let nodes = self.members.iter().flat_map(|m| m.nodes.iter().copied());
        tiles_exactly(self.lanes, nodes).or_else(bad)?;
        for node in &me.nodes {
            match self.partials.get(node).map(Length::floats) {
                Some(len) if len == self.len => {}
                Some(len) => return bad(format!("node {node} has {len} floats, not {}", self.len)),
                None => return bad(format!("node {node} is not among the partials")),
            }
        }
        Ok(())
    }

    /// Number of buckets: at least one per member where there are floats enough.
    pub(crate) fn buckets(&self) -> usize {
        let wanted = self.len.div_ceil(self.bucket_len).max(self.members.len());
        wanted.min(self.len)
    }

    /// The floats of a bucket.
    pub(crate) fn bounds(&self, bucket: usize) -> Range<usize> {
        // 128 bits: a product of two lengths.
        let (len, buckets) = (self.len as u128, self.buckets() as u128);
        let edge = |b: usize| (b as u128 * len / buckets) as usize;
        edge(bucket)..edge(bucket + 1)
    }

    /// Who combines a bucket.
    pub(crate) fn owner(&self, bucket: usize) -> usize {
        bucket % self.members.len()
    }

    /// Parts whose digests tell whose buckets differ.
    pub(crate) fn parts(&self) -> usize {
        self.members.len().min(PARTS_MAX)
    }

    /// The buckets that `rank` combines, ascending.
    pub(crate) fn owned(&self, rank: usize) -> impl Iterator<Item = usize> + use<P> {
        (rank..self.buckets()).step_by(self.members.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(members: usize, len: usize, bucket_len: usize) -> Reduce {
        let addr = SocketAddr::from(([127, 0, 0, 1], 1));
        let mut members = vec![
            Member {
                addr,
                nodes: Vec::new()
            };
            members
        ];
        let root = LaneRange { start: 0, end: 1 };
        members[0].nodes.push(root);
        Reduce {
            generation: 1,
            step: 0,
            lanes: 1,
            rank: 0,
            members,
            partials: BTreeMap::from([(root, Arc::new(vec![0.0; len]))]),
            len,
            divide_by: 1,
            bucket_len,
        }
    }

    #[test]
    fn a_request_that_contradicts_itself_is_refused() {
        assert!(request(2, 5, 2).check().is_ok());
        let mut wrong = request(2, 5, 2);
        wrong.members[1].nodes.push(LaneRange { start: 0, end: 1 });
        assert!(
            wrong
                .check()
                .expect_err("twice")
                .to_string()
                .contains("held twice")
        );
        let mut wrong = request(2, 5, 2);
        wrong.len = 6;
        assert!(wrong.check().is_err());
        let mut wrong = request(2, 5, 2);
        wrong.rank = 2;
        assert!(wrong.check().is_err());
    }

    proptest! {
        #[test]
        fn buckets_tile_the_floats(members in 1usize..12, len in 0usize..300, cap in 1usize..80) {
            let request = request(members, len, cap);
            let mut next = 0;
            for bucket in 0..request.buckets() {
                let bounds = request.bounds(bucket);
                prop_assert_eq!(bounds.start, next);
                prop_assert!(!bounds.is_empty() && bounds.len() <= cap);
                next = bounds.end;
            }
            prop_assert_eq!(next, len);
            prop_assert!(request.buckets() >= members.min(len));
        }
    }
}
