//! The two passes of a resize with AVX2: the same integers, sixteen products at a time. Knows
//! weights and rows of bytes.
//!
//! A 22-bit weight is the sum of a part below 2^15 and a multiple of 2^15. Both parts are multiplied
//! with 16-bit instructions, which are several times faster than 32-bit ones, and added up apart.
//! Additions wrap: modulo 2^32 the sum is that of the plain loop.

use std::arch::x86_64::*;

use super::{Axis, HALF, PRECISION_BITS, TAPS, round};

const LOW_BITS: u32 = 15;

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

/// Resizes every row along `columns`. `C` is 3 or 4.
///
/// # Panics
/// Where there is no AVX2.
pub fn horizontal<'a, const C: usize>(
    rows: impl Iterator<Item = &'a [u8]>,
    columns: &Axis,
    out: &mut Vec<u8>,
) {
    assert!(is_here() && (C == 3 || C == 4));
    let fours: Vec<Four> = columns
        .weights
        .as_chunks::<TAPS>()
        .0
        .iter()
        .map(|weights| Four {
            low: bytemuck::cast(weights.map(|w| parts(w).0)),
            high: bytemuck::cast(weights.map(|w| parts(w).1)),
        })
        .collect();
    // Reads go up to a stride of pixels and a vector beyond the row.
    let mut padded = Vec::new();
    for row in rows {
        padded.clear();
        padded.extend_from_slice(row);
        padded.resize(row.len() + columns.stride * C + 16, 0);
        // SAFETY: this processor has AVX2, as asserted.
        unsafe { horizontal_row::<C>(&padded, columns, &fours, out) };
    }
}

#[target_feature(enable = "avx2")]
fn horizontal_row<const C: usize>(
    padded: &[u8],
    columns: &Axis,
    fours: &[Four],
    out: &mut Vec<u8>,
) {
    let shuffle = interleave::<C>();
    let steps = columns.stride / TAPS;
    for (first, fours) in columns.firsts.iter().zip(fours.chunks_exact(steps)) {
        let (mut low, mut high) = (_mm256_setzero_si256(), _mm256_setzero_si256());
        let pixels = &padded[first * C..][..(steps - 1) * TAPS * C + 16];
        for (step, four) in fours.iter().enumerate() {
            let bytes: [u8; 16] = *pixels[step * TAPS * C..]
                .first_chunk()
                .expect("rows are padded");
            let both = _mm256_broadcastsi128_si256(bytemuck::cast(bytes));
            let values = _mm256_shuffle_epi8(both, shuffle);
            let by_low = _mm256_madd_epi16(values, _mm256_set1_epi64x(four.low));
            let by_high = _mm256_madd_epi16(values, _mm256_set1_epi64x(four.high));
            low = _mm256_add_epi32(low, by_low);
            high = _mm256_add_epi32(high, by_high);
        }
        let sums = _mm256_add_epi32(low, _mm256_slli_epi32::<{ LOW_BITS as i32 }>(high));
        // Lanes: [red, green, …], [blue, alpha, …].
        let sums = _mm256_hadd_epi32(sums, sums);
        let rounded = _mm256_srai_epi32::<{ PRECISION_BITS as i32 }>(_mm256_add_epi32(
            sums,
            _mm256_set1_epi32(HALF),
        ));
        let words = _mm256_packs_epi32(rounded, rounded);
        let bytes = _mm256_packus_epi16(words, words);
        let red_green = _mm256_extract_epi16::<0>(bytes) as u16;
        let blue_alpha = _mm256_extract_epi16::<8>(bytes) as u16;
        let pixel = u32::from(red_green) | u32::from(blue_alpha) << 16;
        out.extend_from_slice(&pixel.to_le_bytes()[..C]);
    }
}

/// Sends the bytes of four pixels to 16-bit words: four reds, four greens | four blues, four alphas.
#[target_feature(enable = "avx2")]
fn interleave<const C: usize>() -> __m256i {
    let mut bytes = [0x80u8; 32];
    for channel in 0..C {
        for tap in 0..TAPS {
            bytes[(channel * TAPS + tap) * 2] = (tap * C + channel) as u8;
        }
    }
    bytemuck::cast(bytes)
}

/// The weighted sum of rows of `stride` bytes.
///
/// # Panics
/// Where there is no AVX2.
pub fn vertical_row(inputs: &[u8], stride: usize, weights: &[i32], out: &mut Vec<u8>) {
    assert!(is_here() && inputs.len() == stride * weights.len());
    // SAFETY: this processor has AVX2, as asserted.
    unsafe { blocks(inputs, stride, weights, out) };
    for column in stride - stride % 16..stride {
        let values = inputs[column..].iter().step_by(stride);
        let sum = values.zip(weights).fold(HALF, |sum, (value, weight)| {
            sum.wrapping_add(i32::from(*value) * weight)
        });
        out.push(round(sum));
    }
}

/// Sixteen columns at a time.
#[target_feature(enable = "avx2")]
fn blocks(inputs: &[u8], stride: usize, weights: &[i32], out: &mut Vec<u8>) {
    let (pairs, last) = weights.as_chunks::<2>();
    for column in (0..stride - stride % 16).step_by(16) {
        let load = |row: usize| -> __m128i {
            let bytes: [u8; 16] = *inputs[row * stride + column..]
                .first_chunk()
                .expect("a block ends inside its row");
            bytemuck::cast(bytes)
        };
        let mut sums = [_mm256_setzero_si256(); 4];
        for (pair, both) in pairs.iter().enumerate() {
            let rows = (load(2 * pair), load(2 * pair + 1));
            add_pair(rows, [both[0], both[1]], &mut sums);
        }
        if let [last] = last {
            let rows = (load(2 * pairs.len()), _mm_setzero_si128());
            add_pair(rows, [*last, 0], &mut sums);
        }
        let whole = |low, high| {
            let high = _mm256_slli_epi32::<{ LOW_BITS as i32 }>(high);
            let sum = _mm256_add_epi32(_mm256_add_epi32(low, high), _mm256_set1_epi32(HALF));
            _mm256_srai_epi32::<{ PRECISION_BITS as i32 }>(sum)
        };
        let (first, second) = (whole(sums[0], sums[1]), whole(sums[2], sums[3]));
        // Packs go by 128-bit lanes; the permutation puts the quarters in their order.
        let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(first, second));
        let bytes = _mm_packus_epi16(
            _mm256_castsi256_si128(words),
            _mm256_extracti128_si256::<1>(words),
        );
        out.extend_from_slice(&bytemuck::cast::<__m128i, [u8; 16]>(bytes));
    }
}

/// Adds two rows' products: columns 0-7 in `sums[0]` (lower parts) and `sums[1]` (higher), columns
/// 8-15 in the others.
#[target_feature(enable = "avx2")]
fn add_pair(rows: (__m128i, __m128i), weights: [i32; 2], sums: &mut [__m256i; 4]) {
    let values = [
        _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(rows.0, rows.1)),
        _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(rows.0, rows.1)),
    ];
    let [(low_0, high_0), (low_1, high_1)] = weights.map(parts);
    let low = _mm256_set1_epi32(bytemuck::cast([low_0, low_1]));
    let high = _mm256_set1_epi32(bytemuck::cast([high_0, high_1]));
    for (half, values) in values.into_iter().enumerate() {
        sums[2 * half] = _mm256_add_epi32(sums[2 * half], _mm256_madd_epi16(values, low));
        let by_high = _mm256_madd_epi16(values, high);
        sums[2 * half + 1] = _mm256_add_epi32(sums[2 * half + 1], by_high);
    }
}
