//! From an image file's bytes to the model's input (model_spec 10): decode, crop, resize, augment,
//! normalise. Knows pixels and keys, and refuses to know shards, lanes and batches.

pub mod augment;
mod buffers;
mod crop;
mod decode;
mod jpeg;
mod normalise;
mod pixels;
mod resize;

use belfry_configs::rng::Key;
use belfry_configs::{Transform, TruncatedJpeg};

pub use crop::resize_with_alpha;
pub use decode::{Decoded, decode};
pub use pixels::{Pixels, Rect};
pub use resize::resize;

/// Appends the normalised f32 `[3, side, side]` of an encoded image to `out`.
///
/// The random transforms draw from `key` alone: the same key gives the same pixels.
///
/// # Errors
/// A reason, when the bytes do not decode or are larger than an image may be; `out` is as it was.
pub fn transform(
    bytes: &[u8],
    kind: Transform,
    side: usize,
    truncated: TruncatedJpeg,
    key: Key,
    out: &mut Vec<f32>,
) -> Result<(), String> {
    let pixels = square(bytes, kind, side, truncated, key)?;
    normalise::append(&pixels, out);
    buffers::give(pixels.data);
    Ok(())
}

/// What [`transform`] normalises: 8-bit RGB, `side` x `side`.
///
/// # Errors
/// As [`transform`].
pub fn square(
    bytes: &[u8],
    kind: Transform,
    side: usize,
    truncated: TruncatedJpeg,
    key: Key,
) -> Result<Pixels<3>, String> {
    let decoded = decode(bytes, truncated)?;
    let (ops, flip) = match kind {
        Transform::Clip => return Ok(crop::centre(decoded, side)),
        Transform::Albef => {
            let pixels = decoded.into_rgb();
            let (all, size) = (pixels.rect(), (side, side));
            let square = resize(&pixels, all, size, Rect::of(side, side));
            buffers::give(pixels.data);
            return Ok(square);
        }
        Transform::AlbefRandaugWc => (augment::Kind::ALL, true),
        Transform::AlbefRandaugWohf => (augment::Kind::WITHOUT_COLOUR, false),
    };
    let pixels = decoded.into_rgb();
    let part = crop::random(pixels.width, pixels.height, key.with(CROP));
    let mut square = resize(&pixels, part, (side, side), Rect::of(side, side));
    buffers::give(pixels.data);
    if flip && key.with(FLIP).uniform(0) < 0.5 {
        crop::flip(&mut square);
    }
    augment::random(&mut square, ops, key.with(OPS));
    Ok(square)
}

/// Parts of a random transform's key.
const CROP: u64 = 0;
const FLIP: u64 = 1;
const OPS: u64 = 2;

/// The `clip` transform alone; a cut-off JPEG is refused.
///
/// # Errors
/// As [`transform`].
pub fn clip_transform(bytes: &[u8], side: usize) -> Result<Vec<f32>, String> {
    let mut out = Vec::with_capacity(3 * side * side);
    let pixels = decode(bytes, TruncatedJpeg::Refuse)?;
    normalise::append(&crop::centre(pixels, side), &mut out);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_image_is_refused() {
        assert!(clip_transform(b"hello", 32).is_err());
        assert!(clip_transform(&[0xFF, 0xD8, 1, 2, 3], 32).is_err());
    }
}
