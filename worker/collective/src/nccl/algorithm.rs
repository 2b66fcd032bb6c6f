//! The deterministic exchange on a device: grouped sends, additions in tree order, bits copied.
//!
//! Rounds of one bucket per member. In round k everybody sends the slices of its nodes to the
//! buckets' owners and, in the same group, the sums of round k - 1; then each owner adds its bucket
//! along the tree, on the device. Round k - 2 is meanwhile copied down and hashed. Divisions and
//! additions are IEEE f32, so the bits are those of the TCP exchange. Blocking; knows no sockets.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use belfry_proto::LaneRange;
use belfry_proto::lanes::{maximal_nodes, root};
use xxhash_rust::xxh3::Xxh3;

use crate::digest::hash_floats;
use crate::floats::Floats;
use crate::nccl::fabric::{Buffer, Fabric, FabricError, Pulse, Span, Transfer};
use crate::plan::{Reduce, Reduced};
use crate::transport::Wire;

/// Buckets' worth of floats that a broadcast moves at once.
const BUCKETS_PER_BROADCAST: usize = 4;

/// Who takes part through device links, and which of them is this member.
#[derive(Clone, Debug)]
pub struct Group {
    /// Ranks, ascending; the first leads.
    pub ranks: Vec<usize>,
    /// This member's place among them.
    pub me: usize,
}

/// Bytes to and from peers.
#[derive(Clone, Copy, Debug, Default)]
struct Traffic {
    sent: u64,
    received: u64,
}

/// The tree nodes that a group's nodes add up to: what one host brings to the exchange of hosts.
pub fn group_nodes(request: &Reduce<Floats>, ranks: &[usize]) -> Vec<LaneRange> {
    let nodes = ranks.iter().flat_map(|r| request.members[*r].nodes.iter());
    if ranks.len() == 1 {
        return nodes.copied().collect();
    }
    let lanes: BTreeSet<u32> = nodes.flat_map(|n| n.start..n.end).collect();
    maximal_nodes(request.lanes, &lanes)
}

/// Sums over a group that is everybody; all get the divided sum.
///
/// # Errors
/// [`FabricError`].
pub fn all_reduce<F: Fabric>(
    fabric: &mut F,
    request: &Reduce<Floats>,
    group: &Group,
    pulse: &Pulse,
) -> Result<Reduced, FabricError> {
    let targets = vec![root(request.lanes)];
    let mut course = Course::new(fabric, request, group, targets, true)?;
    let (mut sum, mut hash) = (vec![0.0; request.len], Xxh3::new());
    let sums = std::slice::from_mut(&mut sum);
    course.run(pulse, sums, |values| hash_floats(&mut hash, values))?;
    let traffic = course.traffic;
    let kept = course.close();
    let on_device = kept.first().and_then(|b| fabric.lend(*b));
    kept.into_iter().for_each(|b| fabric.release(b));
    Ok(Reduced {
        sum,
        digest: hash.digest128(),
        parts: Vec::new(),
        node_digests: Vec::new(),
        bytes_sent: traffic.sent,
        bytes_received: traffic.received,
        on_device,
    })
}

/// Adds a group's nodes up to [`group_nodes`], undivided, in the leader's host memory; the others
/// get nothing.
///
/// # Errors
/// [`FabricError`].
pub fn combine_to_leader<F: Fabric>(
    fabric: &mut F,
    request: &Reduce<Floats>,
    group: &Group,
    pulse: &Pulse,
) -> Result<BTreeMap<LaneRange, Vec<f32>>, FabricError> {
    let targets = group_nodes(request, &group.ranks);
    let mut sums: Vec<Vec<f32>> = Vec::new();
    if group.me == 0 {
        sums.resize(targets.len(), vec![0.0; request.len]);
    }
    let mut course = Course::new(fabric, request, group, targets.clone(), false)?;
    course.run(pulse, &mut sums, |_| {})?;
    let kept = course.close();
    kept.into_iter().for_each(|b| fabric.release(b));
    Ok(targets.into_iter().zip(sums).collect())
}

/// The leader's `sum` to the whole group; every member gets it, hashed as it arrives.
///
/// # Errors
/// [`FabricError`].
pub fn broadcast<F: Fabric>(
    fabric: &mut F,
    request: &Reduce<Floats>,
    group: &Group,
    sum: Option<Vec<f32>>,
    pulse: &Pulse,
) -> Result<Reduced, FabricError> {
    let buffer = fabric.alloc(request.len)?;
    let leads = sum.is_some();
    let mut sum = sum.unwrap_or_else(|| vec![0.0; request.len]);
    let mut hash = Xxh3::new();
    let step = request.bucket_len.saturating_mul(BUCKETS_PER_BROADCAST);
    for start in (0..request.len).step_by(step.max(1)) {
        let len = step.min(request.len - start);
        let span = Span { buffer, start, len };
        let here = &mut sum[start..start + len];
        if leads {
            fabric.upload(here, span)?;
        }
        fabric.broadcast(0, span)?;
        if !leads {
            let mark = fabric.mark()?;
            fabric.download(mark, span, here)?;
        }
        hash_floats(&mut hash, here);
        pulse.beat();
    }
    fabric.finish()?;
    let on_device = fabric.lend(buffer);
    fabric.release(buffer);
    let bytes = 4 * request.len as u64;
    let others = (group.ranks.len() - 1) as u64;
    Ok(Reduced {
        sum,
        digest: hash.digest128(),
        parts: Vec::new(),
        node_digests: Vec::new(),
        bytes_sent: if leads { bytes * others } else { 0 },
        bytes_received: if leads { 0 } else { bytes },
        on_device,
    })
}

/// The library's own sum: each member adds its nodes in ascending order, the rest is the library's.
///
/// # Errors
/// [`FabricError`].
pub fn ring<F: Fabric>(
    fabric: &mut F,
    request: &Reduce<Floats>,
    wire: Wire,
    pulse: &Pulse,
) -> Result<Reduced, FabricError> {
    let out = fabric.alloc(request.len)?;
    let mut own = Own::new(fabric, request, request.bucket_len)?;
    let (mut sum, mut hash) = (vec![0.0; request.len], Xxh3::new());
    let mut behind = None;
    for start in (0..request.len).step_by(request.bucket_len) {
        let range = start..(start + request.bucket_len).min(request.len);
        own.load(fabric, request, range.clone())?;
        let into = span(out, &range);
        match own.slices(range.clone()).split_first() {
            None => fabric.upload(&vec![0.0; range.len()], into)?,
            Some(((_, first), rest)) => {
                fabric.divide(*first, 1.0, into)?;
                for (_, next) in rest {
                    fabric.add(into, *next, into)?;
                }
            }
        }
        fabric.ring_sum(into, wire)?;
        fabric.divide(into, request.divide_by as f32, into)?;
        let mark = fabric.mark()?;
        if let Some((mark, range)) = behind.replace((mark, range)) {
            down(fabric, mark, (out, range), &mut sum, &mut hash)?;
            pulse.beat();
        }
    }
    if let Some((mark, range)) = behind {
        down(fabric, mark, (out, range), &mut sum, &mut hash)?;
    }
    fabric.finish()?;
    own.release(fabric);
    let on_device = fabric.lend(out);
    fabric.release(out);
    // Twice the floats but for the own share is what a ring moves.
    let each = if wire == Wire::Bf16 { 2 } else { 4 };
    let members = request.members.len() as u64;
    let bytes = 2 * each * request.len as u64 * (members - 1) / members;
    Ok(Reduced {
        sum,
        digest: hash.digest128(),
        parts: Vec::new(),
        node_digests: Vec::new(),
        bytes_sent: bytes,
        bytes_received: bytes,
        on_device,
    })
}

fn down<F: Fabric>(
    fabric: &mut F,
    mark: F::Mark,
    (buffer, range): (Buffer, Range<usize>),
    sum: &mut [f32],
    hash: &mut Xxh3,
) -> Result<(), FabricError> {
    let into = &mut sum[range.clone()];
    fabric.download(mark, span(buffer, &range), into)?;
    hash_floats(hash, into);
    Ok(())
}

fn span(buffer: Buffer, range: &Range<usize>) -> Span {
    let (start, len) = (range.start, range.len());
    Span { buffer, start, len }
}

/// The own nodes on the device: where they lie already, or staged there round by round.
struct Own {
    nodes: Vec<(LaneRange, Buffer, bool)>,
    /// The floats that are staged.
    loaded: Range<usize>,
}

impl Own {
    fn new<F: Fabric>(
        fabric: &mut F,
        request: &Reduce<Floats>,
        stage_len: usize,
    ) -> Result<Self, FabricError> {
        let mut nodes = Vec::new();
        for node in &request.members[request.rank].nodes {
            let (buffer, staged) = match &request.partials[node] {
                Floats::Device(floats) => (fabric.adopt(floats)?, false),
                Floats::Host(_) => (fabric.alloc(stage_len.min(request.len))?, true),
            };
            nodes.push((*node, buffer, staged));
        }
        Ok(Own {
            nodes,
            loaded: 0..0,
        })
    }

    fn load<F: Fabric>(
        &mut self,
        fabric: &mut F,
        request: &Reduce<Floats>,
        range: Range<usize>,
    ) -> Result<(), FabricError> {
        for (node, buffer, _) in &self.nodes {
            if let Floats::Host(values) = &request.partials[node] {
                fabric.upload(&values[range.clone()], span(*buffer, &(0..range.len())))?;
            }
        }
        self.loaded = range;
        Ok(())
    }

    /// Each node's floats of `range`, which is loaded; ascending by node.
    fn slices(&self, range: Range<usize>) -> Vec<(LaneRange, Span)> {
        let place = |(node, buffer, staged): &(LaneRange, Buffer, bool)| {
            let start = range.start - if *staged { self.loaded.start } else { 0 };
            (*node, span(*buffer, &(start..start + range.len())))
        };
        self.nodes.iter().map(place).collect()
    }

    fn release<F: Fabric>(self, fabric: &mut F) {
        self.nodes
            .into_iter()
            .for_each(|(_, b, _)| fabric.release(b));
    }
}

/// One exchange in rounds.
struct Course<'a, F: Fabric> {
    fabric: &'a mut F,
    request: &'a Reduce<Floats>,
    group: &'a Group,
    /// Whether all get the divided sums, or only the leader the undivided.
    everybody: bool,
    own: Own,
    /// Slices of the own bucket from others, by node and its holder's place.
    foreign: Vec<(usize, LaneRange, Buffer)>,
    /// For a sum of two own nodes, which may not be written.
    spares: Vec<Buffer>,
    /// What is added up, and where.
    targets: Vec<(LaneRange, Buffer)>,
    traffic: Traffic,
}

impl<'a, F: Fabric> Course<'a, F> {
    fn new(
        fabric: &'a mut F,
        request: &'a Reduce<Floats>,
        group: &'a Group,
        targets: Vec<LaneRange>,
        everybody: bool,
    ) -> Result<Self, FabricError> {
        let buckets = request.buckets();
        let bucket_max = if buckets == 0 {
            0
        } else {
            request.len.div_ceil(buckets)
        };
        let own = Own::new(fabric, request, bucket_max * group.ranks.len())?;
        let mut foreign = Vec::new();
        for (place, rank) in group.ranks.iter().enumerate() {
            if place != group.me {
                for node in &request.members[*rank].nodes {
                    foreign.push((place, *node, fabric.alloc(bucket_max)?));
                }
            }
        }
        let mut placed = Vec::new();
        for target in targets {
            placed.push((target, fabric.alloc(request.len)?));
        }
        Ok(Course {
            fabric,
            request,
            group,
            everybody,
            own,
            foreign,
            spares: Vec::new(),
            targets: placed,
            traffic: Traffic::default(),
        })
    }

    fn rounds(&self) -> usize {
        self.request.buckets().div_ceil(self.group.ranks.len())
    }

    /// The floats of the bucket that the member at `place` owns in `round`; none in a last round
    /// that is not full.
    fn bucket(&self, round: usize, place: usize) -> Option<Range<usize>> {
        let bucket = round * self.group.ranks.len() + place;
        (bucket < self.request.buckets()).then(|| self.request.bounds(bucket))
    }

    /// All floats of a round.
    fn range(&self, round: usize) -> Range<usize> {
        let members = self.group.ranks.len();
        let last = ((round + 1) * members).min(self.request.buckets()) - 1;
        self.request.bounds(round * members).start..self.request.bounds(last).end
    }

    /// Every round; each target's floats come down into `sums`, where they are wanted, and are
    /// shown as they come.
    fn run(
        &mut self,
        pulse: &Pulse,
        sums: &mut [Vec<f32>],
        mut seen: impl FnMut(&[f32]),
    ) -> Result<(), FabricError> {
        let (rounds, mut behind) = (self.rounds(), BTreeMap::new());
        for round in 0..=rounds {
            if round < rounds {
                let range = self.range(round);
                self.own.load(self.fabric, self.request, range)?;
            }
            let transfers = self.transfers(round);
            self.count(&transfers);
            self.fabric.exchange(&transfers)?;
            if round > 0 {
                behind.insert(round - 1, self.fabric.mark()?);
            }
            if round < rounds {
                self.combine(round)?;
            }
            // One round stays behind, so that the device has work while this thread hashes.
            while behind.len() > usize::from(round < rounds) {
                if let Some((done, mark)) = behind.pop_first() {
                    self.hand_over(done, mark, sums, &mut seen)?;
                    pulse.beat();
                }
            }
        }
        self.fabric.finish()
    }

    /// The group of `round`: slices of this round, sums of the one before.
    fn transfers(&self, round: usize) -> Vec<Transfer> {
        let mut transfers = Vec::new();
        for place in (0..self.group.ranks.len()).filter(|p| *p != self.group.me) {
            if let Some(range) = self.bucket(round, place) {
                let slices = self.own.slices(range);
                let send = |(_, from): (LaneRange, Span)| Transfer::Send { to: place, from };
                transfers.extend(slices.into_iter().map(send));
            }
            if let Some(range) = self.bucket(round, self.group.me) {
                let from_it = self.foreign.iter().filter(|(from, ..)| *from == place);
                transfers.extend(from_it.map(|(from, _, buffer)| Transfer::Receive {
                    from: *from,
                    into: span(*buffer, &(0..range.len())),
                }));
            }
            if let Some(before) = round.checked_sub(1) {
                for (_, buffer) in &self.targets {
                    if let Some(range) = self.bucket(before, self.group.me)
                        && (self.everybody || place == 0)
                    {
                        let from = span(*buffer, &range);
                        transfers.push(Transfer::Send { to: place, from });
                    }
                    if let Some(range) = self.bucket(before, place)
                        && (self.everybody || self.group.me == 0)
                    {
                        let into = span(*buffer, &range);
                        transfers.push(Transfer::Receive { from: place, into });
                    }
                }
            }
        }
        transfers
    }

    fn count(&mut self, transfers: &[Transfer]) {
        for transfer in transfers {
            match transfer {
                Transfer::Send { from, .. } => self.traffic.sent += 4 * from.len as u64,
                Transfer::Receive { into, .. } => self.traffic.received += 4 * into.len as u64,
            }
        }
    }

    /// Adds the own bucket along the tree, for each target.
    fn combine(&mut self, round: usize) -> Result<(), FabricError> {
        let Some(range) = self.bucket(round, self.group.me) else {
            return Ok(());
        };
        let mut parts: BTreeMap<LaneRange, (Span, bool)> = BTreeMap::new();
        for (node, own) in self.own.slices(range.clone()) {
            parts.insert(node, (own, false));
        }
        for (_, node, buffer) in &self.foreign {
            parts.insert(*node, (span(*buffer, &(0..range.len())), true));
        }
        let divisor = if self.everybody {
            self.request.divide_by as f32
        } else {
            1.0
        };
        let mut spares_used = 0;
        for (target, buffer) in self.targets.clone() {
            let (sum, _) = self.tree_sum(target, &mut parts, &mut spares_used)?;
            self.fabric.divide(sum, divisor, span(buffer, &range))?;
        }
        Ok(())
    }

    /// The tree sum under `node`, as in [`crate::fold`], and whether its place may be written.
    fn tree_sum(
        &mut self,
        node: LaneRange,
        parts: &mut BTreeMap<LaneRange, (Span, bool)>,
        spares_used: &mut usize,
    ) -> Result<(Span, bool), FabricError> {
        if let Some(part) = parts.remove(&node) {
            return Ok(part);
        }
        let (l, r) = node.children().ok_or_else(|| {
            FabricError::Device(format!(
                "lane {} is held by nobody in the group",
                node.start
            ))
        })?;
        let (left, left_free) = self.tree_sum(l, parts, spares_used)?;
        let (right, right_free) = self.tree_sum(r, parts, spares_used)?;
        let into = match (left_free, right_free) {
            (true, _) => left,
            (_, true) => right,
            _ => self.spare(left.len, spares_used)?,
        };
        self.fabric.add(left, right, into)?;
        Ok((into, true))
    }

    fn spare(&mut self, len: usize, used: &mut usize) -> Result<Span, FabricError> {
        if *used == self.spares.len() {
            let longest = self.request.len.div_ceil(self.request.buckets().max(1));
            self.spares.push(self.fabric.alloc(longest)?);
        }
        *used += 1;
        Ok(span(self.spares[*used - 1], &(0..len)))
    }

    fn hand_over(
        &mut self,
        round: usize,
        mark: F::Mark,
        sums: &mut [Vec<f32>],
        seen: &mut impl FnMut(&[f32]),
    ) -> Result<(), FabricError> {
        let range = self.range(round);
        let mut mark = Some(mark);
        for ((_, buffer), sum) in self.targets.iter().zip(sums) {
            // Behind the first wait a fresh mark is only later, never too early.
            let after = match mark.take() {
                Some(mark) => mark,
                None => self.fabric.mark()?,
            };
            let into = &mut sum[range.clone()];
            self.fabric.download(after, span(*buffer, &range), into)?;
            seen(into);
        }
        Ok(())
    }

    /// Releases everything but the targets, which are returned.
    fn close(self) -> Vec<Buffer> {
        self.own.release(self.fabric);
        let foreign = self.foreign.into_iter().map(|(_, _, buffer)| buffer);
        for buffer in foreign.chain(self.spares) {
            self.fabric.release(buffer);
        }
        self.targets.into_iter().map(|(_, buffer)| buffer).collect()
    }
}
