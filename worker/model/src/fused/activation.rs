//! GELU, exact and CLIP's quick one, in one kernel each way; what is kept is the input.

use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::calculate_cube_count_elemwise;
use cubecl::prelude::*;

use super::launch::{elements, empty, whole};

const SQRT_HALF: f32 = std::f32::consts::FRAC_1_SQRT_2;
/// The normal density at 0.
const DENSITY: f32 = 0.398_942_3;
const QUICK: f32 = 1.702;

/// Which activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gelu {
    /// `x Φ(x)`
    Exact,
    /// `x σ(1.702 x)`
    Quick,
}

pub(super) fn forward(kind: Gelu, x: CubeTensor) -> (CubeTensor, CubeTensor) {
    let x = into_contiguous(x);
    let out = empty(&x, x.meta.shape().to_vec(), x.dtype);
    let (count, dim) = units(&x);
    // SAFETY: units behind the end do nothing.
    unsafe {
        forward_kernel::launch_unchecked(
            &x.client,
            count,
            dim,
            whole(&x),
            whole(&out),
            kind == Gelu::Quick,
        );
    }
    (out, x)
}

pub(super) fn backward(kind: Gelu, x: &CubeTensor, gradient: CubeTensor) -> CubeTensor {
    let gradient = into_contiguous(gradient);
    let out = empty(x, x.meta.shape().to_vec(), x.dtype);
    let (count, dim) = units(x);
    // SAFETY: as forward.
    unsafe {
        backward_kernel::launch_unchecked(
            &x.client,
            count,
            dim,
            whole(x),
            whole(&gradient),
            whole(&out),
            kind == Gelu::Quick,
        );
    }
    out
}

fn units(x: &CubeTensor) -> (CubeCount, CubeDim) {
    let units = elements(x) as usize;
    let dim = CubeDim::new(&x.client, units);
    (calculate_cube_count_elemwise(&x.client, units, dim), dim)
}

#[cube(launch_unchecked)]
pub(super) fn forward_kernel(x: &[f32], out: &mut [f32], #[comptime] quick: bool) {
    if ABSOLUTE_POS >= out.len() {
        terminate!();
    }
    let x = x[ABSOLUTE_POS];
    out[ABSOLUTE_POS] = x * weight(x, quick);
}

#[cube(launch_unchecked)]
pub(super) fn backward_kernel(
    x: &[f32],
    gradient: &[f32],
    out: &mut [f32],
    #[comptime] quick: bool,
) {
    if ABSOLUTE_POS >= out.len() {
        terminate!();
    }
    let x = x[ABSOLUTE_POS];
    let weight = weight(x, quick);
    let slope = if comptime!(quick) {
        QUICK * weight * (1.0f32 - weight)
    } else {
        DENSITY * (-0.5f32 * x * x).exp()
    };
    out[ABSOLUTE_POS] = gradient[ABSOLUTE_POS] * (weight + x * slope);
}

/// What an activation multiplies its input by.
#[cube]
fn weight(x: f32, #[comptime] quick: bool) -> f32 {
    if comptime!(quick) {
        1.0f32 / (1.0f32 + (-QUICK * x).exp())
    } else {
        0.5f32 * (1.0f32 + Erf::erf(x * SQRT_HALF))
    }
}
