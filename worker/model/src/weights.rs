//! Weights on the device: the leaves that a forward pass reads and a backward pass differentiates.
//!
//! Stands between the flat host vector and the layers. It refuses to know layers and losses.

use burn::tensor::{Device, Gradients, Tensor, TensorData};

use crate::error::ModelError;
use crate::params::{ParamId, ParamTable, Residence};

/// One parameter on the device.
#[derive(Clone, Debug)]
enum Resident {
    /// Flat leaves; gradients are asked of these.
    Leaves(Vec<Tensor<1>>),
    /// A look-up table `[rows, width]` outside autodiff.
    Table(Box<Tensor<2>>),
    /// A number on the host.
    Number(f32),
    /// Stayed on the host.
    Absent,
}

/// The flat weights of one state, loaded on a device. Cloning is cheap (tensors are shared).
///
/// One thread at a time may differentiate through the same weights, clones included: burn-autodiff
/// 0.22.1 merges graphs that share leaves, and what another thread registers in a graph while it is
/// merged away is lost ("graph tape has already been consumed"). Threads load their own.
#[derive(Clone, Debug)]
pub struct Weights {
    table: ParamTable,
    /// In the table's order.
    residents: Vec<Resident>,
    device: Device,
}

impl Weights {
    /// Copies `flat` (name order) to `device`. On an autodiff device the trained parameters become
    /// leaves that ask for gradients.
    ///
    /// # Errors
    /// [`ModelError::Length`] if `flat` is not as long as the table says.
    pub fn load(table: &ParamTable, flat: &[f32], device: &Device) -> Result<Self, ModelError> {
        if flat.len() != table.elements() {
            return Err(ModelError::Length {
                what: "weights",
                expected: table.elements(),
                found: flat.len(),
            });
        }
        let inner = device.clone().without_autodiff();
        let residents = table.entries().iter().map(|entry| {
            let values = &flat[entry.offset..entry.offset + entry.len];
            match entry.residence {
                Residence::Host => Resident::Absent,
                Residence::Number => Resident::Number(values[0]),
                Residence::Table => {
                    let data = TensorData::new(values.to_vec(), [entry.shape[0], entry.shape[1]]);
                    Resident::Table(Box::new(Tensor::from_data(data, &inner)))
                }
                Residence::Leaves(count) => {
                    let part = entry.len / count;
                    let leaf = |values: &[f32]| {
                        let data = TensorData::new(values.to_vec(), [part]);
                        let leaf = Tensor::<1>::from_data(data, device);
                        if device.is_autodiff() {
                            leaf.require_grad()
                        } else {
                            leaf
                        }
                    };
                    Resident::Leaves(values.chunks(part).map(leaf).collect())
                }
            }
        });
        Ok(Weights {
            table: table.clone(),
            residents: residents.collect(),
            device: device.clone(),
        })
    }

    /// The same weights outside autodiff, for evaluation. Shares storage.
    pub fn without_gradient(&self) -> Self {
        let residents = self.residents.iter().map(|resident| match resident {
            Resident::Leaves(leaves) => {
                Resident::Leaves(leaves.iter().map(|leaf| leaf.clone().inner()).collect())
            }
            other => other.clone(),
        });
        Weights {
            table: self.table.clone(),
            residents: residents.collect(),
            device: self.device.clone().without_autodiff(),
        }
    }

    /// The device, with autodiff if gradients can be asked.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Leaf `part` of a parameter, flat.
    pub(crate) fn part(&self, id: ParamId, part: usize) -> Tensor<1> {
        match &self.residents[self.table.place(id)] {
            Resident::Leaves(leaves) => leaves[part].clone(),
            _ => unreachable!("`{}` has no leaves", self.table.entry(id).name),
        }
    }

    /// A parameter of one leaf, flat.
    pub(crate) fn vector(&self, id: ParamId) -> Tensor<1> {
        self.part(id, 0)
    }

    /// A number that stayed on the host.
    pub(crate) fn number(&self, id: ParamId) -> f32 {
        match &self.residents[self.table.place(id)] {
            Resident::Number(value) => *value,
            _ => unreachable!("`{}` is no number", self.table.entry(id).name),
        }
    }

    /// The rows `ids` of a look-up table, as a new leaf `[ids, width]` that asks for a gradient if
    /// the weights do. Its gradient is scattered by [`scatter_rows`].
    pub(crate) fn rows(&self, id: ParamId, ids: &[i32]) -> Tensor<2> {
        let Resident::Table(table) = &self.residents[self.table.place(id)] else {
            unreachable!("`{}` is no look-up table", self.table.entry(id).name)
        };
        let indices = TensorData::new(ids.to_vec(), [ids.len()]);
        let rows = table
            .clone()
            .select(0, Tensor::from_data(indices, &table.device()));
        if self.device.is_autodiff() {
            rows.autodiff().require_grad()
        } else {
            rows
        }
    }

    /// Adds the leaves' gradients to `flat` (name order). Leaves that a pass did not use add nothing.
    ///
    /// # Errors
    /// [`ModelError::Device`] if a gradient cannot be read.
    pub(crate) fn collect(
        &self,
        gradients: &mut Gradients,
        flat: &mut [f32],
    ) -> Result<(), ModelError> {
        for (entry, resident) in self.table.entries().iter().zip(&self.residents) {
            let Resident::Leaves(leaves) = resident else {
                continue;
            };
            let part = entry.len / leaves.len();
            let places = flat[entry.offset..entry.offset + entry.len].chunks_mut(part);
            for (leaf, place) in leaves.iter().zip(places) {
                if let Some(gradient) = leaf.grad_remove(gradients) {
                    add(place, &read(gradient, "gradient")?);
                }
            }
        }
        Ok(())
    }

    /// The part of `flat` that belongs to a parameter.
    pub(crate) fn slice_of<'a>(&self, id: ParamId, flat: &'a mut [f32]) -> &'a mut [f32] {
        let entry = self.table.entry(id);
        &mut flat[entry.offset..entry.offset + entry.len]
    }
}

/// `sum[ids[k]] += rows[k]` in the order of `k`, on the host: the same bits on every device, and no
/// dense table of zeros per pass. Rows with id `skip` (padding) get no gradient (model_spec 2).
pub(crate) fn scatter_rows(sum: &mut [f32], rows: &[f32], ids: &[i32], skip: Option<i32>) {
    let width = rows.len() / ids.len().max(1);
    for (row, id) in rows.chunks(width.max(1)).zip(ids) {
        if Some(*id) != skip {
            let start = *id as usize * width;
            add(&mut sum[start..start + width], row);
        }
    }
}

fn add(sum: &mut [f32], terms: &[f32]) {
    for (sum, term) in sum.iter_mut().zip(terms) {
        *sum += term;
    }
}

/// A tensor's numbers on the host.
pub(crate) fn read<const D: usize>(
    tensor: Tensor<D>,
    what: &'static str,
) -> Result<Vec<f32>, ModelError> {
    tensor
        .try_into_vec_as::<f32>()
        .map_err(|error| ModelError::Device {
            what,
            reason: error.to_string(),
        })
}
