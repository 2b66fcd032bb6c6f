//! Safetensors: a JSON header with places, then the numbers.
//!
//! The header is checked by the safetensors crate (size cap, places without gaps or overlaps, shapes
//! that multiply to lengths); this file adds what only the file's size can tell, and reads one
//! tensor at a time.

use std::collections::BTreeMap;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::ops::Range;

use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::error::WeightsError;
use super::file::Stored;
use super::pickle::Element;
use super::source::{Bytes, Source};

/// Bytes of the header's length.
const LENGTH_BYTES: u64 = 8;
/// The largest header that the format allows.
const HEADER_BYTES_MAX: u64 = 100_000_000;

/// Numbers on demand.
pub(crate) struct Reader {
    file: String,
    bytes: Box<dyn Bytes>,
    /// Bytes of the file.
    places: BTreeMap<String, Range<u64>>,
}

/// Reads the header.
pub(crate) fn open(mut source: Source) -> Result<(BTreeMap<String, Stored>, Reader), WeightsError> {
    let file = source.name.clone();
    let refuse = |reason: String| WeightsError::Format {
        file: file.clone(),
        reason,
    };
    let io = |e: std::io::Error| refuse(format!("cannot be read: {e}"));
    if source.bytes <= LENGTH_BYTES {
        return Err(refuse(format!(
            "has {} bytes; this is no file of weights",
            source.bytes
        )));
    }
    let mut header = vec![0; LENGTH_BYTES as usize];
    source.reader.read_exact(&mut header).map_err(io)?;
    let length = u64::from_le_bytes(header[..].try_into().expect("eight bytes were read"));
    if length > HEADER_BYTES_MAX {
        return Err(refuse(format!(
            "is neither safetensors nor a PyTorch zip archive (a header of {length} bytes is beyond \
             {HEADER_BYTES_MAX})"
        )));
    }
    if LENGTH_BYTES + length > source.bytes {
        return Err(refuse(format!(
            "is cut off: its header ends at byte {}, the file at byte {}; copy it again",
            LENGTH_BYTES + length,
            source.bytes
        )));
    }
    header.resize((LENGTH_BYTES + length) as usize, 0);
    let rest = &mut header[LENGTH_BYTES as usize..];
    source.reader.read_exact(rest).map_err(io)?;
    // Alone, so that a file need not be in memory for its header to be checked.
    let metadata: Metadata =
        serde_json::from_slice(rest).map_err(|e| refuse(format!("is no safetensors file: {e}")))?;
    let begin = header.len() as u64;
    let mut tensors = BTreeMap::new();
    let mut places = BTreeMap::new();
    let mut end = begin;
    for (name, info) in metadata.tensors() {
        let place = begin + info.data_offsets.0 as u64..begin + info.data_offsets.1 as u64;
        if place.end > source.bytes {
            return Err(refuse(format!(
                "is cut off: `{name}` ends at byte {}, the file at byte {}; copy it again",
                place.end, source.bytes
            )));
        }
        end = end.max(place.end);
        let element = match info.dtype {
            Dtype::F16 => Element::F16,
            Dtype::BF16 => Element::Bf16,
            Dtype::F32 => Element::F32,
            Dtype::F64 => Element::F64,
            // Types of part of a byte do not occur in weights and are not read either.
            other => Element::Whole {
                bytes: other.bitsize().div_ceil(8),
            },
        };
        let shape = info.shape.clone();
        tensors.insert(name.clone(), Stored { element, shape });
        places.insert(name, place);
    }
    if end != source.bytes {
        return Err(refuse(format!(
            "has {} bytes behind its last tensor; copy it again",
            source.bytes - end
        )));
    }
    let reader = Reader {
        bytes: source.reader,
        places,
        file,
    };
    Ok((tensors, reader))
}

impl Reader {
    pub fn read(&mut self, key: &str) -> Result<Vec<u8>, WeightsError> {
        let place = self.places[key].clone();
        let mut raw = vec![0; (place.end - place.start) as usize];
        let found = self.bytes.seek(SeekFrom::Start(place.start));
        let read = found.and_then(|_| self.bytes.read_exact(&mut raw));
        read.map_err(|e| WeightsError::Format {
            file: self.file.clone(),
            reason: format!("`{key}` at byte {} cannot be read: {e}", place.start),
        })?;
        Ok(raw)
    }
}
