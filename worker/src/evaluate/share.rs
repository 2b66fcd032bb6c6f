//! Shares of an evaluation's units: contiguous ranges that tile them all.

use std::ops::Range;
use std::str::FromStr;

/// The K-th of N shares, written `K/N`, K from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    number: u32,
    of: u32,
}

impl Share {
    /// Everything.
    pub const WHOLE: Share = Share { number: 1, of: 1 };

    /// The K-th of N.
    pub fn new(number: u32, of: u32) -> Self {
        Share { number, of }
    }

    /// Its units of so many.
    pub fn of(self, units: u64) -> Range<u64> {
        let edge = |k: u32| (u128::from(units) * u128::from(k) / u128::from(self.of)) as u64;
        edge(self.number - 1)..edge(self.number)
    }

    /// Its place from 0, and how many there are.
    pub fn place(self) -> (usize, usize) {
        (self.number as usize - 1, self.of as usize)
    }

    /// Where its findings are kept.
    pub fn file_name(self) -> String {
        format!("tally-{}-of-{}.jsonl", self.number, self.of)
    }

    /// All shares of so many.
    pub fn all(of: u32) -> impl Iterator<Item = Share> {
        (1..=of).map(move |number| Share { number, of })
    }
}

impl std::fmt::Display for Share {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.number, self.of)
    }
}

impl FromStr for Share {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once('/').and_then(|(k, n)| {
            let (number, of): (u32, u32) = (k.parse().ok()?, n.parse().ok()?);
            (1..=of).contains(&number).then_some(Share { number, of })
        });
        parsed.ok_or_else(|| format!("`{text}` is no share; write for instance 2/3"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_tile_all_units() {
        for of in 1..9 {
            for units in [0, 1, 5, 100] {
                let mut next = 0;
                for number in 1..=of {
                    let range = Share::new(number, of).of(units);
                    assert_eq!(range.start, next);
                    next = range.end;
                }
                assert_eq!(next, units);
            }
        }
    }

    #[test]
    fn what_is_no_share_is_refused() {
        assert_eq!("2/3".parse(), Ok(Share::new(2, 3)));
        for wrong in ["0/3", "4/3", "1", "a/b", "1/0"] {
            assert!(wrong.parse::<Share>().is_err(), "{wrong}");
        }
    }
}
