//! A worker: one process, one device, some lanes of a run.
//!
//! [`run`] is the whole of it. Rooms, in the order of the walk of a sample: `device` (what it owns),
//! `train_step` (host batches to lane gradients, through the `task`'s heads and losses, or `contrast`
//! with the whole global batch), `partials` (lane gradients to tree nodes), the
//! collective (nodes to one sum), `core` (when what may happen), `optimizer`, `state` and `held`
//! (the sum applied), `snapshot` and `checkpoint` (the state made durable); `weights` brings in what a run begins
//! with. `session` is the shell around them, `link` the line to the coordinator.

pub mod checkpoint;
mod contrast;
pub mod core;
mod device;
mod digests;
pub mod duplicate;
mod error;
pub mod evaluate;
mod export;
mod fingerprint;
mod gathering;
pub mod held;
mod inject;
mod inspect;
mod link;
pub mod memory;
pub mod optimizer;
#[cfg(feature = "cubecl")]
mod optimizer_kernel;
mod optimizer_on_device;
pub mod partials;
mod progress;
mod pulse;
mod session;
mod snapshot;
mod staging;
pub mod state;
pub mod task;
mod train_step;
mod transport;
pub mod weights;

pub use device::open as open_device;
pub use error::WorkerError;
pub use export::{checkpoint_parameters, checkpoint_steps, export_checkpoint};
pub use fingerprint::fingerprint;
pub use inject::Injection;
pub use inspect::inspect;
pub use link::Whereabouts;
pub use session::{WorkerOptions, run};
