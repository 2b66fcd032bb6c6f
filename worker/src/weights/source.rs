//! Opens what `--from` and `init.from` name: a path or an `s3://` URL, to be read and sought.
//!
//! Every file is hashed whole before anything in it is believed, so the report can say exactly which
//! bytes a run began with. Nothing is downloaded from anywhere else.

use std::fs::File;
use std::io::{Cursor, Read, Seek, SeekFrom};

use sha2::{Digest as _, Sha256};
use shard_tools::store::Root;

use super::error::WeightsError;
use crate::state::hex;

/// Bytes that can be read and sought.
pub(crate) trait Bytes: Read + Seek + Send {}
impl<T: Read + Seek + Send> Bytes for T {}

/// An opened file of weights.
pub(crate) struct Source {
    /// As the user wrote it.
    pub name: String,
    /// Of the whole file, lower-case hexadecimal.
    pub sha256: String,
    /// Size in bytes.
    pub bytes: u64,
    pub reader: Box<dyn Bytes>,
}

/// Opens `location`. An object of S3 is held in memory whole; a local file is read as needed.
///
/// # Errors
/// [`WeightsError::Io`] or [`WeightsError::Store`].
pub(crate) async fn open(location: &str) -> Result<Source, WeightsError> {
    let name = location.to_owned();
    let reader: Box<dyn Bytes> = if location.starts_with("s3://") {
        let (root, key) = object(location)?;
        let bytes = root.get(&key).await.map_err(|source| WeightsError::Store {
            file: location.to_owned(),
            source: Box::new(source),
        })?;
        Box::new(Cursor::new(bytes))
    } else {
        let path = location.strip_prefix("file://").unwrap_or(location);
        Box::new(File::open(path).map_err(|source| WeightsError::Io {
            file: location.to_owned(),
            source,
        })?)
    };
    tokio::task::spawn_blocking(move || hashed(name, reader))
        .await
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
}

fn hashed(name: String, mut reader: Box<dyn Bytes>) -> Result<Source, WeightsError> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0u8; 1 << 20];
    let mut bytes = 0;
    let io = |source| WeightsError::Io {
        file: name.clone(),
        source,
    };
    loop {
        let count = reader.read(&mut buffer).map_err(io)?;
        if count == 0 {
            break;
        }
        hash.update(&buffer[..count]);
        bytes += count as u64;
    }
    reader.seek(SeekFrom::Start(0)).map_err(io)?;
    Ok(Source {
        sha256: hex(&hash.finalize()),
        name,
        bytes,
        reader,
    })
}

/// The folder and the name of an `s3://bucket/folder/name`.
pub(crate) fn object(location: &str) -> Result<(Root, String), WeightsError> {
    let (folder, key) = location.rsplit_once('/').unwrap_or((location, ""));
    if key.is_empty() || folder == "s3:/" {
        return Err(WeightsError::Format {
            file: location.to_owned(),
            reason: "names a bucket, not a file in it".into(),
        });
    }
    let root = Root::existing(folder).map_err(|source| WeightsError::Store {
        file: location.to_owned(),
        source: Box::new(source),
    })?;
    Ok((root, key.to_owned()))
}
