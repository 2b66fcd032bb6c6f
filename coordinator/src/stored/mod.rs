//! Checkpoints as they lie in the store: names, manifests, what stands beside them, and what is
//! listed. Whole is what has a manifest; parts without one are nothing.
//!
//! `verify` reads them again, `retention` says which are kept, `scrub` does both in the background.
//! Knows no run that is being led and no tensors.

pub mod retention;
pub mod scrub;
pub mod verify;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{SystemTime, UNIX_EPOCH};

use belfry_proto::v1;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::json;
use shard_tools::store::{Created, Root, StoreError};

/// The folder of all checkpoints.
pub const FOLDER: &str = "checkpoints";
/// The file whose existence makes parts a checkpoint.
const MANIFEST: &str = "manifest.json";
/// Says what is wrong with a checkpoint; one that has it is not used.
const CORRUPT: &str = "corrupt.json";
/// Says when all of it was read and found right.
const VERIFIED: &str = "verified.json";
/// Says what it cost; no promise hangs on it.
const COST: &str = "cost.json";
/// Bytes of the blocks whose hashes say where a byte is wrong, as workers cut them.
const BLOCK_BYTES: u64 = 8 << 20;
/// Bytes of a block's hash (XXH3-64).
const BLOCK_HASH_BYTES: usize = 8;
/// A manifest of a thousand parts of gigabytes is smaller.
const MANIFEST_BYTES_MAX: u64 = 64 << 20;

/// What a manifest says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Of the format.
    pub schema_version: u32,
    /// Updates applied.
    pub step: u64,
    /// Whose it is.
    pub run_id: String,
    /// In order.
    pub parts: Vec<Part>,
}

/// A part as its manifest names it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// Its place.
    pub part: u32,
    /// Its name in the checkpoint's folder.
    pub file: String,
    /// Of all its bytes, hexadecimal.
    pub sha256: String,
    /// Its size.
    pub bytes: u64,
    /// Bytes of a block; 0 where an earlier version wrote no blocks.
    #[serde(default)]
    pub block_bytes: u64,
    /// XXH3-64 of each block, hexadecimal, one behind the other.
    #[serde(default)]
    pub blocks: String,
}

/// A checkpoint's folder as it is listed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stored {
    /// Updates applied.
    pub step: u64,
    /// When its manifest was put; none: it has none, and is no checkpoint.
    pub made: Option<SystemTime>,
    /// When it was last read and found right.
    pub verified: Option<SystemTime>,
    /// Whether it is marked as corrupt.
    pub corrupt: bool,
    /// Files below the folder, the manifest aside, and their sizes.
    pub files: BTreeMap<String, u64>,
}

impl Stored {
    /// Whether a run may begin from it.
    pub fn is_usable(&self) -> bool {
        self.made.is_some() && !self.corrupt
    }

    /// Bytes of its parts.
    pub fn bytes(&self) -> u64 {
        self.parts().map(|(_, bytes)| bytes).sum()
    }

    /// Its parts and their sizes.
    pub fn parts(&self) -> impl Iterator<Item = (&str, u64)> {
        let parts = self.files.iter().filter(|(file, _)| is_part(file));
        parts.map(|(file, bytes)| (file.as_str(), *bytes))
    }
}

fn is_part(file: &str) -> bool {
    file.ends_with(".safetensors")
}

/// The folder of a step's checkpoint, relative to the run's root.
pub fn folder(step: u64) -> String {
    format!("{FOLDER}/step-{step:09}")
}

/// The manifest of a step's checkpoint, relative to the run's root.
pub fn manifest_file(step: u64) -> String {
    format!("{}/{MANIFEST}", folder(step))
}

/// All folders of checkpoints, by step, whether or not they hold one.
///
/// # Errors
/// [`StoreError`] when the store does not list them.
pub async fn list(root: &Root) -> Result<BTreeMap<u64, Stored>, StoreError> {
    let mut found: BTreeMap<u64, Stored> = BTreeMap::new();
    for object in root.objects(FOLDER).await? {
        let below = object.key.strip_prefix(FOLDER).unwrap_or_default();
        let parts = below.trim_start_matches('/').split_once('/');
        let Some((step, file)) = parts.and_then(|(step, file)| {
            let step = step.strip_prefix("step-")?.parse::<u64>().ok()?;
            Some((step, file))
        }) else {
            // Not ours, and not touched.
            continue;
        };
        let stored = found.entry(step).or_default();
        stored.step = step;
        match file {
            MANIFEST => stored.made = Some(object.modified),
            VERIFIED => stored.verified = Some(object.modified),
            CORRUPT => stored.corrupt = true,
            _ => {}
        }
        if file != MANIFEST {
            stored.files.insert(file.to_owned(), object.bytes);
        }
    }
    Ok(found)
}

/// Steps of the checkpoints that a run may begin from.
///
/// # Errors
/// As [`list`].
pub async fn usable(root: &Root) -> Result<BTreeSet<u64>, StoreError> {
    let found = list(root).await?;
    let usable = found.into_values().filter(Stored::is_usable);
    Ok(usable.map(|stored| stored.step).collect())
}

/// The manifest of `step`, or what is wrong with it.
///
/// # Errors
/// [`StoreError`] when it cannot be read for another reason than that it is not there.
pub async fn manifest(root: &Root, step: u64) -> Result<Result<Manifest, String>, StoreError> {
    let file = manifest_file(step);
    let text = match root.get_range(&file, 0..MANIFEST_BYTES_MAX).await {
        Ok(text) => text,
        Err(StoreError::NotFound { .. }) => return Ok(Err(format!("{file} does not exist"))),
        // An empty file has no range.
        Err(_) if root.get(&file).await?.is_empty() => Bytes::new(),
        Err(error) => return Err(error),
    };
    Ok(read_manifest(&text, step).map_err(|reason| format!("{file} {reason}")))
}

fn read_manifest(text: &[u8], step: u64) -> Result<Manifest, String> {
    let bytes = text.len();
    let manifest: Manifest = serde_json::from_slice(text)
        .map_err(|e| format!("({bytes} bytes) is not a manifest: {e}"))?;
    if manifest.step != step {
        let said = manifest.step;
        return Err(format!("is of step {said}, its folder of step {step}"));
    }
    let places = manifest.parts.iter().map(|part| part.part);
    if manifest.parts.is_empty() || !places.eq(0..manifest.parts.len() as u32) {
        return Err("does not name each part once and in order".into());
    }
    Ok(manifest)
}

/// Puts a step's manifest, which makes its parts a checkpoint. Says what differs from one that
/// stands there; one that is none (cut by whatever died, or changed since) is replaced.
///
/// # Errors
/// [`StoreError`].
pub async fn put_manifest(
    root: &Root,
    run_id: &str,
    step: u64,
    parts: &[v1::PartStored],
) -> Result<Option<String>, StoreError> {
    let made = Manifest {
        schema_version: 1,
        step,
        run_id: run_id.to_owned(),
        parts: parts.iter().map(Part::of).collect(),
    };
    let file = manifest_file(step);
    let text = Bytes::from(serde_json::to_vec_pretty(&made).expect("plain data"));
    // A mark stood for what has just been written again.
    root.delete(&format!("{}/{CORRUPT}", folder(step))).await?;
    if root.create(&file, text.clone()).await? == Created::Yes {
        return Ok(None);
    }
    match read_manifest(&root.get(&file).await?, step) {
        Ok(there) if there.says_the_same(&made) => Ok(None),
        Ok(_) => Ok(Some(format!("{file} says otherwise about the same step"))),
        Err(reason) => {
            tracing::warn!(file, reason, "a broken manifest is replaced");
            root.put(&file, text).await?;
            Ok(None)
        }
    }
}

impl Manifest {
    fn says_the_same(&self, other: &Manifest) -> bool {
        let parts = |m: &Manifest| -> Vec<(String, String, u64)> {
            let parts = m.parts.iter();
            parts
                .map(|p| (p.file.clone(), p.sha256.clone(), p.bytes))
                .collect()
        };
        self.run_id == other.run_id && parts(self) == parts(other)
    }
}

impl Part {
    fn of(part: &v1::PartStored) -> Self {
        let whole = part.bytes.div_ceil(BLOCK_BYTES) as usize * BLOCK_HASH_BYTES;
        let has_blocks = part.blocks.len() == whole;
        Part {
            part: part.part,
            file: part.file.clone(),
            sha256: part.sha256.clone(),
            bytes: part.bytes,
            block_bytes: if has_blocks { BLOCK_BYTES } else { 0 },
            blocks: match has_blocks {
                true => hex(&part.blocks),
                false => String::new(),
            },
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Writes down what a checkpoint cost.
///
/// # Errors
/// [`StoreError`].
pub async fn put_cost(root: &Root, step: u64, made: &v1::CheckpointMade) -> Result<(), StoreError> {
    let cost = json!({
        "step": step, "bytes": made.bytes, "seconds": made.seconds,
        "stall_seconds": made.stall_seconds, "retries": made.retries,
    });
    put_beside(root, step, COST, &cost).await
}

/// What a checkpoint cost, if it was written down.
///
/// # Errors
/// [`StoreError`].
pub async fn cost(root: &Root, step: u64) -> Result<Option<serde_json::Value>, StoreError> {
    match root.get(&format!("{}/{COST}", folder(step))).await {
        Ok(text) => Ok(serde_json::from_slice(&text).ok()),
        Err(StoreError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Marks a checkpoint as read and found right, or as corrupt.
///
/// # Errors
/// [`StoreError`].
pub async fn mark(root: &Root, verdict: &verify::Verdict) -> Result<(), StoreError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let at = now.map_or(0, |now| now.as_secs());
    let (step, faults) = (verdict.step, &verdict.faults);
    let text = json!({"step": step, "at": at, "bytes": verdict.bytes, "faults": faults});
    if faults.is_empty() {
        root.delete(&format!("{}/{CORRUPT}", folder(step))).await?;
        return put_beside(root, step, VERIFIED, &text).await;
    }
    put_beside(root, step, CORRUPT, &text).await
}

async fn put_beside(
    root: &Root,
    step: u64,
    file: &str,
    value: &serde_json::Value,
) -> Result<(), StoreError> {
    let text = serde_json::to_vec_pretty(value).expect("plain data");
    root.put(&format!("{}/{file}", folder(step)), Bytes::from(text))
        .await
}

/// Deletes a checkpoint: its manifest first, so that what is left after a crash is no checkpoint.
/// Says how many bytes of parts are gone.
///
/// # Errors
/// [`StoreError`]: some of it may be left.
pub async fn delete(root: &Root, step: u64) -> Result<u64, StoreError> {
    root.delete(&manifest_file(step)).await?;
    let mut bytes = 0;
    for object in root.objects(&folder(step)).await? {
        root.delete(&object.key).await?;
        bytes += if is_part(&object.key) {
            object.bytes
        } else {
            0
        };
    }
    if let Some(local) = root.local_folder() {
        // An empty folder is nothing; one that is being written to again is not empty.
        let _ = std::fs::remove_dir(local.join(folder(step)));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests;
