//! Captions to token ids: RoBERTa's byte-level BPE, padded and truncated (model_spec 9).

use tokenizers::Tokenizer;

use crate::error::DataError;

/// RoBERTa's special ids (model_spec 1).
pub const BOS: i32 = 0;
pub const PAD: i32 = 1;
pub const EOS: i32 = 2;
pub const MASK: i32 = 50264;

/// A tokenizer and its text length.
pub struct Text {
    tokenizer: Tokenizer,
    text_len: usize,
    file: String,
}

impl Text {
    /// Loads `tokenizer.json`; its ids must fit `vocab`.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`], [`DataError::Setting`].
    pub fn open(file: &str, text_len: usize, vocab: u32) -> Result<Self, DataError> {
        let tokenizer = Tokenizer::from_file(file).map_err(|e| DataError::Tokenizer {
            file: file.to_owned(),
            reason: e.to_string(),
        })?;
        let needed = tokenizer.get_vocab_size(true).max(MASK as usize + 1);
        if needed > vocab as usize {
            return Err(DataError::Setting {
                key: "model.text.vocab",
                reason: format!("{vocab} rows cannot hold the tokenizer's {needed} ids"),
            });
        }
        Ok(Text {
            tokenizer,
            text_len,
            file: file.to_owned(),
        })
    }

    /// `<s> … </s>`, truncated and padded to the text length.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`].
    pub fn ids(&self, caption: &str) -> Result<Vec<i32>, DataError> {
        let encoded = self
            .tokenizer
            .encode(caption, false)
            .map_err(|e| DataError::Tokenizer {
                file: self.file.clone(),
                reason: format!("`{caption}`: {e}"),
            })?;
        let words = encoded
            .get_ids()
            .iter()
            .take(self.text_len - 2)
            .map(|id| *id as i32);
        let mut ids: Vec<i32> = std::iter::once(BOS).chain(words).chain([EOS]).collect();
        ids.resize(self.text_len, PAD);
        Ok(ids)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bundled_tokenizer_gives_robertas_ids() {
        let file = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../data/tokenizer/roberta-base.tokenizer.json"
        );
        let text = Text::open(file, 6, 50265).expect("the bundled tokenizer loads");
        assert_eq!(
            text.ids("Hello world").expect("encodes"),
            [0, 31414, 232, 2, 1, 1]
        );
        let long = text
            .ids("Hello world, this is a long caption")
            .expect("encodes");
        assert_eq!((long.len(), long[0], long[5]), (6, BOS, EOS));
        assert!(
            Text::open(file, 6, 1000).is_err(),
            "a small vocabulary is refused"
        );
    }
}
