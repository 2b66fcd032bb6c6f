//! One key of a run file, changed in place: comments and order stay.
//!
//! A line is exchanged, and the file is parsed before and after to prove that nothing but the key
//! changed; what is written in another way (an inline table, a dotted key) is refused. An editor of
//! TOML would take any form, at the price of other features of the parser that the tensor library
//! shares, and so of building that library again everywhere.

use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use toml::{Table, Value};

use crate::files;

const SECTION: &str = "batch";
const KEY: &str = "device_batch";

/// Puts `batch.device_batch = value` into the run file; returns what stood there.
pub fn set_device_batch(file: &Path, value: u32) -> anyhow::Result<Option<i64>> {
    let named = || format!("cannot put {SECTION}.{KEY} into {}", file.display());
    let text = std::fs::read_to_string(file).with_context(named)?;
    let (edited, before) = edited(&text, value).with_context(named)?;
    if edited != text {
        files::replace(file, &edited)?;
    }
    Ok(before)
}

/// The text with the key set, and its value before.
fn edited(text: &str, value: u32) -> anyhow::Result<(String, Option<i64>)> {
    let mut wanted: Table = toml::from_str(text)?;
    let Some(Value::Table(section)) = wanted.get_mut(SECTION) else {
        bail!("it has no [{SECTION}]");
    };
    let before = section.insert(KEY.into(), Value::Integer(value.into()));
    let before = before.and_then(|old| old.as_integer());
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let is_section = |line: &String| {
        let head = line.trim_start().strip_prefix('[');
        let head = head.and_then(|rest| rest.split_once(']'));
        head.is_some_and(|(name, _)| name.trim() == SECTION)
    };
    let Some(start) = lines.iter().position(is_section) else {
        bail!("write [{SECTION}] as a section of its own");
    };
    let inside = &lines[start + 1..];
    let ends = inside
        .iter()
        .position(|line| line.trim_start().starts_with('['));
    let inside = start + 1..start + 1 + ends.unwrap_or(inside.len());
    match inside.clone().find(|i| is_key(&lines[*i])) {
        Some(at) => lines[at] = with_value(&lines[at], value),
        None => {
            // Behind the section's last key, before blank lines and the next section's comments.
            let last = inside.rev().find(|i| lines[*i].contains('='));
            lines.insert(last.unwrap_or(start) + 1, format!("{KEY} = {value}"));
        }
    }
    let edited = lines.join("\n") + "\n";
    let found: Table = toml::from_str(&edited)?;
    ensure!(
        found == wanted,
        "its form is not understood; write `{KEY} = {value}` under [{SECTION}] yourself"
    );
    Ok((edited, before))
}

fn is_key(line: &str) -> bool {
    let key = line.split_once('=').map(|(key, _)| key.trim());
    key == Some(KEY)
}

/// The line with another value; its comment keeps its column where there is room.
fn with_value(line: &str, value: u32) -> String {
    let (code, comment) = match line.find('#') {
        Some(at) => line.split_at(at),
        None => (line, ""),
    };
    let indent = &line[..line.len() - line.trim_start().len()];
    let made = format!("{indent}{KEY} = {value}");
    if comment.is_empty() {
        return made;
    }
    let width = code.chars().count().max(made.chars().count() + 1);
    format!("{made:<width$}{comment}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "# a run\n\n[run] # its name\nname = \"x\"\n\n[batch]\n\
                        lanes = 8         # ours\n\
                        device_batch = 4  # speed\n\n# next\n[data]\ntext_len = 50\n";

    #[test]
    fn only_the_value_changes() {
        let (text, before) = edited(FILE, 16).expect("is understood");
        assert_eq!(
            text,
            FILE.replace("device_batch = 4  #", "device_batch = 16 #")
        );
        assert_eq!(before, Some(4));
        let (text, _) = edited(FILE, 100_000).expect("is understood");
        assert!(text.contains("\ndevice_batch = 100000 # speed\n"), "{text}");
    }

    #[test]
    fn a_key_that_is_missing_stands_behind_its_siblings() {
        let without = FILE.replace("device_batch = 4  # speed\n", "");
        let (text, before) = edited(&without, 2).expect("is understood");
        assert!(
            text.contains("# ours\ndevice_batch = 2\n\n# next\n"),
            "{text}"
        );
        assert_eq!(before, None);
    }

    #[test]
    fn what_is_written_in_another_way_is_refused() {
        for text in [
            "batch = { lanes = 8, device_batch = 4 }\n",
            "batch.lanes = 8\nbatch.device_batch = 4\n",
            "[run]\nname = \"x\"\n",
            "[batch]\nlanes = 8\ndevice_batch \n",
        ] {
            assert!(edited(text, 2).is_err(), "{text}");
        }
    }
}
