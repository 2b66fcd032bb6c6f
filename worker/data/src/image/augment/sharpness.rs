//! Away from a smoothed picture. Knows one kernel of 3 x 3.

use super::super::pixels::Pixels;

/// Every pixel that has eight neighbours moves away from the weighted mean of itself (5) and them
/// (1 each) by `factor`; border pixels stay.
///
/// The mean is rounded: thirteenths are never halves, so there is one way to round. Kept from the
/// authors' code: what leaves 0..=255 is not clipped but wraps around.
pub fn sharpness(pixels: &mut Pixels<3>, factor: f64) {
    if factor == 1.0 {
        return;
    }
    let before = pixels.data.clone();
    if factor == 0.0 {
        smooth(pixels, &before);
        return;
    }
    let stride = pixels.width * 3;
    let factor = factor as f32;
    let rows = pixels.data.chunks_exact_mut(stride).skip(1);
    for (row, three) in rows.zip(before.windows(3 * stride).step_by(stride)) {
        // Left neighbours lie three bytes before, right ones three behind.
        for (i, out) in row.iter_mut().enumerate().take(stride - 3).skip(3) {
            let column = |i: usize| {
                u32::from(three[i])
                    + u32::from(three[i + stride])
                    + u32::from(three[i + 2 * stride])
            };
            let at = u32::from(three[i + stride]);
            let mean = thirteenth(column(i - 3) + column(i) + column(i + 3) + 4 * at) as f32;
            *out = (mean + factor * (at as f32 - mean)) as i32 as u8;
        }
    }
}

/// A thirteenth, rounded.
fn thirteenth(sum: u32) -> u32 {
    (2 * sum + 13) / 26
}

/// The smoothed picture alone. Beyond the border the picture is mirrored, its edge not repeated.
fn smooth(pixels: &mut Pixels<3>, before: &[u8]) {
    let (width, height) = (pixels.width, pixels.height);
    let at = |x: usize, y: usize, c: usize| u32::from(before[(y * width + x) * 3 + c]);
    for (index, out) in pixels.data.iter_mut().enumerate() {
        let (place, c) = (index / 3, index % 3);
        let (x, y) = (place % width, place / width);
        let (xs, ys) = (mirrored(x, width), mirrored(y, height));
        let around: u32 = ys
            .map(|y| xs.map(|x| at(x, y, c)).iter().sum::<u32>())
            .iter()
            .sum();
        *out = thirteenth(around + 4 * at(x, y, c)) as u8;
    }
}

/// A place and its neighbours.
fn mirrored(i: usize, len: usize) -> [usize; 3] {
    let last = len - 1;
    let before = if i == 0 { 1.min(last) } else { i - 1 };
    let after = if i == last {
        last.saturating_sub(1)
    } else {
        i + 1
    };
    [before, i, after]
}
