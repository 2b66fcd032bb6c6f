//! Texts to token ids: RoBERTa's byte-level BPE or BERT's WordPiece, padded and truncated
//! (model_spec 9). It refuses to know what the ids are for.

use belfry_configs::{TextKind, ValidConfig};
use tokenizers::Tokenizer;

use crate::error::DataError;

/// How WordPiece marks a token that goes on with a word.
const CONTINUATION: &str = "##";

/// The ids of a tokenizer that stand for no text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Special {
    /// Begins a text: `<s>`, `[CLS]`.
    pub begin: i32,
    /// Ends a text: `</s>`, `[SEP]`.
    pub end: i32,
    /// Fills a text up: `<pad>`, `[PAD]`.
    pub pad: i32,
    /// Hides a token: `<mask>`, `[MASK]`.
    pub mask: i32,
}

impl Special {
    /// RoBERTa's (model_spec 1).
    pub const ROBERTA: Special = Special {
        begin: 0,
        end: 2,
        pad: 1,
        mask: 50264,
    };

    /// Whether masking leaves `id` alone. A masked token is none of these: texts that hold `<mask>`
    /// themselves are masked like others, as transformers does.
    pub fn holds(self, id: i32) -> bool {
        [self.begin, self.end, self.pad].contains(&id)
    }
}

/// begin, end, pad and mask, as each kind of text tower writes them.
fn names(kind: TextKind) -> [&'static str; 4] {
    match kind {
        TextKind::Roberta => ["<s>", "</s>", "<pad>", "<mask>"],
        TextKind::Bert => ["[CLS]", "[SEP]", "[PAD]", "[MASK]"],
    }
}

/// A tokenizer and its text length.
pub struct Text {
    tokenizer: Tokenizer,
    text_len: usize,
    file: String,
    kind: TextKind,
    special: Special,
    vocab: u32,
}

impl Text {
    /// The tokenizer of `config`, which must be that of its text tower.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`], [`DataError::Setting`].
    pub fn of(config: &ValidConfig) -> Result<Self, DataError> {
        let (data, tower) = (&config.data, &config.model.text);
        let text = Text::open(&data.tokenizer, data.text_len as usize, tower.vocab)?;
        if text.kind != tower.kind {
            let reason = format!(
                "is the tokenizer of {:?}, and model.text.kind is {:?}; change one of them",
                text.kind, tower.kind
            );
            return Err(text.wrong(reason));
        }
        Ok(text)
    }

    /// Loads `tokenizer.json`; its ids must fit the `vocab` rows of the text tower. Which kind it is,
    /// and its special ids, are read from the file.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`], [`DataError::Setting`].
    pub fn open(file: &str, text_len: usize, vocab: u32) -> Result<Self, DataError> {
        let wrong = |reason: String| DataError::Tokenizer {
            file: file.to_owned(),
            reason,
        };
        if text_len < 2 {
            return Err(DataError::Setting {
                key: "data.text_len",
                reason: format!("{text_len} tokens have no room for a beginning and an end"),
            });
        }
        let mut tokenizer = Tokenizer::from_file(file).map_err(|e| wrong(e.to_string()))?;
        // What a file says of lengths would hide what the run's configuration says.
        tokenizer
            .with_truncation(None)
            .map_err(|e| wrong(e.to_string()))?
            .with_padding(None);
        let known = [TextKind::Roberta, TextKind::Bert].into_iter();
        let found = known.filter_map(|kind| Some((kind, special(&tokenizer, kind)?)));
        let (kind, special) = found.last().ok_or_else(|| {
            let all = [TextKind::Roberta, TextKind::Bert].map(|kind| names(kind).join(" "));
            wrong(format!("has neither {} nor {}", all[0], all[1]))
        })?;
        let highest = tokenizer.get_vocab(true).values().copied().max();
        let needed = highest.map_or(0, |id| id + 1);
        if needed > vocab {
            return Err(DataError::Setting {
                key: "model.text.vocab",
                reason: format!("{vocab} rows cannot hold the tokenizer's {needed} ids"),
            });
        }
        Ok(Text {
            tokenizer,
            text_len,
            file: file.to_owned(),
            kind,
            special,
            vocab: needed,
        })
    }

    fn wrong(&self, reason: String) -> DataError {
        DataError::Tokenizer {
            file: self.file.clone(),
            reason,
        }
    }

    /// Whose tokenizer this is.
    pub fn kind(&self) -> TextKind {
        self.kind
    }

    /// The ids that stand for no text.
    pub fn special(&self) -> Special {
        self.special
    }

    /// Ids of the tokenizer: the bound of a random id.
    pub fn vocab(&self) -> u32 {
        self.vocab
    }

    /// For each id, whether its token goes on with the word before it; none where the tokenizer does
    /// not mark that, as RoBERTa's.
    pub fn continuations(&self) -> Option<Vec<bool>> {
        if self.kind != TextKind::Bert {
            return None;
        }
        let mut goes_on = vec![false; self.vocab as usize];
        for (token, id) in self.tokenizer.get_vocab(true) {
            goes_on[id as usize] = token.starts_with(CONTINUATION);
        }
        Some(goes_on)
    }

    /// As [`Text::ids`], and refuses a text that would be cut.
    ///
    /// # Errors
    /// [`DataError::TooLong`], [`DataError::Tokenizer`].
    pub fn whole(&self, text: &str) -> Result<Vec<i32>, DataError> {
        let encoded = self.tokenizer.encode_fast(text, false);
        let encoded = encoded.map_err(|e| self.wrong(format!("`{text}`: {e}")))?;
        let tokens = encoded.get_ids().len() + 2;
        if tokens > self.text_len {
            return Err(DataError::TooLong {
                text: text.to_owned(),
                tokens,
                text_len: self.text_len,
            });
        }
        self.ids(text)
    }

    /// `<s> … </s>` or `[CLS] … [SEP]`, truncated and padded to the text length, as `transformers`
    /// does with `padding="max_length", truncation=True`.
    ///
    /// # Shapes
    /// `[text_len]`.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`].
    pub fn ids(&self, text: &str) -> Result<Vec<i32>, DataError> {
        // Without offsets, which nobody reads: that is what `fast` leaves out.
        let encoded = self.tokenizer.encode_fast(text, false);
        let encoded = encoded.map_err(|e| self.wrong(format!("`{text}`: {e}")))?;
        let words = encoded.get_ids().iter().take(self.text_len - 2);
        let mut ids = Vec::with_capacity(self.text_len);
        ids.push(self.special.begin);
        ids.extend(words.map(|id| *id as i32));
        ids.push(self.special.end);
        ids.resize(self.text_len, self.special.pad);
        Ok(ids)
    }
}

fn special(tokenizer: &Tokenizer, kind: TextKind) -> Option<Special> {
    let [begin, end, pad, mask] = names(kind).map(|name| tokenizer.token_to_id(name));
    Some(Special {
        begin: begin? as i32,
        end: end? as i32,
        pad: pad? as i32,
        mask: mask? as i32,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundled(name: &str) -> String {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../data/tokenizer");
        format!("{folder}/{name}.tokenizer.json")
    }

    #[test]
    fn the_bundled_tokenizers_give_the_authors_ids() {
        let file = bundled("roberta-base");
        let text = Text::open(&file, 6, 50265).expect("the bundled tokenizer loads");
        assert_eq!((text.kind(), text.vocab()), (TextKind::Roberta, 50265));
        assert_eq!(text.special(), Special::ROBERTA);
        let ids = text.ids("Hello world").expect("encodes");
        assert_eq!(ids, [0, 31414, 232, 2, 1, 1]);
        assert!(text.continuations().is_none(), "BPE marks beginnings");

        let file = bundled("bert-base-uncased");
        let text = Text::open(&file, 6, 30522).expect("the bundled tokenizer loads");
        assert_eq!((text.kind(), text.vocab()), (TextKind::Bert, 30522));
        let (begin, end, pad, mask) = (101, 102, 0, 103);
        #[rustfmt::skip]
        assert_eq!(text.special(), Special { begin, end, pad, mask });
        let ids = text.ids("Héllo WORLD").expect("encodes");
        assert_eq!(ids, [101, 7592, 2088, 102, 0, 0], "accents and case go");
        let goes_on = text.continuations().expect("WordPiece marks them");
        assert_eq!((goes_on.len(), goes_on[7592]), (30522, false));
        assert!(goes_on.iter().filter(|on| **on).count() > 5000);
    }

    #[test]
    fn long_texts_are_cut_before_their_end_and_misfits_are_refused() {
        let file = bundled("roberta-base");
        let text = Text::open(&file, 6, 50265).expect("the bundled tokenizer loads");
        let long = text.ids("Hello world, this is a long caption");
        let long = long.expect("encodes");
        assert_eq!((long.len(), long[0], long[5]), (6, 0, 2));
        let short = text.whole("Hello world");
        assert_eq!(short.expect("fits"), [0, 31414, 232, 2, 1, 1]);
        let cut = text.whole("Hello world, this is long");
        let cut = cut.expect_err("would be cut").to_string();
        assert!(
            cut.contains("8 tokens") && cut.contains("data.text_len"),
            "{cut}"
        );
        let told = |refused: Result<Text, DataError>| refused.err().expect("refused").to_string();
        assert!(told(Text::open(&file, 6, 1000)).contains("model.text.vocab: 1000 rows"));
        assert!(told(Text::open(&file, 1, 50265)).contains("data.text_len"));
        let missing = bundled("no-such");
        assert!(told(Text::open(&missing, 6, 50265)).contains(&missing));
    }
}
