//! The `clip` transform (model_spec 10): decode, shorter side to S, centre crop, normalise.

use std::io::Cursor;

use shard_tools::check;
use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use crate::resize::{Pixels, resize};

/// CLIP's mean and standard deviation per channel (model_spec 10), to the last bit of an f32.
const MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

/// Encoded bytes to normalised f32 `[3, side, side]`.
///
/// # Errors
/// A reason, when the bytes do not decode or are larger than an image may be.
pub fn clip_transform(bytes: &[u8], side: usize) -> Result<Vec<f32>, String> {
    let pixels = decode(bytes)?;
    let resized = match pixels {
        Decoded::Rgb(pixels) => shorter_side(pixels, side),
        Decoded::Rgba(pixels) => {
            // Pillow resizes with premultiplied alpha and drops the alpha afterwards.
            let mut resized = shorter_side(premultiply(pixels), side);
            unpremultiply(&mut resized);
            let data = resized
                .data
                .chunks_exact(4)
                .flat_map(|p| [p[0], p[1], p[2]])
                .collect();
            let (width, height) = (resized.width, resized.height);
            Pixels {
                width,
                height,
                data,
            }
        }
    };
    Ok(crop_and_normalise(&resized, side))
}

enum Decoded {
    Rgb(Pixels<3>),
    Rgba(Pixels<4>),
}

fn decode(bytes: &[u8]) -> Result<Decoded, String> {
    if bytes.starts_with(&[0xFF, 0xD8]) {
        let options = DecoderOptions::default()
            .set_strict_mode(true)
            .jpeg_set_out_colorspace(ColorSpace::RGB);
        let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
        decoder
            .decode_headers()
            .map_err(|e| format!("not a JPEG that can be read: {e:?}"))?;
        let (width, height) = decoder.dimensions().ok_or("a JPEG without a size")?;
        check::within(width, height)?;
        let data = decoder
            .decode()
            .map_err(|e| format!("the JPEG does not decode: {e:?}"))?;
        return Ok(Decoded::Rgb(Pixels {
            width,
            height,
            data,
        }));
    }
    check::image(bytes)?;
    let reader = image::ImageReader::new(Cursor::new(bytes)).with_guessed_format();
    let decoded = reader
        .map_err(|e| e.to_string())?
        .decode()
        .map_err(|e| e.to_string())?;
    let (width, height) = (decoded.width() as usize, decoded.height() as usize);
    if decoded.color().has_alpha() {
        let data = decoded.into_rgba8().into_raw();
        return Ok(Decoded::Rgba(Pixels {
            width,
            height,
            data,
        }));
    }
    let data = decoded.into_rgb8().into_raw();
    Ok(Decoded::Rgb(Pixels {
        width,
        height,
        data,
    }))
}

fn shorter_side<const C: usize>(pixels: Pixels<C>, side: usize) -> Pixels<C> {
    let (width, height) = (pixels.width, pixels.height);
    let (w, h) = if width <= height {
        (side, side * height / width)
    } else {
        (side * width / height, side)
    };
    resize(pixels, w, h)
}

fn premultiply(mut pixels: Pixels<4>) -> Pixels<4> {
    for pixel in pixels.data.chunks_exact_mut(4) {
        let alpha = u32::from(pixel[3]);
        for value in &mut pixel[..3] {
            let product = u32::from(*value) * alpha + 128;
            *value = (((product >> 8) + product) >> 8) as u8;
        }
    }
    pixels
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

/// Half of `spare`, halves to even, as torchvision's centre crop does.
fn crop_offset(spare: usize) -> usize {
    let half = spare / 2;
    half + usize::from(spare % 2 == 1 && half % 2 == 1)
}

fn crop_and_normalise(pixels: &Pixels<3>, side: usize) -> Vec<f32> {
    let left = crop_offset(pixels.width - side);
    let top = crop_offset(pixels.height - side);
    let mut out = Vec::with_capacity(3 * side * side);
    for channel in 0..3 {
        for row in top..top + side {
            let start = (row * pixels.width + left) * 3 + channel;
            let values = pixels.data[start..].iter().step_by(3).take(side);
            let normal = |v: &u8| (f32::from(*v) / 255.0 - MEAN[channel]) / STD[channel];
            out.extend(values.map(normal));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crops_round_halves_to_even() {
        assert_eq!([0, 1, 2, 3, 4, 5].map(crop_offset), [0, 0, 1, 2, 2, 2]);
    }

    #[test]
    fn what_is_no_image_is_refused() {
        assert!(clip_transform(b"hello", 32).is_err());
        assert!(clip_transform(&[0xFF, 0xD8, 1, 2, 3], 32).is_err());
    }
}
