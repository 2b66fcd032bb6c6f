//! Weights from outside: published encoders and checkpoints in, the authors' names out.
//!
//! Stands before the walk of a sample begins: a run's first state is fresh numbers, over which the
//! files of `[init]` are laid in their order. In the order of that way: `source` (bytes and their
//! hash), `file` (tensors, whatever the format: `plain` safetensors, `torch` with `pickle`, `run` the
//! checkpoint of another run),
//! `layout` (whose tensor is whose), `fill` (shapes, positions, numbers), `report` (what happened to
//! every name). It refuses to know layers and losses: a model is a list of names and shapes
//! (`target`).

mod error;
mod file;
mod fill;
mod layout;
mod pickle;
mod plain;
mod report;
mod run;
mod source;
mod target;
mod torch;
mod write;

pub use error::WeightsError;
pub use report::{Applied, FileReport, Report, Unused};
pub use target::{Target, Targets};
pub use write::{encode, put};

use belfry_configs::Init;

use fill::Filling;

/// Lays the files of `init` over `flat`, later ones over earlier ones, and the checkpoint of its run
/// over them all. A function of the files, the checkpoint, the names and shapes alone, so that every
/// worker begins with the same bits.
///
/// # Errors
/// [`WeightsError`]: a file that is damaged, dangerous or of another architecture, a weight that is
/// not finite or misshaped, an encoder's weight that no file holds.
pub async fn import(
    init: &Init,
    targets: &Targets,
    flat: Vec<f32>,
) -> Result<(Vec<f32>, Report), WeightsError> {
    let mut filling = Filling::new(init, targets, flat)?;
    for location in &init.from {
        let source = source::open(location).await?;
        let taking = tokio::task::spawn_blocking(move || {
            filling.take(file::TensorFile::open(source)?)?;
            Ok::<_, WeightsError>(filling)
        });
        filling = taking
            .await
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
    }
    if let Some(checkpoint) = run::open(init).await? {
        filling.take(checkpoint)?;
    }
    filling.finish()
}
