//! The all-reduce between workers and the copy of a state from one worker to another.
//!
//! Stands between the tree nodes that a worker holds for a step and the optimizer's update. Every
//! float is added along the canonical lane tree, so the result's bits do not depend on the number
//! of workers or on who holds what. Knows nothing of models, lanes' contents or the coordinator.

mod alive;
pub mod digest;
mod endpoint;
mod error;
mod exchange;
mod floats;
mod fold;
mod frame;
mod gather;
pub mod nccl;
mod peer;
mod plan;
mod state_copy;
mod transport;

#[cfg(test)]
mod contract;
#[cfg(test)]
mod seeded;

pub use endpoint::{Endpoint, Limits};
pub use error::{CollectiveError, Reaction};
pub use floats::{DeviceFloats, DeviceOwner, Floats, Length};
pub use gather::{Gather, GatherMember};
pub use plan::{Member, Reduce, Reduced};
pub use state_copy::{Copied, StateSource};
pub use transport::{DeviceLinks, Reducing, SumOrder, Transport, Wire};
