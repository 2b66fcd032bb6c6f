//! Checkpoints: a fixed number of safetensors parts, named by content, made whole by a manifest.
//!
//! A part holds whole parameters with both moments, keyed by the authors' parameter names, so that
//! any reader of safetensors can open it. Boundaries follow the parameter table alone, never the
//! number of workers. Workers write parts; only the coordinator writes manifests.

use std::collections::BTreeMap;
use std::ops::Range;

use belfry_model::ParamTable;
use belfry_proto::v1;
use bytes::Bytes;
use safetensors::tensor::{Dtype, TensorView};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use shard_tools::store::Root;

use crate::error::WorkerError;
use crate::held::HeldState;
use crate::state::{TrainState, hex};
use crate::weights;

/// Prefixes of the three tensors of a parameter; PyTorch's names for AdamW's moments.
const KINDS: [&str; 3] = ["parameter", "exp_avg", "exp_avg_sq"];

/// What a manifest says; the coordinator writes it (more fields may stand in it).
#[derive(Debug, Deserialize)]
struct Manifest {
    step: u64,
    parts: Vec<ManifestPart>,
}

#[derive(Debug, Deserialize)]
struct ManifestPart {
    part: u32,
    file: String,
    sha256: String,
    bytes: u64,
}

/// The folder of a step's checkpoint, relative to the run's root.
pub fn folder(step: u64) -> String {
    format!("checkpoints/step-{step:09}")
}

/// Indices of the parameters in part `part` of `parts`: those that begin in its share of the flat
/// vector.
fn members(table: &ParamTable, part: u32, parts: u32) -> Range<usize> {
    let total = table.elements() as u64;
    let edge = |p: u32| (total * u64::from(p) / u64::from(parts)) as usize;
    let entries = table.entries();
    let at = |offset: usize| entries.partition_point(|e| e.offset < offset);
    at(edge(part))..at(edge(part + 1))
}

/// A tensor on its way into a file: name, type, shape, little-endian bytes.
type Raw = (String, Dtype, Vec<usize>, Vec<u8>);

fn raw_f32(name: String, shape: &[usize], values: &[f32]) -> Raw {
    let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    (name, Dtype::F32, shape.to_vec(), bytes)
}

/// A safetensors file; the same tensors give the same bytes. One metadata pair only: more would
/// come out in the map's random order.
fn encode(tensors: &[Raw], metadata: (&str, String)) -> Vec<u8> {
    let views = tensors.iter().map(|(name, dtype, shape, raw)| {
        let view = TensorView::new(*dtype, shape.clone(), raw);
        (
            name,
            view.expect("the table's shapes multiply to its lengths"),
        )
    });
    let metadata = [(metadata.0.to_owned(), metadata.1)].into();
    safetensors::serialize(views, Some(metadata)).expect("names are unique and sizes are known")
}

/// One part's bytes.
fn encode_part(state: &TrainState, table: &ParamTable, part: u32, parts: u32) -> Vec<u8> {
    let entries = &table.entries()[members(table, part, parts)];
    let tensors: Vec<Raw> = entries
        .iter()
        .flat_map(|e| {
            KINDS.iter().zip(state.tensors()).map(|(kind, tensor)| {
                let values = &tensor[e.offset..e.offset + e.len];
                raw_f32(format!("{kind}/{}", e.name), &e.shape, values)
            })
        })
        .collect();
    encode(&tensors, ("step", state.step.to_string()))
}

/// Writes one part and says where it is.
pub async fn store_part(
    root: &Root,
    state: &HeldState,
    table: &ParamTable,
    part: u32,
    parts: u32,
) -> v1::PartStored {
    let host = match state.host() {
        Ok(host) => host,
        Err(error) => {
            return v1::PartStored {
                step: state.step(),
                part,
                error: error.to_string(),
                ..Default::default()
            };
        }
    };
    let bytes = encode_part(host, table, part, parts);
    let sha256 = hex(&Sha256::digest(&bytes));
    let file = format!("{}.safetensors", &sha256[..32]);
    let mut stored = v1::PartStored {
        step: state.step(),
        part,
        sha256,
        bytes: bytes.len() as u64,
        file,
        error: String::new(),
    };
    let path = format!("{}/{}", folder(state.step()), stored.file);
    // The name is the content, so an overwrite by the other copy changes nothing.
    if let Err(error) = root.put(&path, Bytes::from(bytes)).await {
        stored.error = format!("cannot write checkpoint part {path}: {error}");
    }
    stored
}

/// Reads the checkpoint under `manifest`, verifying every hash, name and shape.
///
/// # Errors
/// [`WorkerError::Checkpoint`] naming the file, [`WorkerError::Store`] when it cannot be read.
pub async fn load(
    root: &Root,
    manifest: &str,
    table: &ParamTable,
) -> Result<TrainState, WorkerError> {
    let refuse = |file: &str, reason: String| WorkerError::Checkpoint {
        file: file.to_owned(),
        reason,
    };
    let read = async |file: &str| {
        root.get(file).await.map_err(|source| WorkerError::Store {
            what: format!("cannot read checkpoint file {file}"),
            source,
        })
    };
    let text = read(manifest).await?;
    let parsed: Manifest = serde_json::from_slice(&text)
        .map_err(|e| refuse(manifest, format!("is not a manifest: {e}")))?;
    let folder = manifest.rsplit_once('/').map_or("", |(folder, _)| folder);
    let mut state = TrainState {
        step: parsed.step,
        parameters: vec![0.0; table.elements()],
        exp_avg: vec![0.0; table.elements()],
        exp_avg_sq: vec![0.0; table.elements()],
    };
    let mut found: BTreeMap<String, usize> = BTreeMap::new();
    for part in &parsed.parts {
        let file = format!("{folder}/{}", part.file);
        let bytes = read(&file).await?;
        let sha256 = hex(&Sha256::digest(&bytes));
        if sha256 != part.sha256 || bytes.len() as u64 != part.bytes {
            return Err(refuse(
                &file,
                format!(
                    "part {} has {} bytes and sha256 {sha256}, its manifest says {} and {}",
                    part.part,
                    bytes.len(),
                    part.bytes,
                    part.sha256
                ),
            ));
        }
        decode(&bytes, table, &mut state, &mut found).map_err(|reason| refuse(&file, reason))?;
    }
    for entry in table.entries() {
        if found.get(&entry.name) != Some(&KINDS.len()) {
            let reason = format!("no complete `{}` with both moments in any part", entry.name);
            return Err(refuse(manifest, reason));
        }
    }
    Ok(state)
}

fn decode(
    bytes: &[u8],
    table: &ParamTable,
    state: &mut TrainState,
    found: &mut BTreeMap<String, usize>,
) -> Result<(), String> {
    let file = safetensors::SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?;
    for (key, view) in file.tensors() {
        let (kind, name) = key.split_once('/').unwrap_or(("", &key));
        let entry = table
            .get(name)
            .ok_or_else(|| format!("`{key}` is not of this model"))?;
        let target = match kind {
            "parameter" => &mut state.parameters,
            "exp_avg" => &mut state.exp_avg,
            "exp_avg_sq" => &mut state.exp_avg_sq,
            _ => return Err(format!("`{key}` is neither a parameter nor a moment")),
        };
        if view.shape() != entry.shape.as_slice() || view.dtype() != Dtype::F32 {
            return Err(format!(
                "`{key}` is {:?} {:?}, this model has F32 {:?}",
                view.dtype(),
                view.shape(),
                entry.shape
            ));
        }
        let slice = &mut target[entry.offset..entry.offset + entry.len];
        for (value, raw) in slice.iter_mut().zip(view.data().chunks_exact(4)) {
            *value = f32::from_le_bytes(raw.try_into().expect("chunks of four bytes"));
        }
        *found.entry(entry.name.clone()).or_default() += 1;
    }
    Ok(())
}

/// Writes `export/model.safetensors`: the parameters alone under the authors' names, with the one
/// integer buffer that their checkpoints carry, so that PyTorch loads it with `strict=True`.
///
/// # Errors
/// [`WorkerError::Store`] when the root refuses.
pub async fn export(
    root: &Root,
    state: &TrainState,
    table: &ParamTable,
    positions: u32,
) -> Result<String, WorkerError> {
    let bytes = weights::encode(&state.parameters, &table.into(), positions, |_| true);
    let file = "export/model.safetensors";
    root.put(file, Bytes::from(bytes))
        .await
        .map_err(|source| WorkerError::Store {
            what: format!("cannot write {file}"),
            source,
        })?;
    Ok(file.to_owned())
}
