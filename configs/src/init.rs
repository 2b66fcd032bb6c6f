//! `[init]`: the weights a run begins with.

use serde::{Deserialize, Serialize};

use crate::figures;
use crate::layers::ConfigError;
use crate::run_config::RunConfig;
use crate::validate::{ValidConfig, refuse};

/// Files that may be laid over each other: encoders, a pre-trained model, parts of one.
const FILES_MAX: usize = 16;
/// Hexadecimal digits of a SHA-256.
const SHA256_DIGITS: usize = 64;

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
    /// Folder or URL of another run: its parameters, not its optimizer, are laid over those of the
    /// files. Of its checkpoints the newest that verifies when this run starts; that one stays this
    /// run's beginning, whatever the other run does. Empty: none, to take it out of a run file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run: Option<String>,
    /// The checkpoint of this step instead of the newest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step: Option<u64>,
    /// The best checkpoint by this figure of the other run's evaluations instead of the newest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub best: Option<String>,
    /// SHA-256 of the chosen checkpoint's manifest, which names the hash of every byte. Written by
    /// Belfry when the run starts, beside `step`, so that all workers begin with the same bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub manifest_sha256: Option<String>,
}

impl Init {
    /// Whether every weight is drawn from the seed.
    pub fn is_fresh(&self) -> bool {
        self.from.is_empty() && self.run.is_none()
    }

    /// The pinned checkpoint of another run: its root, step and manifest's SHA-256.
    pub fn pinned(&self) -> Option<(&str, u64, &str)> {
        let (run, sha256) = (self.run.as_deref()?, self.manifest_sha256.as_deref()?);
        Some((run, self.step?, sha256))
    }

    /// Whether `other` is this choice, made: the same run, and the same step or figure if one was
    /// named.
    fn is_answered_by(&self, other: &Init) -> bool {
        other.pinned().is_some()
            && self.run == other.run
            && self.best == other.best
            && (self.step.is_none() || self.step == other.step)
    }

    /// Checks the keys, and takes out what is named to be nothing.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] naming the key.
    pub(crate) fn check(&mut self) -> Result<(), ConfigError> {
        if self.run.as_deref() == Some("") {
            (self.run, self.step, self.best) = (None, None, None);
            self.manifest_sha256 = None;
        }
        self.check_files()?;
        self.check_run()?;
        if self.fresh.iter().any(String::is_empty) {
            let reason = "an empty prefix would name every weight";
            return Err(refuse("init.fresh", reason));
        }
        if self.is_fresh() && !self.fresh.is_empty() {
            let reason = "needs init.from or init.run; without them every weight is fresh";
            return Err(refuse("init.fresh", reason));
        }
        Ok(())
    }

    fn check_files(&self) -> Result<(), ConfigError> {
        let refuse = |reason: String| Err(refuse("init.from", reason));
        if self.from.len() > FILES_MAX {
            return refuse(format!("has more than {FILES_MAX} files"));
        }
        for (i, file) in self.from.iter().enumerate() {
            let scheme = file.split_once("://").map(|(scheme, _)| scheme);
            if file.is_empty() || !matches!(scheme, None | Some("s3" | "file")) {
                return refuse(format!(
                    "`{file}` is neither a path nor an s3:// URL; nothing is downloaded: fetch the \
                     file first"
                ));
            }
            if self.from[..i].contains(file) {
                return refuse(format!("`{file}` is listed twice"));
            }
        }
        Ok(())
    }

    fn check_run(&self) -> Result<(), ConfigError> {
        let named = [
            ("init.step", self.step.is_some()),
            ("init.best", self.best.is_some()),
            ("init.manifest_sha256", self.manifest_sha256.is_some()),
        ];
        if self.run.is_none()
            && let Some((key, _)) = named.into_iter().find(|(_, there)| *there)
        {
            return Err(refuse(
                key,
                "needs init.run, the run whose checkpoint it names",
            ));
        }
        if let Some(best) = &self.best {
            if !figures::is_known(best) {
                let reason = format!("no task's evaluation has a figure `{best}`");
                return Err(refuse("init.best", reason));
            }
            if self.step.is_some() && self.manifest_sha256.is_none() {
                return Err(refuse(
                    "init.best",
                    "stands beside init.step; give one of them",
                ));
            }
        }
        if let Some(sha256) = &self.manifest_sha256 {
            let digits = sha256.chars().all(|c| c.is_ascii_hexdigit());
            if !digits || sha256.len() != SHA256_DIGITS || self.step.is_none() {
                let reason = "must be a SHA-256 in hexadecimal, beside init.step; leave it out: it is \
                              written when the run starts";
                return Err(refuse("init.manifest_sha256", reason));
            }
        }
        Ok(())
    }
}

impl ValidConfig {
    /// Whether a checkpoint of another run has still to be chosen.
    pub fn needs_beginning(&self) -> bool {
        self.init.run.is_some() && self.init.manifest_sha256.is_none()
    }

    /// The same run, beginning with this checkpoint of `init.run`.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`]: no SHA-256.
    pub fn with_beginning(&self, step: u64, sha256: String) -> Result<ValidConfig, ConfigError> {
        let mut config = RunConfig::clone(self);
        (config.init.step, config.init.manifest_sha256) = (Some(step), Some(sha256));
        config.validate()
    }

    /// The checkpoint that `resolved` begins with, if it was chosen by the wishes of this run.
    pub fn beginning_of<'a>(&self, resolved: &'a RunConfig) -> Option<(u64, &'a str)> {
        let answered = self.init.is_answered_by(&resolved.init);
        let (_, step, sha256) = resolved.init.pinned().filter(|_| answered)?;
        Some((step, sha256))
    }
}
