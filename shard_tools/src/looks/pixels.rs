//! An image's size and its colours, to look at: nothing here trains.

use std::io::Cursor;

use image::{DynamicImage, ImageReader, Rgb, RgbImage};
use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use crate::check;

/// Width and height by the header alone.
///
/// # Errors
/// A reason.
pub(super) fn size(bytes: &[u8]) -> Result<(usize, usize), String> {
    let (width, height) = if is_jpeg(bytes) {
        let mut decoder = JpegDecoder::new(ZCursor::new(bytes));
        decoder.decode_headers().map_err(|e| format!("{e:?}"))?;
        decoder.dimensions().ok_or("a JPEG without a size")?
    } else {
        let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format();
        let size = reader.map_err(|e| e.to_string())?.into_dimensions();
        let (width, height) = size.map_err(|e| e.to_string())?;
        (width as usize, height as usize)
    };
    check::within(width, height)?;
    Ok((width, height))
}

/// The image in RGB; what is transparent shows white.
///
/// # Errors
/// A reason.
pub(super) fn rgb(bytes: &[u8]) -> Result<RgbImage, String> {
    let (width, height) = size(bytes)?;
    if is_jpeg(bytes) {
        // A cut-off JPEG is an error in strict mode only.
        let options = DecoderOptions::default()
            .set_strict_mode(true)
            .jpeg_set_out_colorspace(ColorSpace::RGB);
        let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
        let pixels = decoder.decode().map_err(|e| format!("{e:?}"))?;
        let image = RgbImage::from_raw(width as u32, height as u32, pixels);
        return image.ok_or_else(|| "pixels are missing".into());
    }
    let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format();
    let image = reader.map_err(|e| e.to_string())?.decode();
    Ok(on_white(&image.map_err(|e| e.to_string())?))
}

fn is_jpeg(bytes: &[u8]) -> bool {
    bytes.starts_with(&[0xFF, 0xD8])
}

fn on_white(image: &DynamicImage) -> RgbImage {
    let rgba = image.to_rgba8();
    RgbImage::from_fn(rgba.width(), rgba.height(), |x, y| {
        let [r, g, b, alpha] = rgba.get_pixel(x, y).0;
        Rgb([r, g, b].map(|value| blend(255, value, alpha)))
    })
}

/// `over` with `alpha` of 255 on `under`.
pub(super) fn blend(under: u8, over: u8, alpha: u8) -> u8 {
    let alpha = u32::from(alpha);
    ((u32::from(under) * (255 - alpha) + u32::from(over) * alpha + 127) / 255) as u8
}
