//! AdamW as one kernel, for devices with kernels of their own.
//!
//! Reads state and gradient once and writes the new state: no vector of the model's size besides.
//! Every element is rounded as on the host, so the bits are the host's too. It refuses to know
//! the model and where rates come from.

use burn::backend::Cube;
use burn::tensor::{DType, Tensor};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::calculate_cube_count_elemwise;
use cubecl::prelude::*;

use crate::optimizer::Numbers;
use crate::optimizer_on_device::Tensors;

/// The update with `spans` of elements, step size and decay, one behind the other over the vectors;
/// `None` where the device has no kernels.
///
/// # Panics
/// If there are more elements than a 32-bit index reaches.
pub(crate) fn apply(
    numbers: Numbers,
    spans: &[(usize, f32, f32)],
    state: &Tensors,
    gradient: &Tensor<1>,
) -> Option<Tensors> {
    let primitive = |tensor: &Tensor<1>| {
        let primitive = tensor.clone().try_into_primitive::<Cube>();
        primitive.ok().map(into_contiguous)
    };
    let gradient = primitive(gradient)?;
    let [params, m, v] = state.each_ref().map(primitive);
    let old = [params?, m?, v?];
    let new = [0, 1, 2].map(|_| empty_like(&gradient));
    let mut end = 0;
    let ends = spans.iter().map(|(len, ..)| {
        end += len;
        u32::try_from(end).expect("a model has less than 2^32 parameters")
    });
    let ends: Vec<u32> = ends.collect();
    let rates: Vec<f32> = spans.iter().flat_map(|(_, s, d)| [*s, *d]).collect();
    let client = &gradient.client;
    let table = |bytes: &[u8], len: usize| {
        let buffer = client.create_from_slice(bytes);
        // SAFETY: the buffer was made for exactly these.
        unsafe { BufferArg::from_raw_parts(buffer, len) }
    };
    let units = gradient.meta.num_elements();
    let dim = CubeDim::new(client, units);
    // SAFETY: units behind the end do nothing; spans cover the vectors.
    unsafe {
        update_kernel::launch_unchecked(
            client,
            calculate_cube_count_elemwise(client, units, dim),
            dim,
            whole(&gradient),
            whole(&old[0]),
            whole(&old[1]),
            whole(&old[2]),
            whole(&new[0]),
            whole(&new[1]),
            whole(&new[2]),
            table(u32::as_bytes(&ends), ends.len()),
            table(f32::as_bytes(&rates), rates.len()),
            numbers.beta1,
            numbers.beta2,
            numbers.one_minus_beta1,
            numbers.one_minus_beta2,
            numbers.epsilon,
            0,
        );
    }
    Some(new.map(Tensor::from_primitive::<Cube>))
}

fn empty_like(tensor: &CubeTensor) -> CubeTensor {
    let (client, device) = (tensor.client.clone(), tensor.device.clone());
    let shape = tensor.meta.shape().clone();
    empty_device_contiguous_dtype(client, device, shape, DType::F32)
}

fn whole(tensor: &CubeTensor) -> BufferArg {
    let (handle, len) = (tensor.handle.clone(), tensor.meta.num_elements());
    // SAFETY: flat vectors without gaps.
    unsafe { BufferArg::from_raw_parts(handle, len) }
}

#[cube(launch_unchecked)]
fn update_kernel(
    gradient: &[f32],
    params: &[f32],
    m: &[f32],
    v: &[f32],
    new_params: &mut [f32],
    new_m: &mut [f32],
    new_v: &mut [f32],
    ends: &[u32],
    rates: &[f32],
    beta1: f32,
    beta2: f32,
    one_minus_beta1: f32,
    one_minus_beta2: f32,
    epsilon: f32,
    zero: u32,
) {
    if ABSOLUTE_POS >= new_params.len() {
        terminate!();
    }
    let place = ABSOLUTE_POS as u32;
    // The first span that ends behind this element.
    let mut span = 0usize;
    let mut last = ends.len() - 1;
    while span < last {
        let middle = (span + last) / 2;
        if ends[middle] > place {
            last = middle;
        } else {
            span = middle + 1;
        }
    }
    let step_size = rates[2 * span];
    let decay = rates[2 * span + 1];

    let g = gradient[ABSOLUTE_POS];
    let m = apart(beta1 * m[ABSOLUTE_POS], zero) + apart(one_minus_beta1 * g, zero);
    let v = apart(beta2 * v[ABSOLUTE_POS], zero) + apart(one_minus_beta2 * (g * g), zero);
    let towards = m / (v.sqrt() + epsilon);
    let moved = params[ABSOLUTE_POS] - apart(step_size * towards, zero);
    new_params[ABSOLUTE_POS] = moved - apart(decay * moved, zero);
    new_m[ABSOLUTE_POS] = m;
    new_v[ABSOLUTE_POS] = v;
}

/// A product whose rounding stays: `zero` is 0, but only the launch knows it, so no compiler can
/// fuse the product with a sum.
#[cube]
fn apart(product: f32, zero: u32) -> f32 {
    f32::reinterpret(u32::reinterpret(product) ^ zero)
}
