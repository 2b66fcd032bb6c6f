//! Normal random numbers by the hundred million, the same bits everywhere.
//!
//! Manager noise needs one normal per token and feature (model_spec 5.3); `Key::normal`'s f64
//! library calls would take longer than the managers. Here Box-Muller runs on polynomials made of
//! f32 additions, multiplications, one division and one square root, all of which IEEE 754 fixes to
//! the bit, so no library, compiler or vector width can change a number. One hash gives two values.
//! Price: absolute error about 1e-6, tails end at 6.7 standard deviations.

use belfry_configs::rng::Key;
use std::f32::consts::{FRAC_PI_2, FRAC_PI_4, LN_2};

/// Fills `out` with `std` times the standard normals number `first`, `first + 1`, … of `key`.
/// `first` must be even (values come in pairs).
///
/// # Panics
/// If `first` is odd.
pub fn fill_normal(key: Key, first: u64, std: f32, out: &mut [f32]) {
    assert!(first.is_multiple_of(2), "normals come in pairs");
    let mut pair = first / 2;
    let mut chunks = out.chunks_exact_mut(2);
    for values in &mut chunks {
        let (a, b) = normal_pair(key.bits(pair));
        values[0] = std * a;
        values[1] = std * b;
        pair += 1;
    }
    if let [last] = chunks.into_remainder() {
        *last = std * normal_pair(key.bits(pair)).0;
    }
}

/// Two independent standard normals from 64 random bits.
#[inline]
fn normal_pair(bits: u64) -> (f32, f32) {
    // 2^-32 (k + 1/2): never 0, and 1 only after rounding, where the logarithm is 0.
    let uniform = ((bits >> 32) as f32 + 0.5) * (1.0 / 4_294_967_296.0);
    // Not `max`, which may keep the minus of a zero or not: the compiler chooses.
    let square = -2.0 * ln(uniform);
    let radius = if square > 0.0 { square } else { 0.0 }.sqrt();
    let low = bits as u32;
    let quarter = low >> 30;
    // The angle inside its quarter turn, centred so that the series are short.
    let inside = ((low & 0x3FFF_FFFF) as f32) * (1.0 / 1_073_741_824.0);
    let (sin, cos) = sin_cos(inside * FRAC_PI_2 - FRAC_PI_4);
    let (x, y) = if quarter & 1 == 0 {
        (cos, sin)
    } else {
        (-sin, cos)
    };
    let sign = if quarter & 2 == 0 { radius } else { -radius };
    (sign * x, sign * y)
}

/// Natural logarithm of a positive normal number: exponent apart, then the atanh series.
#[inline]
fn ln(x: f32) -> f32 {
    let bits = x.to_bits();
    // Shift the mantissa to [sqrt(1/2), sqrt(2)), where the series has |s| < 0.172.
    let shifted = bits.wrapping_sub(0x3F35_04F3);
    let exponent = (shifted as i32) >> 23;
    let mantissa = f32::from_bits((shifted & 0x007F_FFFF).wrapping_add(0x3F35_04F3));
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let s2 = s * s;
    let series = 1.0 + s2 * (1.0 / 3.0 + s2 * (0.2 + s2 * (1.0 / 7.0 + s2 * (1.0 / 9.0))));
    exponent as f32 * LN_2 + 2.0 * s * series
}

/// Sine and cosine for |t| <= pi/4 by Taylor series.
#[inline]
fn sin_cos(t: f32) -> (f32, f32) {
    let t2 = t * t;
    let sin = 1.0 + t2 * (-1.0 / 6.0 + t2 * (1.0 / 120.0 + t2 * (-1.0 / 5040.0)));
    let cos = 1.0 + t2 * (-0.5 + t2 * (1.0 / 24.0 + t2 * (-1.0 / 720.0 + t2 * (1.0 / 40320.0))));
    (t * sin, cos)
}

#[cfg(test)]
mod tests {
    use super::*;
    use belfry_configs::rng::Purpose;

    #[test]
    fn the_moments_and_tails_are_normal() {
        let mut values = vec![0.0f32; 2_000_000];
        fill_normal(Key::new(3, Purpose::ManagerNoise), 0, 1.0, &mut values);
        let n = values.len() as f64;
        let moment = |k: i32| values.iter().map(|v| f64::from(*v).powi(k)).sum::<f64>() / n;
        let expected = [0.0, 1.0, 0.0, 3.0, 0.0, 15.0];
        let tolerance = [0.004, 0.006, 0.015, 0.06, 0.2, 1.0];
        for k in 1..=6 {
            let m = moment(k);
            let (e, t) = (expected[k as usize - 1], tolerance[k as usize - 1]);
            assert!((m - e).abs() < t, "moment {k} is {m}, not {e}");
        }
        let beyond = |x: f32| values.iter().filter(|v| v.abs() > x).count() as f64 / n;
        assert!(
            (beyond(1.0) - 0.3173).abs() < 0.002,
            "one sigma: {}",
            beyond(1.0)
        );
        assert!(
            (beyond(3.0) - 0.0027).abs() < 0.0003,
            "three sigma: {}",
            beyond(3.0)
        );
        let lag: f64 = values
            .windows(2)
            .map(|w| f64::from(w[0]) * f64::from(w[1]))
            .sum::<f64>()
            / n;
        assert!(lag.abs() < 0.004, "neighbours correlate: {lag}");
    }

    #[test]
    fn the_series_agree_with_the_library() {
        for i in 1..20_000u32 {
            let x = i as f32 / 20_000.0;
            assert!(
                (f64::from(ln(x)) - f64::from(x).ln()).abs()
                    < 1e-6 * (1.0 + f64::from(x).ln().abs())
            );
            let t = (x - 0.5) * FRAC_PI_2;
            let (sin, cos) = sin_cos(t);
            assert!(
                (sin - t.sin()).abs() < 1e-6 && (cos - t.cos()).abs() < 1e-6,
                "{t}"
            );
        }
    }

    #[test]
    fn any_cut_of_the_stream_gives_the_same_numbers() {
        let key = Key::new(9, Purpose::ManagerNoise).with(4);
        let mut whole = vec![0.0f32; 101];
        fill_normal(key, 0, 0.5, &mut whole);
        let mut tail = vec![0.0f32; 61];
        fill_normal(key, 40, 0.5, &mut tail);
        assert_eq!(whole[40..], tail[..]);
    }
}
