//! What a format found in its input: descriptions of samples, without their images.
//!
//! Four million samples fit into memory: a description is kept as a few dozen bytes of JSON in one
//! arena. Several descriptions with one key are one sample, so a format may describe record by
//! record and need not group. It knows nothing of shards.

use std::collections::BTreeMap;
use std::path::PathBuf;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::bad::{Bad, BadKind};
use crate::error::ShardError;
use crate::manifest::{Member, sha256};
use crate::pair::{Contents, Pair};
use crate::store::Root;

/// Where bytes of the input lie.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Place {
    /// A file, relative to the catalog's folder.
    #[serde(rename = "f")]
    File(String),
    /// A member of the catalog's tar of this number.
    #[serde(rename = "m")]
    Member(u32, Member),
}

/// What a sample says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Texts {
    /// Captions.
    #[serde(rename = "c")]
    Captions(Vec<String>),
    /// Texts with labels or ids.
    #[serde(rename = "p")]
    Pairs(Vec<Pair>),
    /// Written in this text file: captions, one a line, or `pairs.json`.
    #[serde(rename = "a")]
    At(Place),
    /// Only its record may say.
    #[serde(rename = "r")]
    InRecord,
}

/// A sample, or a part of one: what else has the same key and images belongs to it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Description {
    /// Its key in the shards.
    #[serde(rename = "k")]
    pub key: String,
    /// Its images in order.
    #[serde(rename = "i")]
    pub images: Vec<Place>,
    /// Its texts.
    #[serde(rename = "t")]
    pub texts: Texts,
    /// What img2dataset wrote of the download.
    #[serde(rename = "r", default, skip_serializing_if = "Option::is_none")]
    pub record: Option<Place>,
}

/// All that a format found.
pub struct Catalog {
    /// What the pairs carry.
    pub contents: Contents,
    /// Names of the datasets that are mixed; none where the dataset is its own source.
    pub sources: Vec<String>,
    /// Files that go beside the manifest.
    pub files: Vec<(String, Bytes)>,
    /// What a rule of the publisher or of the authors leaves out, with its number.
    pub left_out: BTreeMap<String, u64>,
    /// Records that cannot be read.
    pub bad: Vec<Bad>,
    /// Where files lie.
    pub folder: PathBuf,
    /// Tars that members lie in.
    pub tars: Vec<(Root, String)>,
    arena: Vec<u8>,
    ends: Vec<u64>,
}

impl Catalog {
    /// Nothing found yet in `folder`.
    pub fn new(folder: impl Into<PathBuf>, contents: Contents) -> Self {
        Catalog {
            contents,
            sources: Vec::new(),
            files: Vec::new(),
            left_out: BTreeMap::new(),
            bad: Vec::new(),
            folder: folder.into(),
            tars: Vec::new(),
            arena: Vec::new(),
            ends: Vec::new(),
        }
    }

    /// Adds a sample or a part of one; a key that no tar may hold counts as bad.
    pub fn push(&mut self, description: &Description) {
        if let Err(reason) = check_key(&description.key) {
            self.bad(BadKind::BrokenRecord, &description.key, reason);
            return;
        }
        serde_json::to_writer(&mut self.arena, description).expect("plain data into memory");
        self.ends.push(self.arena.len() as u64);
    }

    /// Adds a record that cannot be read.
    pub fn bad(&mut self, kind: BadKind, place: impl Into<String>, reason: impl Into<String>) {
        self.bad.push(Bad {
            kind,
            place: place.into(),
            reason: reason.into(),
        });
    }

    /// Counts one more that `rule` leaves out.
    pub fn leave_out(&mut self, rule: &str) {
        match self.left_out.get_mut(rule) {
            Some(count) => *count += 1,
            None => drop(self.left_out.insert(rule.to_owned(), 1)),
        }
    }

    /// Number of descriptions.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether nothing was found.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Description `index`, in the order in which they were added.
    pub fn get(&self, index: usize) -> Description {
        let begin = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        let bytes = &self.arena[begin as usize..self.ends[index] as usize];
        serde_json::from_slice(bytes).expect("written by `push`")
    }

    /// The name of `place` for people. Where the input lies is no part of it: the same input gives
    /// the same list of what is bad anywhere.
    pub fn name(&self, place: &Place) -> String {
        match place {
            Place::File(file) => file.clone(),
            Place::Member(tar, member) => {
                let file = &self.tars[*tar as usize].1;
                format!("{file}, member {}, offset {}", member.name, member.offset)
            }
        }
    }

    /// A digest of all that decides what is packed, but for the images' bytes.
    pub fn sha256(&self) -> String {
        let mut rest = format!("{:?} {:?}", self.contents, self.sources).into_bytes();
        for (name, bytes) in &self.files {
            rest.extend_from_slice(format!(" {name} {}", sha256(bytes)).as_bytes());
        }
        for (_, file) in &self.tars {
            rest.extend_from_slice(format!(" {file}").as_bytes());
        }
        let bad = serde_json::to_vec(&self.bad).expect("plain data");
        let parts = [sha256(&self.arena), sha256(&rest), sha256(&bad)];
        sha256(parts.concat().as_bytes())
    }

    /// Fails where nothing was found.
    ///
    /// # Errors
    /// [`ShardError::Sample`] that says `what` was looked for.
    pub fn some(self, what: &str) -> Result<Self, ShardError> {
        if self.is_empty() && self.bad.is_empty() {
            return Err(ShardError::Sample {
                file: self.folder.display().to_string(),
                reason: format!("no {what} here"),
            });
        }
        Ok(self)
    }
}

/// Whether a member's name may be made of `key`: webdataset ends a key at the first dot of its base
/// name, and no path may leave the archive.
fn check_key(key: &str) -> Result<(), String> {
    let (folders, base) = key.rsplit_once('/').unwrap_or(("", key));
    let inside = folders.split('/').all(|f| f != "." && f != "..") && !key.starts_with('/');
    if base.is_empty() || base.contains('.') || !inside || key.contains(['\0', '\n', '\\']) {
        return Err(format!("`{key}` cannot be a sample's key"));
    }
    Ok(())
}

/// A key made of a file's name: the name without its last extension, other dots replaced, since a
/// key ends at its first dot.
pub fn key_of(name: &str) -> String {
    let base = name.rsplit('/').next().unwrap_or(name);
    let stem = base.rsplit_once('.').map_or(base, |(stem, _)| stem);
    stem.replace('.', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptions_come_back_and_impossible_keys_are_counted() {
        let mut catalog = Catalog::new("in", Contents::Captions);
        let description = |key: &str| Description {
            key: key.into(),
            images: vec![Place::File(format!("{key}.jpg"))],
            texts: Texts::Captions(vec!["a dog".into()]),
            record: None,
        };
        catalog.push(&description("a"));
        catalog.push(&description("b/c"));
        for wrong in ["", "a.b", "../a", "/a", "a/", "b\nc"] {
            catalog.push(&description(wrong));
        }
        assert_eq!((catalog.len(), catalog.bad.len()), (2, 6));
        assert_eq!(catalog.get(1), description("b/c"));
        assert_eq!(key_of("x/4385.b_o.jpg"), "4385_b_o");
    }
}
