//! Gradients of a lane: where backward passes add what they found, on the host or on the device.
//!
//! Stands between the graphs of a device batch and the lane's place in the reduction tree. On the
//! host everything is added into one flat vector as it is read. On a device of its own nothing is
//! read: leaves' gradients are added leaf by leaf, rows of look-up tables are folded in an order
//! that the host fixes, and the lane ends as one flat tensor in name order. It refuses to know
//! layers and losses.

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::batch::expect;
use crate::error::ModelError;
use crate::params::{ParamTable, Residence};
use crate::weights::{Weights, read};

/// A gradient of all parameters, flat, in name order. Cloning is cheap: numbers are shared until
/// something is added.
#[derive(Clone, Debug)]
pub enum Gradient {
    /// In host memory.
    Host(Arc<Vec<f32>>),
    /// On the device, outside autodiff.
    Device(Box<Tensor<1>>),
}

impl Gradient {
    /// Adds another of the same length, element by element.
    ///
    /// # Errors
    /// [`ModelError::Length`] if the lengths differ; [`ModelError::Device`] if one lies elsewhere and
    /// cannot be read.
    pub fn add(&mut self, other: &Gradient) -> Result<(), ModelError> {
        expect("gradient", self.elements(), other.elements())?;
        match (&mut *self, other) {
            (Gradient::Host(sum), Gradient::Host(terms)) => {
                add(Arc::make_mut(sum).as_mut_slice(), terms)
            }
            (Gradient::Host(sum), Gradient::Device(_)) => {
                add(Arc::make_mut(sum).as_mut_slice(), &other.clone().read()?);
            }
            (Gradient::Device(sum), Gradient::Device(terms)) => {
                **sum = *sum.clone() + *terms.clone();
            }
            (Gradient::Device(sum), Gradient::Host(terms)) => {
                let data = TensorData::new(terms.to_vec(), [terms.len()]);
                **sum = *sum.clone() + Tensor::from_data(data, &sum.device());
            }
        }
        Ok(())
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        match self {
            Gradient::Host(values) => values.len(),
            Gradient::Device(values) => values.dims()[0],
        }
    }

    /// On the host. From a device this waits for everything that it still computes.
    ///
    /// # Errors
    /// [`ModelError::Device`] if the device does not give it back.
    pub fn read(self) -> Result<Arc<Vec<f32>>, ModelError> {
        match self {
            Gradient::Host(values) => Ok(values),
            Gradient::Device(values) => read(*values, "gradient").map(Arc::new),
        }
    }
}

impl From<Vec<f32>> for Gradient {
    fn from(values: Vec<f32>) -> Self {
        Gradient::Host(Arc::new(values))
    }
}

/// Adds up the gradients of a lane's device batches.
#[derive(Debug)]
pub enum GradientSum {
    /// Flat, in name order.
    Host(Vec<f32>),
    /// Leaf by leaf.
    Device(DeviceSum),
}

impl GradientSum {
    /// Nothing yet, where `weights` are.
    pub fn new(weights: &Weights) -> Self {
        let table = weights.table();
        if weights.on_host() {
            return GradientSum::Host(vec![0.0; table.elements()]);
        }
        GradientSum::Device(DeviceSum {
            table: table.clone(),
            device: weights.device().clone().without_autodiff(),
            terms: BTreeMap::new(),
        })
    }

    /// The sum.
    pub fn finish(self) -> Gradient {
        match self {
            GradientSum::Host(sum) => Gradient::from(sum),
            GradientSum::Device(sum) => Gradient::Device(Box::new(sum.flat())),
        }
    }
}

/// Where a backward pass adds.
#[derive(Debug)]
pub enum Target<'a> {
    /// Flat, in name order.
    Host(&'a mut [f32]),
    /// Leaf by leaf.
    Device(&'a mut DeviceSum),
}

impl Target<'_> {
    /// The same for a shorter time.
    pub fn again(&mut self) -> Target<'_> {
        match self {
            Target::Host(sum) => Target::Host(sum),
            Target::Device(sum) => Target::Device(sum),
        }
    }

    /// Refuses a vector of another length than the table's.
    pub(crate) fn check(&self, table: &ParamTable) -> Result<(), ModelError> {
        match self {
            Target::Host(sum) => expect("gradient", table.elements(), sum.len()),
            Target::Device(sum) => {
                let elements = sum.table.elements();
                expect("gradient", table.elements(), elements)
            }
        }
    }

    /// Adds to the parameter at `place` of the table, of which the host has the derivative.
    pub(crate) fn add_number(&mut self, table: &ParamTable, place: usize, value: f32) {
        match self {
            Target::Host(sum) => sum[table.entries()[place].offset] += value,
            Target::Device(sum) => {
                let value = Tensor::from_data([value], &sum.device);
                sum.add(place, 0, Term::Plain(value));
            }
        }
    }
}

impl<'a> From<&'a mut [f32]> for Target<'a> {
    fn from(sum: &'a mut [f32]) -> Self {
        Target::Host(sum)
    }
}

impl<'a> From<&'a mut Vec<f32>> for Target<'a> {
    fn from(sum: &'a mut Vec<f32>) -> Self {
        Target::Host(sum)
    }
}

impl<'a> From<&'a mut GradientSum> for Target<'a> {
    fn from(sum: &'a mut GradientSum) -> Self {
        match sum {
            GradientSum::Host(sum) => Target::Host(sum),
            GradientSum::Device(sum) => Target::Device(sum),
        }
    }
}

/// A gradient of one leaf, on the device.
#[derive(Clone, Debug)]
pub(crate) enum Term {
    Plain(Tensor<1>),
    /// `[in, out]`, for a place `[out, in]`.
    Transposed(Tensor<2>),
}

impl Term {
    /// As it stands in the flat vector.
    fn flat(self) -> Tensor<1> {
        match self {
            Term::Plain(values) => values,
            Term::Transposed(values) => {
                let [inputs, outputs] = values.dims();
                values.transpose().reshape([inputs * outputs])
            }
        }
    }
}

impl std::ops::Add for Term {
    type Output = Term;
    fn add(self, other: Term) -> Term {
        match (self, other) {
            (Term::Transposed(a), Term::Transposed(b)) => Term::Transposed(a + b),
            (a, b) => Term::Plain(a.flat() + b.flat()),
        }
    }
}

/// Gradients on the device, by place in the table and part.
#[derive(Debug)]
pub struct DeviceSum {
    table: ParamTable,
    device: Device,
    terms: BTreeMap<(usize, usize), Term>,
}

impl DeviceSum {
    pub(crate) fn add(&mut self, place: usize, part: usize, term: Term) {
        let sum = match self.terms.remove(&(place, part)) {
            Some(sum) => sum + term,
            None => term,
        };
        self.terms.insert((place, part), sum);
    }

    /// Adds the gradients of rows that were gathered from the table at `place`; those of row `skip`
    /// count for nothing.
    pub(crate) fn add_rows(
        &mut self,
        place: usize,
        rows: Tensor<2>,
        ids: &[i32],
        skip: Option<i32>,
    ) {
        let count = self.table.entries()[place].shape[0];
        if let Some(table) = scattered(rows, ids, skip, count) {
            let elements = self.table.entries()[place].len;
            self.add(place, 0, Term::Plain(table.reshape([elements])));
        }
    }

    /// All parameters in name order; zero where nothing was added.
    fn flat(mut self) -> Tensor<1> {
        let (device, mut parts) = (self.device.clone(), Vec::new());
        let nothing = |elements: usize| Tensor::<1>::zeros([elements], &device);
        for (place, entry) in self.table.entries().iter().enumerate() {
            let count = match entry.residence {
                Residence::Leaves(count) | Residence::Matrices(count) => count,
                Residence::Table | Residence::Number | Residence::Host => 1,
            };
            for part in 0..count {
                let term = self.terms.remove(&(place, part)).map(Term::flat);
                parts.push(term.unwrap_or_else(|| nothing(entry.len / count)));
            }
        }
        Tensor::cat(parts, 0)
    }
}

/// The dense gradient `[count, width]` of a look-up table from that of gathered rows, or `None` if
/// no row counts.
///
/// No element is ever added to by two threads: rows of one id are added in pairs of neighbours, then
/// the sums in pairs, as the host arranges, so the order of additions depends on the ids alone. That
/// takes as many rounds as the binary logarithm of the most frequent id's count.
pub(crate) fn scattered(
    rows: Tensor<2>,
    ids: &[i32],
    skip: Option<i32>,
    count: usize,
) -> Option<Tensor<2>> {
    let mut by_id: BTreeMap<i32, Vec<usize>> = BTreeMap::new();
    for (row, id) in ids.iter().enumerate().filter(|(_, id)| Some(**id) != skip) {
        by_id.entry(*id).or_default().push(row);
    }
    let (ids, mut terms): (Vec<i32>, Vec<Vec<usize>>) = by_id.into_iter().unzip();
    if ids.is_empty() {
        return None;
    }
    let mut rows = rows;
    while terms.iter().any(|terms| terms.len() > 1) {
        let nothing = rows.dims()[0];
        let (mut left, mut right) = (Vec::new(), Vec::new());
        for terms in &mut terms {
            let first = left.len();
            for pair in terms.chunks(2) {
                left.push(pair[0]);
                right.push(*pair.get(1).unwrap_or(&nothing));
            }
            *terms = (first..left.len()).collect();
        }
        let padded = with_row_of_zeros(rows);
        rows = select(&padded, &left) + select(&padded, &right);
    }
    let mut dense = vec![rows.dims()[0]; count];
    for (id, terms) in ids.iter().zip(&terms) {
        dense[*id as usize] = terms[0];
    }
    Some(select(&with_row_of_zeros(rows), &dense))
}

fn with_row_of_zeros(rows: Tensor<2>) -> Tensor<2> {
    let zeros = Tensor::zeros([1, rows.dims()[1]], &rows.device());
    Tensor::cat(vec![rows, zeros], 0)
}

/// Rows by their places, in this order, any number of times.
pub(crate) fn select(rows: &Tensor<2>, places: &[usize]) -> Tensor<2> {
    let indices: Vec<i32> = places.iter().map(|place| *place as i32).collect();
    let indices = TensorData::new(indices, [places.len()]);
    let indices = Tensor::<1, Int>::from_data(indices, &rows.device());
    rows.clone().select(0, indices)
}

/// Element by element, on the host.
pub(crate) fn add(sum: &mut [f32], terms: &[f32]) {
    for (sum, term) in sum.iter_mut().zip(terms) {
        *sum += term;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_one_id_are_added_and_padding_is_not() {
        let device = Device::flex();
        let ids = [4, 1, 4, 0, 4, 4, 1, 4];
        let values: Vec<f32> = (0..16).map(|i| i as f32).collect();
        let rows = Tensor::<2>::from_data(TensorData::new(values, [8, 2]), &device);
        let dense = scattered(rows.clone(), &ids, Some(1), 6).expect("some rows count");
        let dense = read(dense, "rows").expect("on the host");
        let of_four = [0.0 + 4.0 + 8.0 + 10.0 + 14.0, 1.0 + 5.0 + 9.0 + 11.0 + 15.0];
        assert_eq!(dense[..2], [6.0, 7.0]);
        assert_eq!(dense[2..8], [0.0; 6]);
        assert_eq!(dense[8..10], of_four);
        assert_eq!(dense[10..], [0.0; 2]);
        assert!(scattered(rows, &[1; 8], Some(1), 6).is_none());
    }

    #[test]
    fn gradients_add_wherever_they_are() {
        let device = Device::flex();
        let on_device =
            |values: [f32; 3]| Gradient::Device(Box::new(Tensor::from_data(values, &device)));
        let on_host = |values: [f32; 3]| Gradient::from(values.to_vec());
        let (a, b) = ([0.1, 0.2, 0.3], [1e-8, 7.0, -0.3]);
        let expected: Vec<f32> = a.iter().zip(b).map(|(a, b)| a + b).collect();
        for other in [on_device(b), on_host(b)] {
            for mut sum in [on_device(a), on_host(a)] {
                sum.add(&other).expect("of one length");
                assert_eq!(*sum.read().expect("on the host"), expected);
            }
        }
        assert!(on_host(a).add(&Gradient::from(vec![0.0])).is_err());
    }
}
