//! Random numbers of a forward pass: dropout masks and manager noise.
//!
//! One block per micro-batch from that micro-batch's own key, so that a number depends on
//! (micro-batch, pass, site, element) and never on how many micro-batches share a device batch, on
//! the device or on threads. Drawn here for the host; `draw_kernels.rs` draws the same bits on other
//! devices. This file refuses to know where keys come from.

use belfry_configs::rng::Key;
use rayon::prelude::*;

use crate::normal::fill_normal;

/// Elements per parallel task; even, as normals come in pairs. Values do not depend on it.
const DRAW_CHUNK: usize = 1 << 15;

/// What a forward pass may draw.
#[derive(Clone, Copy, Debug)]
pub enum Draws<'a> {
    /// Nothing: no dropout, no noise (evaluation).
    Off,
    /// Training: one key per micro-batch.
    Keys(&'a [Key]),
    /// Dropout off, manager noise given: tensors `[batch, experts, length, hidden]` in call order
    /// (layer 0 text, layer 0 image, layer 1 text, …), pass after pass.
    Noise(&'a [Vec<f32>]),
}

/// The micro-batches' keys of one site in one pass.
pub(crate) fn site_keys(keys: &[Key], pass: u64, site: &str) -> Vec<Key> {
    let of_site = |key: &Key| key.with(pass).with_name(site);
    keys.iter().map(of_site).collect()
}

/// Of those, the keys of one expert's noise.
pub(crate) fn expert_keys(site_keys: &[Key], expert: usize) -> Vec<Key> {
    let of_expert = |key: &Key| key.with(expert as u64);
    site_keys.iter().map(of_expert).collect()
}

/// Standard deviation of a manager's noise.
pub(crate) fn noise_std(experts: usize) -> f32 {
    1.0 / experts as f32
}

/// Dropout multipliers from the keys of a site: 0 with probability `rate`, else 1/(1-rate). `len` is
/// divided evenly among the micro-batches.
pub(crate) fn dropout_mask(keys: &[Key], rate: f32, len: usize) -> Vec<f32> {
    let scale = 1.0 / (1.0 - rate);
    let mut mask = vec![0.0f32; len];
    let block = len / keys.len();
    for (key, part) in keys.iter().zip(mask.chunks_mut(block)) {
        part.par_chunks_mut(DRAW_CHUNK)
            .enumerate()
            .for_each(|(chunk, values)| {
                let first = (chunk * DRAW_CHUNK) as u64;
                for (i, value) in values.iter_mut().enumerate() {
                    *value = if key.uniform(first + i as u64) < rate {
                        0.0
                    } else {
                        scale
                    };
                }
            });
    }
    mask
}

/// One expert's manager noise `[batch, length, hidden]` from the keys of that expert.
pub(crate) fn normals(keys: &[Key], std: f32, len: usize) -> Vec<f32> {
    let mut noise = vec![0.0f32; len];
    let block = len / keys.len();
    for (key, part) in keys.iter().zip(noise.chunks_mut(block)) {
        part.par_chunks_mut(DRAW_CHUNK)
            .enumerate()
            .for_each(|(chunk, values)| {
                fill_normal(*key, (chunk * DRAW_CHUNK) as u64, std, values);
            });
    }
    noise
}

/// One expert's part of a given noise tensor `[batch, experts, length, hidden]`.
pub(crate) fn expert_of(noise: &[f32], batch: usize, experts: usize, expert: usize) -> Vec<f32> {
    let block = noise.len() / batch / experts;
    let start = |row: usize| (row * experts + expert) * block;
    (0..batch)
        .flat_map(|row| noise[start(row)..start(row) + block].iter().copied())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use belfry_configs::rng::Purpose;

    fn keys(n: u64) -> Vec<Key> {
        (0..n)
            .map(|i| Key::new(1, Purpose::Dropout).with(i))
            .collect()
    }

    #[test]
    fn dropout_keeps_its_share_and_its_expectation() {
        for rate in [0.1f32, 0.5] {
            let mask = dropout_mask(&site_keys(&keys(4), 0, "site"), rate, 400_000);
            let kept = mask.iter().filter(|m| **m > 0.0).count() as f32 / mask.len() as f32;
            assert!(
                (kept - (1.0 - rate)).abs() < 3e-3,
                "kept {kept} at rate {rate}"
            );
            let mean = mask.iter().sum::<f32>() / mask.len() as f32;
            assert!((mean - 1.0).abs() < 4e-3, "mean {mean} at rate {rate}");
        }
    }

    #[test]
    fn a_micro_batch_draws_the_same_numbers_in_any_company() {
        let keys = keys(3);
        let mask = |keys: &[Key], pass, site| {
            dropout_mask(&site_keys(keys, pass, site), 0.3, keys.len() * 50_000)
        };
        let together = mask(&keys, 1, "a");
        let alone = mask(&keys[1..2], 1, "a");
        assert_eq!(together[50_000..100_000], alone[..]);
        let swapped = mask(&[keys[1], keys[0], keys[2]], 1, "a");
        assert_eq!(swapped[..50_000], alone[..]);
        assert_ne!(alone, mask(&keys[1..2], 0, "a"), "another pass");
        assert_ne!(alone, mask(&keys[1..2], 1, "b"), "another site");
        let noise = |keys: &[Key], expert| {
            let keys = expert_keys(&site_keys(keys, 0, "a"), expert);
            normals(&keys, noise_std(3), keys.len() * 70_002)
        };
        for expert in 0..3 {
            let alone = noise(&keys[2..], expert);
            assert_eq!(noise(&keys, expert)[2 * 70_002..], alone[..]);
            assert_ne!(alone, noise(&keys[2..], (expert + 1) % 3), "another expert");
        }
    }

    #[test]
    fn an_expert_is_cut_out_of_given_noise() {
        let noise: Vec<f32> = (0..12).map(|i| i as f32).collect();
        assert_eq!(expert_of(&noise, 2, 3, 1), vec![2.0, 3.0, 8.0, 9.0]);
    }
}
