//! Permutations of shuffle windows, the last used ones kept. It refuses to know what is shuffled.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use belfry_configs::rng::Key;

/// Bytes of permutations kept: a hundred windows of 9,000 pairs. One that was dropped is drawn
/// again, which takes less time than decoding one image.
const BYTES_MAX: usize = 4 << 20;
/// Permutations kept, so that looking for the oldest stays short.
const WINDOWS_MAX: usize = 256;

/// See the module.
#[derive(Default)]
pub struct Windows(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    clock: u64,
    bytes: usize,
    orders: BTreeMap<Key, (u64, Arc<Vec<u32>>)>,
}

impl Windows {
    /// The permutation of `0..len` by `key`.
    pub fn order(&self, key: Key, len: usize) -> Arc<Vec<u32>> {
        let mut kept = self.0.lock().expect("no holder panics");
        kept.clock += 1;
        let now = kept.clock;
        if let Some((used, order)) = kept.orders.get_mut(&key) {
            *used = now;
            return Arc::clone(order);
        }
        let order = Arc::new(key.permutation(len));
        kept.bytes += size_of_val(&order[..]);
        kept.orders.insert(key, (now, Arc::clone(&order)));
        while kept.orders.len() > 1 && (kept.bytes > BYTES_MAX || kept.orders.len() > WINDOWS_MAX) {
            let oldest = kept.orders.iter().min_by_key(|(_, (used, _))| *used);
            let oldest = oldest.map(|(key, _)| *key).expect("there are two");
            if let Some((_, dropped)) = kept.orders.remove(&oldest) {
                kept.bytes -= size_of_val(&dropped[..]);
            }
        }
        order
    }

    /// Bytes kept.
    pub fn bytes(&self) -> usize {
        self.0.lock().expect("no holder panics").bytes
    }
}
