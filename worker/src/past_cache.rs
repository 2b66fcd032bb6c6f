//! Writes that go past the caches: what is written once and read a step later need not be read
//! before it is written.
//!
//! An ordinary store first fetches the line that it changes. For a state of gigabytes that is the
//! third memory transfer beside reading the old values and writing the new ones.

/// Copies `from` to `to` past the caches where the processor can; the same bytes everywhere.
///
/// # Panics
/// If the lengths differ.
pub fn write(to: &mut [f32], from: &[f32]) {
    assert_eq!(to.len(), from.len(), "as many values as places");
    write_here(to, from);
}

#[cfg(target_arch = "x86_64")]
fn write_here(to: &mut [f32], from: &[f32]) {
    use std::arch::x86_64::{__m128, _mm_loadu_ps, _mm_sfence, _mm_stream_ps};
    const WIDE: usize = 4;
    // SAFETY: four f32 and one __m128 are the same sixteen bytes, and every bit pattern is valid in
    // both. SSE is part of x86-64. Each load and store stays within its slice; the fence makes the
    // weakly ordered stores visible before whoever synchronises with this thread reads them.
    unsafe {
        let (head, body, tail) = to.align_to_mut::<__m128>();
        let (from_head, from) = from.split_at(head.len());
        let (from_body, from_tail) = from.split_at(body.len() * WIDE);
        head.copy_from_slice(from_head);
        tail.copy_from_slice(from_tail);
        for (to, from) in body.iter_mut().zip(from_body.chunks_exact(WIDE)) {
            let values = _mm_loadu_ps(from.as_ptr());
            _mm_stream_ps(std::ptr::from_mut(to).cast(), values);
        }
        _mm_sfence();
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn write_here(to: &mut [f32], from: &[f32]) {
    to.copy_from_slice(from);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_at_every_alignment_is_a_copy() {
        let from: Vec<f32> = (0..64u32)
            .map(|i| f32::from_bits(0x7fc0_0000 + i))
            .collect();
        for start in 0..5 {
            for len in 0..40 {
                let mut to = vec![0.0f32; 64];
                write(&mut to[start..start + len], &from[3..3 + len]);
                let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&to[start..start + len]), bits(&from[3..3 + len]));
                assert!(
                    to[..start]
                        .iter()
                        .chain(&to[start + len..])
                        .all(|x| *x == 0.0)
                );
            }
        }
    }
}
