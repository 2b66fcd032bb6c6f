//! The order in which samples go into shards: by hash of seed and key, whatever the input's order.

use rayon::prelude::*;

use super::catalog::{Catalog, Description};
use crate::manifest::sha256;

/// Descriptions shuffled, those of one key side by side.
pub struct Order {
    /// Hash and index of every description.
    slots: Vec<(u64, u32)>,
    /// Samples: descriptions of one key are one.
    samples: u64,
}

impl Order {
    /// Orders `catalog` by `seed`. Neighbours of the input do not stay neighbours in a shard, and
    /// removing one sample leaves the order of the others.
    pub fn of(catalog: &Catalog, seed: u64) -> Self {
        let count = u32::try_from(catalog.len()).expect("fewer than four billion records");
        let hashed = |index: u32| {
            let key = catalog.get(index as usize).key;
            let hash = sha256(format!("{seed}/{key}").as_bytes());
            let first = u64::from_str_radix(&hash[..16], 16).expect("hexadecimal");
            (first, index)
        };
        let mut slots: Vec<(u64, u32)> = (0..count).into_par_iter().map(hashed).collect();
        // Keys with one hash, nearly always the same key, keep the input's order.
        slots.par_sort_unstable_by(|a, b| {
            a.0.cmp(&b.0).then_with(|| {
                let key = |index: u32| catalog.get(index as usize).key;
                key(a.1).cmp(&key(b.1)).then(a.1.cmp(&b.1))
            })
        });
        let mut order = Order { slots, samples: 0 };
        let mut position = 0;
        while position < order.len() {
            position = order.end(catalog, position);
            order.samples += 1;
        }
        order
    }

    /// Number of positions: one per description.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Number of samples.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// Where the sample that begins at `position` ends.
    fn end(&self, catalog: &Catalog, position: usize) -> usize {
        let (hash, first) = self.slots[position];
        let mut end = position + 1;
        let mut key = None;
        while end < self.len() && self.slots[end].0 == hash {
            let of = |index: u32| catalog.get(index as usize).key;
            let key = key.get_or_insert_with(|| of(first));
            if of(self.slots[end].1) != *key {
                break;
            }
            end += 1;
        }
        end
    }

    /// The descriptions of the sample that begins at `position`, and where the next one begins.
    pub fn sample(&self, catalog: &Catalog, position: usize) -> (Vec<Description>, usize) {
        let end = self.end(catalog, position);
        let indexes = self.slots[position..end].iter();
        let parts = indexes.map(|(_, index)| catalog.get(*index as usize));
        (parts.collect(), end)
    }
}
