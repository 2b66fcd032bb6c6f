//! A plan file as it is written: stages, what they come after, and what they need. Says nothing of
//! whether they fit together.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::layers::ConfigError;

/// A plan file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanFile {
    /// Names the plan.
    pub plan: Head,
    /// Its stages, in any order.
    pub stage: Vec<StageEntry>,
}

/// `[plan]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    /// Letters, digits, `-` and `_`; names the folder under `runs/` when no root is given.
    pub name: String,
}

/// What a stage does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Trains a run.
    #[default]
    Train,
    /// Evaluates what another stage trained.
    Eval,
}

/// `[[stage]]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageEntry {
    /// Its own in the plan: letters, digits, `-` and `_`. Names its folder under the plan's root.
    pub name: String,
    /// `train` or `eval`.
    #[serde(default)]
    pub kind: Kind,
    /// `train`: the run file, relative to the plan file.
    #[serde(default)]
    pub config: Option<PathBuf>,
    /// `train`: the stage whose newest verified checkpoint it begins with (`init.run`).
    #[serde(default)]
    pub init_from: Option<String>,
    /// `train`: once per seed (`run.seed`). With more than one the stage becomes `NAME-seedN` for
    /// each, and so does what evaluates it.
    #[serde(default)]
    pub seeds: Vec<u64>,
    /// `eval`: the stage that is evaluated.
    #[serde(default)]
    pub of: Option<String>,
    /// `eval`: the packed dataset; without it the run's `data.validation`.
    #[serde(default)]
    pub data: Option<String>,
    /// `eval`: of that stage's checkpoints the best by this figure; without it the newest.
    #[serde(default)]
    pub best: Option<String>,
    /// Stages that must have ended well before. Those of `init_from` and `of` are always among them.
    #[serde(default)]
    pub after: Vec<String>,
    /// Workers without which it does not begin and does not go on. Default: the run's
    /// `cluster.min_workers`. An evaluation takes one.
    #[serde(default)]
    pub min_workers: Option<u32>,
    /// Workers that it gets where there are enough. Default: one per lane.
    #[serde(default)]
    pub preferred_workers: Option<u32>,
    /// Stages with a higher number get workers first.
    #[serde(default)]
    pub priority: i32,
    /// How often it is tried again after a failure. A process that dies is no failure.
    #[serde(default = "default_retries")]
    pub retries: u32,
    /// Settings over its run file, `key=value` each.
    #[serde(default)]
    pub set: Vec<String>,
    /// Its rows in the table of results.
    #[serde(default)]
    pub results: Vec<Target>,
}

/// One row of the table of results: what is reported, and what it stands beside.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// The figure of the evaluation, for instance `vqa_score`.
    pub metric: String,
    /// What the table calls it, for instance `VQAv2 test-dev`.
    pub name: String,
    /// The paper's number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paper: Option<f64>,
    /// The figure times this is what the paper prints (100: percent).
    #[serde(default = "default_scale")]
    pub scale: f64,
}

fn default_retries() -> u32 {
    2
}
fn default_scale() -> f64 {
    1.0
}

/// Whether this text is a plan's, not a run's.
pub fn is_plan(text: &str) -> bool {
    match text.parse::<toml::Table>() {
        Ok(table) => table.contains_key("stage") || table.contains_key("plan"),
        // A mistake is told with its line by whoever reads it as what it wants to be.
        Err(_) => text.lines().any(|line| line.trim() == "[[stage]]"),
    }
}

/// Reads a plan file, without the run files that it names.
///
/// # Errors
/// [`ConfigError`], naming the file and the key.
pub fn read(path: &Path) -> Result<PlanFile, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.into(),
        source,
    })?;
    toml::from_str(&text).map_err(|e| ConfigError::Parse {
        origin: path.display().to_string(),
        message: e.to_string().trim_end().to_owned(),
    })
}
