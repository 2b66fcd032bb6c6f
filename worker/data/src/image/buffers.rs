//! Memory that one image leaves to the next on the same thread. Knows bytes only.
//!
//! A decoded photograph is a megabyte: fetched from the system and given back each time, its pages
//! cost a tenth of the time of a decode.

use std::cell::RefCell;

/// Buffers kept per thread: an image needs two at a time.
const KEPT_MAX: usize = 3;
/// Bytes of a buffer that is kept; a scan of 100 megapixels is not.
const BYTES_MAX: usize = 8 << 20;

thread_local! {
    static KEPT: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer of `len` bytes with whatever was in it.
pub fn take(len: usize) -> Vec<u8> {
    let mut buffer = KEPT.with_borrow_mut(Vec::pop).unwrap_or_default();
    if buffer.capacity() < len {
        // Growing would copy what nobody reads.
        buffer = Vec::new();
    }
    buffer.resize(len, 0);
    buffer
}

/// Leaves a buffer to the next image.
pub fn give(buffer: Vec<u8>) {
    if buffer.capacity() > BYTES_MAX {
        return;
    }
    KEPT.with_borrow_mut(|kept| {
        if kept.len() < KEPT_MAX {
            kept.push(buffer);
        }
    });
}
