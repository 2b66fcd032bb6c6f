//! Combines a bucket's nodes along the canonical tree. Pure; knows nothing of who sent what.

use std::collections::BTreeMap;

use belfry_proto::LaneRange;

/// The tree sum under `node`, taking nodes out of `parts`: left + right, element by element.
///
/// `None` if some lane under `node` is not covered.
pub fn tree_sum(node: LaneRange, parts: &mut BTreeMap<LaneRange, Vec<f32>>) -> Option<Vec<f32>> {
    if let Some(part) = parts.remove(&node) {
        return Some(part);
    }
    let (left, right) = node.children()?;
    let mut sum = tree_sum(left, parts)?;
    let right = tree_sum(right, parts)?;
    add(&mut sum, &right);
    Some(sum)
}

/// `left += right`, element by element.
fn add(left: &mut [f32], right: &[f32]) {
    for (l, r) in left.iter_mut().zip(right) {
        *l += *r;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use belfry_proto::lanes::{maximal_nodes, root};
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn leaves(range: LaneRange, len: usize) -> BTreeMap<LaneRange, Vec<f32>> {
        let value = |lane: u32, i: usize| 0.1 + (lane as f32 * 7.0 + i as f32) * 1.000_1e-3;
        (range.start..range.end)
            .map(|l| {
                let leaf = LaneRange {
                    start: l,
                    end: l + 1,
                };
                (leaf, (0..len).map(|i| value(l, i)).collect())
            })
            .collect()
    }

    #[test]
    fn a_gap_gives_nothing() {
        let mut parts = leaves(root(4), 1);
        parts.remove(&LaneRange { start: 2, end: 3 });
        assert_eq!(tree_sum(root(4), &mut parts), None);
    }

    proptest! {
        #[test]
        fn bits_do_not_depend_on_who_holds_what(
            lanes in 1u32..40, owners in prop::collection::vec(0u32..5, 40)
        ) {
            let serial = tree_sum(root(lanes), &mut leaves(root(lanes), 3));
            let mut parts = BTreeMap::new();
            for owner in 0..5 {
                let held: BTreeSet<u32> =
                    (0..lanes).filter(|l| owners[*l as usize] == owner).collect();
                for node in maximal_nodes(lanes, &held) {
                    let part = tree_sum(node, &mut leaves(node, 3)).expect("covered");
                    parts.insert(node, part);
                }
            }
            prop_assert_eq!(tree_sum(root(lanes), &mut parts), serial);
            prop_assert!(parts.is_empty());
        }
    }
}
