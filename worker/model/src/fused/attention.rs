//! Masked softmax of attention scores with dropout, in one kernel each way.
//!
//! Arithmetic is f32; scores come and probabilities leave in the type of products, so with bf16 no
//! f32 tensor of `[batch, heads, queries, keys]` exists. Backward keeps the probabilities before
//! dropout and draws the mask again. It refuses to know queries, keys and values.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;
use half::bf16;

use super::launch::{Draw, Dropping, Rows, cube_max, cube_sum, unread, whole};
use crate::draw_kernels::multiplier;

/// Lower than any score.
const LOWEST: f32 = -3.402_823_5e38;

/// What is done to scores besides the softmax.
#[derive(Clone, Debug)]
pub(crate) struct Scores {
    /// Their factor.
    pub factor: f32,
    /// What is added to those of each key, `[batch, 1, 1, keys]`, f32.
    pub mask: Option<CubeTensor>,
    /// Dropout of the probabilities.
    pub draw: Option<Draw>,
}

/// What backward needs.
#[derive(Clone, Debug)]
pub(super) struct Saved {
    probabilities: CubeTensor,
    factor: f32,
    draw: Option<Draw>,
}

/// `dropout(softmax(scores * factor + mask))` over the last axis, in the scores' type.
pub(super) fn forward(scores: CubeTensor, how: Scores) -> (CubeTensor, Saved) {
    let dtype = scores.dtype;
    let rows = Rows::of(scores);
    let probabilities = rows.empty_like();
    let kept = how.draw.as_ref().map(|_| rows.empty_like());
    let mask = how.mask.map(Rows::of);
    let dropping = Dropping::new(how.draw.as_ref(), &rows.tensor);
    let (count, dim, units) = rows.cubes();
    let launch = match dtype {
        DType::F32 => forward_kernel::launch_unchecked::<f32>,
        DType::BF16 => forward_kernel::launch_unchecked::<bf16>,
        other => panic!("attention scores are f32 or bf16, not {other:?}"),
    };
    let none = || unread(&probabilities);
    // SAFETY: one cube per row, whose units stay inside it.
    unsafe {
        launch(
            &rows.tensor.client,
            count,
            dim,
            rows.arg(),
            mask.as_ref().map_or_else(none, Rows::arg),
            dropping.keys,
            whole(&probabilities),
            kept.as_ref().map_or_else(none, whole),
            rows.width,
            rows.stride,
            mask.as_ref().map_or(1, |mask| rows.count / mask.count),
            mask.as_ref().map_or(0, |mask| mask.stride),
            how.factor,
            dropping.block,
            dropping.dropped,
            dropping.scale,
            mask.is_some(),
            dropping.active,
            units,
        );
    }
    let saved = Saved {
        probabilities: probabilities.clone(),
        factor: how.factor,
        draw: how.draw,
    };
    (kept.unwrap_or(probabilities), saved)
}

/// Gradient of the scores, in their type.
pub(super) fn backward(saved: &Saved, gradient: CubeTensor) -> CubeTensor {
    let (dtype, gradient) = (saved.probabilities.dtype, Rows::of(gradient));
    assert_eq!(
        gradient.tensor.dtype, dtype,
        "a gradient has its tensor's type"
    );
    let out = gradient.empty_like();
    let dropping = Dropping::new(saved.draw.as_ref(), &gradient.tensor);
    let (count, dim, units) = gradient.cubes();
    let launch = match dtype {
        DType::BF16 => backward_kernel::launch_unchecked::<bf16>,
        _ => backward_kernel::launch_unchecked::<f32>,
    };
    // SAFETY: as forward.
    unsafe {
        launch(
            &gradient.tensor.client,
            count,
            dim,
            whole(&saved.probabilities),
            gradient.arg(),
            dropping.keys,
            whole(&out),
            gradient.width,
            gradient.stride,
            saved.factor,
            dropping.block,
            dropping.dropped,
            dropping.scale,
            dropping.active,
            units,
        );
    }
    out
}

#[cube(launch_unchecked)]
pub(super) fn forward_kernel<S: Float>(
    scores: &[S],
    mask: &[f32],
    keys: &[u64],
    probabilities: &mut [S],
    kept: &mut [S],
    width: u32,
    stride: u32,
    rows_per_mask: u32,
    mask_stride: u32,
    factor: f32,
    block: u32,
    dropped: u32,
    scale: f32,
    #[comptime] masked: bool,
    #[comptime] dropout: bool,
    #[comptime] units: u32,
) {
    let row = CUBE_POS as u32;
    let first = row * width;
    let scores_first = row * stride;
    let mask_first = (row / rows_per_mask) * mask_stride;

    let mut largest = LOWEST.runtime();
    let mut i = UNIT_POS;
    while i < width {
        let score = f32::cast_from(scores[(scores_first + i) as usize]) * factor;
        let score = plus(score, mask, mask_first + i, masked);
        largest = select(score > largest, score, largest);
        i += units;
    }
    let largest = cube_max(largest, units);

    let mut total = 0.0f32;
    let mut i = UNIT_POS;
    while i < width {
        let score = f32::cast_from(scores[(scores_first + i) as usize]) * factor;
        let score = plus(score, mask, mask_first + i, masked);
        total += (score - largest).exp();
        i += units;
    }
    let inverse = 1.0f32 / cube_sum(total, units);

    let mut i = UNIT_POS;
    while i < width {
        let score = f32::cast_from(scores[(scores_first + i) as usize]) * factor;
        let score = plus(score, mask, mask_first + i, masked);
        let probability = (score - largest).exp() * inverse;
        let place = first + i;
        probabilities[place as usize] = S::cast_from(probability);
        if comptime!(dropout) {
            let times = multiplier(keys, place, block, dropped, scale);
            kept[place as usize] = S::cast_from(probability * times);
        }
        i += units;
    }
}

/// A score with what the mask adds at `place`, if there is a mask.
#[cube]
fn plus(score: f32, mask: &[f32], place: u32, #[comptime] masked: bool) -> f32 {
    let mut sum = score;
    if comptime!(masked) {
        sum += mask[place as usize];
    }
    sum
}

#[cube(launch_unchecked)]
pub(super) fn backward_kernel<S: Float>(
    probabilities: &[S],
    gradient: &[S],
    keys: &[u64],
    out: &mut [S],
    width: u32,
    stride: u32,
    factor: f32,
    block: u32,
    dropped: u32,
    scale: f32,
    #[comptime] dropout: bool,
    #[comptime] units: u32,
) {
    let row = CUBE_POS as u32;
    let first = row * width;
    let gradient_first = row * stride;

    let mut along = 0.0f32;
    let mut i = UNIT_POS;
    while i < width {
        let place = first + i;
        let mut g = f32::cast_from(gradient[(gradient_first + i) as usize]);
        if comptime!(dropout) {
            g *= multiplier(keys, place, block, dropped, scale);
        }
        along += g * f32::cast_from(probabilities[place as usize]);
        i += units;
    }
    let along = cube_sum(along, units);

    let mut i = UNIT_POS;
    while i < width {
        let place = first + i;
        let mut g = f32::cast_from(gradient[(gradient_first + i) as usize]);
        if comptime!(dropout) {
            g *= multiplier(keys, place, block, dropped, scale);
        }
        let probability = f32::cast_from(probabilities[place as usize]);
        out[place as usize] = S::cast_from(probability * (g - along) * factor);
        i += units;
    }
}
