//! JPEG files: baseline and progressive, grey, YCbCr, CMYK and YCCK, whole or cut off. Knows what the
//! decoder calls a file that ends too early.

use belfry_configs::TruncatedJpeg;
use shard_tools::check;
use zune_jpeg::JpegDecoder;
use zune_jpeg::errors::DecodeErrors;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use super::buffers;
use super::pixels::Pixels;

/// What is missing; the decoder's own choice, and Pillow's.
const GREY: u8 = 128;

/// Whether a file begins as JPEG files do.
pub fn is(bytes: &[u8]) -> bool {
    bytes.starts_with(&[0xFF, 0xD8])
}

/// Decodes; with [`TruncatedJpeg::Pad`] a file that ends after its header has grey rows at its end.
/// The row of blocks in which it ends holds what came before its end and may repeat the row above.
///
/// # Errors
/// A reason.
pub fn decode(bytes: &[u8], truncated: TruncatedJpeg) -> Result<Pixels<3>, String> {
    let error = match read(bytes, true)? {
        Ok(pixels) => return Ok(pixels),
        Err(error) => error,
    };
    if has_end(bytes) {
        return Err(format!("the JPEG does not decode: {error:?}"));
    }
    if truncated == TruncatedJpeg::Refuse {
        return Err(format!(
            "the JPEG ends before its last row ({error:?}); data.truncated_jpeg = \"pad\" takes what \
             there is"
        ));
    }
    // Where the end falls into a code or the header of a scan, the decoder gives up. A little
    // earlier it does not.
    for dropped in (0..=DROPPED_BITS_MAX).map(|bits| (1 << bits) - 1) {
        let kept = bytes.len().saturating_sub(dropped);
        if let Ok(Ok(pixels)) = read(&bytes[..kept], false) {
            return Ok(pixels);
        }
    }
    Err(format!("the cut-off JPEG does not decode: {error:?}"))
}

/// Up to 2^12 - 1 bytes of a cut-off file are not read: more than any header of a scan.
const DROPPED_BITS_MAX: u32 = 12;

/// Markers (ITU-T T.81, table B.1).
const START_OF_SCAN: u8 = 0xDA;
const END: [u8; 2] = [0xFF, 0xD9];

/// (marker, place behind it) of every segment up to the first scan's header.
fn segments(bytes: &[u8]) -> impl Iterator<Item = (u8, usize)> {
    let mut next = Some(2);
    std::iter::from_fn(move || {
        let place = next?;
        let Some([0xFF, marker, high, low]) = bytes.get(place..place + 4) else {
            return None;
        };
        let behind = place + 2 + usize::from(u16::from_be_bytes([*high, *low]));
        next = (*marker != START_OF_SCAN).then_some(behind);
        Some((*marker, behind))
    })
}

/// Whether the end-of-image marker stands somewhere behind the first scan's header. What stands
/// before it may hold another JPEG, a thumbnail, with an end of its own.
fn has_end(bytes: &[u8]) -> bool {
    let scans = segments(bytes).last().map_or(0, |(_, behind)| behind);
    let scans = bytes.get(scans..).unwrap_or_default();
    scans.windows(2).any(|pair| pair == END)
}

/// What kind of JPEG it is, where it is one of those that nobody's browser shows.
fn rare_kind(bytes: &[u8]) -> Option<&'static str> {
    segments(bytes).find_map(|(marker, _)| match marker {
        0xC9..=0xCB | 0xCD..=0xCF => Some("arithmetic codes"),
        0xC3 | 0xC5..=0xC7 => Some("lossless or hierarchical frames"),
        _ => None,
    })
}

/// Reads the header, then all pixels; the inner error is of the pixels. A file that ends too early is
/// an error in strict mode only.
fn read(bytes: &[u8], strict: bool) -> Result<Result<Pixels<3>, DecodeErrors>, String> {
    let options = DecoderOptions::default()
        .set_strict_mode(strict)
        .set_max_width(check::SIDE_MAX)
        .set_max_height(check::SIDE_MAX)
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    decoder
        .decode_headers()
        .map_err(|e| match rare_kind(bytes) {
            Some(kind) => {
                format!("JPEG files with {kind} cannot be read; store it as a usual JPEG")
            }
            None => format!("not a JPEG that can be read: {e:?}"),
        })?;
    let (width, height) = decoder.dimensions().ok_or("a JPEG without a size")?;
    check::within(width, height)?;
    let mut data = buffers::take(3 * width * height);
    // What the decoder leaves out must not show the picture before.
    data.fill(GREY);
    Ok(decoder.decode_into(&mut data).map(|()| Pixels {
        width,
        height,
        data,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(name: &str) -> Vec<u8> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../data/stamps");
        std::fs::read(format!("{folder}/{name}.jpg")).expect("a photograph of the house")
    }

    #[test]
    fn a_cut_off_file_is_refused_or_has_grey_rows() {
        let file = stamp("badger");
        let whole = decode(&file, TruncatedJpeg::Refuse).expect("decodes");
        let scan = file.windows(2).position(|pair| pair == [0xFF, 0xDA]);
        let first = scan.expect("a scan") + 20;
        for cut in (first..file.len() - 16).step_by(7) {
            let refused = decode(&file[..cut], TruncatedJpeg::Refuse);
            let reason = refused
                .err()
                .unwrap_or_else(|| panic!("{cut} bytes decode"));
            assert!(reason.contains("data.truncated_jpeg"), "{cut}: {reason}");
            let padded = decode(&file[..cut], TruncatedJpeg::Pad);
            let padded = padded.unwrap_or_else(|e| panic!("{cut} bytes: {e}"));
            let row = 3 * whole.width;
            let grey = padded.data.chunks_exact(row).rev();
            let grey = grey
                .take_while(|row| row.iter().all(|v| *v == GREY))
                .count();
            let rows = padded
                .data
                .chunks_exact(row)
                .zip(whole.data.chunks_exact(row));
            let kept = rows.take_while(|(a, b)| a == b).count();
            // A row of blocks, and the row before it, whose chroma lies between the two.
            assert!(
                kept + grey + 17 >= whole.height,
                "{cut} bytes: {kept} rows, then {grey}"
            );
        }
    }

    #[test]
    fn what_follows_the_end_is_ignored() {
        let file = stamp("badger");
        let whole = decode(&file, TruncatedJpeg::Refuse).expect("decodes");
        let longer = [&file[..], b"\xFF\xD8 and so on"].concat();
        assert_eq!(
            decode(&longer, TruncatedJpeg::Refuse).expect("decodes"),
            whole
        );
    }

    #[test]
    fn arithmetic_codes_are_refused_by_name() {
        let mut file = stamp("badger");
        let frame = file.windows(2).position(|pair| pair == [0xFF, 0xC0]);
        file[frame.expect("a baseline frame") + 1] = 0xC9;
        let reason = decode(&file, TruncatedJpeg::Pad).expect_err("is refused");
        assert!(reason.contains("arithmetic codes"), "{reason}");
    }

    #[test]
    fn nothing_of_the_picture_before_shows() {
        let file = stamp("badger");
        let cut = &file[..file.len() / 2];
        let first = decode(cut, TruncatedJpeg::Pad).expect("decodes");
        buffers::give(vec![77; first.data.len()]);
        assert_eq!(decode(cut, TruncatedJpeg::Pad).expect("decodes"), first);
    }
}
