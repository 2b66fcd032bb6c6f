//! Nodes on their way from the device to host memory, where the exchange reads them.
//!
//! A node is copied as soon as it is complete, on a thread of its own, while the next lanes are
//! computed; host nodes are there already. A repeated exchange finds what an earlier one staged. It
//! refuses to know who the nodes are exchanged with.

use std::collections::BTreeMap;
use std::sync::Arc;

use belfry_model::Gradient;
use belfry_proto::LaneRange;
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};

/// A node's floats in host memory, or why the device did not give them.
pub(crate) type Staged = Shared<BoxFuture<'static, Result<Arc<Vec<f32>>, String>>>;

/// What was staged for the open step.
#[derive(Default)]
pub(crate) struct Staging {
    step: u64,
    nodes: BTreeMap<LaneRange, Staged>,
}

impl Staging {
    /// Starts to copy a node that is complete.
    pub fn begin(&mut self, step: u64, node: LaneRange, sum: Gradient) {
        if step != self.step {
            self.nodes.clear();
            self.step = step;
        }
        self.nodes.insert(node, stage(sum));
    }

    /// The nodes of an exchange; what was not begun before begins now.
    pub fn staged(
        &mut self,
        step: u64,
        sums: BTreeMap<LaneRange, Gradient>,
    ) -> BTreeMap<LaneRange, Staged> {
        let staged = sums.into_iter().map(|(node, sum)| {
            if step != self.step || !self.nodes.contains_key(&node) {
                self.begin(step, node, sum);
            }
            (node, self.nodes[&node].clone())
        });
        staged.collect()
    }

    /// Forgets everything: the step was applied.
    pub fn clear(&mut self) {
        self.nodes.clear();
    }
}

fn stage(sum: Gradient) -> Staged {
    match sum {
        Gradient::Host(values) => futures::future::ready(Ok(values)).boxed().shared(),
        Gradient::Device(_) => {
            let reading = tokio::task::spawn_blocking(move || sum.read());
            let read = async move {
                let read = reading
                    .await
                    .map_err(|e| format!("the copying thread: {e}"))?;
                read.map_err(|e| e.to_string())
            };
            read.boxed().shared()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nodes_are_staged_once_and_belong_to_their_step() {
        let node = LaneRange { start: 0, end: 2 };
        let sum = |value: f32| Gradient::from(vec![value]);
        let mut staging = Staging::default();
        staging.begin(3, node, sum(1.0));
        let of = |value: f32| BTreeMap::from([(node, sum(value))]);
        let first = staging.staged(3, of(7.0)).remove(&node).expect("there");
        assert_eq!(*first.await.expect("on the host"), [1.0], "what was begun");
        let later = staging.staged(4, of(2.0)).remove(&node).expect("there");
        assert_eq!(*later.await.expect("on the host"), [2.0]);
        staging.clear();
        let again = staging.staged(4, of(5.0)).remove(&node).expect("there");
        assert_eq!(*again.await.expect("on the host"), [5.0]);
    }
}
