//! Leadership and journal: numbered entries created if absent (DESIGN 6).

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
    /// Committed updates when it was written.
    pub committed: u64,
    /// Members of the generation.
    pub members: Vec<u64>,
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
        let listed = root.list("journal").await;
        let listed = listed.map_err(|e| CoordinatorError::store("cannot list the journal", e))?;
        let before = match listed.last() {
            Some((newest, _)) => Some(read(root, newest).await?),
            None => None,
        };
        let last = Entry {
            seq: before.as_ref().map_or(0, |e| e.seq),
            term: before.as_ref().map_or(1, |e| e.term + 1),
            nonce,
            address,
            generation: before.as_ref().map_or(0, |e| e.generation),
            committed: before.as_ref().map_or(0, |e| e.committed),
            members: before.map(|e| e.members).unwrap_or_default(),
        };
        let mut journal = Journal {
            root: root.clone(),
            last,
        };
        let Entry {
            generation,
            committed,
            members,
            ..
        } = journal.last.clone();
        journal.append(generation, committed, members).await?;
        Ok(journal)
    }

    /// The newest entry.
    pub fn last(&self) -> &Entry {
        &self.last
    }

    /// Writes the next entry.
    ///
    /// # Errors
    /// [`CoordinatorError::Superseded`] when another coordinator wrote it first.
    pub async fn append(
        &mut self,
        generation: u64,
        committed: u64,
        members: Vec<u64>,
    ) -> Result<(), CoordinatorError> {
        let seq = self.last.seq + 1;
        let next = Entry {
            seq,
            generation,
            committed,
            members,
            ..self.last.clone()
        };
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
        old.append(1, 0, vec![1, 2]).await.expect("alone");
        let mut new = Journal::lead(&root, "b:2".into(), 2)
            .await
            .expect("succeeds");
        assert_eq!((new.last().term, new.last().generation), (2, 1));
        let refused = old.append(2, 5, vec![1]).await.expect_err("is superseded");
        assert!(refused.to_string().contains("term 2 at b:2"), "{refused}");
        new.append(2, 5, vec![1]).await.expect("leads");
    }
}
