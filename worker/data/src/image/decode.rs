//! Encoded bytes to 8-bit RGB or RGBA, as Pillow's `convert` gives them. Knows the limits of
//! `shard_tools` and what users' files look like; refuses to know what becomes of the pixels.

use std::io::Cursor;

use belfry_configs::TruncatedJpeg;
use shard_tools::check;
use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use super::buffers;
use super::pixels::Pixels;

/// A picture, with alpha where its file has one.
pub enum Decoded {
    /// Opaque.
    Rgb(Pixels<3>),
    /// With alpha, not premultiplied.
    Rgba(Pixels<4>),
}

impl Decoded {
    /// Without alpha: colours as they are, not laid over anything (Pillow's `convert("RGB")`).
    pub fn into_rgb(self) -> Pixels<3> {
        match self {
            Decoded::Rgb(pixels) => pixels,
            Decoded::Rgba(pixels) => {
                let all = pixels.data.as_chunks::<4>().0.iter();
                let data = all.flat_map(|p| [p[0], p[1], p[2]]).collect();
                let (width, height) = (pixels.width, pixels.height);
                Pixels {
                    width,
                    height,
                    data,
                }
            }
        }
    }
}

/// Decodes within the limits of [`check::within`].
///
/// # Errors
/// A reason.
pub fn decode(bytes: &[u8], _truncated: TruncatedJpeg) -> Result<Decoded, String> {
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
        let mut data = buffers::take(3 * width * height);
        decoder
            .decode_into(&mut data)
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
