//! Which part of a picture is kept (torchvision's crops, model_spec 10), and the mirror image.

use belfry_configs::rng::Key;

use super::buffers;
use super::decode::Decoded;
use super::pixels::{Pixels, Rect};
use super::resize::resize;

/// Draws of a random crop before it gives up, as torchvision's.
const TRIES: u64 = 10;
/// Smallest and largest share of the picture's area.
const AREA: (f64, f64) = (0.5, 1.0);
/// Narrowest and widest width over height.
const RATIO: (f64, f64) = (3.0 / 4.0, 4.0 / 3.0);

/// Shorter side to `side`, then the centre of `side` x `side`.
///
/// A picture with alpha is resized with premultiplied colours, as Pillow does, and its alpha is
/// dropped afterwards. Only the pixels of the crop are computed: a picture of 1 x 10,000 pixels
/// would have a billion of them.
pub fn centre(decoded: Decoded, side: usize) -> Pixels<3> {
    match decoded {
        Decoded::Rgb(pixels) => {
            let (size, window) = shorter_side(pixels.width, pixels.height, side);
            let centre = resize(&pixels, pixels.rect(), size, window);
            buffers::give(pixels.data);
            centre
        }
        Decoded::Rgba(pixels) => {
            let (size, window) = shorter_side(pixels.width, pixels.height, side);
            Decoded::Rgba(resize_with_alpha(pixels, size, window)).into_rgb()
        }
    }
}

/// Resizes to `size`, colours weighted by their alpha as Pillow does, and returns the `window`.
pub fn resize_with_alpha(mut pixels: Pixels<4>, size: (usize, usize), window: Rect) -> Pixels<4> {
    // What keeps its size is not premultiplied either, which would cost bits.
    if size == (pixels.width, pixels.height) {
        return resize(&pixels, pixels.rect(), size, window);
    }
    premultiply(&mut pixels);
    let mut resized = resize(&pixels, pixels.rect(), size, window);
    unpremultiply(&mut resized);
    resized
}

/// The size of a `width` x `height` picture whose shorter side becomes `side`, and its centre.
fn shorter_side(width: usize, height: usize, side: usize) -> ((usize, usize), Rect) {
    let size = if width <= height {
        (side, side * height / width)
    } else {
        (side * width / height, side)
    };
    let window = Rect {
        left: half(size.0 - side),
        top: half(size.1 - side),
        width: side,
        height: side,
    };
    (size, window)
}

/// Half of `spare`, halves to even, as torchvision's centre crop does.
fn half(spare: usize) -> usize {
    let half = spare / 2;
    half + usize::from(spare % 2 == 1 && half % 2 == 1)
}

/// A random part: area and ratio drawn until it fits, else the centre nearest to the ratios
/// (torchvision's RandomResizedCrop).
///
/// Logarithm and exponential are the same code on every machine: a C library's may differ in the
/// last bit, and so a crop by a pixel.
pub fn random(width: usize, height: usize, key: Key) -> Rect {
    let unit = |draw: u64| (key.bits(draw) >> 11) as f64 * (1.0 / 9_007_199_254_740_992.0);
    let between = |draw: u64, (low, high): (f64, f64)| low + (high - low) * unit(draw);
    let area = (width * height) as f64;
    for attempt in 0..TRIES {
        let draw = 4 * attempt;
        let target = area * between(draw, AREA);
        let logs = (libm::log(RATIO.0), libm::log(RATIO.1));
        let ratio = libm::exp(between(draw + 1, logs));
        let w = (target * ratio).sqrt().round_ties_even() as usize;
        let h = (target / ratio).sqrt().round_ties_even() as usize;
        if (1..=width).contains(&w) && (1..=height).contains(&h) {
            return Rect {
                left: key.below(draw + 2, (width - w + 1) as u64) as usize,
                top: key.below(draw + 3, (height - h + 1) as u64) as usize,
                width: w,
                height: h,
            };
        }
    }
    fallback(width, height)
}

/// All of the picture, cut to the nearest allowed ratio about its centre.
fn fallback(width: usize, height: usize) -> Rect {
    let ratio = width as f64 / height as f64;
    let (w, h) = if ratio < RATIO.0 {
        let h = (width as f64 / RATIO.0).round_ties_even() as usize;
        (width, h)
    } else if ratio > RATIO.1 {
        let w = (height as f64 * RATIO.1).round_ties_even() as usize;
        (w, height)
    } else {
        (width, height)
    };
    Rect {
        left: (width - w) / 2,
        top: (height - h) / 2,
        width: w,
        height: h,
    }
}

/// Left becomes right.
pub fn flip(pixels: &mut Pixels<3>) {
    for row in pixels.data.chunks_exact_mut(pixels.width * 3) {
        row.as_chunks_mut::<3>().0.reverse();
    }
}

fn premultiply(pixels: &mut Pixels<4>) {
    for pixel in pixels.data.chunks_exact_mut(4) {
        let alpha = u32::from(pixel[3]);
        for value in &mut pixel[..3] {
            let product = u32::from(*value) * alpha + 128;
            *value = (((product >> 8) + product) >> 8) as u8;
        }
    }
}

fn unpremultiply(pixels: &mut Pixels<4>) {
    for pixel in pixels.data.chunks_exact_mut(4) {
        let alpha = u32::from(pixel[3]);
        if alpha != 0 && alpha != 255 {
            for value in &mut pixel[..3] {
                *value = (255 * u32::from(*value) / alpha).min(255) as u8;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use belfry_configs::rng::Purpose;

    #[test]
    fn crops_round_halves_to_even() {
        assert_eq!([0, 1, 2, 3, 4, 5].map(half), [0, 0, 1, 2, 2, 2]);
    }

    #[test]
    fn random_crops_keep_to_their_areas_and_ratios() {
        let key = Key::new(3, Purpose::Pack);
        let mut areas = Vec::new();
        for i in 0..2000 {
            let part = random(640, 480, key.with(i));
            assert_eq!(part, random(640, 480, key.with(i)), "the key says all");
            assert!(part.left + part.width <= 640 && part.top + part.height <= 480);
            let ratio = part.width as f64 / part.height as f64;
            assert!((0.745..1.34).contains(&ratio), "{part:?}");
            areas.push((part.width * part.height) as f64 / (640.0 * 480.0));
        }
        areas.sort_by(f64::total_cmp);
        assert!(areas[0] > 0.495 && areas[0] < 0.51, "{}", areas[0]);
        assert!(areas[1999] > 0.98 && areas[1999] <= 1.0, "{}", areas[1999]);
    }

    #[test]
    fn what_fits_no_ratio_gives_its_centre() {
        let key = Key::new(3, Purpose::Pack);
        let rect = |left, top, width, height| Rect {
            left,
            top,
            width,
            height,
        };
        assert_eq!(random(10_000, 3, key), rect(4998, 0, 4, 3));
        assert_eq!(random(3, 10_000, key), rect(0, 4998, 3, 4));
        assert_eq!(random(1, 1, key), rect(0, 0, 1, 1));
    }

    #[test]
    fn a_mirror_image_is_its_own_inverse() {
        let mut pixels = Pixels::<3> {
            width: 2,
            height: 2,
            data: (0..12).collect(),
        };
        let before = pixels.clone();
        flip(&mut pixels);
        assert_eq!(pixels.data, [3, 4, 5, 0, 1, 2, 9, 10, 11, 6, 7, 8]);
        flip(&mut pixels);
        assert_eq!(pixels, before);
    }
}
