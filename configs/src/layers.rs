//! From a run file with its bases, the environment and `--set` to one [`ValidConfig`]. Last wins.

use std::path::{Path, PathBuf};

use toml::{Table, Value};

use crate::base::{self, Layer};
use crate::run_config::RunConfig;
use crate::validate::ValidConfig;

/// Environment variable with `key=value` or `@FILE` settings separated by `;`.
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
    /// A file's `base` cannot lie below it.
    #[error("{path}: base: {reason}")]
    Base {
        /// The file that has the key.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A setting is neither `key=value` nor `@FILE`.
    #[error(
        "`--set {setting}` is not key=value; for instance --set batch.lanes=8, or --set @FILE to lay \
         a file over"
    )]
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

/// Reads the run file at `path` with its bases, lays environment and `settings` over it, and
/// validates. A setting is `key=value`, or `@FILE`: a file laid over, relative to the working folder.
///
/// # Errors
/// [`ConfigError`], naming the file or the key.
pub fn load(path: &Path, settings: &[String]) -> Result<ValidConfig, ConfigError> {
    let environment = std::env::var(SET_VARIABLE).unwrap_or_default();
    let all: Vec<String> = environment
        .split(';')
        .filter(|s| !s.is_empty())
        .map(str::to_owned)
        .chain(settings.iter().cloned())
        .collect();
    assemble(base::chain(path)?, &path.display().to_string(), &all)
}

/// Like [`load`], from text, which has no base; `origin` names it in errors.
///
/// # Errors
/// [`ConfigError`], naming `origin` or the key.
pub fn load_str(text: &str, origin: &str, settings: &[String]) -> Result<ValidConfig, ConfigError> {
    let layer = Layer::parse(text.into(), origin.into())?;
    assemble(vec![layer], origin, settings)
}

fn assemble(
    mut layers: Vec<Layer>,
    file: &str,
    settings: &[String],
) -> Result<ValidConfig, ConfigError> {
    if let [alone] = layers.as_slice() {
        // First on its own, so that a mistake in the file is told with its line.
        let config = toml::from_str::<RunConfig>(&alone.text);
        let config = config.map_err(|e| ConfigError::Parse {
            origin: file.into(),
            message: e.to_string().trim_end().to_owned(),
        })?;
        if settings.is_empty() {
            return config.validate();
        }
    }
    for setting in settings {
        match setting.trim().strip_prefix('@') {
            Some(file) => layers.extend(base::chain(Path::new(file))?),
            None => layers.push(Layer {
                origin: format!("--set {setting}"),
                table: of_setting(setting)?,
                text: String::new(),
            }),
        }
    }
    let config: Result<RunConfig, _> = Value::Table(base::merged(&layers)).try_into();
    config
        .map_err(|e| base::blame(&layers, &e, file))?
        .validate()
}

/// `a.b=value` as a table.
fn of_setting(setting: &str) -> Result<Table, ConfigError> {
    let bad = || ConfigError::Setting {
        setting: setting.into(),
    };
    let (key, text) = setting.split_once('=').ok_or_else(bad)?;
    let mut found = value(text.trim());
    let mut parts = key.trim().rsplit('.').peekable();
    while let Some(part) = parts.next() {
        if part.is_empty() {
            return Err(bad());
        }
        let mut table = Table::new();
        table.insert(part.to_owned(), found);
        if parts.peek().is_none() {
            return Ok(table);
        }
        found = Value::Table(table);
    }
    Err(bad())
}

/// The value as TOML writes it; anything else is a bare string.
fn value(text: &str) -> Value {
    toml::from_str::<Table>(&format!("v = {text}"))
        .ok()
        .and_then(|mut t| t.remove("v"))
        .unwrap_or_else(|| Value::String(text.to_owned()))
}
