//! What could not be packed, and how much of it is too much. Knows no format.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// File name of the list of what could not be packed: JSON lines, beside the manifest.
pub const BAD_FILE: &str = "bad.jsonl";

/// In which way a sample or a record of the input is no good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum BadKind {
    /// The image is not where the record says.
    MissingImage,
    /// The image is there and is no whole JPEG, PNG or WebP within the limits.
    BrokenImage,
    /// No caption, question or statement, or one that cannot be read.
    BrokenText,
    /// The record itself cannot be read.
    BrokenRecord,
    /// The download that should have brought the image failed, by its own record.
    FailedDownload,
    /// Two different images under one key.
    DoubleKey,
}

impl fmt::Display for BadKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            BadKind::MissingImage => "missing image",
            BadKind::BrokenImage => "broken image",
            BadKind::BrokenText => "broken text",
            BadKind::BrokenRecord => "broken record",
            BadKind::FailedDownload => "failed download",
            BadKind::DoubleKey => "two images under one key",
        })
    }
}

/// A sample or record that was not packed: a line of [`BAD_FILE`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bad {
    /// What is wrong with it.
    pub kind: BadKind,
    /// The file, with line or place, or the tar with its member.
    pub place: String,
    /// In words.
    pub reason: String,
}

impl fmt::Display for Bad {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.reason)
    }
}

/// How much may be bad before packing fails.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MaxBad {
    /// So many samples and records.
    Count(u64),
    /// This share of them, 0 to 1.
    Share(f64),
}

impl MaxBad {
    /// The number allowed where there are `all` samples and records.
    pub fn of(self, all: u64) -> u64 {
        match self {
            MaxBad::Count(count) => count,
            MaxBad::Share(share) => (all as f64 * share).floor() as u64,
        }
    }
}

impl FromStr for MaxBad {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is neither a number (100) nor a share (0.5%)");
        match text.strip_suffix('%') {
            None => text.parse().map(MaxBad::Count).map_err(|_| wrong()),
            Some(percent) => {
                let percent: f64 = percent.trim().parse().map_err(|_| wrong())?;
                let share = percent / 100.0;
                (0.0..=1.0)
                    .contains(&share)
                    .then_some(MaxBad::Share(share))
                    .ok_or_else(wrong)
            }
        }
    }
}

/// Counts by kind.
pub fn by_kind(bad: &[Bad]) -> BTreeMap<BadKind, u64> {
    let mut counts = BTreeMap::new();
    for one in bad {
        *counts.entry(one.kind).or_insert(0) += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_a_number_or_a_share() {
        assert_eq!("100".parse(), Ok(MaxBad::Count(100)));
        assert_eq!("0.5%".parse(), Ok(MaxBad::Share(0.005)));
        assert_eq!(MaxBad::Share(0.005).of(1999), 9);
        for wrong in ["", "-1", "101%", "some", "0.5", "nan%"] {
            assert!(wrong.parse::<MaxBad>().is_err(), "{wrong}");
        }
    }
}
