//! A journal entry as its file says it: who leads a run, where, and what was decided. Numbered files
//! below `journal/` of the run's root; the one with the highest number counts.
//!
//! The coordinator writes them, workers read from them where the leader is. The scheduler of a plan
//! keeps its queue in the same way below the plan's root. Knows no store.

use serde::{Deserialize, Serialize};

use crate::v1;

/// The journal's folder, relative to the run's root.
pub const FOLDER: &str = "journal";

/// One entry. Who creates an entry leads from there on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Number of the entry; its file's name.
    pub seq: u64,
    /// Leadership.
    pub term: u64,
    /// Tells an own entry whose answer was lost from another's.
    pub nonce: u64,
    /// Where the leader is reached.
    pub address: String,
    /// The leader's own name, where it has one; the same after a restart.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Highest generation announced.
    pub generation: u64,
    /// Updates below this one count as committed.
    pub committed: u64,
    /// No update at or beyond this one is committed before the next entry.
    #[serde(default)]
    pub horizon: u64,
    /// Members of the generation.
    pub members: Vec<u64>,
    /// All shards under quarantine, each from its step on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub quarantine: Vec<Quarantined>,
    /// What a plan's scheduler knows; a run's coordinator has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue: Option<serde_json::Value>,
    /// Set in a leader's last entry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub closed: Option<Closed>,
}

/// Why a leader leads no more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Closed {
    /// It was asked to stop: whoever waits may lead at once.
    Released,
    /// The run is over.
    Ended {
        /// Whether it trained to its last step.
        success: bool,
        /// In words.
        reason: String,
    },
}

/// A shard under quarantine, as files say it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quarantined {
    /// Place in `data.train`.
    pub dataset: u32,
    /// Place in the dataset's manifest.
    pub shard: u32,
    /// Name in the manifest.
    pub file: String,
    /// The first step that does without it.
    pub from_step: u64,
}

impl From<v1::Shard> for Quarantined {
    fn from(s: v1::Shard) -> Self {
        Quarantined {
            dataset: s.dataset,
            shard: s.shard,
            file: s.file,
            from_step: s.from_step,
        }
    }
}

impl From<Quarantined> for v1::Shard {
    fn from(s: Quarantined) -> Self {
        v1::Shard {
            dataset: s.dataset,
            shard: s.shard,
            file: s.file,
            from_step: s.from_step,
        }
    }
}

/// The file of an entry, relative to the run's root.
pub fn file(seq: u64) -> String {
    format!("{FOLDER}/{seq:012}.json")
}

/// Whether this file below the root is an entry: what else lies there is nobody's word.
pub fn is_entry(file: &str) -> bool {
    let name = file.strip_prefix(FOLDER).and_then(|f| f.strip_prefix('/'));
    let digits = name.and_then(|n| n.strip_suffix(".json"));
    digits.is_some_and(|d| !d.is_empty() && d.bytes().all(|b| b.is_ascii_digit()))
}

impl Entry {
    /// An entry from its file's bytes.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(bytes).map_err(|e| format!("not a journal entry: {e}"))
    }

    /// The bytes of its file.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain data")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_what_its_file_says_also_that_of_an_earlier_version() {
        let entry = Entry {
            seq: 3,
            term: 2,
            address: "10.0.0.1:7000".into(),
            closed: Some(Closed::Ended {
                success: true,
                reason: "trained to the last step".into(),
            }),
            ..Default::default()
        };
        assert_eq!(Entry::parse(&entry.to_bytes()), Ok(entry));
        let old = r#"{"seq":1,"term":1,"nonce":5,"address":"a:1","generation":0,"committed":0,
            "members":[1]}"#;
        let entry = Entry::parse(old.as_bytes()).expect("is one");
        assert_eq!((entry.members, entry.closed), (vec![1], None));
        let refused = Entry::parse(b"{}").expect_err("lacks all");
        assert!(refused.contains("seq"), "{refused}");
        assert_eq!(file(7), "journal/000000000007.json");
        assert!(is_entry(&file(7)));
        for other in [
            "journal",
            "journal/notes.json",
            "journal/.json",
            "ledger/7.json",
        ] {
            assert!(!is_entry(other), "{other}");
        }
    }
}
