//! Resizing of an image tower's position table (model_spec 3).
//!
//! Happens where weights are loaded: a model for larger images takes the table of a smaller one.
//! It refuses to know parameters and devices.

use crate::error::ModelError;

/// The cubic kernel's coefficient (PyTorch's bicubic).
const A: f32 = -0.75;

/// A table `[1 + g x g, width]`, its class row first, resized to `[1 + grid x grid, width]`:
/// bicubic with half-pixel centres, borders clamped, without antialiasing. The class row stays.
/// The identity, to the bit, if the grid is the same.
///
/// # Errors
/// [`ModelError::Length`] if the table is no class row and a square.
pub fn resize_positions(table: &[f32], width: usize, grid: usize) -> Result<Vec<f32>, ModelError> {
    let rows = table.len() / width.max(1);
    let old = rows.saturating_sub(1).isqrt();
    let fits = width > 0 && old > 0 && grid > 0;
    if !fits || (old * old + 1) * width != table.len() {
        return Err(ModelError::Length {
            what: "position table",
            expected: (old * old + 1) * width,
            found: table.len(),
        });
    }
    if old == grid {
        return Ok(table.to_vec());
    }
    let (class, patches) = table.split_at(width);
    let taps: Vec<[(usize, f32); 4]> = (0..grid).map(|i| taps(i, old, grid)).collect();
    let mut resized = class.to_vec();
    resized.reserve(grid * grid * width);
    for vertical in &taps {
        for horizontal in &taps {
            for feature in 0..width {
                let at = |y: usize, x: usize| patches[(y * old + x) * width + feature];
                let row = |y: usize| horizontal.iter().map(|(x, w)| w * at(y, *x)).sum::<f32>();
                resized.push(vertical.iter().map(|(y, w)| w * row(*y)).sum());
            }
        }
    }
    Ok(resized)
}

/// The four neighbours of new place `i` along one axis, and their weights; in f32, as theirs.
fn taps(i: usize, old: usize, new: usize) -> [(usize, f32); 4] {
    let place = old as f32 / new as f32 * (i as f32 + 0.5) - 0.5;
    let floor = place.floor();
    let t = place - floor;
    let near = |x: f32| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
    let far = |x: f32| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A;
    let weights = [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)];
    std::array::from_fn(|k| {
        let neighbour = floor as i64 - 1 + k as i64;
        (neighbour.clamp(0, old as i64 - 1) as usize, weights[k])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_constant_stays_and_the_class_row_is_untouched() {
        let table = [vec![9.0], vec![0.25; 9]].concat();
        let resized = resize_positions(&table, 1, 5).unwrap();
        assert_eq!(resized.len(), 26);
        assert_eq!(resized[0], 9.0);
        assert!(resized[1..].iter().all(|v| (v - 0.25).abs() < 1e-6));
        assert_eq!(resize_positions(&table, 1, 3).unwrap(), table);
    }

    #[test]
    fn what_is_no_square_is_refused() {
        assert!(resize_positions(&[0.0; 12], 2, 3).is_err());
        assert!(resize_positions(&[0.0; 10], 0, 3).is_err());
    }
}
