//! The environment as a value, so that credentials are found by pure functions and tests read
//! nobody's own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Variables and the home folder of a process.
#[derive(Clone, Default)]
pub struct Environment {
    variables: BTreeMap<String, String>,
    home: Option<PathBuf>,
}

impl Environment {
    /// This process's own.
    pub fn of_process() -> Self {
        // A name or value that is no text can be no setting of a store.
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        Environment {
            variables: std::env::vars_os().filter_map(text).collect(),
            home: std::env::home_dir(),
        }
    }

    /// These variables and no others; `home` is where `.aws/` is looked for.
    pub fn of(variables: &[(&str, &str)], home: Option<&Path>) -> Self {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        Environment {
            variables: variables.iter().map(owned).collect(),
            home: home.map(Path::to_owned),
        }
    }

    /// A variable; an empty one is none.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        let value = self.variables.get(name).map(String::as_str);
        value.filter(|value| !value.is_empty())
    }

    /// Whether a variable says yes.
    pub(super) fn says(&self, name: &str) -> bool {
        self.get(name)
            .is_some_and(|value| value.eq_ignore_ascii_case("true") || value == "1")
    }

    /// Variables whose names begin with `prefix`, by their names in lower case.
    pub(super) fn with_prefix(&self, prefix: &str) -> impl Iterator<Item = (String, &str)> {
        let named = self.variables.iter();
        named
            .filter(move |(name, value)| name.starts_with(prefix) && !value.is_empty())
            .map(|(name, value)| (name.to_ascii_lowercase(), value.as_str()))
    }

    pub(super) fn home(&self) -> Option<&Path> {
        self.home.as_deref()
    }
}
