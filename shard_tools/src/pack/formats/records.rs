//! Annotation files read record by record: what is broken stays one record, and no file of
//! hundreds of megabytes becomes a tree in memory.

use std::fmt;
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::Path;

use serde::Deserialize;
use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::error::ShardError;

/// What reading a record gave; the reason where it is broken.
pub type Parsed<T> = Result<T, String>;

/// The file's name in places: where it lies is no part of them.
pub fn name(file: &Path) -> String {
    let name = file.file_name().unwrap_or(file.as_os_str());
    name.to_string_lossy().into_owned()
}

fn open(file: &Path) -> Result<BufReader<File>, ShardError> {
    let opened = File::open(file).map_err(|source| ShardError::Input {
        file: file.display().to_string(),
        source,
    })?;
    Ok(BufReader::with_capacity(1 << 20, opened))
}

/// Calls `each` with the place and the parsed element of a JSON list, element by element: the list
/// under `field` of the file's object, or the file itself where that is a list.
///
/// # Errors
/// [`ShardError`] where the file cannot be read or is no JSON, with line and column.
pub fn list<T: DeserializeOwned>(
    file: &Path,
    field: &str,
    mut each: impl FnMut(String, Parsed<T>),
) -> Result<(), ShardError> {
    let mut number = 0u64;
    let mut element = |raw: &RawValue| {
        let parsed = serde_json::from_str(raw.get()).map_err(|e| without_place(&e));
        each(format!("{}: {field}[{number}]", name(file)), parsed);
        number += 1;
    };
    let mut reader = serde_json::Deserializer::from_reader(open(file)?);
    let outer = Outer {
        field,
        element: &mut element,
    };
    let found = outer.deserialize(&mut reader).and_then(|found| {
        reader.end()?;
        Ok(found)
    });
    let reason = match found {
        Ok(true) => return Ok(()),
        Ok(false) => format!("has no list `{field}`"),
        Err(error) => format!("not as expected: {error}"),
    };
    Err(ShardError::Sample {
        file: file.display().to_string(),
        reason,
    })
}

/// Calls `each` with the place and the parsed object of every line that is not blank.
///
/// # Errors
/// [`ShardError::Input`].
pub fn json_lines<T: DeserializeOwned>(
    file: &Path,
    mut each: impl FnMut(String, Parsed<T>),
) -> Result<(), ShardError> {
    lines(file, |number, line| {
        let line = match line {
            Ok(line) if line.trim().is_empty() => return,
            Ok(line) => serde_json::from_str(line).map_err(|e| without_place(&e)),
            Err(reason) => Err(reason),
        };
        each(format!("{}:{}", name(file), number + 1), line);
    })
}

/// Calls `each` with the number, from 0, and the text of every line.
///
/// # Errors
/// [`ShardError::Input`].
pub fn lines(file: &Path, mut each: impl FnMut(u64, Parsed<&str>)) -> Result<(), ShardError> {
    let mut reader = open(file)?;
    let (mut line, mut number) = (Vec::new(), 0);
    loop {
        line.clear();
        let read = reader.read_until(b'\n', &mut line);
        let read = read.map_err(|source| ShardError::Input {
            file: file.display().to_string(),
            source,
        })?;
        if read == 0 {
            return Ok(());
        }
        while line
            .last()
            .is_some_and(|last| matches!(last, b'\n' | b'\r'))
        {
            line.pop();
        }
        let text = std::str::from_utf8(&line);
        each(number, text.map_err(|e| format!("not UTF-8: {e}")));
        number += 1;
    }
}

/// The error without "at line 1 column 20", which counts inside the record.
fn without_place(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let cut = text.rfind(" at line ").unwrap_or(text.len());
    text[..cut].to_owned()
}

/// The file: an object with the list, or the list. Tells whether the list was there.
struct Outer<'a, F> {
    field: &'a str,
    element: &'a mut F,
}

impl<'de, F: FnMut(&RawValue)> DeserializeSeed<'de> for Outer<'_, F> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, F: FnMut(&RawValue)> Visitor<'de> for Outer<'_, F> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list, or an object with the list `{}`", self.field)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<bool, A::Error> {
        while let Some(raw) = list.next_element::<Box<RawValue>>()? {
            (self.element)(&raw);
        }
        Ok(true)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<bool, A::Error> {
        let mut found = false;
        while let Some(name) = object.next_key::<String>()? {
            if name == self.field {
                let element = &mut *self.element;
                let inner = Outer {
                    field: self.field,
                    element,
                };
                found = object.next_value_seed(inner)?;
            } else {
                object.next_value::<serde::de::IgnoredAny>()?;
            }
        }
        Ok(found)
    }
}

/// An id that publishers write as a number in one file and as a string in another.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(untagged)]
pub enum Id {
    /// As a number.
    Number(u64),
    /// As a string.
    Text(String),
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Id::Number(number) => number.fmt(f),
            Id::Text(text) => text.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<(String, Parsed<u32>)>, ShardError> {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("a.json");
        std::fs::write(&file, text).expect("is written");
        let mut found = Vec::new();
        list(&file, "images", |place, parsed| {
            let place = place.rsplit_once(": ").expect("a place").1.to_owned();
            found.push((place, parsed));
        })?;
        Ok(found)
    }

    #[test]
    fn a_broken_record_stays_one_and_a_broken_file_is_named() {
        let found = read(r#"{"info": {"a": [1]}, "images": [1, {"b": 2}, 3], "z": 0}"#);
        let found = found.expect("is JSON");
        assert_eq!(found[0], ("images[0]".into(), Ok(1)));
        assert!(
            found[1]
                .1
                .as_ref()
                .is_err_and(|reason| !reason.contains("line"))
        );
        assert_eq!(found[2], ("images[2]".into(), Ok(3)));
        assert_eq!(read("[7]").expect("is JSON").len(), 1);
        let told = read(r#"{"images": [1, 2"#)
            .expect_err("is cut off")
            .to_string();
        assert!(told.contains("a.json") && told.contains("line 1"), "{told}");
        let told = read(r#"{"image": []}"#)
            .expect_err("another file")
            .to_string();
        assert!(told.contains("no list `images`"), "{told}");
    }
}
