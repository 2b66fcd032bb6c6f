//! Whether a JPEG, PNG or WebP goes on to its end: markers, chunks and checksums, no pixels.

/// The first bytes of a PNG (PNG specification, 5.2).
pub const PNG_MARK: &[u8] = b"\x89PNG\r\n\x1a\n";

/// A JPEG marker's second byte (ITU-T T.81, table B.1).
const EOI: u8 = 0xD9;
const SOS: u8 = 0xDA;

fn cut(at: usize) -> String {
    format!("the image is cut off at byte {at}")
}

fn u16_at(bytes: &[u8], at: usize) -> Option<usize> {
    let two = bytes.get(at..at + 2)?;
    Some(usize::from(u16::from_be_bytes([two[0], two[1]])))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<usize> {
    let four = bytes.get(at..at + 4)?;
    Some(u32::from_be_bytes([four[0], four[1], four[2], four[3]]) as usize)
}

/// Width and height of a JPEG up to its frame header.
pub fn jpeg_size(bytes: &[u8]) -> Result<(usize, usize), String> {
    walk_jpeg(bytes, false)
}

/// Width and height of a JPEG that has a frame, a scan and an end.
pub fn jpeg(bytes: &[u8]) -> Result<(usize, usize), String> {
    walk_jpeg(bytes, true)
}

/// Walks the markers. What follows the end marker is not looked at: cameras put previews there.
fn walk_jpeg(bytes: &[u8], to_the_end: bool) -> Result<(usize, usize), String> {
    let (mut at, mut size, mut scans) = (2, None, 0);
    loop {
        // Any number of 0xFF may stand before a marker.
        if *bytes.get(at).ok_or_else(|| cut(at))? != 0xFF {
            return Err(format!("no JPEG marker at byte {at}"));
        }
        while *bytes.get(at).ok_or_else(|| cut(at))? == 0xFF {
            at += 1;
        }
        let marker = bytes[at];
        at += 1;
        match marker {
            EOI if scans == 0 => return Err("a JPEG without a scan".into()),
            EOI => return size.ok_or_else(|| "a JPEG without a frame".into()),
            0x01 | 0xD0..=0xD7 => continue,
            _ => {}
        }
        let length = u16_at(bytes, at).ok_or_else(|| cut(at))?;
        if length < 2 {
            return Err(format!("a JPEG segment of {length} bytes at byte {at}"));
        }
        // Frame headers; C4, C8 and CC in this range are tables.
        if matches!(marker, 0xC0..=0xCF) && !matches!(marker, 0xC4 | 0xC8 | 0xCC) {
            let height = u16_at(bytes, at + 3).ok_or_else(|| cut(at))?;
            let width = u16_at(bytes, at + 5).ok_or_else(|| cut(at))?;
            size = Some((width, height));
            if !to_the_end {
                return Ok((width, height));
            }
        }
        at += length;
        if marker == SOS {
            scans += 1;
            at = scan_end(bytes, at)?;
        }
    }
}

/// Where the entropy-coded data that begin at `at` end: at a 0xFF that is neither stuffed nor a
/// restart.
fn scan_end(bytes: &[u8], mut at: usize) -> Result<usize, String> {
    loop {
        let rest = bytes.get(at..).ok_or_else(|| cut(bytes.len()))?;
        at += memchr::memchr(0xFF, rest).ok_or_else(|| cut(bytes.len()))?;
        match bytes.get(at + 1) {
            None => return Err(cut(bytes.len())),
            Some(0x00 | 0xD0..=0xD7) => at += 2,
            Some(0xFF) => at += 1,
            Some(_) => return Ok(at),
        }
    }
}

/// Width and height of a PNG by its first chunk.
pub fn png_size(bytes: &[u8]) -> Result<(usize, usize), String> {
    let header = bytes.get(12..16) == Some(b"IHDR");
    let size = u32_at(bytes, 16).zip(u32_at(bytes, 20));
    size.filter(|_| header)
        .ok_or_else(|| "a PNG without a header".into())
}

/// Width and height of a PNG with data and an end, all of whose critical chunks have their
/// checksum.
pub fn png(bytes: &[u8]) -> Result<(usize, usize), String> {
    let size = png_size(bytes)?;
    let (mut at, mut data) = (PNG_MARK.len(), false);
    loop {
        let length = u32_at(bytes, at).ok_or_else(|| cut(bytes.len()))?;
        let end = at + 8 + length;
        let chunk = bytes.get(at + 4..end).ok_or_else(|| cut(bytes.len()))?;
        let sum = u32_at(bytes, end).ok_or_else(|| cut(bytes.len()))?;
        let name = &chunk[..4];
        // An ancillary chunk (lower case) may be wrong: decoders pass over it.
        if name[0].is_ascii_uppercase() && crc32fast::hash(chunk) as usize != sum {
            let name = String::from_utf8_lossy(name);
            return Err(format!("PNG chunk {name} at byte {at}: wrong checksum"));
        }
        match name {
            b"IDAT" => data = true,
            b"IEND" if data => return Ok(size),
            b"IEND" => return Err("a PNG without image data".into()),
            _ => {}
        }
        at = end + 4;
    }
}

/// Whether a WebP is as long as its header says.
pub fn webp(bytes: &[u8]) -> Result<(), String> {
    let four = bytes.get(4..8).ok_or_else(|| cut(bytes.len()))?;
    let length = u32::from_le_bytes([four[0], four[1], four[2], four[3]]) as usize;
    if bytes.len() < length + 8 {
        return Err(cut(bytes.len()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::{Check, Kind, examine};
    use super::*;

    fn stamp() -> Vec<u8> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../data/stamps/3_earth.jpg");
        std::fs::read(folder).expect("a photograph")
    }

    fn written(format: image::ImageFormat) -> Vec<u8> {
        let mut bytes = std::io::Cursor::new(Vec::new());
        let picture = image::RgbImage::from_fn(40, 30, |x, y| image::Rgb([x as u8, y as u8, 7]));
        picture.write_to(&mut bytes, format).expect("is written");
        bytes.into_inner()
    }

    /// Every cut that a decoder refuses, the walk refuses.
    #[test]
    fn what_is_cut_off_is_found() {
        let images = [
            (Kind::Jpeg, stamp()),
            (Kind::Png, written(image::ImageFormat::Png)),
            (Kind::Webp, written(image::ImageFormat::WebP)),
        ];
        for (kind, whole) in images {
            for check in [Check::Headers, Check::Structure, Check::Decode] {
                assert_eq!(examine(&whole, check), Ok(kind), "{check:?}");
            }
            for length in [0, 1, 2, 11, 30, whole.len() / 2, whole.len() - 1] {
                let told = examine(&whole[..length], Check::Structure);
                assert!(told.is_err(), "{kind:?} of {length} bytes passes");
            }
            let half = examine(&whole[..whole.len() / 2], Check::Headers);
            assert!(half.is_ok(), "headers are no more than headers: {half:?}");
        }
    }

    #[test]
    fn a_wrong_checksum_and_other_formats_are_named() {
        let mut png = written(image::ImageFormat::Png);
        let middle = png.len() / 2;
        png[middle] ^= 1;
        let told = examine(&png, Check::Structure).expect_err("is damaged");
        assert!(told.contains("IDAT") && told.contains("checksum"), "{told}");
        let told = |bytes: &[u8]| examine(bytes, Check::Headers).expect_err("no image");
        assert!(told(b"GIF89a").contains("a GIF"));
        assert!(told(b"BM123").contains("a BMP"));
        assert!(told(b"  <html>").contains("HTML"));
        assert!(told(b"").contains("empty"));
        // 65,500 x 65,500 pixels.
        let bomb = b"\xFF\xD8\xFF\xC0\x00\x11\x08\xFF\xDC\xFF\xDC\x03\x01\x22\x00\x02\x11\x01";
        assert!(told(bomb).contains("outside the limits"));
    }

    proptest::proptest! {
        #[test]
        fn random_bytes_never_panic(
            bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..600),
            kind in 0..3usize,
        ) {
            let mark: [&[u8]; 3] = [b"\xFF\xD8\xFF", PNG_MARK, b"RIFF\0\0\0\0WEBP"];
            let whole = [mark[kind], &bytes].concat();
            let _ = examine(&whole, Check::Structure);
        }
    }
}
