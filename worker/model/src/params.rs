//! The parameter table: names, shapes and places of all weights in one flat vector.
//!
//! Layers register their parameters while the model is built and keep the ids they get; the table
//! sorts by the authors' names (model_spec 15). Offsets in name order are the only layout that the
//! rest of Belfry knows: gradients, moments, digests, checkpoints and the wire all use it. This file
//! refuses to know what a parameter is used for.

use belfry_configs::rng::{Key, Purpose};
use rayon::prelude::*;

use crate::normal::fill_normal;

/// Elements per parallel task of [`ParamTable::init`]; even, as normals come in pairs. Values do not
/// depend on it.
const INIT_CHUNK: usize = 1 << 16;

/// A registered parameter, by order of registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ParamId(usize);

/// How a parameter starts (model_spec 11, 5.1).
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Init {
    /// Every element this value.
    Constant(f32),
    /// Normal with this standard deviation.
    Normal(f32),
    /// Normal, but this row of the table is zero (padding).
    NormalPadded { std: f32, zero_row: usize },
    /// A manager's scores: rows below `experts` are 1/experts, rows of cross outputs are `cross`.
    ManagerScores { experts: usize, cross: f32 },
}

/// How the tensor is handed to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Residence {
    /// As this many equal leaves along the first non-unit axis, so that using one row or one third
    /// costs no slicing in the backward pass.
    Leaves(usize),
    /// As this many equal matrices along the first axis, each seen transposed, `[in, out]`: as
    /// products take it and give its gradient, so that neither is turned on the device.
    Matrices(usize),
    /// As one table without gradient; rows are gathered and their gradients scattered on the host.
    Table,
    /// As a number that the host reads and differentiates.
    Number,
    /// Not at all: the authors' model holds it, nothing reads it.
    Host,
}

/// One parameter of the model.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamEntry {
    /// The authors' name.
    pub name: String,
    /// Shape as in the authors' checkpoint (linear weights `[out, in]`).
    pub shape: Vec<usize>,
    /// First element in the flat vector.
    pub offset: usize,
    /// Number of elements.
    pub len: usize,
    /// Whether the model's task ever produces a gradient for it. Static: the optimizer skips the
    /// others altogether, decay included (model_spec 11).
    pub trained: bool,
    pub(crate) init: Init,
    pub(crate) residence: Residence,
}

/// All parameters of a model, sorted by name, without gaps.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamTable {
    entries: Vec<ParamEntry>,
    /// Registration order to place in `entries`.
    places: Vec<usize>,
    elements: usize,
}

impl ParamTable {
    /// Entries in name order; offsets ascend without gaps.
    pub fn entries(&self) -> &[ParamEntry] {
        &self.entries
    }

    /// Elements of the flat vector.
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// The entry with this name.
    pub fn get(&self, name: &str) -> Option<&ParamEntry> {
        let place = self.entries.binary_search_by(|e| e.name.as_str().cmp(name));
        place.ok().map(|i| &self.entries[i])
    }

    pub(crate) fn place(&self, id: ParamId) -> usize {
        self.places[id.0]
    }

    /// The first element of a parameter in the flat vector.
    pub(crate) fn offset(&self, id: ParamId) -> usize {
        self.entry(id).offset
    }

    pub(crate) fn entry(&self, id: ParamId) -> &ParamEntry {
        &self.entries[self.places[id.0]]
    }

    /// Fresh weights: a pure function of the seed and the parameters' names.
    pub fn init(&self, seed: u64) -> Vec<f32> {
        let root = Key::new(seed, Purpose::Init);
        let mut flat = vec![0.0f32; self.elements];
        let mut rest = flat.as_mut_slice();
        for entry in &self.entries {
            let (values, tail) = rest.split_at_mut(entry.len);
            rest = tail;
            init_one(entry, root.with_name(&entry.name), values);
        }
        flat
    }
}

fn init_one(entry: &ParamEntry, key: Key, values: &mut [f32]) {
    let normal = |values: &mut [f32], std: f32| {
        values
            .par_chunks_mut(INIT_CHUNK)
            .enumerate()
            .for_each(|(chunk, part)| fill_normal(key, (chunk * INIT_CHUNK) as u64, std, part));
    };
    match entry.init {
        Init::Constant(value) => values.fill(value),
        Init::Normal(std) => normal(values, std),
        Init::NormalPadded { std, zero_row } => {
            normal(values, std);
            let width = entry.shape[1];
            values[zero_row * width..(zero_row + 1) * width].fill(0.0);
        }
        Init::ManagerScores { experts, cross } => {
            let width = entry.len / entry.shape[1];
            for (row, scores) in values.chunks_mut(width).enumerate() {
                scores.fill(if row < experts {
                    1.0 / experts as f32
                } else {
                    cross
                });
            }
        }
    }
}

/// Collects parameters while a model is built. Names are dotted paths.
#[derive(Debug, Default)]
pub(crate) struct Builder {
    entries: Vec<ParamEntry>,
    path: Vec<String>,
}

impl Builder {
    /// Registers everything in `build` under `name`.
    pub fn at<T>(&mut self, name: impl ToString, build: impl FnOnce(&mut Self) -> T) -> T {
        self.path.push(name.to_string());
        let built = build(self);
        self.path.pop();
        built
    }

    /// The dotted path with `name` at its end; also names random draws.
    pub fn name(&self, name: &str) -> String {
        let mut full = self.path.join(".");
        if !full.is_empty() && !name.is_empty() {
            full.push('.');
        }
        full + name
    }

    /// A trained parameter that lives on the device as `leaves` equal leaves.
    pub fn leaves(&mut self, name: &str, shape: &[usize], init: Init, leaves: usize) -> ParamId {
        self.push(name, shape, init, Residence::Leaves(leaves))
    }

    /// A trained parameter that lives on the device as one leaf.
    pub fn leaf(&mut self, name: &str, shape: &[usize], init: Init) -> ParamId {
        self.leaves(name, shape, init, 1)
    }

    /// A trained weight `[out, in]` of linear layers, as so many equal ones of fewer outputs; axes
    /// behind the first are one input axis.
    pub fn matrices(&mut self, name: &str, shape: &[usize], init: Init, count: usize) -> ParamId {
        self.push(name, shape, init, Residence::Matrices(count))
    }

    /// A trained look-up table.
    pub fn table(&mut self, name: &str, shape: &[usize], init: Init) -> ParamId {
        self.push(name, shape, init, Residence::Table)
    }

    /// A trained number that only the host needs.
    pub fn number(&mut self, name: &str, value: f32) -> ParamId {
        self.push(name, &[], Init::Constant(value), Residence::Number)
    }

    /// A parameter of the authors' model that nothing reads.
    pub fn unused(&mut self, name: &str, shape: &[usize], init: Init) -> ParamId {
        self.push(name, shape, init, Residence::Host)
    }

    fn push(&mut self, name: &str, shape: &[usize], init: Init, residence: Residence) -> ParamId {
        self.entries.push(ParamEntry {
            name: self.name(name),
            shape: shape.to_vec(),
            offset: 0,
            len: shape.iter().product(),
            trained: residence != Residence::Host,
            init,
            residence,
        });
        ParamId(self.entries.len() - 1)
    }

    /// The finished table.
    pub fn finish(self) -> ParamTable {
        let mut order: Vec<usize> = (0..self.entries.len()).collect();
        order.sort_by(|a, b| self.entries[*a].name.cmp(&self.entries[*b].name));
        let mut places = vec![0; order.len()];
        let mut entries = Vec::with_capacity(order.len());
        let mut elements = 0;
        for (place, id) in order.into_iter().enumerate() {
            places[id] = place;
            let mut entry = self.entries[id].clone();
            entry.offset = elements;
            elements += entry.len;
            entries.push(entry);
        }
        assert!(
            entries.windows(2).all(|pair| pair[0].name < pair[1].name),
            "two parameters were registered under one name"
        );
        ParamTable {
            entries,
            places,
            elements,
        }
    }
}
