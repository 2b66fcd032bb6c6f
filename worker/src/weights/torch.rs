//! PyTorch's zip format: `NAME/data.pkl` says what there is, `NAME/data/N` hold the numbers.
//!
//! Written by `torch.save` since 1.6 and, with the same insides, by `torch.jit.save` (OpenAI's own
//! CLIP files). The weights are looked for under `state_dict` (Lightning, the authors' files),
//! `model` (DeiT), at the root, or in the attributes of a scripted module. Other content of the file
//! is walked over (see `pickle`).

use std::collections::BTreeMap;
use std::io::Read as _;

use zip::ZipArchive;
use zip::result::ZipError;

use super::error::WeightsError;
use super::file::Stored;
use super::pickle::{self, Pickle, Value, View, Why};
use super::source::{Bytes, Source};

/// Keys of a checkpoint under which the weights stand, in this order.
const STATE_KEYS: [&str; 3] = ["state_dict", "model_state_dict", "model"];
/// Tensors in one file; the largest models of the paper have about 2,000.
const TENSORS_MAX: usize = 100_000;
/// Modules inside modules of a scripted module.
const DEPTH_MAX: usize = 64;
/// Attributes looked at in a scripted module: shared modules could make a small file seem endless.
const ATTRIBUTES_MAX: usize = 1_000_000;

/// Numbers on demand.
pub(crate) struct Reader {
    file: String,
    archive: ZipArchive<Box<dyn Bytes>>,
    /// `NAME/data/`.
    folder: String,
    views: BTreeMap<String, View>,
    /// The record that was read last: packed models keep many tensors in one.
    last: Option<(String, Vec<u8>)>,
}

type Opened = (BTreeMap<String, Stored>, BTreeMap<String, String>, Reader);

/// Reads what there is.
pub(crate) fn open(source: Source) -> Result<Opened, WeightsError> {
    let file = source.name;
    let refuse = |reason: String| WeightsError::Format {
        file: file.clone(),
        reason,
    };
    let damaged = |e: ZipError| refuse(format!("is a damaged zip archive: {e}; copy it again"));
    let mut archive = ZipArchive::new(source.reader).map_err(damaged)?;
    let names = archive.file_names().collect::<Result<Vec<_>, _>>();
    let names = names.map_err(damaged)?;
    let mut folders = names
        .iter()
        .filter_map(|name| name.strip_suffix("/data.pkl"));
    let (Some(folder), None) = (folders.next(), folders.next()) else {
        return Err(refuse(
            "is a zip archive without one data.pkl, so not from torch.save".into(),
        ));
    };
    let folder = folder.to_owned();
    let pickle = record(
        &mut archive,
        &format!("{folder}/data.pkl"),
        pickle::PICKLE_BYTES_MAX,
    )
    .map_err(refuse)?;
    let order = format!("{folder}/byteorder");
    if archive.index_for_name(&order).is_some() {
        let order = record(&mut archive, &order, 16).map_err(refuse)?;
        if order != b"little" {
            return Err(refuse(
                "was saved on a big-endian machine; save it on another".into(),
            ));
        }
    }
    let content = pickle::read(&pickle).map_err(|stop| match stop.why {
        Why::Bad(reason) => WeightsError::Pickle {
            file: file.clone(),
            offset: stop.offset,
            reason,
        },
        Why::Dangerous(global) => WeightsError::Dangerous {
            file: file.clone(),
            offset: stop.offset,
            global,
        },
    })?;
    let mut found = Found::default();
    found.collect(&content).map_err(refuse)?;
    let stored = found.views.iter().map(|(key, view)| {
        let stored = Stored {
            element: view.storage.element,
            shape: view.shape.clone(),
        };
        (key.clone(), stored)
    });
    let reader = Reader {
        archive,
        folder: format!("{folder}/data/"),
        views: found.views.clone(),
        last: None,
        file: file.clone(),
    };
    Ok((stored.collect(), found.others, reader))
}

/// One record of the archive, uncompressed as PyTorch writes it.
fn record<R: std::io::Read + std::io::Seek>(
    archive: &mut ZipArchive<R>,
    name: &str,
    bytes_max: u64,
) -> Result<Vec<u8>, String> {
    let cannot = |e: &dyn std::fmt::Display| format!("record {name} cannot be read: {e}");
    let entry = archive.by_name(name).map_err(|e| cannot(&e))?;
    let size = entry.size();
    if size > bytes_max || entry.compressed_size() != size {
        return Err(format!(
            "record {name} has {size} bytes ({} stored), at most {bytes_max} uncompressed ones \
             were expected",
            entry.compressed_size()
        ));
    }
    let mut bytes = Vec::with_capacity(size as usize);
    // Reading to the end also checks the record's CRC.
    entry
        .take(size + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| cannot(&e))?;
    if bytes.len() as u64 != size {
        return Err(format!(
            "record {name} has {} of its {size} bytes",
            bytes.len()
        ));
    }
    Ok(bytes)
}

/// The tensors of a file by key, and what else stands beside them.
#[derive(Default)]
struct Found {
    views: BTreeMap<String, View>,
    others: BTreeMap<String, String>,
    attributes: usize,
}

impl Found {
    fn collect(&mut self, pickle: &Pickle) -> Result<(), String> {
        match pickle.root() {
            Value::Dict(items) => {
                let items = state_dict(pickle, items).unwrap_or(items);
                for (key, value) in items {
                    if let Value::Text(key) = pickle.get(*key) {
                        self.put(key, pickle.get(*value))?;
                    }
                }
                Ok(())
            }
            Value::Inert { state: Some(_), .. } => self.walk(pickle, pickle.root(), "", 0),
            other => Err(format!(
                "holds {}, not a dict of tensors; save the weights: \
                 torch.save(model.state_dict(), path)",
                pickle::describe(other)
            )),
        }
    }

    /// Tensors among the attributes of a scripted module and of the modules inside it.
    fn walk(
        &mut self,
        pickle: &Pickle,
        module: &Value,
        path: &str,
        depth: usize,
    ) -> Result<(), String> {
        let Value::Inert {
            state: Some(state), ..
        } = module
        else {
            return Ok(());
        };
        let Value::Dict(attributes) = pickle.get(*state) else {
            return Ok(());
        };
        if depth > DEPTH_MAX {
            return Err(format!("`{path}` lies in more than {DEPTH_MAX} modules"));
        }
        self.attributes += attributes.len();
        if self.attributes > ATTRIBUTES_MAX {
            return Err(format!("has more than {ATTRIBUTES_MAX} attributes"));
        }
        for (key, value) in attributes {
            let Value::Text(key) = pickle.get(*key) else {
                continue;
            };
            let path = if path.is_empty() {
                key.clone()
            } else {
                format!("{path}.{key}")
            };
            match pickle.get(*value) {
                value @ Value::Tensor(_) => self.put(&path, value)?,
                value => self.walk(pickle, value, &path, depth + 1)?,
            }
        }
        Ok(())
    }

    fn put(&mut self, key: &str, value: &Value) -> Result<(), String> {
        if self.views.len() + self.others.len() >= TENSORS_MAX {
            return Err(format!("has more than {TENSORS_MAX} entries"));
        }
        let twice = match value {
            Value::Tensor(view) => {
                let view = View::clone(view);
                self.views.insert(key.to_owned(), view).is_some()
            }
            other => {
                let what = pickle::describe(other);
                self.others.insert(key.to_owned(), what).is_some()
            }
        };
        if twice {
            return Err(format!("holds `{key}` twice"));
        }
        Ok(())
    }
}

/// The dict of weights inside a checkpoint's dict.
fn state_dict<'a>(
    pickle: &'a Pickle,
    items: &[(pickle::Id, pickle::Id)],
) -> Option<&'a Vec<(pickle::Id, pickle::Id)>> {
    STATE_KEYS.iter().find_map(|wanted| {
        let named = |key: &Value| matches!(key, Value::Text(text) if text == wanted);
        let (_, value) = items.iter().find(|(key, _)| named(pickle.get(*key)))?;
        match pickle.get(*value) {
            Value::Dict(inner) => Some(inner),
            _ => None,
        }
    })
}

impl Reader {
    pub fn read(&mut self, key: &str) -> Result<Vec<u8>, WeightsError> {
        let view = &self.views[key];
        let (storage, size) = (&view.storage, view.storage.element.bytes());
        let refuse = |reason: String| WeightsError::Format {
            file: self.file.clone(),
            reason: format!("`{key}`: {reason}"),
        };
        if self
            .last
            .as_ref()
            .is_none_or(|(record, _)| *record != storage.record)
        {
            let name = format!("{}{}", self.folder, storage.record);
            let expected = storage.elements as u64 * size as u64;
            let bytes = record(&mut self.archive, &name, expected).map_err(refuse)?;
            if bytes.len() as u64 != expected {
                return Err(refuse(format!(
                    "record {name} has {} bytes for {} elements of {size} bytes",
                    bytes.len(),
                    storage.elements
                )));
            }
            self.last = Some((storage.record.clone(), bytes));
        }
        let (_, bytes) = self.last.as_ref().expect("was just read");
        // Two storages may claim one record under different lengths.
        if bytes.len() < storage.elements * size {
            return Err(refuse("its storage is longer than the record".into()));
        }
        Ok(gather(view, bytes, size))
    }
}

/// The elements of a strided view in row-major order.
fn gather(view: &View, bytes: &[u8], size: usize) -> Vec<u8> {
    let count: usize = view.shape.iter().product();
    if count == 0 {
        return Vec::new();
    }
    let mut row_major = vec![1; view.shape.len()];
    for axis in (1..view.shape.len()).rev() {
        row_major[axis - 1] = row_major[axis] * view.shape[axis];
    }
    let same = |axis: usize| view.shape[axis] == 1 || view.strides[axis] == row_major[axis];
    if (0..view.shape.len()).all(same) {
        return bytes[view.offset * size..(view.offset + count) * size].to_vec();
    }
    let mut gathered = Vec::with_capacity(count * size);
    let mut index = vec![0; view.shape.len()];
    let mut at = view.offset;
    for _ in 0..count {
        gathered.extend_from_slice(&bytes[at * size..(at + 1) * size]);
        for axis in (0..index.len()).rev() {
            index[axis] += 1;
            at += view.strides[axis];
            if index[axis] < view.shape[axis] {
                break;
            }
            at -= view.shape[axis] * view.strides[axis];
            index[axis] = 0;
        }
    }
    gathered
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::pickle::{Element, Storage};

    fn gathered(offset: usize, shape: &[usize], strides: &[usize]) -> Vec<u8> {
        let view = View {
            storage: Storage {
                element: Element::Whole { bytes: 1 },
                record: "0".into(),
                elements: 12,
            },
            offset,
            shape: shape.to_vec(),
            strides: strides.to_vec(),
        };
        let bytes: Vec<u8> = (0..12).collect();
        gather(&view, &bytes, 1)
    }

    #[test]
    fn views_are_laid_out_row_by_row() {
        assert_eq!(gathered(0, &[2, 3], &[3, 1]), [0, 1, 2, 3, 4, 5]);
        assert_eq!(
            gathered(0, &[3, 2], &[1, 3]),
            [0, 3, 1, 4, 2, 5],
            "a transpose"
        );
        assert_eq!(gathered(2, &[2, 2], &[5, 2]), [2, 4, 7, 9], "a slice");
        assert_eq!(gathered(4, &[3], &[0]), [4, 4, 4], "an expanded scalar");
        assert_eq!(gathered(7, &[], &[]), [7]);
        assert_eq!(gathered(0, &[0, 4], &[4, 1]), [0u8; 0]);
    }
}
