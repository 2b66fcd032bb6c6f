//! `[init]`: the weights a run begins with.

use serde::{Deserialize, Serialize};

use crate::layers::ConfigError;

/// Files that may be laid over each other: encoders, a pre-trained model, parts of one.
const FILES_MAX: usize = 16;

/// `[init]`. Without it every weight is drawn from `run.seed`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Init {
    /// Safetensors or PyTorch files, each a path or an `s3://` URL; later ones are laid over earlier
    /// ones. For instance RoBERTa's and CLIP's, or a pre-trained ManagerTower's.
    pub from: Vec<String>,
    /// Prefixes of parameter names that start from the seed whether or not a file holds them. Without
    /// it a missing weight of an encoder is an error.
    pub fresh: Vec<String>,
}

impl Init {
    /// # Errors
    /// [`ConfigError::Invalid`] naming the key.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        let refuse = |key: &str, reason: String| {
            Err(ConfigError::Invalid {
                key: key.into(),
                reason,
            })
        };
        if self.from.len() > FILES_MAX {
            return refuse("init.from", format!("has more than {FILES_MAX} files"));
        }
        for (i, file) in self.from.iter().enumerate() {
            let scheme = file.split_once("://").map(|(scheme, _)| scheme);
            if file.is_empty() || !matches!(scheme, None | Some("s3" | "file")) {
                return refuse(
                    "init.from",
                    format!(
                        "`{file}` is neither a path nor an s3:// URL; nothing is downloaded: fetch \
                         the file first"
                    ),
                );
            }
            if self.from[..i].contains(file) {
                return refuse("init.from", format!("`{file}` is listed twice"));
            }
        }
        if self.fresh.iter().any(String::is_empty) {
            return refuse(
                "init.fresh",
                "an empty prefix would name every weight".into(),
            );
        }
        if self.from.is_empty() && !self.fresh.is_empty() {
            return refuse(
                "init.fresh",
                "needs init.from; without files every weight is fresh".into(),
            );
        }
        Ok(())
    }
}
