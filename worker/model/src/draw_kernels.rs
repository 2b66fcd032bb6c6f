//! The draws of a forward pass, made where they are used: kernels for devices that are not the host.
//!
//! The same bits as `draws.rs` and `normal.rs`, from the same keys. Integers mix alike everywhere;
//! what can differ is the last bit of a sum, because GPU compilers fuse a product and the sum behind
//! it into one operation with one rounding. Here every such product passes through [`apart`], which
//! no compiler may look through. This file refuses to know what is drawn for whom.

use std::f32::consts::{FRAC_PI_2, FRAC_PI_4, LN_2};

use belfry_configs::rng::Key;
use burn::backend::{Cube, DispatchDevice};
use burn::tensor::{DType, Device, Shape, Tensor};
use burn_cubecl::CubeDevice;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::calculate_cube_count_elemwise;
use cubecl::prelude::*;

use crate::weights::enter;

/// Dropout multipliers as [`crate::draws::dropout_mask`] draws them; `keys` are those of the site.
/// `None` where the device has no kernels.
pub(crate) fn dropout_mask<const D: usize>(
    device: &Device,
    keys: &[Key],
    rate: f32,
    shape: [usize; D],
) -> Option<Tensor<D>> {
    let device_of_kernels = cube_device(device)?;
    let out = empty(&device_of_kernels, Shape::from(shape));
    let len = shape.iter().product::<usize>();
    // `uniform < rate` for uniforms that are multiples of 2^-24, asked of integers.
    let dropped = (f64::from(rate) * f64::from(1u32 << 24)).ceil() as u32;
    launch(&out, keys, len, |client, count, dim, keys, values| {
        let block = (len / keys.len) as u64;
        // SAFETY: the kernel leaves units behind the end.
        unsafe {
            dropout_kernel::launch_unchecked(
                client,
                count,
                dim,
                keys.buffer,
                values,
                block,
                dropped,
                1.0 / (1.0 - rate),
            );
        }
    });
    Some(enter(Tensor::from_primitive::<Cube>(out), device))
}

/// One expert's manager noise as [`crate::draws::normals`] draws it; `keys` are those of the
/// site and the expert. `None` where the device has no kernels.
pub(crate) fn normals<const D: usize>(
    device: &Device,
    keys: &[Key],
    std: f32,
    shape: [usize; D],
) -> Option<Tensor<D>> {
    let device_of_kernels = cube_device(device)?;
    let out = empty(&device_of_kernels, Shape::from(shape));
    let block = shape.iter().product::<usize>() / keys.len();
    let pairs = block.div_ceil(2);
    launch(
        &out,
        keys,
        pairs * keys.len(),
        |client, count, dim, keys, values| {
            // SAFETY: the kernel leaves units behind the end.
            unsafe {
                normal_kernel::launch_unchecked(
                    client,
                    count,
                    dim,
                    keys.buffer,
                    values,
                    block as u64,
                    pairs as u64,
                    std,
                    0,
                );
            }
        },
    );
    Some(enter(Tensor::from_primitive::<Cube>(out), device))
}

fn cube_device(device: &Device) -> Option<CubeDevice> {
    match device.clone().without_autodiff().as_dispatch() {
        DispatchDevice::Cube(device) => Some(device.clone()),
        _ => None,
    }
}

fn empty(device: &CubeDevice, shape: Shape) -> CubeTensor {
    empty_device_contiguous_dtype(device.client(), device.clone(), shape, DType::F32)
}

/// Keys on the device.
struct KeysArg {
    buffer: BufferArg,
    len: usize,
}

/// Brings the keys to the device and starts `units` units.
fn launch(
    out: &CubeTensor,
    keys: &[Key],
    units: usize,
    start: impl FnOnce(&cubecl::client::Client, CubeCount, CubeDim, KeysArg, BufferArg),
) {
    let client = &out.client;
    let states: Vec<u64> = keys.iter().map(|key| key.state()).collect();
    let states = client.create_from_slice(bytemuck::cast_slice(&states));
    let dim = CubeDim::new(client, units);
    let count = calculate_cube_count_elemwise(client, units, dim);
    // SAFETY: both buffers were made for exactly these numbers of elements.
    let (keys, values) = unsafe {
        let buffer = BufferArg::from_raw_parts(states, keys.len());
        let len = keys.len();
        let elements = out.meta.num_elements();
        let values = BufferArg::from_raw_parts(out.handle.clone(), elements);
        (KeysArg { buffer, len }, values)
    };
    start(client, count, dim, keys, values);
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn dropout_kernel(keys: &[u64], values: &mut [f32], block: u64, dropped: u32, scale: f32) {
    if ABSOLUTE_POS >= values.len() {
        terminate!();
    }
    let place = ABSOLUTE_POS as u64;
    let key = keys[(place / block) as usize];
    let drawn = (bits(key, place % block) >> 40u64) as u32;
    values[ABSOLUTE_POS] = select(drawn < dropped, 0.0f32, scale);
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn normal_kernel(keys: &[u64], values: &mut [f32], block: u64, pairs: u64, std: f32, zero: u32) {
    let unit = ABSOLUTE_POS as u64;
    let micro_batch = unit / pairs;
    if micro_batch >= keys.len() as u64 {
        terminate!();
    }
    let pair = unit % pairs;
    let drawn = bits(keys[micro_batch as usize], pair);

    let high = (drawn >> 32u64) as u32;
    let uniform = (f32::cast_from(high) + 0.5f32) * comptime!(1.0f32 / 4_294_967_296.0);
    let square = -2.0f32 * ln(uniform, zero);
    let radius = select(square > 0.0f32, square, 0.0f32).sqrt();
    let low = drawn as u32;
    let quarter = low >> 30u32;
    let inside = f32::cast_from(low & 0x3FFF_FFFFu32) * comptime!(1.0f32 / 1_073_741_824.0);
    let t = apart(inside * FRAC_PI_2, zero) - FRAC_PI_4;
    let t2 = t * t;
    let sin = t * sin_series(t2, zero);
    let cos = cos_series(t2, zero);
    let even = (quarter & 1u32) == 0u32;
    let x = select(even, cos, -sin);
    let y = select(even, sin, cos);
    let signed = select((quarter & 2u32) == 0u32, radius, -radius);

    let place = micro_batch * block + 2u64 * pair;
    values[place as usize] = std * (signed * x);
    if 2u64 * pair + 1u64 < block {
        values[(place + 1u64) as usize] = std * (signed * y);
    }
}

/// `Key::bits` of a key's state.
#[cube]
fn bits(key: u64, index: u64) -> u64 {
    let mut z = key + index * 0x9E37_79B9_7F4A_7C15u64;
    z = (z ^ (z >> 30u64)) * 0xBF58_476D_1CE4_E5B9u64;
    z = (z ^ (z >> 27u64)) * 0x94D0_49BB_1331_11EBu64;
    z ^ (z >> 31u64)
}

/// A product whose rounding stays: `zero` is 0, but only the launch knows it, so no compiler can
/// see the product behind the integers and fuse it with a sum.
#[cube]
fn apart(product: f32, zero: u32) -> f32 {
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
    let mut series = apart(s2 * comptime!(1.0f32 / 9.0), zero) + comptime!(1.0f32 / 7.0);
    series = apart(s2 * series, zero) + 0.2f32;
    series = apart(s2 * series, zero) + comptime!(1.0f32 / 3.0);
    series = apart(s2 * series, zero) + 1.0f32;
    apart(f32::cast_from(exponent) * LN_2, zero) + apart(2.0f32 * s * series, zero)
}

/// As the sine of `normal::sin_cos`, divided by its argument.
#[cube]
fn sin_series(t2: f32, zero: u32) -> f32 {
    let mut sum = apart(t2 * comptime!(-1.0f32 / 5040.0), zero) + comptime!(1.0f32 / 120.0);
    sum = apart(t2 * sum, zero) + comptime!(-1.0f32 / 6.0);
    apart(t2 * sum, zero) + 1.0f32
}

/// As the cosine of `normal::sin_cos`.
#[cube]
fn cos_series(t2: f32, zero: u32) -> f32 {
    let mut sum = apart(t2 * comptime!(1.0f32 / 40320.0), zero) + comptime!(-1.0f32 / 720.0);
    sum = apart(t2 * sum, zero) + comptime!(1.0f32 / 24.0);
    sum = apart(t2 * sum, zero) + -0.5f32;
    apart(t2 * sum, zero) + 1.0f32
}
