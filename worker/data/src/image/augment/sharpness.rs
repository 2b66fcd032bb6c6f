//! Away from a smoothed picture. Knows one kernel of 3 x 3.

use super::super::pixels::Pixels;

/// Every pixel that has eight neighbours moves away from the weighted mean of itself (5) and them
/// (1 each) by `factor`; border pixels stay.
///
/// The mean is rounded: thirteenths are never halves, so there is one way to round. Kept from the
/// authors' code: what leaves 0..=255 is not clipped but wraps around.
pub fn sharpness(pixels: &mut Pixels<3>, factor: f64) {
    let (width, height) = (pixels.width, pixels.height);
    if factor == 1.0 {
        return;
    }
    let before = pixels.data.clone();
    let factor = factor as f32;
    let at = |x: usize, y: usize, c: usize| u32::from(before[(y * width + x) * 3 + c]);
    let smooth = |xs: [usize; 3], ys: [usize; 3], c: usize| {
        let around: u32 = ys
            .iter()
            .map(|y| xs.map(|x| at(x, *y, c)).iter().sum::<u32>())
            .sum();
        (2 * (around + 4 * at(xs[1], ys[1], c)) + 13) / 26
    };
    if factor == 0.0 {
        for_each(pixels, (0..width, 0..height), |x, y, c| {
            smooth(mirrored(x, width), mirrored(y, height), c) as u8
        });
        return;
    }
    let inner = (1..width.saturating_sub(1), 1..height.saturating_sub(1));
    for_each(pixels, inner, |x, y, c| {
        let mean = smooth([x - 1, x, x + 1], [y - 1, y, y + 1], c) as f32;
        let away = mean + factor * (at(x, y, c) as f32 - mean);
        away as i32 as u8
    });
}

/// A place and its neighbours, mirrored at the picture's border without repeating it.
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

fn for_each(
    pixels: &mut Pixels<3>,
    (xs, ys): (std::ops::Range<usize>, std::ops::Range<usize>),
    value: impl Fn(usize, usize, usize) -> u8,
) {
    for y in ys {
        for x in xs.clone() {
            for c in 0..3 {
                pixels.data[(y * pixels.width + x) * 3 + c] = value(x, y, c);
            }
        }
    }
}
