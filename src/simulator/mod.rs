//! The simulator: the coordinator's and the workers' cores as they run in production, with virtual
//! time, a seeded network, an object store, and faults of all of them at any moment.
//!
//! What a device computes is replaced by a few floats whose sums depend on the order of addition,
//! so that a wrong sum shows. No thread, no clock, no socket.
//!
//! A caller makes a [`Setup`] (the run), [`Costs`] (what things take) and a [`World`] of a seed;
//! schedules faults, or lets them come at random ([`Mtbf`]); lets it run to a deadline in virtual
//! milliseconds; and reads its [`Counts`]. The same four give the same run.

mod arithmetic;
mod coordinator;
mod counts;
mod exchange;
mod faults;
mod invariants;
mod network;
mod setup;
mod store;
mod workers;
mod world;

pub use arithmetic::SHARDS;
pub use counts::{Counts, Request};
pub use faults::{Fault, Mtbf, Process};
pub use setup::{Costs, Setup, Span};
pub use world::World;
