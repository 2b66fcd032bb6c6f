//! Digests of floats: how members agree on sums and states without sending them.
//!
//! A state is cut into slices of fixed length, whoever looks at it: hashed on all processors at
//! once, and a copy that is wrong in one slice names the peer that it came from. Knows nothing of
//! what the floats mean.

use std::borrow::Cow;
use std::num::NonZero;
use std::thread;

use xxhash_rust::xxh3::Xxh3;

/// Floats of a slice: 4 MiB, a few megabytes being what a processor hashes without waiting for
/// another, and a thousand slices being few enough to send their digests.
pub const SLICE_FLOATS: usize = 1 << 20;
/// Threads that hash; more would only wait for memory.
const THREADS_MAX: usize = 8;

/// The little-endian bytes of `values`, without a copy where the machine has them so.
pub(crate) fn bytes_of(values: &[f32]) -> Cow<'_, [u8]> {
    if cfg!(target_endian = "little") {
        return Cow::Borrowed(bytemuck::cast_slice(values));
    }
    Cow::Owned(values.iter().flat_map(|x| x.to_le_bytes()).collect())
}

pub(crate) fn hash_floats(hash: &mut Xxh3, values: &[f32]) {
    // In pieces, so that a machine which must copy them copies little.
    for piece in values.chunks(SLICE_FLOATS) {
        hash.update(&bytes_of(piece));
    }
}

/// XXH3-128 over the little-endian bytes of `values`.
pub fn digest_of(values: &[f32]) -> u128 {
    let mut hash = Xxh3::new();
    hash_floats(&mut hash, values);
    hash.digest128()
}

/// The digests of all slices of `tensors`, tensor by tensor.
pub fn slice_digests(tensors: &[&[f32]]) -> Vec<u128> {
    let slices: Vec<&[f32]> = tensors
        .iter()
        .flat_map(|t| t.chunks(SLICE_FLOATS))
        .collect();
    let processors = thread::available_parallelism().map_or(1, NonZero::get);
    let each = slices.len().div_ceil(processors.min(THREADS_MAX)).max(1);
    let mut digests = vec![0; slices.len()];
    thread::scope(|scope| {
        for (slices, digests) in slices.chunks(each).zip(digests.chunks_mut(each)) {
            scope.spawn(move || {
                for (slice, digest) in slices.iter().zip(digests) {
                    *digest = digest_of(slice);
                }
            });
        }
    });
    digests
}

/// The digest of a whole state of `step` updates from those of its slices.
pub fn state_digest(step: u64, slices: &[u128]) -> u128 {
    let mut hash = Xxh3::new();
    hash.update(&step.to_le_bytes());
    for slice in slices {
        hash.update(&slice.to_le_bytes());
    }
    hash.digest128()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_hashed_slice_by_slice_whoever_does_it() {
        let values: Vec<f32> = (0..2 * SLICE_FLOATS + 5).map(|i| i as f32).collect();
        let found = slice_digests(&[&values, &values[..3]]);
        let bytes = |v: &[f32]| v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let slices = values.chunks(SLICE_FLOATS).chain([&values[..3]]);
        let expected: Vec<u128> = slices
            .map(|s| xxhash_rust::xxh3::xxh3_128(&bytes(s)))
            .collect();
        assert_eq!(found, expected);
        assert_eq!(found.len(), 4);
        assert_ne!(state_digest(1, &found), state_digest(2, &found));
        assert_eq!(slice_digests(&[&[], &[]]), Vec::<u128>::new());
    }
}
