//! Leadership and journal: numbered entries created if absent (DESIGN 6).

use belfry_proto::v1;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use shard_tools::store::{Created, Root};

use crate::error::CoordinatorError;

/// One entry. Who creates an entry leads from there on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Number of the entry; its file's name.
    pub seq: u64,
    /// Leadership.
    pub term: u64,
    /// Tells an own entry whose answer was lost from another's.
    pub nonce: u64,
    /// Where the leader listens.
    pub address: String,
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

/// The newest entry of a run's journal; `None` for a run that nobody led.
///
/// # Errors
/// [`CoordinatorError`], naming the file.
pub async fn newest(root: &Root) -> Result<Option<Entry>, CoordinatorError> {
    let listed = root.list("journal").await;
    let listed = listed.map_err(|e| CoordinatorError::store("cannot list the journal", e))?;
    match listed.last() {
        Some((newest, _)) => Ok(Some(read(root, newest).await?)),
        None => Ok(None),
    }
}

/// The journal of one leader.
pub struct Journal {
    root: Root,
    last: Entry,
}

fn file(seq: u64) -> String {
    format!("journal/{seq:012}.json")
}

impl Journal {
    /// Reads the newest entry and takes the leadership with the next one.
    ///
    /// # Errors
    /// [`CoordinatorError`] when the root fails or another coordinator is faster.
    pub async fn lead(root: &Root, address: String, nonce: u64) -> Result<Self, CoordinatorError> {
        let first = Entry {
            seq: 0,
            term: 0,
            nonce,
            address: String::new(),
            generation: 0,
            committed: 0,
            horizon: 0,
            members: Vec::new(),
            quarantine: Vec::new(),
        };
        let before = newest(root).await?.unwrap_or(first);
        let last = Entry {
            term: before.term + 1,
            nonce,
            address,
            ..before
        };
        let mut journal = Journal {
            root: root.clone(),
            last: last.clone(),
        };
        journal.append(last).await?;
        Ok(journal)
    }

    /// The newest entry.
    pub fn last(&self) -> &Entry {
        &self.last
    }

    /// Writes the next entry; its number is given here.
    ///
    /// # Errors
    /// [`CoordinatorError::Superseded`] when another coordinator wrote it first.
    pub async fn append(&mut self, mut next: Entry) -> Result<(), CoordinatorError> {
        let seq = self.last.seq + 1;
        next.seq = seq;
        let text = serde_json::to_vec(&next).expect("plain data");
        let created = self.root.create(&file(seq), Bytes::from(text)).await;
        let settled = match created {
            Ok(Created::Yes) => None,
            // A lost answer or a lost race: what stands there tells.
            Ok(Created::Exists) | Err(_) => Some(read(&self.root, &file(seq)).await?),
        };
        if let Some(there) = settled.filter(|e| e.nonce != self.last.nonce) {
            let Entry { term, address, .. } = there;
            return Err(CoordinatorError::Superseded { term, address });
        }
        self.last = next;
        Ok(())
    }
}

async fn read(root: &Root, file: &str) -> Result<Entry, CoordinatorError> {
    let what = format!("cannot read or write the journal entry {file}");
    let bytes = root.get(file).await;
    let bytes = bytes.map_err(|e| CoordinatorError::store(what, e))?;
    serde_json::from_slice(&bytes).map_err(|e| CoordinatorError::Corrupt {
        file: file.to_owned(),
        reason: format!("not a journal entry: {e}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn of_two_coordinators_one_leads() {
        let root = Root::open("memory://").expect("opens");
        let mut old = Journal::lead(&root, "a:1".into(), 1).await.expect("leads");
        let entry = |journal: &Journal, generation, committed| Entry {
            generation,
            committed,
            members: vec![1, 2],
            quarantine: vec![lost()],
            ..journal.last().clone()
        };
        old.append(entry(&old, 1, 0)).await.expect("alone");
        let mut new = Journal::lead(&root, "b:2".into(), 2)
            .await
            .expect("succeeds");
        assert_eq!((new.last().term, new.last().generation), (2, 1));
        assert_eq!(
            new.last().quarantine,
            [lost()],
            "a choice outlives its leader"
        );
        let late = entry(&old, 2, 5);
        let refused = old.append(late).await.expect_err("is superseded");
        assert!(refused.to_string().contains("term 2 at b:2"), "{refused}");
        new.append(entry(&new, 2, 5)).await.expect("leads");
    }

    fn lost() -> Quarantined {
        Quarantined {
            dataset: 0,
            shard: 3,
            file: "000003.tar".into(),
            from_step: 7,
        }
    }
}
