//! The simulator: the coordinator's and the workers' cores as they run in production, with virtual
//! time, a seeded network, and faults of processes and shards at any moment.
//!
//! What a device computes is replaced by a few floats whose sums depend on the order of addition,
//! so that a wrong sum shows. No thread, no clock, no socket.

mod arithmetic;
mod coordinator;
mod workers;
mod world;

pub use arithmetic::SHARDS;
pub use world::{Fault, Sizes, World};
