//! Checkpoints: a fixed number of safetensors parts, named by content, made whole by a manifest.
//!
//! A part holds whole parameters with both moments, keyed by the authors' parameter names, so that
//! any reader of safetensors can open it. Boundaries follow the parameter table alone, never the
//! number of workers. Workers write parts; only the coordinator writes manifests.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use belfry_model::ParamTable;
use belfry_proto::v1;
use bytes::Bytes;
use safetensors::tensor::{Dtype, View};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use shard_tools::store::{Root, StoreError};
use xxhash_rust::xxh3::xxh3_64;

use crate::error::WorkerError;
use crate::held::HeldState;
use crate::state::{TrainState, hex};
use crate::weights;

/// Prefixes of the three tensors of a parameter; PyTorch's names for AdamW's moments.
const KINDS: [&str; 3] = ["parameter", "exp_avg", "exp_avg_sq"];
/// A part's hash says that a byte is wrong; one more for each of these says where.
const BLOCK_BYTES: usize = 8 << 20;
/// A store that is away is asked so often, beyond its client's own retries: half an hour at least.
const READS_MAX: u32 = 180;
const READ_PAUSE: Duration = Duration::from_secs(10);

/// What makes the parts of a step a checkpoint.
pub(crate) const MANIFEST: &str = "manifest.json";

/// What a manifest says; the coordinator writes it (more fields may stand in it).
#[derive(Debug, Deserialize)]
pub(crate) struct Manifest {
    step: u64,
    pub parts: Vec<ManifestPart>,
}

/// A part as its manifest names it.
#[derive(Debug, Deserialize)]
pub(crate) struct ManifestPart {
    part: u32,
    pub file: String,
    sha256: String,
    bytes: u64,
}

impl ManifestPart {
    /// Whether `bytes` are this part's; if not, how they differ.
    pub fn check(&self, bytes: &[u8]) -> Result<(), String> {
        let sha256 = hex(&Sha256::digest(bytes));
        if sha256 == self.sha256 && bytes.len() as u64 == self.bytes {
            return Ok(());
        }
        Err(format!(
            "part {} has {} bytes and sha256 {sha256}, its manifest says {} and {}",
            self.part,
            bytes.len(),
            self.bytes,
            self.sha256
        ))
    }
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

/// A tensor on its way into a file: its shape, and its values where they are.
struct Values<'a> {
    shape: &'a [usize],
    values: Cow<'a, [f32]>,
}

impl View for Values<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }
    fn shape(&self) -> &[usize] {
        self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        if cfg!(target_endian = "little") {
            return Cow::Borrowed(bytemuck::cast_slice(&self.values));
        }
        Cow::Owned(self.values.iter().flat_map(|x| x.to_le_bytes()).collect())
    }
    fn data_len(&self) -> usize {
        size_of_val::<[f32]>(&self.values)
    }
}

/// A part in memory, and what is said of it once it is stored.
#[derive(Debug)]
pub struct Encoded {
    /// Name, hashes and size.
    pub stored: v1::PartStored,
    /// The file.
    pub bytes: Bytes,
}

/// Part `part` of `parts`: copied once, hashed, named. The same state gives the same bytes. A
/// device's own state comes to the host range by range. Takes as long as copying and hashing do:
/// not for a thread that serves others.
///
/// # Errors
/// [`WorkerError::Internal`] if a device does not give its state.
pub fn encode_part(
    state: &HeldState,
    table: &ParamTable,
    part: u32,
    parts: u32,
) -> Result<Encoded, WorkerError> {
    let entries = &table.entries()[members(table, part, parts)];
    let first = entries.first().map_or(0, |e| e.offset);
    let end = entries.last().map_or(first, |e| e.offset + e.len);
    let ranges = state.range(first..end)?;
    let tensors = entries.iter().flat_map(|e| {
        let here = e.offset - first..e.offset - first + e.len;
        KINDS.iter().zip(&ranges).map(move |(kind, range)| {
            let values = Values {
                shape: &e.shape,
                values: Cow::Borrowed(&range[here.clone()]),
            };
            (format!("{kind}/{}", e.name), values)
        })
    });
    // One metadata pair only: more would come out in the map's random order.
    let metadata = [("step".to_owned(), state.step().to_string())].into();
    let bytes = safetensors::serialize(tensors, Some(metadata));
    let bytes = bytes.expect("names are unique and shapes multiply to lengths");
    let sha256 = hex(&Sha256::digest(&bytes));
    let blocks = bytes.chunks(BLOCK_BYTES);
    Ok(Encoded {
        stored: v1::PartStored {
            step: state.step(),
            part,
            file: format!("{}.safetensors", &sha256[..32]),
            sha256,
            bytes: bytes.len() as u64,
            blocks: blocks.flat_map(|b| xxh3_64(b).to_le_bytes()).collect(),
            ..Default::default()
        },
        bytes: Bytes::from(bytes),
    })
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
        patiently(root, file).await.map_err(|source| match source {
            StoreError::NotFound { .. } => refuse(file, "is missing".into()),
            source => WorkerError::Store {
                what: format!("cannot read checkpoint file {file}"),
                source,
            },
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
        part.check(&bytes).map_err(|reason| refuse(&file, reason))?;
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

/// The whole object. A store that is away is waited for: another checkpoint would lie there too. A
/// disk is not away; what it does not give is not there.
pub(crate) async fn patiently(root: &Root, file: &str) -> Result<Bytes, StoreError> {
    let mut tries = 0;
    loop {
        match root.get(file).await {
            Err(error) if error.may_pass() && root.local_folder().is_none() => {
                tries += 1;
                if tries == READS_MAX {
                    return Err(error);
                }
                tracing::warn!(file, tries, %error, "waiting for the store");
                tokio::time::sleep(READ_PAUSE).await;
            }
            answer => return answer,
        }
    }
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
