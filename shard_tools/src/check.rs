//! Whether an image can be decoded at all, within limits that stop decompression bombs.

use std::io::Cursor;

use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::options::DecoderOptions;

/// Longest side of an image in pixels.
pub const SIDE_MAX: usize = 20_000;
/// Pixels of an image.
pub const PIXELS_MAX: usize = 200_000_000;

/// Decodes `bytes` and says what is wrong with them.
///
/// # Errors
/// A reason.
pub fn image(bytes: &[u8]) -> Result<(usize, usize), String> {
    if bytes.starts_with(&[0xFF, 0xD8]) {
        // A cut-off JPEG is an error in strict mode only.
        let options = DecoderOptions::default().set_strict_mode(true);
        let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
        decoder
            .decode_headers()
            .map_err(|e| format!("not a JPEG that can be read: {e:?}"))?;
        let (width, height) = decoder.dimensions().ok_or("a JPEG without a size")?;
        within(width, height)?;
        decoder
            .decode()
            .map_err(|e| format!("the JPEG does not decode: {e:?}"))?;
        return Ok((width, height));
    }
    let reader = image::ImageReader::new(Cursor::new(bytes)).with_guessed_format();
    let reader = reader.map_err(|e| e.to_string())?;
    let format = reader.format().ok_or("neither JPEG, PNG nor WebP")?;
    let size = image::ImageReader::with_format(Cursor::new(bytes), format).into_dimensions();
    let (width, height) = size.map_err(|e| format!("the image has no readable size: {e}"))?;
    within(width as usize, height as usize)?;
    reader
        .decode()
        .map_err(|e| format!("the image does not decode: {e}"))?;
    Ok((width as usize, height as usize))
}

/// Refuses sizes that no photograph has.
///
/// # Errors
/// A reason.
pub fn within(width: usize, height: usize) -> Result<(), String> {
    if width == 0 || height == 0 || width.max(height) > SIDE_MAX || width * height > PIXELS_MAX {
        return Err(format!(
            "{width} x {height} pixels are outside the limits ({SIDE_MAX} a side, {PIXELS_MAX} in \
             all)"
        ));
    }
    Ok(())
}
