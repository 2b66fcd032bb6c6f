//! The two passes of a resize with AVX2: the same integers, sixteen products at a time. Knows
//! weights and rows of bytes.
//!
//! A 22-bit weight is the sum of a part below 2^15 and a multiple of 2^15. Both parts are multiplied
//! with 16-bit instructions, which are several times faster than 32-bit ones, and added up apart.
//! Additions wrap: modulo 2^32 the sum is that of the plain loop.

use std::arch::x86_64::*;

use super::{Axis, HALF, PRECISION_BITS, TAPS, round};

const LOW_BITS: i32 = 15;
const SHIFT: i32 = PRECISION_BITS as i32;
/// Columns of a block of the vertical pass.
const BLOCK: usize = 16;
/// Output pixels that the horizontal pass finishes together.
const GROUP: usize = 4;

/// Whether this processor has it.
pub fn is_here() -> bool {
    is_x86_feature_detected!("avx2")
}

/// (lower part, higher part) of a weight.
fn parts(weight: i32) -> (i16, i16) {
    let low = (weight & ((1 << LOW_BITS) - 1)) as i16;
    (low, (weight >> LOW_BITS) as i16)
}

/// Weights of [`TAPS`] inputs: lower and higher parts.
#[derive(Clone, Copy)]
struct Four {
    low: i64,
    high: i64,
}

impl Four {
    fn new(weights: &[i32; TAPS]) -> Self {
        Four {
            low: bytemuck::cast(weights.map(|w| parts(w).0)),
            high: bytemuck::cast(weights.map(|w| parts(w).1)),
        }
    }
}

/// Resizes every row along `columns`. A row is a slice that begins with it, and its bytes. `C` is 3 or 4; up to `SLACK` bytes of `out` behind the last
/// row are overwritten.
///
/// # Panics
/// Where there is no AVX2.
pub fn horizontal<'a, const C: usize>(
    rows: impl Iterator<Item = (&'a [u8], usize)>,
    columns: &Axis,
    out: &mut [u8],
) {
    assert!(is_here() && (C == 3 || C == 4));
    let weights = columns.weights.as_chunks::<TAPS>().0;
    let mut fours: Vec<Four> = weights.iter().map(Four::new).collect();
    let mut firsts = columns.firsts.clone();
    // The last output again, until the group is full: the next row overwrites it.
    while !firsts.len().is_multiple_of(GROUP) {
        firsts.push(firsts[firsts.len() - 1]);
        fours.extend_from_within(fours.len() - columns.stride / TAPS..);
    }
    // Reads go up to a stride of pixels and a vector beyond the row: into the next one, whose weights
    // are zero, or behind a copy of the last.
    let beyond = columns.stride * C + 16;
    let mut padded = Vec::new();
    for (index, (row, width)) in rows.enumerate() {
        let out = &mut out[index * columns.firsts.len() * C..];
        let row = match row.get(..width + beyond) {
            Some(row) => row,
            None => {
                padded.clear();
                padded.extend_from_slice(&row[..width]);
                padded.resize(width + beyond, 0);
                &padded
            }
        };
        // SAFETY: this processor has AVX2, as asserted.
        unsafe { horizontal_row::<C>(row, &firsts, &fours, out) };
    }
}

#[target_feature(enable = "avx2")]
fn horizontal_row<const C: usize>(padded: &[u8], firsts: &[usize], fours: &[Four], out: &mut [u8]) {
    let (spread, gather) = (spread::<C>(), gather::<C>());
    let steps = fours.len() / firsts.len();
    let groups = firsts.as_chunks::<GROUP>().0.iter();
    for (index, (firsts, fours)) in groups.zip(fours.chunks_exact(GROUP * steps)).enumerate() {
        let sum = |pixel: usize| {
            let pixels = &padded[firsts[pixel] * C..];
            pixel_sums::<C>(pixels, &fours[pixel * steps..(pixel + 1) * steps], spread)
        };
        // Lanes: [red, green] of two pixels | [blue, alpha] of the same.
        let pairs = [
            _mm256_hadd_epi32(sum(0), sum(1)),
            _mm256_hadd_epi32(sum(2), sum(3)),
        ];
        let [first, second] = pairs.map(|pair| {
            _mm256_srai_epi32::<SHIFT>(_mm256_add_epi32(pair, _mm256_set1_epi32(HALF)))
        });
        let words = _mm256_packs_epi32(first, second);
        let bytes = _mm256_packus_epi16(words, words);
        let pixels = _mm_unpacklo_epi16(
            _mm256_castsi256_si128(bytes),
            _mm256_extracti128_si256::<1>(bytes),
        );
        let pixels: [u8; 16] = bytemuck::cast(_mm_shuffle_epi8(pixels, gather));
        out[index * GROUP * C..][..16].copy_from_slice(&pixels);
    }
}

/// The weighted sums of one output pixel, each in two halves: red, red, green, green | blue, …
#[target_feature(enable = "avx2")]
fn pixel_sums<const C: usize>(pixels: &[u8], fours: &[Four], spread: __m256i) -> __m256i {
    let (mut low, mut high) = (_mm256_setzero_si256(), _mm256_setzero_si256());
    // One look at the bounds instead of one a step.
    let pixels = &pixels[..(fours.len() - 1) * TAPS * C + 16];
    for (step, four) in fours.iter().enumerate() {
        // SAFETY: 16 bytes lie behind the place of every step, as the slice was just cut.
        let bytes: [u8; 16] = unsafe { *pixels.as_ptr().add(step * TAPS * C).cast() };
        let both = _mm256_broadcastsi128_si256(bytemuck::cast(bytes));
        let values = _mm256_shuffle_epi8(both, spread);
        let by_low = _mm256_madd_epi16(values, _mm256_set1_epi64x(four.low));
        let by_high = _mm256_madd_epi16(values, _mm256_set1_epi64x(four.high));
        low = _mm256_add_epi32(low, by_low);
        high = _mm256_add_epi32(high, by_high);
    }
    _mm256_add_epi32(low, _mm256_slli_epi32::<LOW_BITS>(high))
}

/// Sends the bytes of four pixels to 16-bit words: four reds, four greens | four blues, four alphas.
#[target_feature(enable = "avx2")]
fn spread<const C: usize>() -> __m256i {
    let mut bytes = [0x80u8; 32];
    for channel in 0..C {
        for tap in 0..TAPS {
            bytes[(channel * TAPS + tap) * 2] = (tap * C + channel) as u8;
        }
    }
    bytemuck::cast(bytes)
}

/// Moves four pixels of four bytes together to four pixels of `C` bytes.
#[target_feature(enable = "avx2")]
fn gather<const C: usize>() -> __m128i {
    let mut bytes = [0x80u8; 16];
    for pixel in 0..GROUP {
        for channel in 0..C {
            bytes[pixel * C + channel] = (pixel * 4 + channel) as u8;
        }
    }
    bytemuck::cast(bytes)
}

/// The weighted sum of rows as long as `out`.
///
/// # Panics
/// Where there is no AVX2.
pub fn vertical_row(inputs: &[u8], weights: &[i32], out: &mut [u8]) {
    let stride = out.len();
    assert!(is_here() && inputs.len() == stride * weights.len());
    // SAFETY: this processor has AVX2, as asserted.
    unsafe { blocks(inputs, weights, out) };
    for column in stride - stride % BLOCK..stride {
        let values = inputs[column..].iter().step_by(stride);
        let sum = values.zip(weights).fold(HALF, |sum, (value, weight)| {
            sum.wrapping_add(i32::from(*value) * weight)
        });
        out[column] = round(sum);
    }
}

/// [`BLOCK`] columns at a time, two rows at a time.
#[target_feature(enable = "avx2")]
fn blocks(inputs: &[u8], weights: &[i32], out: &mut [u8]) {
    let stride = out.len();
    let pairs = weights.chunks(2).map(|pair| {
        let [first, second] = [pair[0], pair.get(1).copied().unwrap_or(0)].map(parts);
        let low = _mm256_set1_epi32(bytemuck::cast([first.0, second.0]));
        let high = _mm256_set1_epi32(bytemuck::cast([first.1, second.1]));
        (low, high)
    });
    let pairs: Vec<(__m256i, __m256i)> = pairs.collect();
    for (block, out) in out.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
        let column = block * BLOCK;
        let mut sums = [_mm256_setzero_si256(); 4];
        for (pair, (low, high)) in pairs.iter().enumerate() {
            let place = 2 * pair * stride + column;
            let first = load(&inputs[place..]);
            let below = place + stride;
            // Behind the last row of an odd number there is none; its weight is zero.
            let second = if below + BLOCK <= inputs.len() {
                load(&inputs[below..])
            } else {
                first
            };
            let values = [
                _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(first, second)),
                _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(first, second)),
            ];
            for (values, sums) in values.into_iter().zip(sums.as_chunks_mut::<2>().0) {
                sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(values, *low));
                sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(values, *high));
            }
        }
        let whole = |low, high| {
            let high = _mm256_slli_epi32::<LOW_BITS>(high);
            let sum = _mm256_add_epi32(_mm256_add_epi32(low, high), _mm256_set1_epi32(HALF));
            _mm256_srai_epi32::<SHIFT>(sum)
        };
        let (first, second) = (whole(sums[0], sums[1]), whole(sums[2], sums[3]));
        // Packs go by 128-bit lanes; the permutation puts the quarters in their order.
        let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(first, second));
        *out = bytemuck::cast(_mm_packus_epi16(
            _mm256_castsi256_si128(words),
            _mm256_extracti128_si256::<1>(words),
        ));
    }
}

#[target_feature(enable = "avx2")]
fn load(bytes: &[u8]) -> __m128i {
    let block: [u8; BLOCK] = *bytes.first_chunk().expect("a block ends inside its row");
    bytemuck::cast(block)
}
