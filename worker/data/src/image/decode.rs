//! Encoded bytes to 8-bit RGB or RGBA, as Pillow's `convert` gives them. Knows the limits of
//! `shard_tools` and what users' files look like; refuses to know what becomes of the pixels.
//!
//! As in Pillow, a file's rotation in its EXIF and its colour profile are ignored, an animation is
//! its first picture, and of 16 bits a channel the upper 8 count (grey without alpha: is clipped).

use std::io::Cursor;

use belfry_configs::TruncatedJpeg;
use image::{DynamicImage, ImageFormat, ImageReader};
use shard_tools::check;

use super::jpeg;
use super::pixels::Pixels;

/// What this build decodes, for those whose file it is not.
const READ: &str = "JPEG, PNG, WebP, GIF and BMP are read";

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
                Pixels {
                    width: pixels.width,
                    height: pixels.height,
                    data: all.flat_map(|p| [p[0], p[1], p[2]]).collect(),
                }
            }
        }
    }
}

/// Decodes a picture within the limits of [`check::within`], which are read before any pixel is.
///
/// # Errors
/// A reason.
pub fn decode(bytes: &[u8], truncated: TruncatedJpeg) -> Result<Decoded, String> {
    if shard_tools::jpeg::is(bytes) {
        return jpeg::decode(bytes, truncated).map(Decoded::Rgb);
    }
    let format = format(bytes)?;
    let reader = || ImageReader::with_format(Cursor::new(bytes), format);
    let broken = |e: image::ImageError| format!("the {format:?} file does not decode: {e}");
    let (width, height) = reader().into_dimensions().map_err(broken)?;
    check::within(width as usize, height as usize)?;
    reader().decode().map(eight_bits).map_err(broken)
}

/// The format that the first bytes tell, where it can be read.
fn format(bytes: &[u8]) -> Result<ImageFormat, String> {
    let format = image::guess_format(bytes).map_err(|_| {
        let first = &bytes[..bytes.len().min(8)];
        format!("no image begins with the bytes {first:02x?}; {READ}")
    })?;
    if !format.reading_enabled() {
        return Err(format!("{format:?} files cannot be read; {READ}"));
    }
    Ok(format)
}

fn eight_bits(picture: DynamicImage) -> Decoded {
    use DynamicImage as D;
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    let rgb = |data| {
        Decoded::Rgb(Pixels {
            width,
            height,
            data,
        })
    };
    let rgba = |data| {
        Decoded::Rgba(Pixels {
            width,
            height,
            data,
        })
    };
    let upper = |values: Vec<u16>| values.into_iter().map(|v| (v >> 8) as u8);
    match picture {
        D::ImageLuma16(grey) => {
            // Pillow clips these instead: nearly every value becomes white.
            let values = grey.into_raw().into_iter().map(|v| v.min(255) as u8);
            rgb(values.flat_map(|v| [v; 3]).collect())
        }
        D::ImageRgb16(all) => rgb(upper(all.into_raw()).collect()),
        D::ImageRgba16(all) => rgba(upper(all.into_raw()).collect()),
        D::ImageLumaA16(all) => {
            let values: Vec<u8> = upper(all.into_raw()).collect();
            let pixels = values.as_chunks::<2>().0.iter();
            rgba(pixels.flat_map(|[v, a]| [*v, *v, *v, *a]).collect())
        }
        other if other.color().has_alpha() => rgba(other.into_rgba8().into_raw()),
        other => rgb(other.into_rgb8().into_raw()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::ExtendedColorType;

    fn refused(bytes: &[u8]) -> String {
        let decoded = decode(bytes, TruncatedJpeg::Pad);
        decoded.err().expect("is no picture that can be read")
    }

    fn png(colour: ExtendedColorType, (width, height): (u32, u32), data: &[u8]) -> Vec<u8> {
        use image::ImageEncoder as _;
        let mut file = Vec::new();
        let encoder = image::codecs::png::PngEncoder::new(&mut file);
        encoder
            .write_image(data, width, height, colour)
            .expect("is encoded");
        file
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        assert!(
            refused(b"hello").contains("68, 65, 6c, 6c, 6f"),
            "the bytes"
        );
        assert!(refused(b"").contains("JPEG, PNG"));
        assert!(refused(b"II*\0\x08\0\0\0\0\0").contains("Tiff files cannot be read"));
        assert!(refused(b"\x89PNG\r\n\x1a\n\0\0").contains("the Png file does not decode"));
        assert!(refused(&[0xFF, 0xD8, 1, 2, 3]).contains("JPEG"));
    }

    #[test]
    fn a_bomb_is_refused_before_it_goes_off() {
        // A header of 30,000 x 30,000 pixels and no pixel: 2.7 GB if anyone believed it.
        let mut file = png(ExtendedColorType::L8, (1, 1), &[0]);
        file[16..20].copy_from_slice(&30_000u32.to_be_bytes());
        file[20..24].copy_from_slice(&30_000u32.to_be_bytes());
        let crc = crc32(&file[12..29]);
        file[29..33].copy_from_slice(&crc.to_be_bytes());
        assert!(refused(&file).contains("30000 x 30000 pixels are outside the limits"));
    }

    /// PNG's checksum.
    fn crc32(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0, |crc: u32, byte| {
            (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
                (crc >> 1) ^ (0xEDB8_8320 * (crc & 1))
            })
        })
    }

    #[test]
    fn sixteen_bits_become_eight_as_in_pillow() {
        let values: [u16; 4] = [0x12FF, 0x3400, 0x5680, 0x7F7F];
        let file = png(
            ExtendedColorType::Rgba16,
            (1, 1),
            bytemuck::bytes_of(&values),
        );
        let Ok(Decoded::Rgba(pixels)) = decode(&file, TruncatedJpeg::Refuse) else {
            panic!("a picture with alpha");
        };
        assert_eq!(pixels.data, [0x12, 0x34, 0x56, 0x7F]);
        let file = png(
            ExtendedColorType::L16,
            (2, 1),
            bytemuck::bytes_of(&[0xFFFE_u16, 0xFE]),
        );
        let decoded = decode(&file, TruncatedJpeg::Refuse).expect("decodes");
        assert_eq!(decoded.into_rgb().data, [255, 255, 255, 254, 254, 254]);
    }
}
