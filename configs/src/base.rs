//! Files laid over files: `base = "FILE"` at the head of a run file, and overlays by `--set @FILE`.
//!
//! Tables merge, any other value replaces what lies below. What a layer says wrongly is told with the
//! layer's name. It knows the meaning of no key but `base`; the merged table is parsed elsewhere.

use std::path::{Path, PathBuf};

use toml::{Table, Value};

use crate::layers::ConfigError;
use crate::length::supersede;
use crate::run_config::RunConfig;

/// The key that names the file below. A resolved configuration has none.
const BASE: &str = "base";
/// Files in one chain: whoever reads a run file should find where a value comes from.
const FILES_MAX: usize = 8;

/// What one file or setting says.
pub(crate) struct Layer {
    /// The file, or the setting, for people.
    pub origin: String,
    /// What it sets.
    pub table: Table,
    /// The file's text, to tell the line of a mistake.
    pub text: String,
}

impl Layer {
    /// # Errors
    /// [`ConfigError::Parse`] where `text` is not TOML.
    pub fn parse(text: String, origin: String) -> Result<Self, ConfigError> {
        match toml::from_str(&text) {
            Ok(table) => Ok(Layer {
                origin,
                table,
                text,
            }),
            Err(e) => Err(ConfigError::Parse {
                origin,
                message: e.to_string().trim_end().to_owned(),
            }),
        }
    }
}

/// The file at `path` and the files below it, the lowest first.
///
/// # Errors
/// [`ConfigError::Read`] and [`ConfigError::Parse`] naming the file, [`ConfigError::Base`] where the
/// chain has no end or names a file that is not there.
pub(crate) fn chain(path: &Path) -> Result<Vec<Layer>, ConfigError> {
    let read = |path: &Path| std::fs::read_to_string(path);
    let text = read(path).map_err(|source| ConfigError::Read {
        path: path.into(),
        source,
    })?;
    let mut layers = vec![Layer::parse(text, path.display().to_string())?];
    let mut place: PathBuf = path.into();
    let mut seen = vec![canonical(path)];
    while let Some(below) = layers.last_mut().and_then(|layer| layer.table.remove(BASE)) {
        let refused = |reason: String| ConfigError::Base {
            path: place.clone(),
            reason,
        };
        let Value::String(name) = below else {
            return Err(refused("must be the path of a file, in quotes".into()));
        };
        let next = place.parent().unwrap_or(Path::new("")).join(&name);
        if layers.len() == FILES_MAX {
            return Err(refused(format!(
                "`{name}` would be file {} of the chain; at most {FILES_MAX} lie over each other",
                FILES_MAX + 1
            )));
        }
        if seen.contains(&canonical(&next)) {
            return Err(refused(format!("`{name}` lies above this file already")));
        }
        let text = read(&next).map_err(|e| {
            let path = next.display();
            refused(format!(
                "cannot read {path}: {e}; it is relative to this file"
            ))
        })?;
        seen.push(canonical(&next));
        layers.push(Layer::parse(text, next.display().to_string())?);
        place = next;
    }
    layers.reverse();
    Ok(layers)
}

/// One name for each file, by whatever path.
fn canonical(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.into())
}

/// Lays `over` over `under`.
pub(crate) fn lay(under: &mut Table, over: Table) {
    for (key, value) in over {
        match (under.get_mut(&key), value) {
            (Some(Value::Table(below)), Value::Table(above)) => lay(below, above),
            (_, value) => drop(under.insert(key, value)),
        }
    }
}

/// All `layers`, the first lowest.
pub(crate) fn merged(layers: &[Layer]) -> Table {
    let mut table = Table::new();
    for layer in layers {
        if let Some(Value::Table(run)) = layer.table.get("run") {
            run.keys().for_each(|key| supersede(&mut table, key));
        }
        lay(&mut table, layer.table.clone());
    }
    table
}

/// The error of parsing what `layers` merge to, with the name of the layer that is at fault: the
/// highest that has the key. Where none has it, as where a key is missing, it is `file`'s.
pub(crate) fn blame(layers: &[Layer], error: &toml::de::Error, file: &str) -> ConfigError {
    let told = error.to_string();
    let told = told.trim_end();
    let keys = keys(told, error.message());
    let at_fault = layers.iter().rev().find(|layer| has(&layer.table, &keys));
    let Some(layer) = at_fault.filter(|_| !keys.is_empty()) else {
        return ConfigError::Parse {
            origin: file.into(),
            message: told.replace('\n', " "),
        };
    };
    // A file alone often fails alike, and then its line is known.
    let alone = toml::from_str::<RunConfig>(&layer.text).err();
    let alone = alone.filter(|e| e.message() == error.message() && !layer.text.is_empty());
    ConfigError::Parse {
        origin: layer.origin.clone(),
        message: alone.map_or_else(
            || told.replace('\n', " "),
            |e| e.to_string().trim_end().to_owned(),
        ),
    }
}

/// The path to what is wrong: "in `a.b`" and, of an unknown key, its name. None to a key that is
/// missing: every layer lacks it.
fn keys(told: &str, message: &str) -> Vec<String> {
    if message.starts_with("missing field") {
        return Vec::new();
    }
    let place = told.lines().last().and_then(|line| {
        let inside = line.strip_prefix("in `")?;
        inside.strip_suffix('`')
    });
    let mut keys: Vec<String> = place
        .into_iter()
        .flat_map(|place| place.split('.'))
        .map(str::to_owned)
        .collect();
    let unknown = message.strip_prefix("unknown field `");
    keys.extend(
        unknown
            .and_then(|rest| rest.split('`').next())
            .map(str::to_owned),
    );
    keys
}

fn has(table: &Table, keys: &[String]) -> bool {
    let Some((first, rest)) = keys.split_first() else {
        return true;
    };
    match table.get(first) {
        Some(Value::Table(inner)) => has(inner, rest),
        // Inside a list only the list itself can be named.
        found => found.is_some(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(text: &str) -> Table {
        toml::from_str(text).expect("is TOML")
    }

    #[test]
    fn tables_merge_and_values_replace() {
        let mut under = table("a = 1\nlist = [1, 2]\n[t]\nx = 1\ny = 2\n[t.deep]\nz = 1");
        lay(
            &mut under,
            table("list = [3]\nnew = true\n[t]\ny = 3\n[t.deep]\nw = 2\n[other]\nq = 1"),
        );
        let expected = "a = 1\nlist = [3]\nnew = true\n[t]\nx = 1\ny = 3\n[t.deep]\nz = 1\nw = 2\n\
                        [other]\nq = 1";
        assert_eq!(under, table(expected));
        // A table over a value, and a value over a table.
        lay(&mut under, table("t = 5\n[a]\nb = 1"));
        assert_eq!(under["t"], Value::Integer(5));
        assert_eq!(under["a"], Value::Table(table("b = 1")));
    }

    #[test]
    fn the_key_that_is_wrong_is_found_in_its_layer() {
        let layer =
            |origin: &str, text: &str| Layer::parse(text.into(), origin.into()).expect("is TOML");
        let layers = [
            layer(
                "low",
                "[batch]\nlanes = 8\n[data]\ntrain = [{ path = \"a\" }]",
            ),
            layer("high", "[batch]\nmicro_batch = \"x\"\nlaness = 3"),
        ];
        let at_fault = |told: &str, message: &str| {
            let keys = keys(told, message);
            let found = layers.iter().rev().find(|l| has(&l.table, &keys));
            found.map(|l| l.origin.as_str())
        };
        let unknown = "unknown field `laness`, expected one of `lanes`";
        assert_eq!(
            at_fault(&format!("{unknown}\nin `batch`"), unknown),
            Some("high")
        );
        assert_eq!(
            at_fault("invalid type\nin `batch.lanes`", "invalid type"),
            Some("low")
        );
        assert_eq!(at_fault("odd\nin `data.train`", "odd"), Some("low"));
        assert_eq!(at_fault("odd\nin `model.heads`", "odd"), None);
    }
}
