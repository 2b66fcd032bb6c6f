//! Shear, shift and turn, as OpenCV's `warpAffine` does: bilinear, places in 1/32 pixels, grey where
//! the picture does not reach. Knows affine maps.

use super::super::pixels::Pixels;

/// What lies outside (model_spec 10).
const FILL: [u8; 3] = [128; 3];
/// Fraction bits of a place between pixels.
const PLACE_BITS: u32 = 5;
/// Fraction bits of the sums that give places.
const SUM_BITS: u32 = 10;

/// From places of the old picture to places of the new one: `[[xx, xy, x], [yx, yy, y]]`.
type Affine = [[f64; 3]; 2];

/// Rows shifted to the right by `share` times their number.
pub fn shear_x(pixels: &mut Pixels<3>, share: f64) {
    // The authors write these maps in f32.
    let share = f64::from(share as f32);
    warp(pixels, [[1.0, share, 0.0], [0.0, 1.0, 0.0]]);
}

/// Columns shifted down by `share` times their number.
pub fn shear_y(pixels: &mut Pixels<3>, share: f64) {
    let share = f64::from(share as f32);
    warp(pixels, [[1.0, 0.0, 0.0], [share, 1.0, 0.0]]);
}

/// To the left and up by an offset.
pub fn translate(pixels: &mut Pixels<3>, x: f64, y: f64) {
    let (x, y) = (f64::from(x as f32), f64::from(y as f32));
    warp(pixels, [[1.0, 0.0, -x], [0.0, 1.0, -y]]);
}

/// Anti-clockwise by `degrees` about (width / 2, height / 2).
pub fn rotate(pixels: &mut Pixels<3>, degrees: f64) {
    let angle = degrees * std::f64::consts::PI / 180.0;
    // The same code on every machine, unlike a C library's.
    let (sin, cos) = (libm::sin(angle), libm::cos(angle));
    let center = [pixels.width, pixels.height].map(|side| f64::from(side as f32 / 2.0));
    warp(
        pixels,
        [
            [cos, sin, (1.0 - cos) * center[0] - sin * center[1]],
            [-sin, cos, sin * center[0] + (1.0 - cos) * center[1]],
        ],
    );
}

/// The map from new places to old ones.
fn inverse([[xx, xy, x], [yx, yy, y]]: Affine) -> Affine {
    let determinant = xx * yy - xy * yx;
    let factor = if determinant == 0.0 {
        0.0
    } else {
        1.0 / determinant
    };
    let (a, b, c, d) = (yy * factor, xy * -factor, yx * -factor, xx * factor);
    [[a, b, -a * x - b * y], [c, d, -c * x - d * y]]
}

/// Rounded to a whole number of 1/2^10, halves to even.
fn fixed(value: f64) -> i32 {
    (value * f64::from(1u32 << SUM_BITS)).round_ties_even() as i32
}

fn warp(pixels: &mut Pixels<3>, map: Affine) {
    let [xs, ys] = inverse(map);
    let columns: Vec<(i32, i32)> = (0..pixels.width)
        .map(|x| (fixed(xs[0] * x as f64), fixed(ys[0] * x as f64)))
        .collect();
    let drop = SUM_BITS - PLACE_BITS;
    let half = 1 << (drop - 1);
    let mut out = Vec::with_capacity(pixels.data.len());
    for y in 0..pixels.height {
        let row_x = fixed(xs[1] * y as f64 + xs[2]) + half;
        let row_y = fixed(ys[1] * y as f64 + ys[2]) + half;
        for (x, y) in &columns {
            out.extend(between(pixels, (row_x + x) >> drop, (row_y + y) >> drop));
        }
    }
    pixels.data = out;
}

/// The picture at a place in 1/32 pixels, from the four pixels around it.
fn between(pixels: &Pixels<3>, x: i32, y: i32) -> [u8; 3] {
    let part = (1 << PLACE_BITS) - 1;
    let (left, top) = (x >> PLACE_BITS, y >> PLACE_BITS);
    let corners = corners(pixels, left, top);
    let (x, y) = ((x & part) as u32, (y & part) as u32);
    let whole = 1 << PLACE_BITS;
    let weights = [
        (whole - x) * (whole - y),
        x * (whole - y),
        (whole - x) * y,
        x * y,
    ];
    std::array::from_fn(|c| {
        let each = corners.iter().zip(weights);
        let sum: u32 = each
            .map(|(pixel, weight)| u32::from(pixel[c]) * weight)
            .sum();
        ((sum + (1 << (2 * PLACE_BITS - 1))) >> (2 * PLACE_BITS)) as u8
    })
}

/// The pixels at, right of, below, and right of and below a place.
fn corners(pixels: &Pixels<3>, left: i32, top: i32) -> [[u8; 3]; 4] {
    let (width, height) = (pixels.width as i32, pixels.height as i32);
    let all = pixels.data.as_chunks::<3>().0;
    if left >= 0 && top >= 0 && left + 1 < width && top + 1 < height {
        // Most pixels: one test for all four.
        let place = top as usize * pixels.width + left as usize;
        let (above, below) = (&all[place..place + 2], &all[place + pixels.width..][..2]);
        return [above[0], above[1], below[0], below[1]];
    }
    [(0, 0), (1, 0), (0, 1), (1, 1)].map(|(right, down)| {
        let (x, y) = (left + right, top + down);
        match (0..width).contains(&x) && (0..height).contains(&y) {
            true => all[y as usize * pixels.width + x as usize],
            false => FILL,
        }
    })
}
