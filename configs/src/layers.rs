//! From a run file, the environment and `--set` to one [`ValidConfig`]. Last wins.

use std::path::{Path, PathBuf};

use toml::{Table, Value};

use crate::length::supersede;
use crate::run_config::RunConfig;
use crate::validate::ValidConfig;

/// Environment variable with `key=value` settings separated by `;`.
const SET_VARIABLE: &str = "BELFRY_SET";

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The run file cannot be read.
    #[error("cannot read the run file {path}; check the path")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The text is not TOML, or a key is unknown or has the wrong type.
    #[error("{origin}: {message}")]
    Parse {
        /// The file, or where the settings came from.
        origin: String,
        /// What is wrong, with line, key and the keys that exist.
        message: String,
    },
    /// A setting is not `key=value`.
    #[error("`--set {setting}` is not key=value; for instance --set batch.lanes=8")]
    Setting {
        /// The setting as written.
        setting: String,
    },
    /// A value is not possible.
    #[error("{key}: {reason}")]
    Invalid {
        /// The key as the user writes it.
        key: String,
        /// What would be right.
        reason: String,
    },
}

/// Reads the run file at `path`, lays environment and `settings` over it, and validates.
///
/// # Errors
/// [`ConfigError`], naming the file or the key.
pub fn load(path: &Path, settings: &[String]) -> Result<ValidConfig, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.into(),
        source,
    })?;
    let environment = std::env::var(SET_VARIABLE).unwrap_or_default();
    let all: Vec<String> = environment
        .split(';')
        .filter(|s| !s.is_empty())
        .map(str::to_owned)
        .chain(settings.iter().cloned())
        .collect();
    load_str(&text, &path.display().to_string(), &all)
}

/// Like [`load`], from text; `origin` names it in errors.
///
/// # Errors
/// [`ConfigError`], naming `origin` or the key.
pub fn load_str(text: &str, origin: &str, settings: &[String]) -> Result<ValidConfig, ConfigError> {
    let parse = |origin: &str, message: String| ConfigError::Parse {
        origin: origin.into(),
        message,
    };
    // First on its own, so that a mistake in the file is told with its line.
    let config: RunConfig =
        toml::from_str(text).map_err(|e| parse(origin, e.to_string().trim_end().to_owned()))?;
    if settings.is_empty() {
        return config.validate();
    }
    let mut table: Table =
        toml::from_str(text).map_err(|e| parse(origin, e.to_string().trim_end().to_owned()))?;
    for setting in settings {
        apply(&mut table, setting)?;
    }
    let config: RunConfig = Value::Table(table)
        .try_into()
        .map_err(|e: toml::de::Error| {
            parse(
                &format!("--set {}", settings.join(" --set ")),
                e.message().to_owned(),
            )
        })?;
    config.validate()
}

fn apply(table: &mut Table, setting: &str) -> Result<(), ConfigError> {
    let bad = || ConfigError::Setting {
        setting: setting.into(),
    };
    let (key, text) = setting.split_once('=').ok_or_else(bad)?;
    supersede(table, key.trim());
    let mut place = table;
    let mut parts: Vec<&str> = key.trim().split('.').collect();
    let last = parts.pop().filter(|p| !p.is_empty()).ok_or_else(bad)?;
    for part in parts {
        place = place
            .entry(part)
            .or_insert_with(|| Value::Table(Table::new()))
            .as_table_mut()
            .ok_or_else(bad)?;
    }
    place.insert(last.to_owned(), value(text.trim()));
    Ok(())
}

/// The value as TOML writes it; anything else is a bare string.
fn value(text: &str) -> Value {
    toml::from_str::<Table>(&format!("v = {text}"))
        .ok()
        .and_then(|mut t| t.remove("v"))
        .unwrap_or_else(|| Value::String(text.to_owned()))
}
