//! Layer norm in one kernel each way, with the residual sum and its dropout in front.
//!
//! Forward keeps what was normalised and two numbers per row. Gradients of scale and shift are sums
//! down the columns: each unit adds the rows of its part in their order, and parts are added alike
//! until one is left. It refuses to know where weights come from.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::calculate_cube_count_elemwise;
use cubecl::prelude::*;

use super::launch::{
    Draw, Dropping, ROWS_PER_PART, Rows, cube_sum, elements, empty, unread, whole,
};
use crate::draw_kernels::multiplier;

/// What is added before the norm.
pub(super) struct Residual {
    pub x: CubeTensor,
    /// Of the norm's first operand.
    pub draw: Option<Draw>,
}

/// What backward needs.
#[derive(Clone, Debug)]
pub(super) struct Saved {
    /// The norm's input, or the result where that is the normalised value.
    values: CubeTensor,
    /// Mean and reciprocal deviation of each row, f32.
    stats: CubeTensor,
    scale: Option<CubeTensor>,
    draw: Option<Draw>,
}

/// Gradients of a norm.
pub(super) struct NormGradients {
    pub input: CubeTensor,
    /// Of the operand that was dropped from, where it is another than the input's.
    pub dropped: Option<CubeTensor>,
}

/// `norm(dropout(x) + residual) * scale + shift`, each part if it is given.
pub(super) fn forward(
    x: CubeTensor,
    residual: Option<Residual>,
    affine: Option<[CubeTensor; 2]>,
    epsilon: f32,
) -> (CubeTensor, Saved) {
    let x = Rows::of(x);
    let out = x.empty_like();
    let stats = empty(&x.tensor, vec![x.count as usize, 2], DType::F32);
    let sum = residual.as_ref().map(|_| x.empty_like());
    let (residual, draw) = match residual {
        Some(residual) => (Some(Rows::of(residual.x)), residual.draw),
        None => (None, None),
    };
    let affine = affine.map(|parts| parts.map(|part| Rows::of(part).tensor));
    let dropping = Dropping::new(draw.as_ref(), &x.tensor);
    let (count, dim, units) = x.cubes();
    let none = || unread(&stats);
    let part = |i: usize| affine.as_ref().map_or_else(none, |parts| whole(&parts[i]));
    // SAFETY: one cube per row, whose units stay inside it.
    unsafe {
        forward_kernel::launch_unchecked(
            &x.tensor.client,
            count,
            dim,
            x.arg(),
            residual.as_ref().map_or_else(none, Rows::arg),
            dropping.keys,
            part(0),
            part(1),
            sum.as_ref().map_or_else(none, whole),
            whole(&out),
            whole(&stats),
            x.width,
            x.stride,
            residual.as_ref().map_or(0, |rows| rows.stride),
            epsilon,
            dropping.block,
            dropping.dropped,
            dropping.scale,
            affine.is_some(),
            residual.is_some(),
            dropping.active,
            units,
        );
    }
    let saved = Saved {
        values: match (&affine, sum) {
            (None, _) => out.clone(),
            (Some(_), Some(sum)) => sum,
            (Some(_), None) => x.tensor,
        },
        stats,
        scale: affine.map(|[scale, _]| scale),
        draw,
    };
    (out, saved)
}

/// Gradients of what was normalised.
pub(super) fn backward(saved: &Saved, gradient: &CubeTensor) -> NormGradients {
    let (values, gradient) = (Rows::of(saved.values.clone()), Rows::of(gradient.clone()));
    let input = gradient.empty_like();
    let dropped = saved.draw.as_ref().map(|_| gradient.empty_like());
    let dropping = Dropping::new(saved.draw.as_ref(), &gradient.tensor);
    let (count, dim, units) = values.cubes();
    let none = || unread(&saved.stats);
    // SAFETY: as forward.
    unsafe {
        backward_kernel::launch_unchecked(
            &values.tensor.client,
            count,
            dim,
            values.arg(),
            whole(&saved.stats),
            saved.scale.as_ref().map_or_else(none, whole),
            gradient.arg(),
            dropping.keys,
            whole(&input),
            dropped.as_ref().map_or_else(none, whole),
            values.width,
            values.stride,
            gradient.stride,
            dropping.block,
            dropping.dropped,
            dropping.scale,
            saved.scale.is_some(),
            dropping.active,
            units,
        );
    }
    NormGradients { input, dropped }
}

/// Gradients of scale and shift, `[width]` each.
pub(super) fn affine_backward(saved: &Saved, gradient: &CubeTensor) -> [CubeTensor; 2] {
    let (values, gradient) = (Rows::of(saved.values.clone()), Rows::of(gradient.clone()));
    let width = values.width as usize;
    let parts = values.count.div_ceil(ROWS_PER_PART);
    let like = &values.tensor;
    let sums = [0, 1].map(|_| empty(like, vec![parts as usize, width], DType::F32));
    let (count, dim) = units(&sums[0]);
    // SAFETY: units behind the end of the parts do nothing.
    unsafe {
        columns_kernel::launch_unchecked(
            &like.client,
            count,
            dim,
            values.arg(),
            whole(&saved.stats),
            gradient.arg(),
            whole(&sums[0]),
            whole(&sums[1]),
            values.count,
            values.width,
            values.stride,
            gradient.stride,
        );
    }
    sums.map(|sum| folded(sum, width))
}

/// `[parts, width]` down to `[width]`.
fn folded(mut sums: CubeTensor, width: usize) -> CubeTensor {
    loop {
        let rows = elements(&sums) as usize / width;
        if rows == 1 {
            sums.meta = empty(&sums, vec![width], DType::F32).meta;
            return sums;
        }
        let parts = rows.div_ceil(ROWS_PER_PART as usize);
        let out = empty(&sums, vec![parts, width], DType::F32);
        let (count, dim) = units(&out);
        // SAFETY: as above.
        unsafe {
            fold_kernel::launch_unchecked(
                &sums.client,
                count,
                dim,
                whole(&sums),
                whole(&out),
                rows as u32,
                width as u32,
            );
        }
        sums = out;
    }
}

fn units(out: &CubeTensor) -> (CubeCount, CubeDim) {
    let units = out.meta.num_elements();
    let dim = CubeDim::new(&out.client, units);
    (calculate_cube_count_elemwise(&out.client, units, dim), dim)
}

#[cube(launch_unchecked)]
pub(super) fn forward_kernel(
    x: &[f32],
    residual: &[f32],
    keys: &[u64],
    scale: &[f32],
    shift: &[f32],
    sum: &mut [f32],
    out: &mut [f32],
    stats: &mut [f32],
    width: u32,
    x_stride: u32,
    residual_stride: u32,
    epsilon: f32,
    block: u32,
    dropped: u32,
    kept: f32,
    #[comptime] affine: bool,
    #[comptime] summed: bool,
    #[comptime] dropout: bool,
    #[comptime] units: u32,
) {
    let row = CUBE_POS as u32;
    let first = row * width;
    let x_first = row * x_stride;
    let len = f32::cast_from(width);

    let mut total = 0.0f32;
    let mut i = UNIT_POS;
    while i < width {
        let mut value = x[(x_first + i) as usize];
        if comptime!(summed) {
            if comptime!(dropout) {
                value *= multiplier(keys, first + i, block, dropped, kept);
            }
            value += residual[(row * residual_stride + i) as usize];
            sum[(first + i) as usize] = value;
        }
        total += value;
        i += units;
    }
    let mean = cube_sum(total, units) / len;

    let mut squares = 0.0f32;
    let mut i = UNIT_POS;
    while i < width {
        let centred = normed(x, x_first + i, &*sum, first + i, summed) - mean;
        squares += centred * centred;
        i += units;
    }
    let variance = cube_sum(squares, units) / len;
    let inverse = 1.0f32 / (variance + epsilon).sqrt();

    let mut i = UNIT_POS;
    while i < width {
        let mut value = (normed(x, x_first + i, &*sum, first + i, summed) - mean) * inverse;
        if comptime!(affine) {
            value = value * scale[i as usize] + shift[i as usize];
        }
        out[(first + i) as usize] = value;
        i += units;
    }
    if UNIT_POS == 0 {
        stats[(2 * row) as usize] = mean;
        stats[(2 * row + 1) as usize] = inverse;
    }
}

/// What is normalised: `x`, or the sum that this unit wrote before.
#[cube]
fn normed(x: &[f32], x_place: u32, sum: &[f32], place: u32, #[comptime] summed: bool) -> f32 {
    if comptime!(summed) {
        sum[place as usize]
    } else {
        x[x_place as usize]
    }
}

/// With `affine` the values are the norm's input, else they are normalised.
#[cube(launch_unchecked)]
pub(super) fn backward_kernel(
    values: &[f32],
    stats: &[f32],
    scale: &[f32],
    gradient: &[f32],
    keys: &[u64],
    input: &mut [f32],
    dropped_input: &mut [f32],
    width: u32,
    values_stride: u32,
    gradient_stride: u32,
    block: u32,
    dropped: u32,
    kept: f32,
    #[comptime] affine: bool,
    #[comptime] dropout: bool,
    #[comptime] units: u32,
) {
    let row = CUBE_POS as u32;
    let first = row * width;
    let values_first = row * values_stride;
    let gradient_first = row * gradient_stride;
    let mean = stats[(2 * row) as usize];
    let inverse = stats[(2 * row + 1) as usize];
    let len = f32::cast_from(width);

    let mut total = 0.0f32;
    let mut along = 0.0f32;
    let mut i = UNIT_POS;
    while i < width {
        let mut value = values[(values_first + i) as usize];
        let mut g = gradient[(gradient_first + i) as usize];
        if comptime!(affine) {
            value = (value - mean) * inverse;
            g *= scale[i as usize];
        }
        total += g;
        along += g * value;
        i += units;
    }
    let total = cube_sum(total, units) / len;
    let along = cube_sum(along, units) / len;

    let mut i = UNIT_POS;
    while i < width {
        let mut value = values[(values_first + i) as usize];
        let mut g = gradient[(gradient_first + i) as usize];
        if comptime!(affine) {
            value = (value - mean) * inverse;
            g *= scale[i as usize];
        }
        let place = first + i;
        let made = (g - total - value * along) * inverse;
        input[place as usize] = made;
        if comptime!(dropout) {
            dropped_input[place as usize] = made * multiplier(keys, place, block, dropped, kept);
        }
        i += units;
    }
}

/// Parts of the gradients of scale and shift; neighbouring units read neighbouring columns.
#[cube(launch_unchecked)]
pub(super) fn columns_kernel(
    values: &[f32],
    stats: &[f32],
    gradient: &[f32],
    scale: &mut [f32],
    shift: &mut [f32],
    rows: u32,
    width: u32,
    values_stride: u32,
    gradient_stride: u32,
) {
    if ABSOLUTE_POS >= scale.len() {
        terminate!();
    }
    let unit = ABSOLUTE_POS as u32;
    let column = unit % width;
    let mut row = (unit / width) * ROWS_PER_PART;
    let end = u32::min(row + ROWS_PER_PART, rows);
    let mut scales = 0.0f32;
    let mut shifts = 0.0f32;
    while row < end {
        let g = gradient[(row * gradient_stride + column) as usize];
        let centred = values[(row * values_stride + column) as usize] - stats[(2 * row) as usize];
        scales += g * (centred * stats[(2 * row + 1) as usize]);
        shifts += g;
        row += 1;
    }
    scale[ABSOLUTE_POS] = scales;
    shift[ABSOLUTE_POS] = shifts;
}

#[cube(launch_unchecked)]
pub(super) fn fold_kernel(parts: &[f32], sums: &mut [f32], rows: u32, width: u32) {
    if ABSOLUTE_POS >= sums.len() {
        terminate!();
    }
    let unit = ABSOLUTE_POS as u32;
    let column = unit % width;
    let mut row = (unit / width) * ROWS_PER_PART;
    let end = u32::min(row + ROWS_PER_PART, rows);
    let mut sum = 0.0f32;
    while row < end {
        sum += parts[(row * width + column) as usize];
        row += 1;
    }
    sums[ABSOLUTE_POS] = sum;
}
