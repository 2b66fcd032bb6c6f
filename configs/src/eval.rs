//! `[eval]` of a run file: how a state is judged (model_spec 14). What stands here decides bits, so it
//! is the same for whoever evaluates.

use serde::{Deserialize, Serialize};

use crate::layers::ConfigError;
use crate::validate::at_least_one;

/// `[eval]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Eval {
    /// Pairs, images or texts in one forward pass. Pre-training's losses are means of
    /// `batch.micro_batch` instead, since its labels are drawn inside a micro-batch.
    pub pairs_per_batch: u32,
    /// Retrieval: so many of the nearest texts of an image, and images of a text, are scored by a
    /// fusion pass (the authors' `k_test`: 128).
    pub top_k: u32,
    /// Retrieval: bytes of experts that stay in memory between the towers' one run and the fusion
    /// passes; what is beyond lies in a file in the cache folder. At BASE sizes 1,000 images and
    /// 5,000 texts have 15 GB.
    pub experts_bytes_max: u64,
}

impl Default for Eval {
    fn default() -> Self {
        Eval {
            pairs_per_batch: 16,
            top_k: 128,
            experts_bytes_max: 4 << 30,
        }
    }
}

impl Eval {
    /// # Errors
    /// [`ConfigError::Invalid`] naming the key.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        at_least_one("eval.pairs_per_batch", self.pairs_per_batch.into())?;
        at_least_one("eval.top_k", self.top_k.into())
    }
}
