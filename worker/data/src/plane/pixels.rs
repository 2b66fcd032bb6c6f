//! Encoded images into their places in host batches: an image that stands there twice is decoded
//! once.

use std::cell::RefCell;
use std::collections::BTreeMap;

use belfry_configs::rng::{Key, Purpose};
use belfry_configs::{Transform, TruncatedJpeg};
use bytes::Bytes;
use rayon::prelude::*;

use super::reading::ImagePlace;
use crate::image::transform;

/// What is done to images.
#[derive(Clone, Copy)]
pub struct How {
    pub kind: Transform,
    pub side: usize,
    pub truncated: TruncatedJpeg,
}

/// An image that is wanted somewhere.
pub struct Wish {
    pub place: ImagePlace,
    pub bytes: Bytes,
    /// What its transform draws from.
    pub key: Key,
}

thread_local! {
    /// An image's pixels on their way into a batch.
    static PIXELS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Fills `slots`, `[3, side, side]` each, with the images of `wishes`.
///
/// # Errors
/// The place of an image that cannot be used, and why.
pub fn fill(
    how: How,
    wishes: &[Wish],
    mut slots: Vec<&mut [f32]>,
) -> Result<(), (ImagePlace, String)> {
    let mut known = BTreeMap::new();
    let same = |(number, wish): (usize, &Wish)| *known.entry(how.drawn(wish)).or_insert(number);
    let first: Vec<usize> = wishes.iter().enumerate().map(same).collect();
    let work = slots.par_iter_mut().zip(wishes).enumerate();
    let work = work.filter(|(number, _)| first[*number] == *number);
    work.try_for_each(|(_, (slot, wish))| {
        PIXELS.with_borrow_mut(|pixels| {
            pixels.clear();
            how.append(wish, pixels)
                .map_err(|reason| (wish.place, reason))?;
            slot.copy_from_slice(pixels);
            Ok(())
        })
    })?;
    for (number, first) in first.iter().enumerate().filter(|(n, first)| n != *first) {
        let (before, rest) = slots.split_at_mut(number);
        rest[0].copy_from_slice(before[*first]);
    }
    Ok(())
}

impl How {
    /// What decides an image's pixels.
    fn drawn(&self, wish: &Wish) -> (ImagePlace, Key) {
        let fixed = Key::new(0, Purpose::Augment);
        let key = if self.kind.is_random() {
            wish.key
        } else {
            fixed
        };
        (wish.place, key)
    }

    fn append(&self, wish: &Wish, out: &mut Vec<f32>) -> Result<(), String> {
        transform(
            &wish.bytes,
            self.kind,
            self.side,
            self.truncated,
            wish.key,
            out,
        )
    }
}
