//! MLM masking (model_spec 9) and ITM labels (model_spec 8), from keys alone.

use belfry_configs::rng::Key;

use crate::text::{BOS, EOS, MASK, PAD};

/// Positions that carry no label.
const IGNORED: i32 = -100;

/// Masks `ids` in place and returns the labels. Of the chosen tokens 80 % become `<mask>`, 10 % a
/// uniform id, 10 % stay.
pub fn mask(key: Key, probability: f32, vocab: u32, ids: &mut [i32]) -> Vec<i32> {
    let mut labels = vec![IGNORED; ids.len()];
    for (position, (id, label)) in ids.iter_mut().zip(&mut labels).enumerate() {
        let draw = 3 * position as u64;
        if [BOS, PAD, EOS].contains(id) || key.uniform(draw) >= probability {
            continue;
        }
        *label = *id;
        let action = key.uniform(draw + 1);
        if action < 0.8 {
            *id = MASK;
        } else if action < 0.9 {
            *id = key.below(draw + 2, u64::from(vocab)) as i32;
        }
    }
    labels
}

/// floor(b / 2) ones and zeros for the rest, permuted.
pub fn itm_labels(key: Key, pairs: usize) -> Vec<i32> {
    let order = key.permutation(pairs);
    order
        .into_iter()
        .map(|place| i32::from((place as usize) < pairs / 2))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use belfry_configs::rng::Purpose;

    #[test]
    fn shares_are_those_of_the_specification() {
        let key = Key::new(3, Purpose::Mask);
        let (mut chosen, mut masked, mut kept, mut total) = (0u32, 0u32, 0u32, 0u32);
        for pair in 0..4000 {
            let mut ids = vec![BOS, 100, 101, 102, 103, 104, 105, 106, EOS, PAD];
            let before = ids.clone();
            let labels = mask(key.with(pair), 0.15, 50265, &mut ids);
            for i in 0..ids.len() {
                total += u32::from((1..8).contains(&i));
                if labels[i] == IGNORED {
                    assert_eq!(ids[i], before[i]);
                    continue;
                }
                assert!((1..8).contains(&i), "special tokens are never masked");
                assert_eq!(labels[i], before[i]);
                chosen += 1;
                masked += u32::from(ids[i] == MASK);
                kept += u32::from(ids[i] == before[i]);
            }
        }
        let share = |part: u32, of: u32| f64::from(part) / f64::from(of);
        assert!((share(chosen, total) - 0.15).abs() < 0.01);
        assert!((share(masked, chosen) - 0.8).abs() < 0.02);
        assert!((share(kept, chosen) - 0.1).abs() < 0.02);
    }

    #[test]
    fn half_of_the_labels_match() {
        for pairs in 1..9 {
            let labels = itm_labels(Key::new(1, Purpose::ItmLabels).with(pairs), pairs as usize);
            assert_eq!(labels.iter().sum::<i32>(), pairs as i32 / 2);
        }
    }
}
