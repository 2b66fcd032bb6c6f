//! A run's configuration: structs, layering and validation, beside the run files themselves.
//!
//! Layers, last wins: file, environment (`BELFRY_SET`), `--set key=value`. Unknown keys are
//! refused. [`RunConfig::validate`] turns what was parsed into a [`ValidConfig`] that cannot be
//! wrong: batch arithmetic, model sizes, schedule. [`plan`] lines runs up.

mod collective;
mod data;
mod init;
mod layers;
mod model;
pub mod plan;
mod precision;
pub mod rng;
mod run_config;
mod timeouts;
mod validate;

pub use collective::{Collective, Transport, Wire};
pub use data::*;
pub use init::Init;
pub use layers::{ConfigError, load, load_str};
pub use model::*;
pub use precision::{Matmul, Precision};
pub use run_config::*;
pub use timeouts::Timeouts;
pub use validate::{CPU_APART, ValidConfig};
