//! What all fused kernels need to start: rows of a tensor, draws of a dropout site, cubes for rows,
//! and sums whose order is fixed.
//!
//! A row belongs to one cube; its units take every so-many-th element and meet in a tree over
//! shared memory. Neither depends on timing. It refuses to know what is computed.

use belfry_configs::rng::Key;
use burn::tensor::DType;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use crate::draw_kernels::drop_threshold;
use crate::pass::{Dropout, Pass};

/// Units of a cube that reduces one row, a power of two: a row of 768 gives each a dozen elements,
/// and enough cubes fit on a multiprocessor to fill it. Part of a run's bits.
const UNITS_PER_ROW: u32 = 64;
/// Rows that one unit adds up of its column before parts meet.
pub(super) const ROWS_PER_PART: u32 = 32;

/// Dropout of a site: the states of its micro-batches' keys.
#[derive(Clone, Debug)]
pub(crate) struct Draw {
    keys: Vec<u64>,
    rate: f32,
}

impl Draw {
    /// What a pass draws at a site, if it drops anything there.
    pub fn of(pass: &Pass, dropout: &Dropout) -> Option<Self> {
        let keys = pass.dropout_keys(dropout)?;
        Some(Draw::new(&keys, dropout.rate))
    }

    pub fn new(keys: &[Key], rate: f32) -> Self {
        Draw {
            keys: keys.iter().map(|key| key.state()).collect(),
            rate,
        }
    }
}

/// A [`Draw`] as kernels take it, or a stand-in that they never read.
pub(super) struct Dropping {
    pub keys: BufferArg,
    /// Elements per key.
    pub block: u32,
    pub dropped: u32,
    pub scale: f32,
    pub active: bool,
}

impl Dropping {
    /// For a tensor of `like`'s size.
    pub fn new(draw: Option<&Draw>, like: &CubeTensor) -> Self {
        let Some(draw) = draw else {
            return Dropping {
                keys: unread(like),
                block: 1,
                dropped: 0,
                scale: 1.0,
                active: false,
            };
        };
        let bytes = bytemuck::cast_slice(&draw.keys);
        let buffer = like.client.create_from_slice(bytes);
        Dropping {
            // SAFETY: the buffer was made for exactly these.
            keys: unsafe { BufferArg::from_raw_parts(buffer, draw.keys.len()) },
            block: (elements(like) as usize / draw.keys.len()) as u32,
            dropped: drop_threshold(draw.rate),
            scale: 1.0 / (1.0 - draw.rate),
            active: true,
        }
    }
}

/// A tensor as rows of its last axis, `stride` elements from one to the next.
#[derive(Clone, Debug)]
pub(super) struct Rows {
    pub tensor: CubeTensor,
    pub count: u32,
    pub width: u32,
    pub stride: u32,
}

impl Rows {
    /// Copies only what does not lie in evenly spaced rows. Products may pad theirs.
    pub fn of(tensor: CubeTensor) -> Self {
        let (tensor, stride) = match row_stride(tensor.meta.shape(), tensor.meta.strides()) {
            Some(stride) => (tensor, stride),
            None => {
                let tensor = into_contiguous(tensor);
                let width = last(&tensor);
                (tensor, width)
            }
        };
        let width = last(&tensor) as u32;
        Rows {
            count: elements(&tensor) / width,
            width,
            stride: stride as u32,
            tensor,
        }
    }

    pub fn arg(&self) -> BufferArg {
        let len = (self.count - 1) as usize * self.stride as usize + self.width as usize;
        // SAFETY: the last row ends within the buffer.
        unsafe { BufferArg::from_raw_parts(self.tensor.handle.clone(), len) }
    }

    /// As many rows without gaps, to be written.
    pub fn empty_like(&self) -> CubeTensor {
        let shape = self.tensor.meta.shape().clone();
        empty(&self.tensor, shape.to_vec(), self.tensor.dtype)
    }

    /// One cube per row, and its units.
    pub fn cubes(&self) -> (CubeCount, CubeDim, u32) {
        let properties = &self.tensor.client.properties().hardware;
        // A processor runs a unit as a thread, for which a row is too little.
        let units = match properties.plane_size_max {
            1 => 1,
            _ => UNITS_PER_ROW,
        };
        #[cfg(test)]
        let units = super::tests::units().unwrap_or(units);
        (
            CubeCount::Static(self.count, 1, 1),
            CubeDim::new_1d(units),
            units,
        )
    }
}

fn last(tensor: &CubeTensor) -> usize {
    let shape = tensor.meta.shape();
    shape[shape.num_dims() - 1]
}

/// Distance of neighbouring rows, if all are evenly spaced and have no gaps inside.
fn row_stride(shape: &[usize], strides: &[usize]) -> Option<usize> {
    let mut axes = shape.iter().zip(strides).rev();
    let (width, step) = axes.next()?;
    if *width > 1 && *step != 1 {
        return None;
    }
    // Axes of length 1 may have any stride.
    let mut outer = axes.filter(|(len, _)| **len > 1);
    let Some((len, stride)) = outer.next() else {
        return Some(*width);
    };
    let mut next = len * stride;
    for (len, stride) in outer {
        if *stride != next {
            return None;
        }
        next = len * stride;
    }
    (*stride >= *width).then_some(*stride)
}

/// # Panics
/// If the tensor has more elements than a 32-bit index reaches.
pub(super) fn elements(tensor: &CubeTensor) -> u32 {
    let shape = tensor.meta.shape();
    let len = shape.num_elements();
    u32::try_from(len).unwrap_or_else(|_| panic!("{shape:?} is too large for one kernel"))
}

pub(super) fn empty(like: &CubeTensor, shape: Vec<usize>, dtype: DType) -> CubeTensor {
    let (client, device) = (like.client.clone(), like.device.clone());
    empty_device_contiguous_dtype(client, device, shape.into(), dtype)
}

/// All elements of a tensor without gaps.
pub(super) fn whole(tensor: &CubeTensor) -> BufferArg {
    let (handle, len) = (tensor.handle.clone(), tensor.meta.num_elements());
    // SAFETY: the caller made the tensor without gaps.
    unsafe { BufferArg::from_raw_parts(handle, len) }
}

/// Stands in for an argument that a kernel has no use for in this form.
pub(super) fn unread(tensor: &CubeTensor) -> BufferArg {
    // SAFETY: nobody reads or writes it.
    unsafe { BufferArg::from_raw_parts(tensor.handle.clone(), 1) }
}

/// The sum of the units' values, the same for all of them.
#[cube]
pub(super) fn cube_sum(value: f32, #[comptime] units: u32) -> f32 {
    let mut result = value;
    if comptime!(units > 1) {
        let mut shared = Shared::new_slice(comptime!(units as usize));
        let unit = UNIT_POS as usize;
        shared[unit] = value;
        let mut half = comptime!(units as usize / 2).runtime();
        while half > 0 {
            sync_cube();
            if unit < half {
                let sum = shared[unit] + shared[unit + half];
                shared[unit] = sum;
            }
            half /= 2;
        }
        sync_cube();
        result = shared[0];
    }
    result
}

/// The largest of the units' values.
#[cube]
pub(super) fn cube_max(value: f32, #[comptime] units: u32) -> f32 {
    let mut result = value;
    if comptime!(units > 1) {
        let mut shared = Shared::new_slice(comptime!(units as usize));
        let unit = UNIT_POS as usize;
        shared[unit] = value;
        let mut half = comptime!(units as usize / 2).runtime();
        while half > 0 {
            sync_cube();
            if unit < half {
                let (own, other) = (shared[unit], shared[unit + half]);
                shared[unit] = select(other > own, other, own);
            }
            half /= 2;
        }
        sync_cube();
        result = shared[0];
    }
    result
}
