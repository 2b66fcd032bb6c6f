//! Kernels against the operations that the host computes: values and every gradient.

use std::cell::Cell;

use belfry_configs::rng::{Key, Purpose};
use burn::tensor::{Device, FloatDType, Tensor, TensorData, activation};

use super::*;
use crate::draws;
use crate::exact_product::tests::devices;
use crate::normal::fill_normal;

/// Largest error over the largest value: sums of up to some hundred f32 in another order.
const F32_TOLERANCE: f32 = 5e-6;
/// The same of values rounded to bf16, which keeps eight bits.
const BF16_TOLERANCE: f32 = 8e-3;
const EPSILON: f32 = 1e-5;
const RATE: f32 = 0.1;

thread_local! {
    static UNITS: Cell<Option<u32>> = const { Cell::new(None) };
}

/// Units of a cube that a test asks for.
pub(super) fn units() -> Option<u32> {
    UNITS.get()
}

fn normal(stream: u64, len: usize, device: &Device) -> Tensor<1> {
    let mut values = vec![0.0; len];
    fill_normal(Key::new(stream, Purpose::Init), 0, 1.0, &mut values);
    Tensor::from_data(TensorData::new(values, [len]), device)
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.try_into_vec_as().expect("can be read")
}

fn keys() -> Vec<Key> {
    let key = Key::new(7, Purpose::Dropout);
    (0..2).map(|i| key.with(i)).collect()
}

/// The mask that the host would draw.
fn mask<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    let drawn = draws::dropout_mask(&keys(), RATE, shape.iter().product());
    Tensor::from_data(TensorData::new(drawn, shape), device)
}

/// `made` of flat leaves of these lengths, and their gradients under a fixed cotangent.
fn with_gradients(
    device: &Device,
    leaves: &[usize],
    made: &dyn Fn(&[Tensor<1>]) -> Tensor<1>,
) -> Vec<Vec<f32>> {
    let device = device.clone().autodiff();
    let leaves = leaves.iter().zip(1..);
    let leaves = leaves.map(|(len, stream)| normal(stream, *len, &device).require_grad());
    let leaves: Vec<Tensor<1>> = leaves.collect();
    let out = made(&leaves);
    let loss = (out.clone() * normal(99, out.dims()[0], &device)).sum();
    let mut gradients = loss.backward();
    let gradients = leaves.into_iter().map(|leaf| {
        let gradient = leaf.grad_remove(&mut gradients);
        values(gradient.expect("was asked for"))
    });
    std::iter::once(values(out)).chain(gradients).collect()
}

fn check(
    name: &str,
    leaves: &[usize],
    ours: &dyn Fn(&[Tensor<1>]) -> Tensor<1>,
    host: &dyn Fn(&[Tensor<1>]) -> Tensor<1>,
) {
    let host = with_gradients(&Device::flex(), leaves, host);
    for device in devices() {
        let made = with_gradients(&device, leaves, ours);
        let again = with_gradients(&device, leaves, ours);
        assert_eq!(made, again, "{name}: the same bits again");
        close(name, &made, &host, F32_TOLERANCE);
    }
}

fn close(name: &str, ours: &[Vec<f32>], host: &[Vec<f32>], tolerance: f32) {
    assert_eq!(ours.len(), host.len());
    for (number, (ours, host)) in ours.iter().zip(host).enumerate() {
        assert_eq!(ours.len(), host.len());
        // Where all is zero, so must ours be.
        let largest = host.iter().fold(1e-3f32, |m, v| m.max(v.abs()));
        let errors = ours.iter().zip(host).map(|(a, b)| (a - b).abs());
        let error = errors.fold(0.0, f32::max) / largest;
        println!("{name}, tensor {number}: {error:.1e}");
        assert!(error < tolerance, "{name}, tensor {number}: {error}");
    }
}

/// Rows that fill no part, one part, and several levels of parts; odd widths.
const ROWS: [[usize; 3]; 5] = [
    [2, 1, 1],
    [2, 3, 33],
    [2, 16, 768],
    [2, 20, 65],
    [2, 700, 9],
];

/// A norm as the host spells it out.
fn composed(x: Tensor<3>, affine: Option<[&Tensor<1>; 2]>) -> Tensor<1> {
    let centred = x.clone() - x.mean_dim(2);
    let variance = (centred.clone() * centred.clone()).mean_dim(2);
    let mut made = centred * (variance + EPSILON).sqrt().recip();
    if let Some([scale, shift]) = affine {
        let width = made.dims()[2];
        made = made * scale.clone().reshape([1, 1, width]) + shift.clone().reshape([1, 1, width]);
    }
    flat(made)
}

fn flat<const D: usize>(x: Tensor<D>) -> Tensor<1> {
    let len = x.dims().iter().product::<usize>();
    x.reshape([len])
}

fn part(leaves: &[Tensor<1>], i: usize) -> Tensor<1> {
    leaves[i].clone()
}

#[test]
fn norms_are_the_hosts_up_to_rounding() {
    for shape in ROWS {
        let [len, width] = [shape.iter().product(), shape[2]];
        check(
            &format!("norm {shape:?}"),
            &[len, width, width],
            &|l| {
                let affine = [part(l, 1), part(l, 2)];
                flat(norm(part(l, 0).reshape(shape), affine, EPSILON))
            },
            &|l| composed(part(l, 0).reshape(shape), Some([&l[1], &l[2]])),
        );
        check(
            &format!("normalised {shape:?}"),
            &[len],
            &|l| flat(normalise(part(l, 0).reshape(shape), EPSILON)),
            &|l| composed(part(l, 0).reshape(shape), None),
        );
    }
}

fn check_sums(shape: [usize; 3]) {
    let [len, width] = [shape.iter().product(), shape[2]];
    for drops in [false, true] {
        let draw = drops.then(|| Draw::new(&keys(), RATE));
        check(
            &format!("norm of a sum {shape:?}, dropout {drops}"),
            &[len, len, width, width],
            &|l| {
                let (y, x) = (part(l, 0).reshape(shape), part(l, 1).reshape(shape));
                let affine = [part(l, 2), part(l, 3)];
                flat(sum_norm((y, draw.clone()), x, affine, EPSILON))
            },
            &|l| {
                let (y, x) = (part(l, 0).reshape(shape), part(l, 1).reshape(shape));
                let y = match drops {
                    true => y * mask(shape, &l[0].device()),
                    false => y,
                };
                composed(y + x, Some([&l[2], &l[3]]))
            },
        );
    }
}

#[test]
fn norms_of_sums_are_the_hosts_up_to_rounding() {
    for shape in ROWS {
        check_sums(shape);
    }
}

/// What is added to scores: the last keys of the second row are padding.
fn padding(batch: usize, keys: usize, device: &Device) -> Tensor<4> {
    let added = (0..batch * keys).map(|i| match i / keys == 1 && i % keys > keys / 2 {
        true => -10_000.0,
        false => 0.0,
    });
    let added: Vec<f32> = added.collect();
    Tensor::from_data(TensorData::new(added, [batch, 1, 1, keys]), device)
}

/// The host's softmax.
fn composed_softmax(scores: Tensor<4>, [masked, drops]: [bool; 2]) -> Tensor<4> {
    let (shape, device) = (scores.dims(), scores.device());
    let scores = match masked {
        true => scores * 0.3 + padding(shape[0], shape[3], &device),
        false => scores * 0.3,
    };
    let probabilities = activation::softmax(scores, 3);
    match drops {
        true => probabilities * mask(shape, &device),
        false => probabilities,
    }
}

fn our_softmax(scores: Tensor<4>, [masked, drops]: [bool; 2]) -> Tensor<4> {
    let (shape, device) = (scores.dims(), scores.device());
    let padding = masked.then(|| padding(shape[0], shape[3], &device));
    let draw = drops.then(|| Draw::new(&keys(), RATE));
    softmax(scores, 0.3, padding.as_ref(), draw)
}

const FORMS: [[bool; 2]; 4] = [[false, false], [true, false], [false, true], [true, true]];

fn check_softmax(shape: [usize; 4]) {
    let len = shape.iter().product();
    for form in FORMS {
        check(
            &format!("softmax {shape:?}, mask and dropout {form:?}"),
            &[len],
            &|l| flat(our_softmax(part(l, 0).reshape(shape), form)),
            &|l| flat(composed_softmax(part(l, 0).reshape(shape), form)),
        );
    }
}

#[test]
fn softmaxes_are_the_hosts_up_to_rounding() {
    for shape in [[2, 1, 1, 1], [2, 3, 5, 7], [2, 2, 3, 65], [2, 12, 17, 325]] {
        check_softmax(shape);
    }
}

/// Products may leave gaps between rows, and views come in any order of axes.
#[test]
fn scores_are_read_where_they_lie() {
    let wide = [2, 3, 5, 8];
    let turned = [2, 3, 7, 5];
    let cut = |x: Tensor<4>| x.narrow(3, 0, 7);
    for form in FORMS {
        let len = wide.iter().product();
        check(
            &format!("softmax of cut rows {form:?}"),
            &[len],
            &|l| flat(our_softmax(cut(part(l, 0).reshape(wide)), form)),
            &|l| flat(composed_softmax(cut(part(l, 0).reshape(wide)), form)),
        );
        let len = turned.iter().product();
        check(
            &format!("softmax of turned rows {form:?}"),
            &[len],
            &|l| {
                flat(our_softmax(
                    part(l, 0).reshape(turned).swap_dims(2, 3),
                    form,
                ))
            },
            &|l| {
                let scores = part(l, 0).reshape(turned).swap_dims(2, 3);
                flat(composed_softmax(scores, form))
            },
        );
    }
}

#[test]
fn bf16_scores_meet_f32_arithmetic() {
    let shape = [2, 3, 5, 65];
    let round = |x: Tensor<1>| x.cast(FloatDType::BF16);
    for form in FORMS {
        let leaves = [shape.iter().product()];
        let host = with_gradients(&Device::flex(), &leaves, &|l| {
            let scores = round(part(l, 0)).cast(FloatDType::F32).reshape(shape);
            flat(composed_softmax(scores, form))
        });
        for device in devices() {
            let ours = |l: &[Tensor<1>]| {
                let made = our_softmax(round(part(l, 0)).reshape(shape), form);
                assert_eq!(made.dtype(), DType::BF16);
                flat(made).cast(FloatDType::F32)
            };
            let made = with_gradients(&device, &leaves, &ours);
            assert_eq!(made, with_gradients(&device, &leaves, &ours));
            close(&format!("bf16 {form:?}"), &made, &host, BF16_TOLERANCE);
        }
    }
}

#[test]
fn activations_are_the_hosts_up_to_rounding() {
    for len in [1, 255, 257, 70_001] {
        let ours = |kind| move |l: &[Tensor<1>]| gelu(kind, part(l, 0) * 3.0);
        check("gelu", &[len], &ours(Gelu::Exact), &|l| {
            activation::gelu(part(l, 0) * 3.0)
        });
        check("quick gelu", &[len], &ours(Gelu::Quick), &|l| {
            let x = part(l, 0) * 3.0;
            x.clone() * activation::sigmoid(x * 1.702)
        });
    }
}

/// Two units of a cube meet over shared memory.
#[test]
fn units_of_a_row_agree() {
    UNITS.set(Some(2));
    check_sums([2, 3, 33]);
    check_softmax([2, 2, 3, 7]);
}

#[test]
fn what_needs_no_gradient_gets_none() {
    for device in devices() {
        let device = device.autodiff();
        let x = normal(1, 12, &device).reshape([3, 4]);
        let scale = normal(2, 4, &device).require_grad();
        let shift = normal(3, 4, &device);
        let made = norm(x.clone(), [scale.clone(), shift.clone()], EPSILON);
        let mut gradients = made.sum().backward();
        assert!(x.grad_remove(&mut gradients).is_none());
        assert!(scale.grad_remove(&mut gradients).is_some());
        assert!(shift.grad_remove(&mut gradients).is_none());
        assert!(!normalise(x, EPSILON).is_require_grad());
    }
}
