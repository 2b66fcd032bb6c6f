//! The shard format: webdataset tars of image-caption pairs with a manifest and an index per shard.
//!
//! Everything that touches stored pairs reads and writes through here. It knows neither runs nor
//! lanes, and decodes images only to find broken ones.

pub mod check;
pub mod cli;
mod error;
pub mod jpeg;
pub mod looks;
pub mod manifest;
pub mod pack;
pub mod pair;
pub mod reader;
pub mod store;

pub use error::ShardError;
pub use looks::verify;
