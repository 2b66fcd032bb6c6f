//! Image position tables for another grid (model_spec 3).
//!
//! What the authors' code does whenever it loads weights: the class row stays, the rest is a picture
//! of `side x side` pixels that is scaled bicubically. Conventions are PyTorch's `interpolate`:
//! pixel centres at halves, coefficient a = -0.75, border pixels repeated, no antialias.

/// The cubic's free coefficient.
const A: f32 = -0.75;
/// Pixels under the cubic along one axis.
const TAPS: usize = 4;

/// Scales a table to `to_side x to_side` patches; the same side gives the same bits.
///
/// # Shapes
/// table `[1 + from_side², width]` → `[1 + to_side², width]`
pub fn resize_positions(table: &[f32], width: usize, from_side: usize, to_side: usize) -> Vec<f32> {
    assert_eq!(
        table.len(),
        (1 + from_side * from_side) * width,
        "a class row and a square of patches"
    );
    if from_side == to_side {
        return table.to_vec();
    }
    let (class, picture) = table.split_at(width);
    let taps = taps(from_side, to_side);
    let mut scaled = Vec::with_capacity((1 + to_side * to_side) * width);
    scaled.extend_from_slice(class);
    // Along x in every source row first, then along y: the order of the sums is PyTorch's.
    let mut rows = Vec::with_capacity(from_side * to_side * width);
    for row in picture.chunks_exact(from_side * width) {
        for tap in &taps {
            let pixel = |i: usize| &row[tap.at[i] * width..(tap.at[i] + 1) * width];
            blend(&mut rows, tap, [pixel(0), pixel(1), pixel(2), pixel(3)]);
        }
    }
    let stride = to_side * width;
    for tap in &taps {
        let row = |i: usize| &rows[tap.at[i] * stride..(tap.at[i] + 1) * stride];
        blend(&mut scaled, tap, [row(0), row(1), row(2), row(3)]);
    }
    scaled
}

/// Where one output pixel looks along an axis, and with which weights.
struct Tap {
    at: [usize; TAPS],
    weights: [f32; TAPS],
}

fn taps(from: usize, to: usize) -> Vec<Tap> {
    let scale = from as f32 / to as f32;
    let tap = |pixel: usize| {
        let centre = scale * (pixel as f32 + 0.5) - 0.5;
        let floor = centre.floor();
        let t = centre - floor;
        let clamped = |step: isize| (floor as isize + step).clamp(0, from as isize - 1) as usize;
        Tap {
            at: [clamped(-1), clamped(0), clamped(1), clamped(2)],
            weights: [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)],
        }
    };
    (0..to).map(tap).collect()
}

/// The cubic at a distance of up to one pixel.
fn near(x: f32) -> f32 {
    ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
}

/// The cubic at a distance of one to two pixels.
fn far(x: f32) -> f32 {
    ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A
}

fn blend(out: &mut Vec<f32>, tap: &Tap, parts: [&[f32]; TAPS]) {
    let [a, b, c, d] = tap.weights;
    let mixed = (0..parts[0].len())
        .map(|i| parts[0][i] * a + parts[1][i] * b + parts[2][i] * c + parts[3][i] * d);
    out.extend(mixed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_constant_stays_and_the_class_row_too() {
        let mut table = vec![3.0; 1 + 9];
        table[0] = -7.0;
        let scaled = resize_positions(&table, 1, 3, 5);
        assert_eq!(scaled.len(), 26);
        assert_eq!(scaled[0], -7.0);
        assert!(
            scaled[1..].iter().all(|x| (x - 3.0).abs() < 1e-5),
            "{scaled:?}"
        );
    }

    #[test]
    fn the_same_side_gives_the_same_bits() {
        let table: Vec<f32> = (0..20).map(|i| (i as f32).sin()).collect();
        assert_eq!(resize_positions(&table, 2, 3, 3), table);
    }
}
