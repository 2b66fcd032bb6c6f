//! The gradients that a worker holds for the open step: nodes of the canonical lane tree.
//!
//! A lane's gradient is a leaf. Siblings are added into their parent as soon as both are there
//! (left + right, element by element) and freed, but never beyond the nodes that the generation
//! assigns to this worker: what straddles workers is summed by the bucket's owner. The bits of a
//! node are therefore a function of its lanes alone.

use std::collections::BTreeMap;

use belfry_model::{Gradient, ModelError};
use belfry_proto::lanes::parent_and_sibling;
use belfry_proto::{LaneRange, v1};

/// Tree nodes held for one step, with the reports of the lanes below them.
#[derive(Debug, Default)]
pub struct Partials {
    lanes: u32,
    nodes: BTreeMap<LaneRange, Gradient>,
    reports: BTreeMap<u32, v1::LaneReport>,
}

impl Partials {
    /// Nothing yet, for a tree over `lanes`.
    pub fn new(lanes: u32) -> Self {
        Partials {
            lanes,
            ..Partials::default()
        }
    }

    /// Forgets everything: the step was applied.
    pub fn clear(&mut self) {
        self.nodes.clear();
        self.reports.clear();
    }

    /// The nodes held, ascending.
    pub fn nodes(&self) -> impl Iterator<Item = LaneRange> + '_ {
        self.nodes.keys().copied()
    }

    /// Drops what lies outside `assigned` and returns the lanes still to be computed, ascending.
    pub fn missing(&mut self, assigned: &[LaneRange]) -> Vec<u32> {
        self.nodes
            .retain(|node, _| assigned.iter().any(|a| a.contains(*node)));
        let held: Vec<LaneRange> = self.nodes().collect();
        let covered = |lane: u32| held.iter().any(|n| n.start <= lane && lane < n.end);
        let lanes = assigned.iter().flat_map(|a| a.start..a.end);
        lanes.filter(|lane| !covered(*lane)).collect()
    }

    /// Adds lane `lane`'s gradient and folds upwards within `assigned`; gives the node that it ended
    /// in, if that is an assigned one: it is complete.
    ///
    /// # Errors
    /// [`ModelError`] if the gradients are not of one length, or a device fails.
    pub fn insert(
        &mut self,
        report: v1::LaneReport,
        gradient: Gradient,
        assigned: &[LaneRange],
    ) -> Result<Option<(LaneRange, Gradient)>, ModelError> {
        let mut node = LaneRange {
            start: report.lane,
            end: report.lane + 1,
        };
        self.reports.insert(report.lane, report);
        let mut sum = gradient;
        while let Some((parent, sibling)) = parent_and_sibling(self.lanes, node) {
            if !assigned.iter().any(|a| a.contains(parent)) {
                break;
            }
            let Some(other) = self.nodes.remove(&sibling) else {
                break;
            };
            let (mut left, right) = if sibling < node {
                (other, sum)
            } else {
                (sum, other)
            };
            // Numbers are copied only if an aborted exchange still reads them.
            left.add(&right)?;
            (node, sum) = (parent, left);
        }
        self.nodes.insert(node, sum.clone());
        Ok(assigned.contains(&node).then_some((node, sum)))
    }

    /// What the device said of lanes later than their gradients came.
    pub fn complete_reports(&mut self, reports: Vec<v1::LaneReport>) {
        for report in reports {
            self.reports.insert(report.lane, report);
        }
    }

    /// The assigned nodes, when every one of them is complete.
    pub fn complete(&self, assigned: &[LaneRange]) -> Option<BTreeMap<LaneRange, Gradient>> {
        assigned
            .iter()
            .map(|node| Some((*node, self.nodes.get(node)?.clone())))
            .collect()
    }

    /// Reports of the lanes below `assigned`, in lane order.
    pub fn reports(&self, assigned: &[LaneRange]) -> Vec<v1::LaneReport> {
        let lanes = assigned.iter().flat_map(|a| a.start..a.end);
        lanes
            .filter_map(|lane| self.reports.get(&lane).cloned())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u32, end: u32) -> LaneRange {
        LaneRange { start, end }
    }

    fn report(lane: u32) -> v1::LaneReport {
        v1::LaneReport {
            lane,
            ..Default::default()
        }
    }

    /// A value whose sums depend on the order of addition.
    fn gradient(lane: u32) -> Vec<f32> {
        (0..5)
            .map(|i| 0.1 + (lane * 7 + i) as f32 * 1.000_1e-3)
            .collect()
    }

    fn insert(partials: &mut Partials, lane: u32, assigned: &[LaneRange]) -> Option<LaneRange> {
        let complete = partials.insert(report(lane), gradient(lane).into(), assigned);
        complete.expect("of one length").map(|(node, _)| node)
    }

    fn add(a: &[f32], b: &[f32]) -> Vec<f32> {
        a.iter().zip(b).map(|(x, y)| x + y).collect()
    }

    #[test]
    fn any_order_gives_the_tree_sum() {
        let pair = |l: u32| add(&gradient(l), &gradient(l + 1));
        let expected = add(&add(&pair(0), &pair(2)), &add(&pair(4), &pair(6)));
        for order in [[0, 1, 2, 3, 4, 5, 6, 7], [7, 0, 6, 1, 5, 2, 4, 3]] {
            let mut partials = Partials::new(8);
            let assigned = [range(0, 8)];
            assert_eq!(partials.missing(&assigned).len(), 8);
            for lane in order {
                insert(&mut partials, lane, &assigned);
            }
            let nodes = partials.complete(&assigned).expect("all lanes are in");
            let sum = nodes[&range(0, 8)].clone().read().expect("on the host");
            assert_eq!(*sum, expected);
            assert_eq!(partials.reports(&assigned).len(), 8);
        }
    }

    #[test]
    fn a_repair_asks_only_for_the_lost_lanes() {
        let mut partials = Partials::new(8);
        let before = [range(0, 4)];
        for lane in 0..4 {
            insert(&mut partials, lane, &before);
        }
        let after = [range(0, 4), range(6, 8)];
        assert_eq!(partials.missing(&after), vec![6, 7]);
        assert!(partials.complete(&after).is_none());
        assert_eq!(insert(&mut partials, 6, &after), None);
        assert_eq!(insert(&mut partials, 7, &after), Some(range(6, 8)));
        let nodes = partials.complete(&after).expect("complete");
        assert_eq!(nodes.keys().copied().collect::<Vec<_>>(), after);
        // Lanes that moved away are dropped.
        assert_eq!(partials.missing(&[range(6, 8)]), Vec::<u32>::new());
        assert_eq!(partials.nodes().collect::<Vec<_>>(), vec![range(6, 8)]);
    }
}
