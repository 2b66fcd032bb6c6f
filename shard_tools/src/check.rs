//! Whether an image is whole and can be decoded, within limits that stop decompression bombs.

mod structure;

pub use structure::jpeg_size;

use std::io::Cursor;

use crate::jpeg;

/// Longest side of an image in pixels.
pub const SIDE_MAX: usize = 20_000;
/// Pixels of an image.
pub const PIXELS_MAX: usize = 200_000_000;

/// How closely images are looked at before they are packed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Check {
    /// Format and size. A cut-off image passes.
    Headers,
    /// Besides, every marker or chunk up to the end, and PNG's checksums: finds what is cut off or
    /// mixed with something else, at the speed of memory.
    #[default]
    Structure,
    /// Besides, every pixel is decoded: finds also damage inside compressed data, at the speed of
    /// decoding.
    Decode,
}

/// A format that training decodes, by an image's first bytes; names do not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// JPEG.
    Jpeg,
    /// PNG.
    Png,
    /// WebP.
    Webp,
}

impl Kind {
    /// The format of `bytes`.
    ///
    /// # Errors
    /// A reason that names the format where it is another one.
    pub fn of(bytes: &[u8]) -> Result<Self, String> {
        let starts = |mark: &[u8]| bytes.starts_with(mark);
        if starts(&[0xFF, 0xD8]) {
            return Ok(Kind::Jpeg);
        }
        if starts(structure::PNG_MARK) {
            return Ok(Kind::Png);
        }
        if starts(b"RIFF") && bytes.get(8..12) == Some(b"WEBP") {
            return Ok(Kind::Webp);
        }
        let blank = bytes.trim_ascii_start();
        let found = match bytes {
            [] => "an empty file",
            _ if starts(b"GIF8") => "a GIF",
            _ if starts(b"BM") => "a BMP",
            _ if starts(b"II*\0") || starts(b"MM\0*") => "a TIFF",
            _ if bytes.get(4..8) == Some(b"ftyp") => "an AVIF, HEIC or video",
            _ if blank.starts_with(b"<") => "a page (HTML, XML or SVG) instead of an image",
            _ => "of an unknown format",
        };
        Err(format!("it is {found}; training reads JPEG, PNG and WebP"))
    }

    /// The extension of its files.
    pub fn extension(self) -> &'static str {
        match self {
            Kind::Jpeg => "jpg",
            Kind::Png => "png",
            Kind::Webp => "webp",
        }
    }
}

/// Looks at `bytes` as closely as `check` says.
///
/// # Errors
/// A reason.
pub fn examine(bytes: &[u8], check: Check) -> Result<Kind, String> {
    let kind = Kind::of(bytes)?;
    let (width, height) = match (check, kind) {
        (Check::Headers, Kind::Jpeg) => structure::jpeg_size(bytes)?,
        (Check::Structure, Kind::Jpeg) => structure::jpeg(bytes)?,
        (Check::Headers, Kind::Png) => structure::png_size(bytes)?,
        (Check::Structure, Kind::Png) => structure::png(bytes)?,
        (Check::Headers | Check::Structure, Kind::Webp) => {
            if check == Check::Structure {
                structure::webp(bytes)?;
            }
            size(bytes, image::ImageFormat::WebP)?
        }
        (Check::Decode, _) => image(bytes)?,
    };
    within(width, height)?;
    Ok(kind)
}

fn size(bytes: &[u8], format: image::ImageFormat) -> Result<(usize, usize), String> {
    let reader = image::ImageReader::with_format(Cursor::new(bytes), format);
    let size = reader.into_dimensions();
    let (width, height) = size.map_err(|e| format!("the image has no readable size: {e}"))?;
    Ok((width as usize, height as usize))
}

/// A JPEG with all of its pixels as they were stored.
///
/// # Errors
/// A reason.
pub(crate) fn whole_jpeg(bytes: &[u8]) -> Result<jpeg::Picture, String> {
    let picture = jpeg::decode(bytes, |len| vec![0; len])?;
    if picture.cut_off {
        return Err("the JPEG ends before its last row".into());
    }
    if picture.warnings > 0 {
        return Err("the JPEG's compressed data are damaged".into());
    }
    Ok(picture)
}

/// Decodes `bytes` and says what is wrong with them.
///
/// # Errors
/// A reason.
pub fn image(bytes: &[u8]) -> Result<(usize, usize), String> {
    if jpeg::is(bytes) {
        let picture = whole_jpeg(bytes)?;
        return Ok((picture.width, picture.height));
    }
    let reader = image::ImageReader::new(Cursor::new(bytes)).with_guessed_format();
    let reader = reader.map_err(|e| e.to_string())?;
    let format = reader.format().ok_or("neither JPEG, PNG nor WebP")?;
    let (width, height) = size(bytes, format)?;
    within(width, height)?;
    reader
        .decode()
        .map_err(|e| format!("the image does not decode: {e}"))?;
    Ok((width, height))
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
