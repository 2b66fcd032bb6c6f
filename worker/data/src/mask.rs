//! MLM masking (model_spec 9) and ITM labels (model_spec 8), from keys alone. It refuses to know
//! texts: it sees ids.

use belfry_configs::rng::Key;

use crate::error::DataError;
use crate::text::{Special, Text};

/// Positions that carry no label.
const IGNORED: i32 = -100;
/// Draws of a position: whether it is chosen, what becomes of it, a random id.
const DRAWS: u64 = 3;
/// Keys the shuffle of words apart from the draws of positions.
const WORDS: u64 = u64::MAX;

/// Which tokens a masked text may lose, and how many.
pub struct Masking {
    special: Special,
    probability: f32,
    vocab: u32,
    /// Whether an id goes on with a word, where whole words are masked.
    continuations: Option<Vec<bool>>,
}

impl Masking {
    /// Masking of the ids of `text`, `probability` of them.
    ///
    /// # Errors
    /// [`DataError::Setting`] where whole words are asked for and the tokenizer does not mark them.
    pub fn new(text: &Text, probability: f32, whole_words: bool) -> Result<Self, DataError> {
        let continuations = if whole_words {
            let marked = text.continuations().ok_or_else(|| DataError::Setting {
                key: "data.whole_word_masking",
                reason: "needs BERT's tokenizer, which marks where a word goes on; RoBERTa's runs \
                         mask single tokens (model_spec 9)"
                    .into(),
            });
            Some(marked?)
        } else {
            None
        };
        Ok(Masking {
            special: text.special(),
            probability,
            vocab: text.vocab(),
            continuations,
        })
    }

    /// Masks `ids` in place and returns the labels. Of the chosen tokens 80 % become the mask, 10 % a
    /// uniform id of the vocabulary, 10 % stay; each for itself, also inside a word.
    pub fn mask(&self, key: Key, ids: &mut [i32]) -> Vec<i32> {
        let chosen = match &self.continuations {
            Some(goes_on) => self.whole_words(key, ids, goes_on),
            None => self.tokens(key, ids),
        };
        let mut labels = vec![IGNORED; ids.len()];
        for (position, id) in ids.iter_mut().enumerate() {
            if !chosen[position] || self.special.holds(*id) {
                continue;
            }
            labels[position] = *id;
            let draw = DRAWS * position as u64;
            let action = key.uniform(draw + 1);
            if action < 0.8 {
                *id = self.special.mask;
            } else if action < 0.9 {
                *id = key.below(draw + 2, u64::from(self.vocab)) as i32;
            }
        }
        labels
    }

    /// Each token by itself.
    fn tokens(&self, key: Key, ids: &[i32]) -> Vec<bool> {
        let draws = (0..ids.len() as u64).map(|position| key.uniform(DRAWS * position));
        draws.map(|drawn| drawn < self.probability).collect()
    }

    /// Whole words by the rule of the authors' collator (`DataCollatorForWholeWordMask` of
    /// transformers): words in random order are taken while they fit into a budget of
    /// round(text length x probability) tokens, at least one; one that does not fit is passed over.
    /// The length counts padding, and each pad is a word that may be drawn and is then dropped, so
    /// that a short text loses about the same share of its tokens as a long one.
    fn whole_words(&self, key: Key, ids: &[i32], goes_on: &[bool]) -> Vec<bool> {
        let mut words: Vec<std::ops::Range<usize>> = Vec::new();
        for (position, id) in ids.iter().enumerate() {
            if *id == self.special.begin || *id == self.special.end {
                continue;
            }
            match words.last_mut() {
                Some(word) if goes_on[*id as usize] => word.end = position + 1,
                _ => words.push(position..position + 1),
            }
        }
        let budget = (ids.len() as f64 * f64::from(self.probability)).round_ties_even();
        let budget = (budget as usize).max(1);
        let mut chosen = vec![false; ids.len()];
        let mut taken = 0;
        for word in key.with(WORDS).permutation(words.len()) {
            let word = words[word as usize].clone();
            if taken + word.len() <= budget {
                taken += word.len();
                chosen[word].fill(true);
            }
        }
        chosen
    }
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

    fn bundled(name: &str, vocab: u32, text_len: usize) -> Text {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../data/tokenizer");
        let file = format!("{folder}/{name}.tokenizer.json");
        Text::open(&file, text_len, vocab).expect("the bundled tokenizer loads")
    }

    #[test]
    fn shares_are_those_of_the_specification() {
        let texts = [
            bundled("roberta-base", 50265, 10),
            bundled("bert-base-uncased", 30522, 10),
        ];
        for text in texts {
            let masking = Masking::new(&text, 0.15, false).expect("tokens need no marks");
            let special = text.special();
            let key = Key::new(3, Purpose::Mask);
            let (mut chosen, mut masked, mut kept, mut total) = (0u32, 0u32, 0u32, 0u32);
            let mut highest = 0;
            for pair in 0..6000 {
                let mut ids = vec![special.begin, 200, 201, 202, 203, 204, 205, 206];
                ids.extend([special.end, special.pad]);
                let before = ids.clone();
                let labels = masking.mask(key.with(pair), &mut ids);
                for i in 0..ids.len() {
                    total += u32::from((1..8).contains(&i));
                    if labels[i] == IGNORED {
                        assert_eq!(ids[i], before[i]);
                        continue;
                    }
                    assert!((1..8).contains(&i), "special tokens are never masked");
                    assert_eq!(labels[i], before[i]);
                    chosen += 1;
                    masked += u32::from(ids[i] == special.mask);
                    kept += u32::from(ids[i] == before[i]);
                    highest = highest.max(if ids[i] == special.mask { 0 } else { ids[i] });
                }
            }
            let share = |part: u32, of: u32| f64::from(part) / f64::from(of);
            assert!((share(chosen, total) - 0.15).abs() < 0.01);
            assert!((share(masked, chosen) - 0.8).abs() < 0.02);
            assert!((share(kept, chosen) - 0.1).abs() < 0.02);
            let vocab = text.vocab() as i32;
            assert!((vocab * 9 / 10..vocab).contains(&highest), "{highest}");
        }
    }

    #[test]
    fn words_are_masked_whole_within_the_budget() {
        let text = bundled("bert-base-uncased", 30522, 20);
        let goes_on = text.continuations().expect("WordPiece marks them");
        let masking = Masking::new(&text, 0.15, true).expect("BERT's");
        let ids = text
            .ids("an unaffable embroiderer disembarked")
            .expect("encodes");
        let special = text.special();
        let words = ids.iter().filter(|id| !special.holds(**id)).count();
        let split = ids.iter().filter(|id| goes_on[**id as usize]).count();
        assert!(
            split >= 4 && words > split,
            "{ids:?}: words of several tokens"
        );
        let (mut hit, mut runs) = (0, 4000);
        for pair in 0..runs {
            let mut masked = ids.clone();
            let labels = masking.mask(Key::new(3, Purpose::Mask).with(pair), &mut masked);
            let chosen: Vec<bool> = labels.iter().map(|l| *l != IGNORED).collect();
            for position in 1..ids.len() {
                let together = goes_on[ids[position] as usize];
                assert!(!together || chosen[position] == chosen[position - 1]);
                assert!(!chosen[position] || !special.holds(ids[position]));
            }
            let count = chosen.iter().filter(|c| **c).count();
            assert!(count <= 3, "20 tokens x 15 % are 3");
            hit += count;
        }
        runs *= words as u64;
        // Long words find no room: that is the collator's rule, and its share lies below 3 / 18.
        let share = hit as f64 / runs as f64;
        assert!((0.05..0.17).contains(&share), "{share}");
    }

    #[test]
    fn whole_words_need_a_tokenizer_that_marks_them() {
        let refused = Masking::new(&bundled("roberta-base", 50265, 20), 0.15, true);
        let told = refused.err().expect("no marks").to_string();
        assert!(
            told.contains("data.whole_word_masking: needs BERT"),
            "{told}"
        );
    }

    #[test]
    fn half_of_the_labels_match() {
        for pairs in 1..9 {
            let labels = itm_labels(Key::new(1, Purpose::ItmLabels).with(pairs), pairs as usize);
            assert_eq!(labels.iter().sum::<i32>(), pairs as i32 / 2);
        }
    }
}
