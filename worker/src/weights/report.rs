//! What an import did to every name: nothing is random, left out or changed without a word here.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use super::error::some;

/// One file.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FileReport {
    /// As the user wrote it.
    pub file: String,
    /// Of the whole file.
    pub sha256: String,
    /// Whose names it uses.
    pub layout: &'static str,
    /// Tensors in it.
    pub tensors: usize,
    /// Tensors of the model that it gave.
    pub applied: usize,
}

/// A tensor of the model that came from a file.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Applied {
    /// The model's name.
    pub name: String,
    /// Index of the file.
    pub file: usize,
    /// The file's keys: one, or three that were packed.
    pub keys: Vec<String>,
    /// What was changed on the way: type, grid, rows.
    pub notes: Vec<String>,
}

/// A key that gave nothing.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Unused {
    /// Index of the file.
    pub file: usize,
    /// The file's key.
    pub key: String,
    /// Why.
    pub reason: &'static str,
}

/// What an import did.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    /// In the order of `init.from`.
    pub files: Vec<FileReport>,
    /// In name order; a name that two files hold came from the later one.
    pub applied: Vec<Applied>,
    /// Names that no file gave: they hold the numbers that the seed gives them.
    pub fresh: Vec<String>,
    /// Keys that gave nothing.
    pub unused: Vec<Unused>,
    /// Keys of another shape, for weights that nothing reads or that a later file gave.
    pub misshaped: Vec<String>,
}

impl Report {
    /// Whether `name` came from a file.
    pub fn holds(&self, name: &str) -> bool {
        let place = self.applied.binary_search_by(|a| a.name.as_str().cmp(name));
        place.is_ok()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for file in &self.files {
            writeln!(
                f,
                "{}: {}, {} tensors, {} applied, sha256 {}",
                file.file, file.layout, file.tensors, file.applied, file.sha256
            )?;
        }
        let mut notes: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for applied in &self.applied {
            for note in &applied.notes {
                notes.entry(note).or_default().push(applied.name.clone());
            }
        }
        for (note, names) in &notes {
            writeln!(f, "{note} ({}): {}", names.len(), some(names))?;
        }
        let mut unused: BTreeMap<(usize, &str), Vec<String>> = BTreeMap::new();
        for entry in &self.unused {
            let keys = unused.entry((entry.file, entry.reason)).or_default();
            keys.push(entry.key.clone());
        }
        for ((file, reason), keys) in &unused {
            let file = &self.files[*file].file;
            writeln!(
                f,
                "unused, {reason} ({} in {file}): {}",
                keys.len(),
                some(keys)
            )?;
        }
        if !self.misshaped.is_empty() {
            writeln!(f, "of another shape, not taken: {}", some(&self.misshaped))?;
        }
        let total = self.applied.len() + self.fresh.len();
        writeln!(
            f,
            "applied {} of the model's {total} tensors",
            self.applied.len()
        )?;
        if !self.fresh.is_empty() {
            let names = some(&self.fresh);
            writeln!(f, "fresh from the seed ({}): {names}", self.fresh.len())?;
        }
        Ok(())
    }
}
