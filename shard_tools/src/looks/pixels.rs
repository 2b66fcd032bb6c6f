//! An image's size and its colours, to look at and to measure: no picture that trains comes from here.

use std::io::Cursor;

use image::{DynamicImage, ImageReader, Rgb, RgbImage};

use crate::{check, jpeg};

/// Width and height by the header alone.
///
/// # Errors
/// A reason.
pub(super) fn size(bytes: &[u8]) -> Result<(usize, usize), String> {
    let (width, height) = if jpeg::is(bytes) {
        check::jpeg_size(bytes)?
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
pub(crate) fn rgb(bytes: &[u8]) -> Result<RgbImage, String> {
    if jpeg::is(bytes) {
        let picture = check::whole_jpeg(bytes)?;
        let (width, height) = (picture.width as u32, picture.height as u32);
        let image = RgbImage::from_raw(width, height, picture.data);
        return image.ok_or_else(|| "pixels are missing".into());
    }
    size(bytes)?;
    let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format();
    let image = reader.map_err(|e| e.to_string())?.decode();
    Ok(on_white(&image.map_err(|e| e.to_string())?))
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
