//! JPEG files to 8-bit RGB by libjpeg, whose pixels are Pillow's to the bit: baseline and progressive,
//! grey, YCbCr, CMYK and YCCK, whole or cut off. It refuses to know who looks at them.
//!
//! zune-jpeg was here before: a quarter slower where libjpeg has its assembler (nasm), a third faster
//! where it has not, and up to 15 of 255 away from what the authors trained on.

use std::cell::Cell;
use std::io::{self, BufRead, Read};
use std::os::raw::c_int;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use mozjpeg::{ColorSpace, Decompress};
use mozjpeg_sys::{jpeg_common_struct, jpeg_error_mgr, jpeg_std_error};

use crate::check;

/// A decoded file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// RGB, row by row.
    pub data: Vec<u8>,
    /// The file ended before its last pixel; what is missing is grey.
    pub cut_off: bool,
    /// How often libjpeg found compressed data that it had to guess at. Pillow says nothing of them.
    pub warnings: u32,
}

/// Whether a file begins as JPEG files do.
pub fn is(bytes: &[u8]) -> bool {
    bytes.starts_with(&[0xFF, 0xD8])
}

/// Decodes into the memory that `buffer` gives for so many bytes. Limits are checked before.
///
/// # Errors
/// A reason.
pub fn decode(bytes: &[u8], buffer: impl FnOnce(usize) -> Vec<u8>) -> Result<Picture, String> {
    WARNINGS.set(0);
    // libjpeg's way to fail is to leave through all of its frames; its resources are freed on the way.
    let decoded = catch_unwind(AssertUnwindSafe(|| read(bytes, buffer)));
    decoded.unwrap_or_else(|payload| match payload.downcast::<Failure>() {
        Ok(failure) => Err(told(bytes, &failure.0)),
        Err(panic) => resume_unwind(panic),
    })
}

fn told(bytes: &[u8], reason: &str) -> String {
    match rare_kind(bytes) {
        Some(kind) => format!("JPEG files with {kind} cannot be read; store it as a usual JPEG"),
        None => format!("the JPEG does not decode: {reason}"),
    }
}

fn read(bytes: &[u8], buffer: impl FnOnce(usize) -> Vec<u8>) -> Result<Picture, String> {
    let ended = Cell::new(false);
    let rest = bytes;
    let failed = |e: io::Error| told(bytes, &e.to_string());
    let source = Source {
        rest,
        ended: &ended,
    };
    let file = Decompress::with_err(errors()).from_reader(source);
    let file = file.map_err(failed)?;
    let (width, height) = file.size();
    check::within(width, height)?;
    let inks = file.components().len() == 4;
    let space = if inks {
        ColorSpace::JCS_CMYK
    } else {
        ColorSpace::JCS_RGB
    };
    let mut file = file.to_colorspace(space).map_err(failed)?;
    let data = if inks {
        let mut data = vec![0; 4 * width * height];
        file.read_scanlines_into(&mut data).map_err(failed)?;
        data.as_chunks::<4>()
            .0
            .iter()
            .flat_map(|p| light(*p))
            .collect()
    } else {
        let mut data = buffer(3 * width * height);
        file.read_scanlines_into(&mut data).map_err(failed)?;
        data
    };
    // Asked here: what is missing behind the last pixel, the mark of the end, is missed by nobody.
    let cut_off = ended.get();
    Ok(Picture {
        width,
        height,
        data,
        cut_off,
        warnings: WARNINGS.get(),
    })
}

/// Inks, stored inverted as Adobe does (Pillow assumes it of all), to RGB as Pillow converts them.
fn light([cyan, magenta, yellow, black]: [u8; 4]) -> [u8; 3] {
    [cyan, magenta, yellow].map(|ink| {
        let light = u32::from(black);
        let product = u32::from(255 - ink) * light + 128;
        (light - (((product >> 8) + product) >> 8)) as u8
    })
}

/// The file, and whether libjpeg has asked for more than there is.
struct Source<'a> {
    rest: &'a [u8],
    ended: &'a Cell<bool>,
}

impl Read for Source<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        self.rest.read(to)
    }
}

impl BufRead for Source<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.ended.set(self.rest.is_empty());
        Ok(self.rest)
    }

    fn consume(&mut self, bytes: usize) {
        self.rest = &self.rest[bytes..];
    }
}

/// What libjpeg ended with.
struct Failure(String);

thread_local! {
    /// Of the file that this thread decodes.
    static WARNINGS: Cell<u32> = const { Cell::new(0) };
}

fn errors() -> jpeg_error_mgr {
    // SAFETY: a structure of C whose zeros are null pointers and numbers, filled by its own
    // constructor before anybody reads it.
    let mut errors: jpeg_error_mgr = unsafe { std::mem::zeroed() };
    unsafe { jpeg_std_error(&mut errors) };
    errors.error_exit = Some(fail);
    errors.emit_message = Some(count);
    errors
}

extern "C-unwind" fn fail(file: &mut jpeg_common_struct) {
    let mut text = [0u8; 80];
    // SAFETY: libjpeg calls with its own structures; the formatter writes up to 80 bytes.
    unsafe {
        if let Some(errors) = file.err.as_ref()
            && let Some(format) = errors.format_message
        {
            let text: *mut [u8; 80] = &mut text;
            format(file, &*text);
        }
    }
    let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
    let text = String::from_utf8_lossy(text).into_owned();
    // Not a panic: nothing is printed.
    resume_unwind(Box::new(Failure(text)));
}

extern "C-unwind" fn count(_: &mut jpeg_common_struct, level: c_int) {
    if level < 0 {
        WARNINGS.set(WARNINGS.get().saturating_add(1));
    }
}

/// What kind of JPEG it is, where it is one of those that nobody's browser shows (ITU-T T.81, B.1).
fn rare_kind(bytes: &[u8]) -> Option<&'static str> {
    let mut place = 2;
    while let Some([0xFF, marker, high, low]) = bytes.get(place..place + 4) {
        match marker {
            0xC9..=0xCB | 0xCD..=0xCF => return Some("arithmetic codes"),
            0xC3 | 0xC5..=0xC7 => return Some("lossless or hierarchical frames"),
            0xDA => return None,
            _ => place += 2 + usize::from(u16::from_be_bytes([*high, *low])),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp() -> Vec<u8> {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../data/stamps/badger.jpg");
        std::fs::read(file).expect("a photograph of the house")
    }

    fn decoded(bytes: &[u8]) -> Picture {
        decode(bytes, |len| vec![77; len]).expect("decodes")
    }

    #[test]
    fn a_cut_off_file_is_grey_where_it_ends() {
        let file = stamp();
        let whole = decoded(&file);
        assert!(!whole.cut_off && whole.warnings == 0);
        let scan = file.windows(2).position(|pair| pair == [0xFF, 0xDA]);
        for cut in (scan.expect("a scan") + 20..file.len() - 16).step_by(7) {
            let part = decoded(&file[..cut]);
            assert!(part.cut_off, "{cut} bytes are whole");
            let row = 3 * whole.width;
            let rows = part
                .data
                .chunks_exact(row)
                .zip(whole.data.chunks_exact(row));
            let kept = rows.take_while(|(a, b)| a == b).count();
            let grey = part.data.chunks_exact(row).rev();
            let grey = grey.take_while(|row| row.iter().all(|v| *v == 128)).count();
            // A row of blocks, and a row on either side of it, whose chroma lies between.
            let all = kept + grey + 18;
            assert!(all >= whole.height, "{cut} bytes: {kept} rows, then {grey}");
        }
    }

    #[test]
    fn what_follows_the_end_is_ignored() {
        let longer = [&stamp()[..], b"\xFF\xD8 and so on"].concat();
        assert_eq!(decoded(&longer), decoded(&stamp()));
    }

    #[test]
    fn damage_inside_is_counted_and_rare_kinds_are_named() {
        let mut file = stamp();
        let middle = file.len() / 2;
        // The mark of the end, in the middle.
        file[middle..middle + 2].copy_from_slice(&[0xFF, 0xD9]);
        assert!(decoded(&file).warnings > 0);
        let frame = file.windows(2).position(|pair| pair == [0xFF, 0xC0]);
        file[frame.expect("a baseline frame") + 1] = 0xC9;
        let reason = decode(&file, |len| vec![0; len]).expect_err("is refused");
        assert!(reason.contains("arithmetic codes"), "{reason}");
    }

    proptest::proptest! {
        #[test]
        fn damaged_files_never_panic(place in 2usize..4000, value in 0u8..=255, len in 0usize..9000) {
            let mut file = stamp();
            let place = place % file.len();
            file[place] = value;
            file.truncate(len.max(2));
            let _ = decode(&file, |len| vec![0; len]);
        }
    }
}
