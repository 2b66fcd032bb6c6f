//! Leadership and journal: numbered entries created if absent (DESIGN 6).

use belfry_proto::v1;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use shard_tools::store::{Created, Root};

use crate::error::CoordinatorError;

/// The journal's folder, relative to the run's root.
const FOLDER: &str = "journal";
/// Entries that stay: a quarter of an hour of renewals, for people, and one page of a listing.
const KEPT: usize = 1000;
/// Entries that one pruning removes: a run of an earlier version may hold very many.
const PRUNED_MAX: usize = 5000;

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
    let listed = root.list(FOLDER).await;
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
    format!("{FOLDER}/{seq:012}.json")
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
            seq: before.seq + 1,
            term: before.term + 1,
            nonce,
            address,
            ..before
        };
        put(root, &last).await?;
        let root = root.clone();
        Ok(Journal { root, last })
    }

    /// The newest entry.
    pub fn last(&self) -> &Entry {
        &self.last
    }

    /// The run's root.
    pub fn root(&self) -> &Root {
        &self.root
    }

    /// The entry that comes next, saying what the newest one says.
    pub fn next(&self) -> Entry {
        Entry {
            seq: self.last.seq + 1,
            ..self.last.clone()
        }
    }

    /// `entry` is durable: it is the newest.
    pub fn settled(&mut self, entry: Entry) {
        self.last = entry;
    }
}

/// Writes an entry. May be repeated with the same entry: a try whose answer was lost, or which was
/// given up and lands late, is settled by what stands there.
///
/// # Errors
/// [`CoordinatorError::Superseded`] when another coordinator wrote it first, or wrote so many since
/// that its place is empty again.
pub async fn put(root: &Root, entry: &Entry) -> Result<(), CoordinatorError> {
    let name = file(entry.seq);
    let text = Bytes::from(serde_json::to_vec(entry).expect("plain data"));
    match root.create(&name, text).await {
        Ok(Created::Yes) => {}
        // A lost answer or a lost race: what stands there tells.
        Ok(Created::Exists) => own(entry, read(root, &name).await?)?,
        Err(error) => match read(root, &name).await {
            Ok(there) => own(entry, there)?,
            Err(CoordinatorError::Store { .. }) => {
                return Err(CoordinatorError::store(
                    format!("cannot write {name}"),
                    error,
                ));
            }
            Err(other) => return Err(other),
        },
    }
    // Entries are removed in their order. Where the one before is gone, others have written so many
    // that this one's place was empty again.
    if entry.seq > 1 {
        let before = file(entry.seq - 1);
        let there = root.exists(&before).await;
        let failed = |e| CoordinatorError::store(format!("cannot look for {before}"), e);
        if !there.map_err(failed)?
            && let Some(newest) = newest(root).await?
        {
            own(entry, newest)?;
        }
    }
    Ok(())
}

fn own(entry: &Entry, there: Entry) -> Result<(), CoordinatorError> {
    if there.nonce == entry.nonce {
        return Ok(());
    }
    let Entry { term, address, .. } = there;
    Err(CoordinatorError::Superseded { term, address })
}

/// Whether the leader of this nonce still leads: nothing is made durable otherwise.
///
/// # Errors
/// [`CoordinatorError::Superseded`] when it does not.
pub async fn check_leads(root: &Root, leader: &Entry) -> Result<(), CoordinatorError> {
    match newest(root).await? {
        Some(newest) => own(leader, newest),
        None => Ok(()),
    }
}

/// Removes old entries, in their order: an entry that stands vouches for all behind it.
///
/// # Errors
/// [`CoordinatorError::Store`]; what was not removed goes the next time.
pub async fn prune(root: &Root) -> Result<(), CoordinatorError> {
    let listed = root.list(FOLDER).await;
    let listed = listed.map_err(|e| CoordinatorError::store("cannot list the journal", e))?;
    let old = listed.len().saturating_sub(KEPT).min(PRUNED_MAX);
    for (file, _) in &listed[..old] {
        let removed = root.delete(file).await;
        removed.map_err(|e| CoordinatorError::store(format!("cannot remove {file}"), e))?;
    }
    Ok(())
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
            ..journal.next()
        };
        let first = entry(&old, 1, 0);
        put(&root, &first).await.expect("alone");
        put(&root, &first).await.expect("again harms nothing");
        old.settled(first);
        let new = Journal::lead(&root, "b:2".into(), 2)
            .await
            .expect("succeeds");
        assert_eq!((new.last().term, new.last().generation), (2, 1));
        assert_eq!(
            new.last().quarantine,
            [lost()],
            "a choice outlives its leader"
        );
        let late = entry(&old, 2, 5);
        let refused = put(&root, &late).await.expect_err("is superseded");
        assert!(refused.to_string().contains("term 2 at b:2"), "{refused}");
        let refused = check_leads(&root, old.last()).await.expect_err("as well");
        assert!(refused.to_string().contains("term 2 at b:2"), "{refused}");
        check_leads(&root, new.last()).await.expect("leads");
        put(&root, &entry(&new, 2, 5)).await.expect("leads");
    }

    /// A leader that slept while another wrote more entries than are kept finds its place empty.
    #[tokio::test]
    async fn who_slept_through_a_pruning_is_superseded_too() {
        let root = Root::open("memory://").expect("opens");
        let old = Journal::lead(&root, "a:1".into(), 1).await.expect("leads");
        let mut new = Journal::lead(&root, "b:2".into(), 2)
            .await
            .expect("succeeds");
        for _ in 0..KEPT + 10 {
            let next = new.next();
            put(&root, &next).await.expect("leads");
            new.settled(next);
        }
        prune(&root).await.expect("prunes");
        let listed = root.list(FOLDER).await.expect("lists");
        assert_eq!(listed.len(), KEPT);
        assert_eq!(listed[KEPT - 1].0, file(new.last().seq), "the newest stay");
        let refused = put(&root, &old.next()).await.expect_err("is superseded");
        assert!(refused.to_string().contains("term 2 at b:2"), "{refused}");
        put(&root, &new.next()).await.expect("leads");
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
