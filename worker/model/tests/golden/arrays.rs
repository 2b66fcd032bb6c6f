//! Tensors on disk.

use std::collections::BTreeMap;
use std::path::Path;

use belfry_model::ParamTable;
use safetensors::{Dtype, SafeTensors};

#[derive(Clone, Debug, Default)]
pub struct Array {
    pub shape: Vec<usize>,
    pub values: Vec<f64>,
}

impl Array {
    pub fn f32(&self) -> Vec<f32> {
        self.values.iter().map(|v| *v as f32).collect()
    }
    pub fn i32(&self) -> Vec<i32> {
        self.values.iter().map(|v| *v as i32).collect()
    }
    pub fn usize(&self) -> Vec<usize> {
        self.values.iter().map(|v| *v as usize).collect()
    }
}

/// A safetensors file.
pub type Arrays = BTreeMap<String, Array>;

pub fn read_arrays(path: &Path) -> Option<Arrays> {
    let bytes = std::fs::read(path).ok()?;
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let array = |name: &str| {
        let view = file.tensor(name).unwrap();
        let data = view.data();
        let values = match view.dtype() {
            Dtype::F32 => {
                let (chunks, _) = data.as_chunks();
                let value = |c: &[u8; 4]| f64::from(f32::from_le_bytes(*c));
                chunks.iter().map(value).collect()
            }
            Dtype::I64 => {
                let (chunks, _) = data.as_chunks();
                let value = |c: &[u8; 8]| i64::from_le_bytes(*c) as f64;
                chunks.iter().map(value).collect()
            }
            Dtype::U8 => data.iter().map(|v| f64::from(*v)).collect(),
            other => panic!("{name}: unexpected type {other:?}"),
        };
        Array {
            shape: view.shape().to_vec(),
            values,
        }
    };
    let names = file.names().into_iter();
    Some(names.map(|name| (name.to_string(), array(name))).collect())
}

/// The flat vector of `prefix/NAME` arrays; absent names are zeros.
pub fn flat(table: &ParamTable, arrays: &Arrays, prefix: &str) -> Vec<f32> {
    let mut flat = vec![0.0; table.elements()];
    for entry in table.entries() {
        if let Some(array) = arrays.get(&format!("{prefix}/{}", entry.name)) {
            assert_eq!(array.shape, entry.shape, "{prefix}/{}", entry.name);
            flat[entry.offset..entry.offset + entry.len].copy_from_slice(&array.f32());
        }
    }
    flat
}

/// Largest absolute difference; NaN where anything is NaN.
pub fn distance(ours: &[f32], theirs: &[f64]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let pairs = ours.iter().zip(theirs);
    let differences = pairs.map(|(a, b)| (f64::from(*a) - b).abs());
    differences.fold(0.0, |max, d| if d > max || d.is_nan() { d } else { max })
}
