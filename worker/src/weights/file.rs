//! A file of tensors, whatever its format: names, shapes and types at once, numbers one by one.
//!
//! The format is told by the first bytes, never by the file's name.

use std::collections::BTreeMap;

use half::{bf16, f16};

use super::error::WeightsError;
use super::pickle::Element;
use super::source::Source;
use super::{plain, run, torch};

/// First bytes of a zip archive, and of PyTorch's format before it (a pickled magic number). As a
/// safetensors header's length the second would be beyond what that format allows; one byte less
/// would not tell them apart.
const ZIP: [u8; 4] = *b"PK\x03\x04";
const LEGACY: [u8; 4] = *b"\x80\x02\x8a\x0a";

/// What the file says of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stored {
    pub element: Element,
    pub shape: Vec<usize>,
}

/// An opened file.
pub(crate) struct TensorFile {
    /// As the user wrote it.
    pub name: String,
    pub sha256: String,
    pub tensors: BTreeMap<String, Stored>,
    /// Keys that hold no tensor, and what they hold.
    pub others: BTreeMap<String, String>,
    pub(super) data: Data,
}

/// Where the numbers are.
pub(super) enum Data {
    Safetensors(plain::Reader),
    Torch(Box<torch::Reader>),
    Run(run::Parameters),
}

impl TensorFile {
    /// Reads everything but the numbers.
    ///
    /// # Errors
    /// [`WeightsError`] naming the file.
    pub fn open(mut source: Source) -> Result<Self, WeightsError> {
        let mut first = Vec::with_capacity(ZIP.len());
        let head = std::io::Read::take(&mut source.reader, ZIP.len() as u64);
        let io = |source: std::io::Error, file: &str| WeightsError::Io {
            file: file.to_owned(),
            source,
        };
        std::io::Read::read_to_end(&mut { head }, &mut first).map_err(|e| io(e, &source.name))?;
        std::io::Seek::rewind(&mut source.reader).map_err(|e| io(e, &source.name))?;
        let (name, sha256) = (source.name.clone(), source.sha256.clone());
        let mut others = BTreeMap::new();
        let (tensors, data) = if first == ZIP {
            let (tensors, found, reader) = torch::open(source)?;
            others = found;
            (tensors, Data::Torch(Box::new(reader)))
        } else if first == LEGACY {
            return Err(WeightsError::Format {
                file: name,
                reason: "is a bare pickle, as PyTorch before 1.6 wrote it; in PyTorch, save it \
                         again: torch.save(torch.load(path, weights_only=True), new_path)"
                    .into(),
            });
        } else {
            let (tensors, reader) = plain::open(source)?;
            (tensors, Data::Safetensors(reader))
        };
        Ok(TensorFile {
            name,
            sha256,
            tensors,
            others,
            data,
        })
    }

    /// The numbers of `key` in row-major order, as f32.
    ///
    /// # Errors
    /// [`WeightsError`] naming the file and the key.
    pub fn read(&mut self, key: &str) -> Result<Vec<f32>, WeightsError> {
        let element = self.tensors[key].element;
        let bytes = match &mut self.data {
            Data::Safetensors(reader) => reader.read(key)?,
            Data::Torch(reader) => reader.read(key)?,
            Data::Run(parameters) => parameters[key].clone(),
        };
        Ok(floats(element, &bytes))
    }
}

/// Little-endian numbers as f32. Rounding of f64 is to nearest even; the others are exact.
fn floats(element: Element, bytes: &[u8]) -> Vec<f32> {
    match element {
        Element::F32 => each(bytes, f32::from_le_bytes),
        Element::F64 => each(bytes, |raw| f64::from_le_bytes(raw) as f32),
        Element::F16 => each(bytes, |raw| f16::from_le_bytes(raw).to_f32()),
        Element::Bf16 => each(bytes, |raw| bf16::from_le_bytes(raw).to_f32()),
        Element::Whole { .. } => unreachable!("integers are refused before they are read"),
    }
}

fn each<const N: usize>(bytes: &[u8], convert: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    bytes
        .as_chunks()
        .0
        .iter()
        .map(|raw| convert(*raw))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_float_type_becomes_f32() {
        assert_eq!(floats(Element::F16, &[0x00, 0xc1]), [-2.5]);
        assert_eq!(floats(Element::Bf16, &[0x20, 0xc0]), [-2.5]);
        assert_eq!(floats(Element::F32, &(-2.5f32).to_le_bytes()), [-2.5]);
        assert_eq!(floats(Element::F64, &0.1f64.to_le_bytes()), [0.1]);
    }
}
