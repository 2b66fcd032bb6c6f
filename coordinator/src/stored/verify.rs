//! Reads a checkpoint again, byte by byte in bounded memory, and says what is wrong where.

use std::time::Duration;

use futures::StreamExt as _;
use sha2::{Digest as _, Sha256};
use shard_tools::store::{Root, StoreError};
use tokio::time::Instant;
use xxhash_rust::xxh3::Xxh3;

use super::{BLOCK_HASH_BYTES, Part, folder, hex, manifest};

/// Wrong blocks of a part that are named; the others are counted.
const NAMED_MAX: usize = 4;

/// What reading a checkpoint again gave.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// Its step.
    pub step: u64,
    /// Bytes that were read.
    pub bytes: u64,
    /// What is wrong, each with its file and place; none: all is right.
    pub faults: Vec<String>,
}

/// Bytes that may be read in a second.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    bytes_per_second: f64,
    begun: Instant,
    read: u64,
}

impl Pace {
    /// From now on; infinity: as fast as it goes.
    pub fn new(bytes_per_second: f64) -> Self {
        Pace {
            bytes_per_second,
            begun: Instant::now(),
            read: 0,
        }
    }

    /// Waits until `bytes` more are due.
    async fn spend(&mut self, bytes: u64) {
        self.read += bytes;
        let due = Duration::from_secs_f64(self.read as f64 / self.bytes_per_second);
        tokio::time::sleep_until(self.begun + due).await;
    }
}

/// Reads all parts of the checkpoint of `step`; `progress` is told the bytes of each piece.
///
/// # Errors
/// [`StoreError`] when the store does not answer: nothing is known then.
pub async fn verify(
    root: &Root,
    step: u64,
    pace: &mut Pace,
    mut progress: impl FnMut(u64),
) -> Result<Verdict, StoreError> {
    let mut verdict = Verdict {
        step,
        bytes: 0,
        faults: Vec::new(),
    };
    let found = match manifest(root, step).await? {
        Ok(found) => found,
        Err(fault) => {
            verdict.faults.push(fault);
            return Ok(verdict);
        }
    };
    for part in &found.parts {
        let path = format!("{}/{}", folder(step), part.file);
        let mut read = Read::new(part);
        let told = async {
            let mut pieces = root
                .stream_range(&path, 0..part.bytes.saturating_add(1))
                .await?;
            while let Some(piece) = pieces.next().await {
                let piece = piece?;
                read.add(&piece);
                progress(piece.len() as u64);
                pace.spend(piece.len() as u64).await;
            }
            Ok::<(), StoreError>(())
        };
        let told = told.await;
        verdict.bytes += read.bytes;
        match told {
            Err(StoreError::NotFound { .. }) => {
                verdict
                    .faults
                    .push(format!("{path} (part {}) is missing", part.part));
            }
            // An empty file has no range.
            Err(_) if read.bytes == 0 && root.get(&path).await?.is_empty() => {
                verdict.faults.extend(read.fault(&path));
            }
            Err(error) => return Err(error),
            Ok(()) => verdict.faults.extend(read.fault(&path)),
        }
    }
    Ok(verdict)
}

/// A part while it is read.
struct Read<'a> {
    part: &'a Part,
    bytes: u64,
    sha256: Sha256,
    block: Xxh3,
    /// Hashes of the blocks that are complete, hexadecimal.
    blocks: Vec<String>,
}

impl<'a> Read<'a> {
    fn new(part: &'a Part) -> Self {
        Read {
            part,
            bytes: 0,
            sha256: Sha256::new(),
            block: Xxh3::new(),
            blocks: Vec::new(),
        }
    }

    fn add(&mut self, mut piece: &[u8]) {
        self.sha256.update(piece);
        let block = self.part.block_bytes;
        if block == 0 {
            self.bytes += piece.len() as u64;
            return;
        }
        while !piece.is_empty() {
            let left = (block - self.bytes % block).min(piece.len() as u64);
            let (now, later) = piece.split_at(left as usize);
            self.block.update(now);
            self.bytes += left;
            if self.bytes.is_multiple_of(block) {
                self.end_block();
            }
            piece = later;
        }
    }

    fn end_block(&mut self) {
        let hash = std::mem::take(&mut self.block).digest();
        self.blocks.push(hex(&hash.to_le_bytes()));
    }

    /// What is wrong with the part, now that all of it was read.
    fn fault(mut self, path: &str) -> Option<String> {
        let (part, must) = (self.part.part, self.part.bytes);
        let block = self.part.block_bytes;
        if block > 0 && !self.bytes.is_multiple_of(block) {
            self.end_block();
        }
        if self.bytes < must {
            let ends = self.bytes;
            return Some(format!(
                "{path} (part {part}) ends at byte {ends}, its manifest says {must}"
            ));
        }
        if self.bytes > must {
            return Some(format!(
                "{path} (part {part}) goes on behind byte {must}, where its manifest says that it ends"
            ));
        }
        let sha256 = hex(&self.sha256.finalize());
        if sha256 == self.part.sha256 {
            return None;
        }
        let said = &self.part.sha256;
        let mut text =
            format!("{path} (part {part}) has sha256 {sha256}, its manifest says {said}");
        let expected = self.part.blocks.as_bytes().chunks(2 * BLOCK_HASH_BYTES);
        let pairs = self.blocks.iter().zip(expected).enumerate();
        let wrong = pairs.filter(|(_, (is, must))| is.as_bytes() != *must);
        let wrong: Vec<u64> = wrong.map(|(index, _)| index as u64).collect();
        for index in wrong.iter().take(NAMED_MAX) {
            let (from, to) = (index * block, ((index + 1) * block).min(must));
            text += &format!("; wrong in bytes {from}..{to}");
        }
        if wrong.len() > NAMED_MAX {
            text += &format!(" and {} blocks more", wrong.len() - NAMED_MAX);
        }
        Some(text)
    }
}
