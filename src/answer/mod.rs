//! Answers of a trained model to one question: `belfry ask`, `belfry match`, `belfry retrieve`.
//!
//! What a user gives, texts and image files, becomes what the model reads, by the run's own
//! tokenizer and its transform for evaluation. What does not fit is refused, never cut.

mod ask;
mod index;
mod matching;
mod retrieve;

use std::path::Path;

use anyhow::Context as _;
use belfry_configs::ValidConfig;
use belfry_configs::rng::{Key, Purpose};
use belfry_data::{Text, transform};

pub use ask::{AskArguments, ask};
pub use matching::{MatchArguments, match_captions};
pub use retrieve::{RetrieveArguments, retrieve};

/// Turns texts and images into a model's inputs.
struct Reader<'a> {
    config: &'a ValidConfig,
    text: Text,
}

/// Token ids and mask, `[texts, text_len]`.
#[derive(Default)]
struct Tokens {
    ids: Vec<i32>,
    mask: Vec<f32>,
}

impl<'a> Reader<'a> {
    fn new(config: &'a ValidConfig) -> anyhow::Result<Self> {
        let text = Text::of(config)?;
        Ok(Reader { config, text })
    }

    /// Texts whole: one that the model cannot read to its end is refused.
    fn texts<'t>(&self, texts: impl IntoIterator<Item = &'t str>) -> anyhow::Result<Tokens> {
        let mut tokens = Tokens::default();
        for text in texts {
            anyhow::ensure!(!text.trim().is_empty(), "a text is empty");
            self.add(self.text.whole(text)?, &mut tokens);
        }
        Ok(tokens)
    }

    /// Captions of a collection, cut as training cuts them.
    fn cut_texts<'t>(&self, texts: impl IntoIterator<Item = &'t str>) -> anyhow::Result<Tokens> {
        let mut tokens = Tokens::default();
        for text in texts {
            self.add(self.text.ids(text)?, &mut tokens);
        }
        Ok(tokens)
    }

    fn add(&self, ids: Vec<i32>, tokens: &mut Tokens) {
        let pad = self.text.special().pad;
        let mask = ids.iter().map(|id| f32::from(u8::from(*id != pad)));
        tokens.mask.extend(mask);
        tokens.ids.extend(ids);
    }

    /// Normalised pixels `[3, side, side]` of an image file.
    fn image(&self, file: &Path) -> anyhow::Result<Vec<f32>> {
        let bytes =
            std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        self.pixels(&bytes)
            .map_err(|reason| anyhow::anyhow!("{}: {reason}", file.display()))
    }

    fn pixels(&self, bytes: &[u8]) -> Result<Vec<f32>, String> {
        let data = &self.config.data;
        let side = self.config.model.image.size as usize;
        let mut pixels = Vec::with_capacity(3 * side * side);
        // Transforms for evaluation draw nothing.
        let key = Key::new(self.config.run.seed, Purpose::Augment);
        let (kind, truncated) = (data.eval_transform, data.truncated_jpeg);
        transform(bytes, kind, side, truncated, key, &mut pixels)?;
        Ok(pixels)
    }
}

/// The probability of class 1 of two.
fn probability([other, match_]: [f32; 2]) -> f64 {
    1.0 / (1.0 + f64::from(other - match_).exp())
}
