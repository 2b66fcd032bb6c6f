//! Commands that look at a dataset and change nothing in it: each in a file of its own, over one
//! bounded walk through the shards.

mod dataset;
pub mod diff;
pub mod index;
pub mod info;
pub mod ls;
pub(crate) mod pixels;
pub mod sample;
mod sheet;
pub mod stats;
mod table;
pub mod verify;

pub use dataset::Dataset;
pub use table::thousands;
