//! A run's configuration: structs, layering and validation, beside the run files themselves.
//!
//! Layers, last wins: a file over the file that its `base` names, environment (`BELFRY_SET`),
//! `--set key=value` or `--set @FILE`. Unknown keys are refused. [`RunConfig::validate`] turns what
//! was parsed into a [`ValidConfig`] that cannot be wrong: batch arithmetic, model sizes, schedule. [`plan`] lines runs up.

mod base;
mod collective;
mod data;
mod eval;
pub mod figures;
mod init;
mod layers;
mod length;
mod model;
pub mod plan;
mod precision;
pub mod rng;
mod run_config;
mod timeouts;
mod validate;

pub use collective::{Collective, Transport, Wire};
pub use data::*;
pub use eval::Eval;
pub use init::Init;
pub use layers::{ConfigError, load, load_str};
pub use length::{Epochs, Rhythm};
pub use model::*;
pub use precision::{Matmul, Precision};
pub use run_config::*;
pub use timeouts::Timeouts;
pub use validate::{CPU_APART, ValidConfig};
