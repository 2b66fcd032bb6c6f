//! The draws of a forward pass, made where they are used: kernels for devices that are not the host.
//!
//! The same bits as `draws.rs` and `normal.rs`, from the same keys. Integers mix alike everywhere;
//! what can differ is the last bit of a sum, because GPU compilers fuse a product and the sum behind
//! it into one operation with one rounding. Here every such product passes through [`apart`], which
//! no compiler can look through. This file refuses to know what is drawn for whom.

use std::f32::consts::{FRAC_PI_2, FRAC_PI_4, LN_2};

use belfry_configs::rng::Key;
use burn::backend::{Cube, DispatchDevice};
use burn::tensor::{DType, Device, Tensor};
use burn_cubecl::CubeDevice;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::calculate_cube_count_elemwise;
use cubecl::prelude::*;

use crate::weights::enter;

/// What 32 and 30 random bits are multiples of.
const UNIFORM_STEP: f32 = 1.0 / 4_294_967_296.0;
const ANGLE_STEP: f32 = 1.0 / 1_073_741_824.0;
/// Coefficients of the series in `normal.rs`, by power.
const THIRD: f32 = 1.0 / 3.0;
const SEVENTH: f32 = 1.0 / 7.0;
const NINTH: f32 = 1.0 / 9.0;
const SIN_3: f32 = -1.0 / 6.0;
const SIN_5: f32 = 1.0 / 120.0;
const SIN_7: f32 = -1.0 / 5040.0;
const COS_2: f32 = -0.5;
const COS_4: f32 = 1.0 / 24.0;
const COS_6: f32 = -1.0 / 720.0;
const COS_8: f32 = 1.0 / 40320.0;

/// Dropout multipliers as [`crate::draws::dropout_mask`] draws them; `keys` are those of the site.
/// `None` where the device has no kernels.
pub(crate) fn dropout_mask<const D: usize>(
    device: &Device,
    keys: &[Key],
    rate: f32,
    shape: [usize; D],
) -> Option<Tensor<D>> {
    let out = Drawn::new(device, keys, shape)?;
    let (count, dim) = out.units(out.block * keys.len());
    // SAFETY: units behind the end of the values do nothing.
    unsafe {
        dropout_kernel::launch_unchecked(
            &out.tensor.client,
            count,
            dim,
            out.keys(keys),
            out.values(),
            out.block as u32,
            drop_threshold(rate),
            1.0 / (1.0 - rate),
        );
    }
    Some(out.enter(device))
}

/// `uniform < rate`, asked of the integers that uniforms are 2^-24 of.
pub(crate) fn drop_threshold(rate: f32) -> u32 {
    (f64::from(rate) * f64::from(1u32 << 24)).ceil() as u32
}

/// One expert's manager noise as [`crate::draws::normals`] draws it; `keys` are those of the site
/// and the expert. `None` where the device has no kernels.
pub(crate) fn normals<const D: usize>(
    device: &Device,
    keys: &[Key],
    std: f32,
    shape: [usize; D],
) -> Option<Tensor<D>> {
    let out = Drawn::new(device, keys, shape)?;
    let pairs = out.block.div_ceil(2);
    let (count, dim) = out.units(pairs * keys.len());
    // SAFETY: units behind the last key do nothing, nor does a pair's second half behind a block.
    unsafe {
        normal_kernel::launch_unchecked(
            &out.tensor.client,
            count,
            dim,
            out.keys(keys),
            out.values(),
            out.block as u32,
            pairs as u32,
            std,
            0,
        );
    }
    Some(out.enter(device))
}

/// A tensor that a kernel fills.
struct Drawn {
    tensor: CubeTensor,
    /// Elements per key.
    block: usize,
}

impl Drawn {
    /// # Panics
    /// If the tensor has more elements than a 32-bit index reaches: 16 GiB of draws for one site.
    fn new<const D: usize>(device: &Device, keys: &[Key], shape: [usize; D]) -> Option<Self> {
        let device = cube_device(device)?;
        let len = shape.iter().product::<usize>();
        assert!(u32::try_from(len).is_ok(), "{shape:?} is too large to draw");
        let client = device.client();
        let tensor = empty_device_contiguous_dtype(client, device, shape.into(), DType::F32);
        let block = len / keys.len();
        Some(Drawn { tensor, block })
    }

    /// Cubes for so many units.
    fn units(&self, units: usize) -> (CubeCount, CubeDim) {
        let client = &self.tensor.client;
        let dim = CubeDim::new(client, units);
        (calculate_cube_count_elemwise(client, units, dim), dim)
    }

    fn keys(&self, keys: &[Key]) -> BufferArg {
        let states: Vec<u64> = keys.iter().map(|key| key.state()).collect();
        let client = &self.tensor.client;
        let buffer = client.create_from_slice(bytemuck::cast_slice(&states));
        // SAFETY: the buffer was made for exactly these.
        unsafe { BufferArg::from_raw_parts(buffer, states.len()) }
    }

    fn values(&self) -> BufferArg {
        let (handle, len) = (self.tensor.handle.clone(), self.tensor.meta.num_elements());
        // SAFETY: the buffer was made for exactly these.
        unsafe { BufferArg::from_raw_parts(handle, len) }
    }

    fn enter<const D: usize>(self, device: &Device) -> Tensor<D> {
        enter(Tensor::from_primitive::<Cube>(self.tensor), device)
    }
}

fn cube_device(device: &Device) -> Option<CubeDevice> {
    match device.clone().without_autodiff().as_dispatch() {
        DispatchDevice::Cube(device) => Some(device.clone()),
        _ => None,
    }
}

#[cube(launch_unchecked)]
fn dropout_kernel(keys: &[u64], values: &mut [f32], block: u32, dropped: u32, scale: f32) {
    if ABSOLUTE_POS >= values.len() {
        terminate!();
    }
    values[ABSOLUTE_POS] = multiplier(keys, ABSOLUTE_POS as u32, block, dropped, scale);
}

/// The dropout multiplier of the element at `place`, for kernels that use it where they draw it.
/// `block` elements share a key; `dropped` is [`drop_threshold`]'s.
#[cube]
pub(crate) fn multiplier(keys: &[u64], place: u32, block: u32, dropped: u32, scale: f32) -> f32 {
    let key = keys[(place / block) as usize];
    let drawn = (bits(key, place % block) >> 40u64) as u32;
    select(drawn < dropped, 0.0f32, scale)
}

#[cube(launch_unchecked)]
fn normal_kernel(keys: &[u64], values: &mut [f32], block: u32, pairs: u32, std: f32, zero: u32) {
    let unit = ABSOLUTE_POS as u32;
    let micro_batch = unit / pairs;
    if micro_batch as usize >= keys.len() {
        terminate!();
    }
    let pair = unit % pairs;
    let drawn = bits(keys[micro_batch as usize], pair);

    let high = (drawn >> 32u64) as u32;
    let uniform = (f32::cast_from(high) + 0.5f32) * UNIFORM_STEP;
    let square = -2.0f32 * ln(uniform, zero);
    let radius = select(square > 0.0f32, square, 0.0f32).sqrt();
    let low = drawn as u32;
    let quarter = low >> 30u32;
    let inside = f32::cast_from(low & 0x3FFF_FFFFu32) * ANGLE_STEP;
    let t = apart(inside * FRAC_PI_2, zero) - FRAC_PI_4;
    let t2 = t * t;
    let sin = t * sin_series(t2, zero);
    let cos = cos_series(t2, zero);
    let even = (quarter & 1u32) == 0u32;
    let x = select(even, cos, -sin);
    let y = select(even, sin, cos);
    let signed = select((quarter & 2u32) == 0u32, radius, -radius);

    let inside_block = 2u32 * pair;
    let place = micro_batch * block + inside_block;
    values[place as usize] = std * (signed * x);
    if inside_block + 1u32 < block {
        values[(place + 1u32) as usize] = std * (signed * y);
    }
}

/// `Key::bits` of a key's state.
#[cube]
fn bits(key: u64, index: u32) -> u64 {
    let mut z = key + (index as u64) * 0x9E37_79B9_7F4A_7C15u64;
    z = (z ^ (z >> 30u64)) * 0xBF58_476D_1CE4_E5B9u64;
    z = (z ^ (z >> 27u64)) * 0x94D0_49BB_1331_11EBu64;
    z ^ (z >> 31u64)
}

/// A product whose rounding stays: `zero` is 0, but only the launch knows it, so no compiler can
/// see the product behind the integers and fuse it with a sum.
#[cube]
pub(crate) fn apart(product: f32, zero: u32) -> f32 {
    f32::reinterpret(u32::reinterpret(product) ^ zero)
}

/// As `normal::ln`.
#[cube]
fn ln(x: f32, zero: u32) -> f32 {
    let shifted = u32::reinterpret(x) - 0x3F35_04F3u32;
    let exponent = i32::reinterpret(shifted) >> 23i32;
    let mantissa = f32::reinterpret((shifted & 0x007F_FFFFu32) + 0x3F35_04F3u32);
    let s = (mantissa - 1.0f32) / (mantissa + 1.0f32);
    let s2 = s * s;
    let mut series = apart(s2 * NINTH, zero) + SEVENTH;
    series = apart(s2 * series, zero) + 0.2f32;
    series = apart(s2 * series, zero) + THIRD;
    series = apart(s2 * series, zero) + 1.0f32;
    apart(f32::cast_from(exponent) * LN_2, zero) + apart(2.0f32 * s * series, zero)
}

/// As the sine of `normal::sin_cos`, divided by its argument.
#[cube]
fn sin_series(t2: f32, zero: u32) -> f32 {
    let mut sum = apart(t2 * SIN_7, zero) + SIN_5;
    sum = apart(t2 * sum, zero) + SIN_3;
    apart(t2 * sum, zero) + 1.0f32
}

/// As the cosine of `normal::sin_cos`.
#[cube]
fn cos_series(t2: f32, zero: u32) -> f32 {
    let mut sum = apart(t2 * COS_8, zero) + COS_6;
    sum = apart(t2 * sum, zero) + COS_4;
    sum = apart(t2 * sum, zero) + COS_2;
    apart(t2 * sum, zero) + 1.0f32
}

#[cfg(test)]
pub(crate) mod tests;
