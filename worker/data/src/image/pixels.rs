//! Pictures in memory. Knows nothing of files, models and random numbers.

/// 8-bit pixels, `C` channels interleaved, rows from top to bottom.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pixels<const C: usize> {
    /// Pixels a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// `[height, width, C]`.
    pub data: Vec<u8>,
}

/// A rectangle of whole pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rect {
    /// Columns left of it.
    pub left: usize,
    /// Rows above it.
    pub top: usize,
    /// Its columns.
    pub width: usize,
    /// Its rows.
    pub height: usize,
}

impl Rect {
    /// All of a picture of this size.
    pub fn of(width: usize, height: usize) -> Self {
        Rect {
            left: 0,
            top: 0,
            width,
            height,
        }
    }
}

impl<const C: usize> Pixels<C> {
    /// All of it.
    pub fn rect(&self) -> Rect {
        Rect::of(self.width, self.height)
    }
}
