//! Nodes on their way to where the exchange reads them: host memory, or where they are.
//!
//! For TCP a device's node is copied as soon as it is complete, on a thread of its own, while the
//! next lanes are computed; host nodes are there already. A repeated exchange finds what an earlier
//! one staged. Links between devices read nodes where they lie. It refuses to know who the nodes are
//! exchanged with.

use std::collections::BTreeMap;

use belfry_collective::Floats;
use belfry_model::Gradient;
use belfry_proto::LaneRange;
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};

/// A node's floats where the exchange reads them, or why the device did not give them.
pub(crate) type Staged = Shared<BoxFuture<'static, Result<Floats, String>>>;

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

/// Nodes for an exchange that reads a device's memory.
pub(crate) fn where_they_are(sums: BTreeMap<LaneRange, Gradient>) -> BTreeMap<LaneRange, Staged> {
    let lend = |(node, sum)| (node, on_a_thread(sum, lent));
    sums.into_iter().map(lend).collect()
}

fn stage(sum: Gradient) -> Staged {
    match sum {
        Gradient::Host(values) => futures::future::ready(Ok(values.into())).boxed().shared(),
        Gradient::Device(_) => on_a_thread(sum, on_host),
    }
}

fn on_a_thread(sum: Gradient, bring: fn(Gradient) -> Result<Floats, String>) -> Staged {
    let bringing = tokio::task::spawn_blocking(move || bring(sum));
    let brought = async move {
        let brought = bringing.await;
        brought.unwrap_or_else(|e| Err(format!("the copying thread: {e}")))
    };
    brought.boxed().shared()
}

fn on_host(sum: Gradient) -> Result<Floats, String> {
    let values = sum.read().map_err(|e| e.to_string())?;
    Ok(values.into())
}

#[cfg(not(feature = "cuda"))]
fn lent(sum: Gradient) -> Result<Floats, String> {
    on_host(sum)
}

/// A GPU's floats stay where they are.
#[cfg(feature = "cuda")]
fn lent(sum: Gradient) -> Result<Floats, String> {
    use std::sync::Arc;

    use belfry_collective::{DeviceFloats, DeviceOwner};
    use belfry_model::Lent;

    #[derive(Debug)]
    struct Owner(Lent);

    impl DeviceOwner for Owner {
        fn to_host(&self) -> Result<Vec<f32>, String> {
            self.0.to_host().map_err(|e| e.to_string())
        }
    }

    match sum.lend().map_err(|e| e.to_string())? {
        Some(lent) => Ok(Floats::Device(DeviceFloats {
            pointer: lent.pointer,
            len: lent.len,
            owner: Arc::new(Owner(lent)),
        })),
        None => on_host(sum),
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
        let first = values(staging.staged(3, of(7.0))).await;
        assert_eq!(first, [1.0], "what was begun");
        assert_eq!(values(staging.staged(4, of(2.0))).await, [2.0]);
        staging.clear();
        assert_eq!(values(staging.staged(4, of(5.0))).await, [5.0]);
        assert_eq!(values(where_they_are(of(6.0))).await, [6.0]);
    }

    async fn values(mut staged: BTreeMap<LaneRange, Staged>) -> Vec<f32> {
        let (_, one) = staged.pop_first().expect("a node");
        let floats = one.await.expect("the host gives it");
        floats.on_host().expect("it is there").to_vec()
    }
}
