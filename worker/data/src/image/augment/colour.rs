//! Operations on values alone: where a pixel lies does not matter. Knows channels and tables.

use super::super::pixels::Pixels;

/// What numpy's two-step "clip, then to 8 bits" gives: the fraction is cut off.
fn cut(value: f64) -> u8 {
    value.clamp(0.0, 255.0) as u8
}

fn through(pixels: &mut Pixels<3>, table: &[u8; 256]) {
    for value in &mut pixels.data {
        *value = table[usize::from(*value)];
    }
}

fn each_through(pixels: &mut Pixels<3>, tables: &[[u8; 256]; 3]) {
    for pixel in pixels.data.as_chunks_mut::<3>().0 {
        for (value, table) in pixel.iter_mut().zip(tables) {
            *value = table[usize::from(*value)];
        }
    }
}

/// How often each value occurs in each channel.
fn histograms(pixels: &Pixels<3>) -> [[u32; 256]; 3] {
    let mut counts = [[0; 256]; 3];
    for pixel in pixels.data.as_chunks::<3>().0 {
        for (value, counts) in pixel.iter().zip(&mut counts) {
            counts[usize::from(*value)] += 1;
        }
    }
    counts
}

const IDENTITY: [u8; 256] = {
    let mut table = [0; 256];
    let mut v = 0;
    while v < 256 {
        table[v] = v as u8;
        v += 1;
    }
    table
};

/// Lowest value to 0, highest to 255.
///
/// Kept from the authors' code: the lowest value is negated in 8 bits, 256 - low. So a channel that
/// has no 0 becomes white instead of being spread.
pub fn auto_contrast(pixels: &mut Pixels<3>) {
    let tables = histograms(pixels).map(|counts| {
        let low = counts.iter().position(|c| *c > 0).unwrap_or(0) as u8;
        let high = counts.iter().rposition(|c| *c > 0).unwrap_or(0) as u8;
        if high <= low {
            return IDENTITY;
        }
        let scale = 255.0 / f64::from(high - low);
        let offset = f64::from(low.wrapping_neg()) * scale;
        std::array::from_fn(|v| cut(v as f64 * scale + offset))
    });
    each_through(pixels, &tables);
}

/// A value becomes the share of the channel's pixels below it. Pixels of the highest value do not
/// count, as in Pillow.
pub fn equalize(pixels: &mut Pixels<3>) {
    let tables = histograms(pixels).map(|counts| {
        let highest = counts.iter().rposition(|c| *c > 0).unwrap_or(0);
        let step = counts[..highest].iter().sum::<u32>() / 255;
        if step == 0 {
            return IDENTITY;
        }
        let mut below = step / 2;
        std::array::from_fn(|v| {
            let value = (below / step).min(255) as u8;
            below += counts[v];
            value
        })
    });
    each_through(pixels, &tables);
}

/// Values times `factor`, in f32.
pub fn brightness(pixels: &mut Pixels<3>, factor: f64) {
    let factor = factor as f32;
    let value = |v: usize| (v as f32 * factor).clamp(0.0, 255.0) as u8;
    through(pixels, &std::array::from_fn(value));
}

/// Values from `threshold` on become 255 - v.
pub fn solarize(pixels: &mut Pixels<3>, threshold: u32) {
    let value = |v: usize| {
        let kept = (v as u32) < threshold;
        if kept { v as u8 } else { 255 - v as u8 }
    };
    through(pixels, &std::array::from_fn(value));
}

/// Keeps the upper `bits` of a value.
pub fn posterize(pixels: &mut Pixels<3>, bits: u32) {
    let mask = (255u32 << 8u32.saturating_sub(bits)) as u8;
    pixels.data.iter_mut().for_each(|value| *value &= mask);
}

/// Weights of luma for blue, green and red. The authors' code takes pixels in this order and gets
/// them the other way round; so do these operations.
const LUMA: [f64; 3] = [0.114, 0.587, 0.299];

/// Values away from the picture's mean luma, by `factor`.
pub fn contrast(pixels: &mut Pixels<3>, factor: f64) {
    let mut sums = [0u64; 3];
    for pixel in pixels.data.as_chunks::<3>().0 {
        for (sum, value) in sums.iter_mut().zip(pixel) {
            *sum += u64::from(*value);
        }
    }
    let count = (pixels.width * pixels.height) as f64;
    let [first, second, third] = sums.map(|sum| sum as f64 / count);
    let mean = first * LUMA[0] + second * LUMA[1] + third * LUMA[2];
    let value = |v: usize| cut((v as f64 - mean) * factor + mean);
    through(pixels, &std::array::from_fn(value));
}

/// Away from grey, by `factor`: a product with a 3 x 3 matrix in f32, summed as numpy's BLAS sums.
pub fn colour(pixels: &mut Pixels<3>, factor: f64) {
    /// Identity minus luma, by input and output channel.
    const AWAY: [[f32; 3]; 3] = [
        [0.886, -0.114, -0.114],
        [-0.587, 0.413, -0.587],
        [-0.299, -0.299, 0.701],
    ];
    let factor = factor as f32;
    let matrix: [[f32; 3]; 3] = std::array::from_fn(|from| {
        std::array::from_fn(|to| AWAY[from][to] * factor + LUMA[from] as f32)
    });
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("fma") {
        // SAFETY: this processor has it, as just asked.
        unsafe { times_with_fma(pixels, &matrix) };
        return;
    }
    times(pixels, &matrix);
}

/// [`times`] with the instruction; without it each step is a call. The bits are the same.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "fma")]
fn times_with_fma(pixels: &mut Pixels<3>, matrix: &[[f32; 3]; 3]) {
    times(pixels, matrix);
}

#[inline(always)]
fn times(pixels: &mut Pixels<3>, matrix: &[[f32; 3]; 3]) {
    for pixel in pixels.data.as_chunks_mut::<3>().0 {
        let values = pixel.map(f32::from);
        *pixel = std::array::from_fn(|to| {
            let first = values[0] * matrix[0][to];
            let second = values[1].mul_add(matrix[1][to], first);
            let third = values[2].mul_add(matrix[2][to], second);
            third.clamp(0.0, 255.0) as u8
        });
    }
}
