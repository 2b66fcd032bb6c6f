//! The canonical binary tree over a run's lanes: the one order in which gradients are added.
//!
//! A node is a lane interval. The root is `[0, L)`; a node of length n splits at the largest power
//! of two below n. Every float of a reduced gradient is added along this tree, whoever holds which
//! lane, so its bits are a function of the lanes alone. Knows nothing of workers' addresses, time
//! or memory.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;

/// A lane interval `[start, end)`, not empty where it is a node of the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LaneRange {
    /// First lane.
    pub start: u32,
    /// One past the last lane.
    pub end: u32,
}

impl LaneRange {
    /// Number of lanes.
    pub const fn lanes(self) -> u32 {
        self.end.saturating_sub(self.start)
    }

    /// Whether `other` lies inside.
    pub const fn contains(self, other: LaneRange) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// The two halves of a node: split at the largest power of two below its length. A leaf has
    /// none.
    pub fn children(self) -> Option<(LaneRange, LaneRange)> {
        let lanes = self.lanes();
        if lanes < 2 {
            return None;
        }
        let middle = self.start + lanes.next_power_of_two() / 2;
        let node = |start, end| LaneRange { start, end };
        Some((node(self.start, middle), node(middle, self.end)))
    }
}

impl fmt::Display for LaneRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{},{})", self.start, self.end)
    }
}

/// The root of the tree over `lanes`.
pub const fn root(lanes: u32) -> LaneRange {
    LaneRange {
        start: 0,
        end: lanes,
    }
}

/// Whether `range` is a node of the tree over `lanes`.
pub fn is_node(lanes: u32, range: LaneRange) -> bool {
    range == root(lanes) || parent_and_sibling(lanes, range).is_some()
}

/// The parent of `node` and the parent's other child; none for the root and for what is no node.
pub fn parent_and_sibling(lanes: u32, node: LaneRange) -> Option<(LaneRange, LaneRange)> {
    if node.lanes() == 0 {
        return None;
    }
    let mut parent = root(lanes);
    while let Some((left, right)) = parent.children() {
        if left == node {
            return Some((parent, right));
        }
        if right == node {
            return Some((parent, left));
        }
        parent = if left.contains(node) {
            left
        } else if right.contains(node) {
            right
        } else {
            return None;
        };
    }
    None
}

/// The fewest nodes that tile exactly the lanes of `held`, ascending.
pub fn maximal_nodes(lanes: u32, held: &BTreeSet<u32>) -> Vec<LaneRange> {
    fn walk(node: LaneRange, held: &BTreeSet<u32>, out: &mut Vec<LaneRange>) {
        let count = held.range(node.start..node.end).count();
        if count == node.lanes() as usize {
            out.push(node);
        } else if count > 0
            && let Some((left, right)) = node.children()
        {
            walk(left, held, out);
            walk(right, held, out);
        }
    }
    let mut nodes = Vec::new();
    if lanes > 0 {
        walk(root(lanes), held, &mut nodes);
    }
    nodes
}

/// Checks that `nodes` are nodes of the tree and tile `0..lanes` with no gap and no overlap.
///
/// # Errors
/// Says which node or lane is wrong.
pub fn tiles_exactly(lanes: u32, nodes: impl IntoIterator<Item = LaneRange>) -> Result<(), String> {
    let mut sorted: Vec<LaneRange> = nodes.into_iter().collect();
    sorted.sort_unstable();
    let mut next = 0;
    for node in sorted {
        if !is_node(lanes, node) {
            return Err(format!(
                "{node} is not a node of the tree over {lanes} lanes"
            ));
        }
        if node.start != next {
            let what = if node.start < next {
                "held twice"
            } else {
                "held by nobody"
            };
            return Err(format!("lane {} is {what}", node.start.min(next)));
        }
        next = node.end;
    }
    if next != lanes {
        return Err(format!("lane {next} is held by nobody"));
    }
    Ok(())
}

/// One contiguous range of lanes per worker, in proportion to `speeds`, preferring cuts that make
/// few tree nodes (at most `nodes_max` each where that is possible). Workers beyond the lanes get
/// an empty range.
pub fn cut(lanes: u32, speeds: &[f64], nodes_max: u32) -> Vec<Range<u32>> {
    let workers = speeds.len() as u32;
    let busy = workers.min(lanes);
    let total: f64 = speeds.iter().take(busy as usize).map(|s| s.max(1e-9)).sum();
    let mut edges = vec![0u32];
    let mut share = 0.0;
    for worker in 1..busy {
        share += speeds[worker as usize - 1].max(1e-9) / total;
        let low = edges[worker as usize - 1] + 1;
        let high = lanes - (busy - worker);
        let ideal = ((f64::from(lanes) * share).round() as u32).clamp(low, high);
        edges.push(best_edge(lanes, low, ideal, high, nodes_max));
    }
    edges.push(lanes);
    let mut ranges: Vec<Range<u32>> = edges.windows(2).map(|e| e[0]..e[1]).collect();
    ranges.resize(workers as usize, lanes..lanes);
    ranges
}

/// The ideal edge, unless it leaves the range before it with too many nodes; then the nearest edge
/// that does not.
fn best_edge(lanes: u32, low: u32, ideal: u32, high: u32, nodes_max: u32) -> u32 {
    let nodes = |edge: u32| maximal_nodes(lanes, &(low - 1..edge).collect()).len() as u32;
    let near = |distance: u32| [ideal.checked_sub(distance), ideal.checked_add(distance)];
    let mut candidates = (0..=high - low).flat_map(near).flatten();
    let fits = candidates.find(|edge| (low..=high).contains(edge) && nodes(*edge) <= nodes_max);
    fits.unwrap_or(ideal)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn seven_lanes_split_at_four() {
        let (left, right) = root(7).children().expect("seven lanes split");
        assert_eq!(
            (left.to_string(), right.to_string()),
            ("[0,4)".into(), "[4,7)".into())
        );
        assert_eq!(
            right.children().expect("splits").0,
            LaneRange { start: 4, end: 6 }
        );
        assert!(is_node(7, LaneRange { start: 6, end: 7 }));
        assert!(!is_node(7, LaneRange { start: 5, end: 7 }));
        assert!(root(8).children().expect("splits").0.lanes() == 4);
    }

    #[test]
    fn a_gap_and_an_overlap_are_named() {
        let node = |start, end| LaneRange { start, end };
        let gap = tiles_exactly(4, [node(0, 2), node(3, 4)]);
        assert_eq!(gap, Err("lane 2 is held by nobody".into()));
        let twice = tiles_exactly(4, [node(0, 2), node(1, 2), node(2, 4)]);
        assert_eq!(twice, Err("lane 1 is held twice".into()));
        assert!(tiles_exactly(4, [node(0, 3), node(3, 4)]).is_err());
    }

    proptest! {
        #[test]
        fn maximal_nodes_tile_what_is_held(
            lanes in 1u32..200, held in prop::collection::btree_set(0u32..200, 0..200)
        ) {
            let held: BTreeSet<u32> = held.into_iter().filter(|l| *l < lanes).collect();
            let nodes = maximal_nodes(lanes, &held);
            let covered: Vec<u32> = nodes.iter().flat_map(|n| n.start..n.end).collect();
            prop_assert_eq!(covered, held.iter().copied().collect::<Vec<_>>());
            for node in &nodes {
                prop_assert!(is_node(lanes, *node));
                if let Some((parent, _)) = parent_and_sibling(lanes, *node) {
                    prop_assert!((parent.start..parent.end).any(|l| !held.contains(&l)));
                }
            }
        }

        #[test]
        fn cuts_cover_every_lane_once(lanes in 1u32..130, workers in 1usize..80) {
            let ranges = cut(lanes, &vec![1.0; workers], 4);
            prop_assert_eq!(ranges.len(), workers);
            let all: Vec<u32> = ranges.iter().cloned().flatten().collect();
            prop_assert_eq!(all, (0..lanes).collect::<Vec<_>>());
            let busy = ranges.iter().filter(|r| !r.is_empty()).count();
            prop_assert_eq!(busy, workers.min(lanes as usize));
            let nodes = ranges.iter().map(|r| maximal_nodes(lanes, &r.clone().collect()));
            prop_assert!(tiles_exactly(lanes, nodes.flatten()).is_ok());
        }
    }
}
