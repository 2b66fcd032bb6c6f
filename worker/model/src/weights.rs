//! Weights on the device: the leaves that a forward pass reads and a backward pass differentiates.
//!
//! Stands between the flat host vector and the layers. It refuses to know layers and losses.

use std::ops::Range;

use burn::tensor::{AllocationProperty, Bytes, DType, Device, Gradients, Tensor, TensorData};

use rayon::prelude::*;

use belfry_configs::Matmul;

use crate::error::ModelError;
use crate::gradient::{DeviceSum, Target, Term, add};
use crate::params::{ParamEntry, ParamId, ParamTable, Residence};
use crate::phase::phase;
use crate::product::Products;

/// One parameter on the device.
#[derive(Clone, Debug)]
enum Resident {
    /// Flat leaves; gradients are asked of these.
    Leaves(Vec<Tensor<1>>),
    /// Transposed matrices `[in, out]`; gradients are asked of these.
    Matrices(Vec<Tensor<2>>),
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
/// merged away is lost ("graph tape has already been consumed"). Threads load their own, or fork.
#[derive(Clone, Debug)]
pub struct Weights {
    table: ParamTable,
    /// In the table's order.
    residents: Vec<Resident>,
    device: Device,
    products: Products,
    on_host: bool,
}

impl Weights {
    /// Copies `flat` (name order) to `device`. On an autodiff device the trained parameters become
    /// leaves that ask for gradients.
    ///
    /// # Errors
    /// [`ModelError::Length`] if `flat` is not as long as the table says.
    pub fn load(table: &ParamTable, flat: &[f32], device: &Device) -> Result<Self, ModelError> {
        let copy =
            |range: Range<usize>, shape: Vec<usize>| TensorData::new(flat[range].to_vec(), shape);
        let source = OnHost {
            flat,
            data: copy,
            inner: device.clone().without_autodiff(),
        };
        Self::build(table, &source, device)
    }

    /// As [`Weights::load`], but a device in host memory reads `flat` where it is: nothing is
    /// copied, and `flat` is held until the last clone of the weights is dropped.
    ///
    /// # Errors
    /// As [`Weights::load`].
    pub fn share<F>(table: &ParamTable, flat: F, device: &Device) -> Result<Self, ModelError>
    where
        F: AsRef<[f32]> + Clone + Send + Sync + 'static,
    {
        let bytes = bytes::Bytes::from_owner(Owner(flat.clone()));
        let share = |range: Range<usize>, shape: Vec<usize>| {
            let size = size_of::<f32>();
            let part = bytes.slice(size * range.start..size * range.end);
            let part = Bytes::from_shared(part, AllocationProperty::Native);
            TensorData::from_bytes(part, shape, DType::F32)
        };
        let source = OnHost {
            flat: flat.as_ref(),
            data: share,
            inner: device.clone().without_autodiff(),
        };
        Self::build(table, &source, device)
    }

    /// As [`Weights::load`] from a flat tensor that is on the device already, outside autodiff.
    ///
    /// # Errors
    /// As [`Weights::load`]; [`ModelError::Device`] if a number that the host needs cannot be read.
    pub fn from_device(
        table: &ParamTable,
        flat: Tensor<1>,
        device: &Device,
    ) -> Result<Self, ModelError> {
        Self::build(table, &flat, device)
    }

    fn build(table: &ParamTable, flat: &impl Flat, device: &Device) -> Result<Self, ModelError> {
        if flat.elements() != table.elements() {
            return Err(ModelError::Length {
                what: "weights",
                expected: table.elements(),
                found: flat.elements(),
            });
        }
        let _phase = phase!(device, "weights to leaves");
        let resident = |entry: &ParamEntry| {
            let range = entry.offset..entry.offset + entry.len;
            Ok(match entry.residence {
                Residence::Host => Resident::Absent,
                Residence::Number => Resident::Number(flat.number(entry.offset)?),
                Residence::Table => {
                    let rows = entry.shape[0];
                    Resident::Table(Box::new(flat.matrix(range, rows)))
                }
                Residence::Leaves(count) => {
                    let part = entry.len / count;
                    let leaf = |start: usize| new_leaf(flat.vector(start..start + part), device);
                    Resident::Leaves(range.step_by(part).map(leaf).collect())
                }
                Residence::Matrices(count) => {
                    let part = entry.len / count;
                    let rows = entry.shape[0] / count;
                    let matrix = |start: usize| {
                        let matrix = flat.matrix(start..start + part, rows);
                        new_leaf(matrix.transpose(), device)
                    };
                    Resident::Matrices(range.step_by(part).map(matrix).collect())
                }
            })
        };
        let residents = table.entries().iter().map(resident);
        Ok(Weights {
            table: table.clone(),
            residents: residents.collect::<Result<_, ModelError>>()?,
            device: device.clone(),
            products: Products {
                matmul: Matmul::F32,
            },
            on_host: on_host(device),
        })
    }

    /// The same numbers as leaves of their own, for another thread. Shares storage.
    pub(crate) fn fork(&self) -> Self {
        let residents = self.residents.iter().map(|resident| match resident {
            Resident::Leaves(leaves) if self.device.is_autodiff() => {
                let leaf = |leaf: &Tensor<1>| new_leaf(leaf.clone().inner(), &self.device);
                Resident::Leaves(leaves.iter().map(leaf).collect())
            }
            Resident::Matrices(matrices) if self.device.is_autodiff() => {
                let leaf = |leaf: &Tensor<2>| new_leaf(leaf.clone().inner(), &self.device);
                Resident::Matrices(matrices.iter().map(leaf).collect())
            }
            other => other.clone(),
        });
        Weights {
            table: self.table.clone(),
            residents: residents.collect(),
            device: self.device.clone(),
            products: self.products,
            on_host: self.on_host,
        }
    }

    /// The same weights outside autodiff, for evaluation. Shares storage.
    pub fn without_gradient(&self) -> Self {
        let residents = self.residents.iter().map(|resident| match resident {
            Resident::Leaves(leaves) => {
                Resident::Leaves(leaves.iter().map(|leaf| leaf.clone().inner()).collect())
            }
            Resident::Matrices(matrices) => {
                Resident::Matrices(matrices.iter().map(|leaf| leaf.clone().inner()).collect())
            }
            other => other.clone(),
        });
        Weights {
            table: self.table.clone(),
            residents: residents.collect(),
            device: self.device.clone().without_autodiff(),
            products: self.products,
            on_host: self.on_host,
        }
    }

    /// The same weights for products of another arithmetic than f32.
    #[must_use]
    pub fn multiplied_in(mut self, matmul: Matmul) -> Self {
        self.products = Products { matmul };
        self
    }

    /// The same weights, treated as if their device had a memory of its own: losses and gradients
    /// stay there. For checks of that way where there is no such device.
    #[must_use]
    pub fn apart_from_host(mut self) -> Self {
        self.on_host = false;
        self
    }

    /// Whether losses and gradients of these weights are worked on in host memory.
    pub fn on_host(&self) -> bool {
        self.on_host
    }

    /// Names, shapes and places.
    pub(crate) fn table(&self) -> &ParamTable {
        &self.table
    }

    /// How products with these weights are computed.
    pub(crate) fn products(&self) -> Products {
        self.products
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

    /// Matrix `part` of a linear layer's weight, `[in, out]`.
    pub(crate) fn matrix(&self, id: ParamId, part: usize) -> Tensor<2> {
        match &self.residents[self.table.place(id)] {
            Resident::Matrices(matrices) => matrices[part].clone(),
            _ => unreachable!("`{}` is no matrix", self.table.entry(id).name),
        }
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
        new_leaf(rows, &self.device)
    }

    /// Adds the leaves' gradients of one graph, or of several over the same weights or forks of them:
    /// every element's terms are added in the order of `sources`. Leaves that no graph used add
    /// nothing.
    ///
    /// # Errors
    /// [`ModelError::Device`] if a gradient cannot be read.
    pub(crate) fn collect_all(
        sources: &mut [(&Weights, &mut Gradients)],
        target: Target,
    ) -> Result<(), ModelError> {
        let device = sources.first().map(|(weights, _)| &weights.device);
        let _phase = device.map(|device| phase!(device, "gradient collection"));
        match target {
            Target::Host(flat) => Self::collect_on_host(sources, flat),
            Target::Device(sum) => {
                Self::collect_on_device(sources, sum);
                Ok(())
            }
        }
    }

    fn collect_on_device(sources: &mut [(&Weights, &mut Gradients)], sum: &mut DeviceSum) {
        for (weights, gradients) in sources {
            for (place, resident) in weights.residents.iter().enumerate() {
                for part in 0..resident.parts() {
                    if let Some(term) = resident.take_gradient(part, gradients) {
                        sum.add(place, part, term);
                    }
                }
            }
        }
    }

    fn collect_on_host(
        sources: &mut [(&Weights, &mut Gradients)],
        flat: &mut [f32],
    ) -> Result<(), ModelError> {
        let Some(first) = sources.first().map(|(weights, _)| *weights) else {
            return Ok(());
        };
        let mut sums = Vec::new();
        let mut rest = flat;
        for (place, entry) in first.table.entries().iter().enumerate() {
            let (values, tail) = rest.split_at_mut(entry.len);
            rest = tail;
            let parts = first.residents[place].parts();
            if parts == 0 {
                continue;
            }
            for (part, values) in values.chunks_mut(entry.len / parts).enumerate() {
                let terms = sources.iter_mut().filter_map(|(weights, gradients)| {
                    weights.residents[place].take_gradient(part, gradients)
                });
                sums.push((values, terms.collect::<Vec<Term>>()));
            }
        }
        sums.into_par_iter().try_for_each(|(values, terms)| {
            terms
                .into_iter()
                .try_for_each(|term| add_term(values, term))
        })
    }

    /// Adds the gradients of rows that were gathered from a look-up table; row `skip` gets none.
    ///
    /// # Errors
    /// [`ModelError::Device`] if they cannot be read.
    pub(crate) fn collect_rows(
        &self,
        id: ParamId,
        rows: Tensor<2>,
        (ids, skip): (&[i32], Option<i32>),
        target: Target,
    ) -> Result<(), ModelError> {
        match target {
            Target::Host(flat) => {
                let entry = self.table.entry(id);
                let sum = &mut flat[entry.offset..entry.offset + entry.len];
                scatter_rows(sum, &read(rows, "gradient of looked-up rows")?, ids, skip);
            }
            Target::Device(sum) => sum.add_rows(self.table.place(id), rows, ids, skip),
        }
        Ok(())
    }
}

/// Flat weights in name order, as tensors outside autodiff.
trait Flat {
    fn elements(&self) -> usize;
    fn vector(&self, range: Range<usize>) -> Tensor<1>;
    /// `[rows, ..]`
    fn matrix(&self, range: Range<usize>, rows: usize) -> Tensor<2>;
    fn number(&self, place: usize) -> Result<f32, ModelError>;
}

/// In host memory; `data` copies or shares a range in a shape.
struct OnHost<'a, D> {
    flat: &'a [f32],
    data: D,
    inner: Device,
}

impl<D: Fn(Range<usize>, Vec<usize>) -> TensorData> Flat for OnHost<'_, D> {
    fn elements(&self) -> usize {
        self.flat.len()
    }
    fn vector(&self, range: Range<usize>) -> Tensor<1> {
        let len = range.len();
        Tensor::from_data((self.data)(range, vec![len]), &self.inner)
    }
    fn matrix(&self, range: Range<usize>, rows: usize) -> Tensor<2> {
        let shape = vec![rows, range.len() / rows];
        Tensor::from_data((self.data)(range, shape), &self.inner)
    }
    fn number(&self, place: usize) -> Result<f32, ModelError> {
        Ok(self.flat[place])
    }
}

impl Flat for Tensor<1> {
    fn elements(&self) -> usize {
        self.dims()[0]
    }
    fn vector(&self, range: Range<usize>) -> Tensor<1> {
        self.clone().narrow(0, range.start, range.len())
    }
    fn matrix(&self, range: Range<usize>, rows: usize) -> Tensor<2> {
        let columns = range.len() / rows;
        Flat::vector(self, range).reshape([rows, columns])
    }
    fn number(&self, place: usize) -> Result<f32, ModelError> {
        let read = read(Flat::vector(self, place..place + 1), "weight")?;
        Ok(read[0])
    }
}

/// Whether a device computes in host memory.
pub fn on_host(device: &Device) -> bool {
    device.clone().without_autodiff() == Device::flex()
}

fn add_term(sum: &mut [f32], term: Term) -> Result<(), ModelError> {
    match term {
        Term::Plain(gradient) => add(sum, &read(gradient, "gradient")?),
        Term::Transposed(gradient) => {
            let [inputs, _] = gradient.dims();
            add_transposed(sum, &read(gradient, "gradient")?, inputs);
        }
    }
    Ok(())
}

impl Resident {
    /// Leaves that gradients are asked of.
    fn parts(&self) -> usize {
        match self {
            Resident::Leaves(leaves) => leaves.len(),
            Resident::Matrices(matrices) => matrices.len(),
            Resident::Table(_) | Resident::Number(_) | Resident::Absent => 0,
        }
    }

    fn take_gradient(&self, part: usize, gradients: &mut Gradients) -> Option<Term> {
        match self {
            Resident::Leaves(leaves) => leaves[part].grad_remove(gradients).map(Term::Plain),
            Resident::Matrices(matrices) => {
                matrices[part].grad_remove(gradients).map(Term::Transposed)
            }
            _ => None,
        }
    }
}

/// Flat weights as bytes.
struct Owner<F>(F);

impl<F: AsRef<[f32]>> AsRef<[u8]> for Owner<F> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(self.0.as_ref())
    }
}

/// A constant as the device computes with it: tracked or not, stored or computed again.
pub(crate) fn enter<const D: usize>(values: Tensor<D>, device: &Device) -> Tensor<D> {
    match device.gradient_checkpointing_strategy() {
        Some(strategy) => values
            .autodiff()
            .with_gradient_checkpointing_strategy(strategy),
        None => values,
    }
}

/// On an autodiff device a leaf that asks for a gradient.
pub(crate) fn new_leaf<const D: usize>(values: Tensor<D>, device: &Device) -> Tensor<D> {
    let values = enter(values, device);
    if device.is_autodiff() {
        values.require_grad()
    } else {
        values
    }
}

/// `sum[ids[k]] += rows[k]` in the order of `k`, on the host: the same bits on every device, and no
/// dense table of zeros per pass. Rows with id `skip` (padding) get no gradient (model_spec 2).
fn scatter_rows(sum: &mut [f32], rows: &[f32], ids: &[i32], skip: Option<i32>) {
    let width = rows.len() / ids.len().max(1);
    for (row, id) in rows.chunks(width.max(1)).zip(ids) {
        if Some(*id) != skip {
            let start = *id as usize * width;
            add(&mut sum[start..start + width], row);
        }
    }
}

/// `sum[out, in] += terms[in, out]`, in tiles. A tile is turned in a buffer of its own: rows whose
/// length is a power of two times something small would throw each other out of the first cache.
fn add_transposed(sum: &mut [f32], terms: &[f32], inputs: usize) {
    const TILE: usize = 32;
    let outputs = terms.len() / inputs;
    let bands = sum.par_chunks_mut(TILE * inputs).enumerate();
    bands.for_each(|(band, rows)| {
        let mut tile = [[0.0f32; TILE]; TILE];
        let width = rows.len() / inputs;
        for (number, terms) in terms.chunks(TILE * outputs).enumerate() {
            let (first, height) = (number * TILE, terms.len() / outputs);
            for (input, row) in terms.chunks(outputs).enumerate() {
                let band = &row[band * TILE..band * TILE + width];
                for (turned, term) in tile.iter_mut().zip(band) {
                    turned[input] = *term;
                }
            }
            for (sums, turned) in rows.chunks_mut(inputs).zip(&tile) {
                add(&mut sums[first..first + height], &turned[..height]);
            }
        }
    });
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

#[cfg(test)]
mod tests {
    #[test]
    fn a_transposed_matrix_is_added_in_its_place() {
        let (inputs, outputs) = (37, 70);
        let terms: Vec<f32> = (0..inputs * outputs).map(|i| i as f32).collect();
        let mut sum = vec![0.5; inputs * outputs];
        super::add_transposed(&mut sum, &terms, inputs);
        for output in 0..outputs {
            for input in 0..inputs {
                let expected = 0.5 + (input * outputs + output) as f32;
                assert_eq!(sum[output * inputs + input], expected);
            }
        }
    }
}
