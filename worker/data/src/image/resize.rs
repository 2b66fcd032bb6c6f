//! Bicubic resize with antialias, to Pillow's bits. Knows one filter and rectangles of pixels.
//!
//! Pillow's 8-bit path: coefficients in f64, rounded to 22-bit fixed point, a horizontal then a
//! vertical pass with an 8-bit picture between. Integer arithmetic: the same on every processor,
//! which the faster resize crates do not promise across instruction sets. Only what the window needs
//! is computed, which changes no bit of it.

use super::buffers;
use super::pixels::{Pixels, Rect};

#[cfg(target_arch = "x86_64")]
mod avx2;

const PRECISION_BITS: u32 = 32 - 8 - 2;
const HALF: i32 = 1 << (PRECISION_BITS - 1);
/// Keys' cubic with a = -0.5 reaches two samples far.
const SUPPORT: f64 = 2.0;
/// Weights of an output sample are filled up with zeros to a multiple of this.
const TAPS: usize = 4;

/// Resizes the `part` of a picture to `size` and returns the `window` of the result.
///
/// What lies outside `part` has no influence: it is a crop before the resize.
pub fn resize<const C: usize>(
    from: &Pixels<C>,
    part: Rect,
    size: (usize, usize),
    window: Rect,
) -> Pixels<C> {
    let columns = Axis::new(part.width, size.0, window.left, window.width);
    let rows = Axis::new(part.height, size.1, window.top, window.height);
    let (top, bottom) = rows.reach();
    let wide = Pixels::<C> {
        width: window.width,
        height: bottom - top,
        data: horizontal(from, &part, (top, bottom), &columns),
    };
    let resized = Pixels {
        width: window.width,
        height: window.height,
        data: vertical(&wide, top, &rows),
    };
    buffers::give(wide.data);
    resized
}

/// How the samples of one axis come to be: a range of the outputs.
struct Axis {
    /// Of every output, its first input.
    firsts: Vec<usize>,
    /// Of every output, how many inputs.
    counts: Vec<usize>,
    /// Weights an output, a multiple of [`TAPS`].
    stride: usize,
    /// `[outputs, stride]` in fixed point, zeros behind an output's count.
    weights: Vec<i32>,
}

impl Axis {
    /// Outputs `first..first + count` of an axis that goes from `from` to `to` samples.
    fn new(from: usize, to: usize, first: usize, count: usize) -> Self {
        let scale = from as f64 / to as f64;
        let filter_scale = scale.max(1.0);
        let support = SUPPORT * filter_scale;
        let narrow = 1.0 / filter_scale;
        let center = |out: usize| (out as f64 + 0.5) * scale;
        let reach = |out: usize| {
            let begin = ((center(out) - support + 0.5) as i64).max(0) as usize;
            let end = ((center(out) + support + 0.5) as i64).min(from as i64) as usize;
            begin..end
        };
        let outputs = first..first + count;
        let counts: Vec<usize> = outputs.clone().map(|out| reach(out).len()).collect();
        let most = counts.iter().copied().max().unwrap_or(0);
        let stride = most.next_multiple_of(TAPS);
        let mut weights = vec![0; count * stride];
        let mut raw = Vec::with_capacity(most);
        for (out, fixed) in outputs.clone().zip(weights.chunks_exact_mut(stride)) {
            raw.clear();
            raw.extend(reach(out).map(|x| cubic((x as f64 - center(out) + 0.5) * narrow)));
            let sum: f64 = raw.iter().sum();
            for (fixed, weight) in fixed.iter_mut().zip(&raw) {
                let scaled = weight / sum * f64::from(1u32 << PRECISION_BITS);
                *fixed = (scaled + 0.5f64.copysign(scaled)) as i32;
            }
        }
        Axis {
            firsts: outputs.map(|out| reach(out).start).collect(),
            counts,
            stride,
            weights,
        }
    }

    /// First input of all, and the one behind the last.
    fn reach(&self) -> (usize, usize) {
        let ends = self.firsts.iter().zip(&self.counts).map(|(f, c)| f + c);
        (
            self.firsts.iter().copied().min().unwrap_or(0),
            ends.max().unwrap_or(0),
        )
    }

    /// (first input, weights) of every output.
    fn outputs(&self) -> impl Iterator<Item = (usize, &[i32])> {
        let weights = self.weights.chunks_exact(self.stride);
        let each = self.firsts.iter().zip(&self.counts).zip(weights);
        each.map(|((first, count), weights)| (*first, &weights[..*count]))
    }
}

fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

fn round(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// Rows `reach` of the `part`, each resized along `columns`.
fn horizontal<const C: usize>(
    from: &Pixels<C>,
    part: &Rect,
    reach: (usize, usize),
    columns: &Axis,
) -> Vec<u8> {
    let width = part.width * C;
    let rows = (part.top + reach.0..part.top + reach.1)
        .map(|row| &from.data[(row * from.width + part.left) * C..]);
    let stride = columns.firsts.len() * C;
    let all = rows.len() * stride;
    let mut out = buffers::take(all + SLACK);
    #[cfg(target_arch = "x86_64")]
    if avx2::is_here() {
        avx2::horizontal::<C>(rows.map(|row| (row, width)), columns, &mut out);
        out.truncate(all);
        return out;
    }
    for (row, out) in rows.zip(out.chunks_exact_mut(stride)) {
        horizontal_row::<C>(&row[..width], columns, out);
    }
    out.truncate(all);
    out
}

/// Bytes behind the last row that vectors may reach.
const SLACK: usize = 32;

fn horizontal_row<const C: usize>(row: &[u8], columns: &Axis, out: &mut [u8]) {
    for ((first, weights), out) in columns.outputs().zip(out.as_chunks_mut::<C>().0) {
        let mut sums = [HALF; C];
        for (pixel, weight) in row[first * C..].as_chunks::<C>().0.iter().zip(weights) {
            for (sum, value) in sums.iter_mut().zip(pixel) {
                *sum = sum.wrapping_add(i32::from(*value) * weight);
            }
        }
        *out = sums.map(round);
    }
}

/// All columns of `wide`, whose first row is the input's row `top`, resized along `rows`.
fn vertical<const C: usize>(wide: &Pixels<C>, top: usize, rows: &Axis) -> Vec<u8> {
    let stride = wide.width * C;
    let mut out = buffers::take(rows.firsts.len() * stride);
    #[cfg(target_arch = "x86_64")]
    let fast = avx2::is_here();
    for ((first, weights), out) in rows.outputs().zip(out.chunks_exact_mut(stride)) {
        let begin = (first - top) * stride;
        let inputs = &wide.data[begin..begin + weights.len() * stride];
        #[cfg(target_arch = "x86_64")]
        if fast {
            avx2::vertical_row(inputs, weights, out);
            continue;
        }
        vertical_row(inputs, weights, out);
    }
    out
}

/// The weighted sum of rows as long as `out`.
fn vertical_row(inputs: &[u8], weights: &[i32], out: &mut [u8]) {
    let mut sums = vec![HALF; out.len()];
    for (row, weight) in inputs.chunks_exact(out.len()).zip(weights) {
        for (sum, value) in sums.iter_mut().zip(row) {
            *sum = sum.wrapping_add(i32::from(*value) * weight);
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = round(sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use belfry_configs::rng::{Key, Purpose};

    fn noise<const C: usize>(width: usize, height: usize, key: Key) -> Pixels<C> {
        // Black and white: the largest sums there are.
        let value = |i: usize| if key.bits(i as u64) & 1 == 0 { 0 } else { 255 };
        Pixels {
            width,
            height,
            data: (0..width * height * C).map(value).collect(),
        }
    }

    fn whole<const C: usize>(from: &Pixels<C>, size: (usize, usize)) -> Pixels<C> {
        resize(from, from.rect(), size, Rect::of(size.0, size.1))
    }

    #[test]
    fn a_window_holds_the_bits_of_the_whole() {
        let from = noise::<3>(61, 47, Key::new(1, Purpose::Pack));
        let all = whole(&from, (40, 90));
        let window = Rect {
            left: 7,
            top: 30,
            width: 21,
            height: 33,
        };
        let some = resize(&from, from.rect(), (40, 90), window);
        for y in 0..33 {
            let start = ((y + 30) * 40 + 7) * 3;
            let row = &some.data[y * 63..(y + 1) * 63];
            assert_eq!(row, &all.data[start..start + 63], "row {y}");
        }
    }

    #[test]
    fn a_part_is_a_crop_before() {
        let from = noise::<3>(61, 47, Key::new(2, Purpose::Pack));
        let part = Rect {
            left: 5,
            top: 9,
            width: 31,
            height: 20,
        };
        let rows = (9..29).flat_map(|y| from.data[(y * 61 + 5) * 3..][..93].iter().copied());
        let crop = Pixels::<3> {
            width: 31,
            height: 20,
            data: rows.collect(),
        };
        let size = Rect::of(48, 48);
        let both = [resize(&from, part, (48, 48), size), whole(&crop, (48, 48))];
        assert_eq!(both[0], both[1]);
    }

    #[test]
    fn what_keeps_its_size_keeps_its_bits() {
        let from = noise::<4>(13, 8, Key::new(3, Purpose::Pack));
        assert_eq!(whole(&from, (13, 8)), from);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        if !avx2::is_here() {
            eprintln!("SKIPPED: this processor has no AVX2, one path is all there is");
            return;
        }
        let key = Key::new(4, Purpose::Pack);
        for case in 0..200 {
            let size = |draw: u64| 1 + key.with(case).below(draw, 90) as usize;
            paths_agree::<3>(size(0), size(1), key.with(case));
            paths_agree::<4>(size(0), size(2), key.with(case));
        }
        // A weight for every one of 5,000 samples: partial sums pass 31 bits and come back.
        paths_agree::<3>(5000, 1, key);
    }

    #[cfg(target_arch = "x86_64")]
    fn paths_agree<const C: usize>(from: usize, to: usize, key: Key) {
        let axis = Axis::new(from, to, 0, to);
        let row = noise::<C>(from, 1, key).data;
        let (mut plain, mut fast) = (vec![0; to * C], vec![1; to * C + SLACK]);
        horizontal_row::<C>(&row, &axis, &mut plain);
        avx2::horizontal::<C>([(&row[..], row.len())].into_iter(), &axis, &mut fast);
        assert_eq!(plain, fast[..to * C], "{C} channels, {from} to {to}");
        let stride = 1 + key.below(9, 70) as usize;
        let rows = noise::<1>(stride, from, key).data;
        for (first, weights) in axis.outputs() {
            let inputs = &rows[first * stride..(first + weights.len()) * stride];
            let (mut plain, mut fast) = (vec![0; stride], vec![1; stride]);
            vertical_row(inputs, weights, &mut plain);
            avx2::vertical_row(inputs, weights, &mut fast);
            assert_eq!(plain, fast, "{stride} columns, {from} to {to}");
        }
    }
}
