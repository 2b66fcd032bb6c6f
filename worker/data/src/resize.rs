//! Bicubic resize with antialias, to Pillow's bits.
//!
//! Pillow 9's 8-bit path: coefficients in f64, rounded to 22-bit fixed point, a horizontal then a
//! vertical pass with an 8-bit picture between. Integer arithmetic: the same on every processor,
//! which the faster resize crates do not promise across instruction sets.

const PRECISION_BITS: u32 = 32 - 8 - 2;
/// Keys' cubic with a = -0.5 reaches two samples far.
const SUPPORT: f64 = 2.0;

/// 8-bit pixels, `C` channels interleaved.
#[derive(Clone, Debug, PartialEq)]
pub struct Pixels<const C: usize> {
    pub width: usize,
    pub height: usize,
    pub data: Vec<u8>,
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

/// First input sample and fixed-point weights of every output sample.
fn weights(from: usize, to: usize) -> Vec<(usize, Vec<i32>)> {
    let scale = from as f64 / to as f64;
    let filter_scale = scale.max(1.0);
    let support = SUPPORT * filter_scale;
    (0..to)
        .map(|out| {
            let center = (out as f64 + 0.5) * scale;
            let first = ((center - support + 0.5) as i64).max(0) as usize;
            let last = ((center + support + 0.5) as i64).min(from as i64) as usize;
            let raw: Vec<f64> = (first..last)
                .map(|x| cubic((x as f64 - center + 0.5) / filter_scale))
                .collect();
            let sum: f64 = raw.iter().sum();
            let fixed = raw.iter().map(|w| {
                let scaled = w / sum * f64::from(1u32 << PRECISION_BITS);
                if scaled < 0.0 {
                    (scaled - 0.5) as i32
                } else {
                    (scaled + 0.5) as i32
                }
            });
            (first, fixed.collect())
        })
        .collect()
}

fn round(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

const HALF: i32 = 1 << (PRECISION_BITS - 1);

/// Resizes to `width` x `height`.
pub fn resize<const C: usize>(from: Pixels<C>, width: usize, height: usize) -> Pixels<C> {
    let wide = if from.width == width {
        from
    } else {
        horizontal(&from, width)
    };
    if wide.height == height {
        wide
    } else {
        vertical(&wide, height)
    }
}

fn horizontal<const C: usize>(from: &Pixels<C>, width: usize) -> Pixels<C> {
    let weights = weights(from.width, width);
    let mut data = Vec::with_capacity(width * from.height * C);
    for row in from.data.chunks_exact(from.width * C) {
        for (first, taps) in &weights {
            let mut sums = [HALF; C];
            for (pixel, tap) in row[first * C..].chunks_exact(C).zip(taps) {
                for (sum, value) in sums.iter_mut().zip(pixel) {
                    *sum += i32::from(*value) * tap;
                }
            }
            data.extend(sums.map(round));
        }
    }
    let height = from.height;
    Pixels {
        width,
        height,
        data,
    }
}

fn vertical<const C: usize>(from: &Pixels<C>, height: usize) -> Pixels<C> {
    let stride = from.width * C;
    let mut data = Vec::with_capacity(stride * height);
    let mut sums = vec![HALF; stride];
    for (first, taps) in weights(from.height, height) {
        sums.fill(HALF);
        for (row, tap) in from.data[first * stride..].chunks_exact(stride).zip(taps) {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += i32::from(*value) * tap;
            }
        }
        data.extend(sums.iter().map(|s| round(*s)));
    }
    let width = from.width;
    Pixels {
        width,
        height,
        data,
    }
}
