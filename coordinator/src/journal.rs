//! Leadership and journal: numbered entries created if absent (DESIGN 6).

pub use belfry_proto::journal::{Closed, Entry, Quarantined};
use belfry_proto::journal::{FOLDER, file, is_entry};
use bytes::Bytes;
use shard_tools::store::{Created, Root, StoreError};

use crate::candidate::Candidate;
use crate::error::CoordinatorError;

/// Entries that stay: a quarter of an hour of renewals, for people, and one page of a listing.
const KEPT: usize = 1000;
/// Entries that one pruning removes: a run of an earlier version may hold very many.
const PRUNED_MAX: usize = 5000;

/// The newest entry of a run's journal; `None` for a run that nobody led.
///
/// # Errors
/// [`CoordinatorError`], naming the file.
pub async fn newest(root: &Root) -> Result<Option<Entry>, CoordinatorError> {
    match files(root).await?.last() {
        Some(newest) => Ok(Some(read(root, newest).await?)),
        None => Ok(None),
    }
}

/// The entries' files, ascending.
async fn files(root: &Root) -> Result<Vec<String>, CoordinatorError> {
    let listed = root.list(FOLDER).await;
    let listed = listed.map_err(|e| CoordinatorError::store("cannot list the journal", e))?;
    let files = listed.into_iter().map(|(file, _)| file);
    Ok(files.filter(|file| is_entry(file)).collect())
}

/// The entry behind the one of this number, if it is written: one small request.
///
/// # Errors
/// [`CoordinatorError`], naming the file.
pub async fn after(root: &Root, seq: u64) -> Result<Option<Entry>, CoordinatorError> {
    match read(root, &file(seq + 1)).await {
        Ok(entry) => Ok(Some(entry)),
        Err(CoordinatorError::Store {
            source: StoreError::NotFound { .. },
            ..
        }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The journal of one leader.
pub struct Journal {
    root: Root,
    last: Entry,
}

impl Journal {
    /// Takes the leadership with the entry behind `before`; may be repeated.
    ///
    /// # Errors
    /// [`CoordinatorError`] when the root fails or another coordinator is faster.
    pub async fn succeed(
        root: &Root,
        before: Option<Entry>,
        candidate: &Candidate,
        nonce: u64,
    ) -> Result<Self, CoordinatorError> {
        let before = before.unwrap_or_default();
        let last = Entry {
            seq: before.seq + 1,
            term: before.term + 1,
            nonce,
            address: candidate.address.clone(),
            name: candidate.name.clone(),
            closed: None,
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
    let text = Bytes::from(entry.to_bytes());
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
    let files = files(root).await?;
    let old = files.len().saturating_sub(KEPT).min(PRUNED_MAX);
    for file in &files[..old] {
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

    async fn lead(root: &Root, address: &str, nonce: u64) -> Journal {
        let candidate = Candidate {
            address: address.into(),
            ..Default::default()
        };
        let before = newest(root).await.expect("reads");
        let led = Journal::succeed(root, before, &candidate, nonce).await;
        led.expect("leads")
    }

    #[tokio::test]
    async fn of_two_coordinators_one_leads() {
        let root = Root::open("memory://").expect("opens");
        let mut old = lead(&root, "a:1", 1).await;
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
        let new = lead(&root, "b:2", 2).await;
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
        let old = lead(&root, "a:1", 1).await;
        let mut new = lead(&root, "b:2", 2).await;
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
