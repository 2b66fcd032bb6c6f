//! The one face of every way to sum: TCP between hosts, or a device's own links.
//!
//! The worker's shell holds one [`Transport`] and does not know which. Both give the same bits,
//! unless a ring was asked for.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use belfry_proto::LaneRange;

use crate::endpoint::Endpoint;
use crate::error::CollectiveError;
use crate::floats::Floats;
use crate::plan::{Reduce, Reduced};

/// An exchange under way; dropping it gives its generation up.
pub type Reducing = Pin<Box<dyn Future<Output = Result<Reduced, CollectiveError>> + Send>>;

/// How the members of a generation are linked beside TCP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceLinks {
    /// All ranks, each once, in groups that device links span: one group of everybody, or one per
    /// host. Ascending within a group; a group's first rank leads it.
    pub groups: Vec<Vec<usize>>,
    /// Unique id of the own group's links; empty where the group is this member alone.
    pub id: Vec<u8>,
    /// In what order floats are added.
    pub order: SumOrder,
}

/// In what order an exchange adds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SumOrder {
    /// Along the canonical lane tree: the same bits for every number of workers.
    Tree,
    /// As the device's library likes: bits hold per number of workers only.
    Ring(Wire),
}

/// What a ring carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// 32 bits a float.
    F32,
    /// 16 bits a float, rounded to the nearest even at every addition.
    Bf16,
}

/// A way to sum the partials of all members.
pub trait Transport: Send + Sync {
    /// Takes part in one exchange; without `links` it goes over TCP. A generation whose exchange
    /// failed or was dropped is over.
    fn reduce(self: Arc<Self>, request: Reduce<Floats>, links: Option<DeviceLinks>) -> Reducing;

    /// An id for the links of a group that this member leads.
    ///
    /// # Errors
    /// [`CollectiveError::NoDeviceLinks`], saying what is missing.
    fn new_id(&self) -> Result<Vec<u8>, CollectiveError>;
}

impl Transport for Endpoint {
    fn reduce(self: Arc<Self>, request: Reduce<Floats>, links: Option<DeviceLinks>) -> Reducing {
        Box::pin(async move {
            if links.is_some() {
                return Err(no_links());
            }
            let staged = tokio::task::spawn_blocking(move || staged(&request)).await;
            let request = staged.map_err(|e| CollectiveError::Internal(e.to_string()))??;
            self.all_reduce(request).await
        })
    }

    fn new_id(&self) -> Result<Vec<u8>, CollectiveError> {
        Err(no_links())
    }
}

fn no_links() -> CollectiveError {
    let reason = "this process opened TCP only".to_owned();
    CollectiveError::NoDeviceLinks(reason)
}

/// The request with every node in host memory.
pub(crate) fn staged(request: &Reduce<Floats>) -> Result<Reduce, CollectiveError> {
    let mut partials: BTreeMap<LaneRange, Arc<Vec<f32>>> = BTreeMap::new();
    for (node, floats) in &request.partials {
        let on_host = floats.on_host().map_err(|reason| {
            CollectiveError::Device(format!("node {node} could not be copied down: {reason}"))
        })?;
        partials.insert(*node, on_host);
    }
    Ok(request.with(partials))
}
