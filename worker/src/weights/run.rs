//! The parameters of another run's checkpoint, as a file of weights.
//!
//! Which checkpoint that is was chosen before this run started and stands in its configuration with
//! the hash of the manifest; the manifest names the hash of every part. So all workers begin with the
//! same bytes or not at all: this room looks for no other checkpoint. It reads parameters and leaves
//! the optimizer's moments.

use std::collections::BTreeMap;

use belfry_configs::Init;
use safetensors::{Dtype, SafeTensors};
use sha2::{Digest as _, Sha256};
use shard_tools::store::{Root, StoreError};

use super::error::WeightsError;
use super::file::{Data, Stored, TensorFile};
use super::pickle::Element;
use crate::checkpoint::{MANIFEST, Manifest, ManifestPart, folder, patiently};
use crate::state::hex;

/// What stands before a parameter's name in a part, beside those of its moments.
const PARAMETER: &str = "parameter/";

/// Little-endian numbers by name.
pub(crate) type Parameters = BTreeMap<String, Vec<u8>>;

/// Reads the checkpoint that `init` pins, if it begins with a run.
///
/// # Errors
/// [`WeightsError::Unpinned`] if none is chosen, [`WeightsError::Format`] if a byte is not what was
/// chosen, [`WeightsError::Store`].
pub(crate) async fn open(init: &Init) -> Result<Option<TensorFile>, WeightsError> {
    let Some(run) = &init.run else {
        return Ok(None);
    };
    let Some((run, step, sha256)) = init.pinned() else {
        return Err(WeightsError::Unpinned { run: run.clone() });
    };
    let checkpoint = Checkpoint::open(run, step)?;
    let text = checkpoint.read(MANIFEST).await?;
    let found = hex(&Sha256::digest(&text));
    if found != sha256 {
        let reason = format!("has sha256 {found}; this run begins with {sha256}");
        return Err(checkpoint.wrong(MANIFEST, &reason));
    }
    let manifest: Manifest = serde_json::from_slice(&text)
        .map_err(|e| checkpoint.wrong(MANIFEST, &format!("is not a manifest: {e}")))?;
    let mut tensors = BTreeMap::new();
    let mut parameters = Parameters::new();
    for part in &manifest.parts {
        let bytes = checkpoint.part(part).await?;
        let taken = take(&bytes, &mut tensors, &mut parameters);
        taken.map_err(|reason| checkpoint.wrong(&part.file, &reason))?;
    }
    Ok(Some(TensorFile {
        name: checkpoint.name(),
        sha256: sha256.to_owned(),
        tensors,
        others: BTreeMap::new(),
        data: Data::Run(parameters),
    }))
}

/// A checkpoint of another run.
struct Checkpoint {
    root: Root,
    folder: String,
}

impl Checkpoint {
    fn open(run: &str, step: u64) -> Result<Self, WeightsError> {
        let root = Root::existing(run).map_err(|source| WeightsError::Store {
            file: run.to_owned(),
            source: Box::new(source),
        })?;
        let folder = folder(step);
        Ok(Checkpoint { root, folder })
    }

    fn name(&self) -> String {
        format!("{}/{}", self.root, self.folder)
    }

    fn wrong(&self, file: &str, reason: &str) -> WeightsError {
        WeightsError::Format {
            file: format!("{}/{file}", self.name()),
            reason: format!(
                "{reason}; bring the checkpoint back, or start a new run, which chooses among those \
                 that are right"
            ),
        }
    }

    async fn read(&self, file: &str) -> Result<bytes::Bytes, WeightsError> {
        let read = patiently(&self.root, &format!("{}/{file}", self.folder)).await;
        read.map_err(|source| match source {
            StoreError::NotFound { .. } => self.wrong(file, "is missing"),
            source => WeightsError::Store {
                file: format!("{}/{file}", self.name()),
                source: Box::new(source),
            },
        })
    }

    async fn part(&self, part: &ManifestPart) -> Result<bytes::Bytes, WeightsError> {
        let bytes = self.read(&part.file).await?;
        part.check(&bytes)
            .map_err(|reason| self.wrong(&part.file, &reason))?;
        Ok(bytes)
    }
}

/// Keeps a part's parameters.
fn take(
    bytes: &[u8],
    tensors: &mut BTreeMap<String, Stored>,
    parameters: &mut Parameters,
) -> Result<(), String> {
    let file = SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?;
    for (key, view) in file.tensors() {
        let Some(name) = key.strip_prefix(PARAMETER) else {
            continue;
        };
        if view.dtype() != Dtype::F32 {
            return Err(format!("`{key}` is {:?}, not F32", view.dtype()));
        }
        let stored = Stored {
            element: Element::F32,
            shape: view.shape().to_vec(),
        };
        parameters.insert(name.to_owned(), view.data().to_vec());
        if tensors.insert(name.to_owned(), stored).is_some() {
            return Err(format!("`{key}` is in another part too"));
        }
    }
    Ok(())
}
