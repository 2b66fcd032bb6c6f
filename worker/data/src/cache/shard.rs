//! An open shard: a file whose hash was checked, read member by member.
//!
//! Its bytes are not held: what is used again stays in the system's page cache, which all workers of
//! a host share. A file that loses its name while it is open stays readable.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use shard_tools::ShardError;
use shard_tools::manifest::Member;

use super::folder;
use crate::error::DataError;

/// Bytes read at once where a whole file is hashed: fits the second-level cache.
pub(super) const HASHED_BYTES: usize = 256 << 10;

/// See the module.
#[derive(Debug)]
pub struct Shard {
    file: File,
    name: String,
    bytes: u64,
}

impl Shard {
    pub(super) fn new(file: File, name: String, bytes: u64) -> Self {
        Shard { file, name, bytes }
    }

    /// The data of `member`.
    ///
    /// # Errors
    /// [`ShardError::Member`] when it lies beyond the shard's end or cannot be read.
    pub fn member(&self, member: &Member) -> Result<Bytes, DataError> {
        let wrong = |reason: String| ShardError::Member {
            shard: self.name.clone(),
            member: member.name.clone(),
            offset: member.offset,
            reason,
        };
        let end = member.offset.checked_add(member.bytes);
        if end.is_none_or(|end| end > self.bytes) {
            let reason = "lies beyond the end of the shard; the shard is cut off";
            return Err(wrong(reason.into()).into());
        }
        let mut data = vec![0; member.bytes as usize];
        let read = self.file.read_exact_at(&mut data, member.offset);
        read.map_err(|e| wrong(format!("cannot be read: {e}")))?;
        Ok(Bytes::from(data))
    }

    /// Notes its use for the other workers of the host; whether the cache still holds it.
    pub(super) fn used(&self) -> bool {
        folder::touch(&self.file);
        self.is_held()
    }

    pub(super) fn is_held(&self) -> bool {
        folder::is_named(&self.file)
    }
}

/// Length and lower-case hexadecimal SHA-256 of what `file` holds.
pub(super) fn measured(file: &File) -> io::Result<(u64, String)> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; HASHED_BYTES];
    let mut at = 0;
    loop {
        match file.read_at(&mut buffer, at)? {
            0 => return Ok((at, hexadecimal(hash))),
            read => {
                hash.update(&buffer[..read]);
                at += read as u64;
            }
        }
    }
}

/// The digest as manifests write it.
pub(super) fn hexadecimal(hash: Sha256) -> String {
    let digest = hash.finalize();
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}
