//! What is known of an unfinished dataset, so that packing can go on after any crash.
//!
//! `packing/options.json` is put before the first shard; `packing/NNNNNN.json` after a shard and its
//! index are stored, in order, so that the entries are always a prefix; all are removed when the
//! manifest stands. Finished shards are not read again, their sizes are compared with a listing.

use std::collections::BTreeMap;

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use serde::{Deserialize, Serialize};

use super::bad::Bad;
use crate::error::ShardError;
use crate::manifest::{MANIFEST_FILE, ShardEntry};
use crate::store::Root;

const FOLDER: &str = "packing";
const OPTIONS: &str = "packing/options.json";
/// Entries that are read or removed at once.
const REQUESTS: usize = 32;

/// A finished shard.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Entry {
    /// Position in the packing order of its first sample.
    pub begin: u64,
    /// Position after its last sample, bad ones included.
    pub end: u64,
    /// Samples in this range, good or bad.
    pub samples: u64,
    /// Captions that were left out as repeated or blank.
    pub repeated: u64,
    /// What could not be packed in this range.
    pub bad: Vec<Bad>,
    /// For the manifest; none where no sample of the range was good.
    pub shard: Option<ShardEntry>,
}

/// What decides the bytes of a dataset, by name.
pub type Options = BTreeMap<String, String>;

/// The journal of a dataset.
pub struct Journal {
    root: Root,
}

/// What stands where the output should go.
pub enum Found {
    /// Nothing, or an unfinished dataset with these finished shards.
    Unfinished(Journal, Vec<Entry>),
    /// The dataset that was asked for: its packer was killed after the manifest.
    Finished,
}

fn file(number: usize) -> String {
    format!("{FOLDER}/{number:06}.json")
}

impl Journal {
    /// Begins or goes on: the entries of finished shards, in order.
    ///
    /// # Errors
    /// What [`vacant`] refuses; [`ShardError::OtherOptions`] where the unfinished dataset has other
    /// options or another input.
    pub async fn open(root: &Root, options: &Options, resume: bool) -> Result<Found, ShardError> {
        let journal = Journal { root: root.clone() };
        let there = vacant(root, resume).await?;
        if !there.contains_key(MANIFEST_FILE) && !begun(&there) {
            let text = serde_json::to_vec_pretty(options).expect("plain data");
            root.put(OPTIONS, Bytes::from(text)).await?;
            return Ok(Found::Unfinished(journal, Vec::new()));
        }
        let before: Options = journal.parse(OPTIONS).await?;
        if before != *options {
            return Err(ShardError::OtherOptions {
                output: root.to_string(),
                differing: differing(&before, options),
            });
        }
        if there.contains_key(MANIFEST_FILE) {
            journal.remove().await?;
            return Ok(Found::Finished);
        }
        let entries = journal.finished(&there).await?;
        Ok(Found::Unfinished(journal, entries))
    }

    async fn parse<T: for<'a> Deserialize<'a>>(&self, file: &str) -> Result<T, ShardError> {
        let bytes = self.root.get(file).await?;
        serde_json::from_slice(&bytes).map_err(|e| ShardError::Manifest {
            origin: format!("{}/{file}", self.root),
            reason: format!("not as expected: {e}; remove the unfinished dataset and pack again"),
        })
    }

    /// The longest prefix of entries whose shards are stored whole.
    async fn finished(&self, there: &BTreeMap<String, u64>) -> Result<Vec<Entry>, ShardError> {
        let count = (0..).take_while(|n| there.contains_key(&file(*n))).count();
        let read = (0..count).map(|number| async move { self.parse::<Entry>(&file(number)).await });
        let read = futures::stream::iter(read).buffered(REQUESTS);
        let entries: Vec<Entry> = read.try_collect().await?;
        let mut position = 0;
        let whole = entries.into_iter().take_while(|entry| {
            let follows = entry.begin == position;
            position = entry.end;
            let stored = entry.shard.as_ref().is_none_or(|shard| {
                there.get(&shard.file) == Some(&shard.bytes)
                    && there.contains_key(&shard.index_file)
            });
            follows && stored
        });
        Ok(whole.collect())
    }

    /// Notes that `entry` is finished; its shard and index are stored.
    ///
    /// # Errors
    /// [`ShardError::Store`].
    pub async fn put(&self, number: usize, entry: &Entry) -> Result<(), ShardError> {
        let text = serde_json::to_vec(entry).expect("plain data");
        Ok(self.root.put(&file(number), Bytes::from(text)).await?)
    }

    /// Removes the journal; the manifest stands.
    ///
    /// # Errors
    /// [`ShardError::Store`].
    pub async fn remove(self) -> Result<(), ShardError> {
        let there = self.root.list(FOLDER).await?;
        // The options last: what is left by a crash in between can still be told from a dataset
        // of other options.
        let entries = there.iter().filter(|(key, _)| key != OPTIONS);
        let removals = entries.map(|(key, _)| self.root.delete(key));
        let removals = futures::stream::iter(removals).buffer_unordered(REQUESTS);
        removals.try_collect::<Vec<()>>().await?;
        self.root.delete(OPTIONS).await?;
        if let Some(folder) = self.root.local_folder() {
            // Leftovers are no harm; that they cannot be removed is none either.
            let _ = std::fs::remove_dir_all(folder.join(FOLDER));
            let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
            for file in entries.filter(|entry| is_leftover(&entry.file_name().to_string_lossy())) {
                let _ = std::fs::remove_file(file.path());
            }
        }
        Ok(())
    }
}

/// Whether a file is what a killed process leaves of a write into a folder: `000003.tar#1`, under
/// which it stands until it is whole.
fn is_leftover(name: &str) -> bool {
    name.rsplit_once('#').is_some_and(|(target, number)| {
        let ours = [".tar", ".json", ".jsonl"]
            .iter()
            .any(|end| target.ends_with(end));
        ours && !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit())
    })
}

/// Whether there is a finished shard to go on behind. A packer that ended before its first one
/// stands in nobody's way.
fn begun(there: &BTreeMap<String, u64>) -> bool {
    there.contains_key(OPTIONS) && there.contains_key(&file(0))
}

/// Fails where a new dataset must not be begun; gives all that stands there, with sizes.
///
/// # Errors
/// [`ShardError::Exists`], [`ShardError::Unfinished`] without `resume`, [`ShardError::Foreign`].
pub async fn vacant(root: &Root, resume: bool) -> Result<BTreeMap<String, u64>, ShardError> {
    let there: BTreeMap<String, u64> = root.list("").await?.into_iter().collect();
    let name = root.to_string();
    let journal = there.contains_key(OPTIONS);
    if there.contains_key(MANIFEST_FILE) && !(journal && resume) {
        return Err(ShardError::Exists(name));
    }
    if begun(&there) && !resume {
        return Err(ShardError::Unfinished(name));
    }
    if !journal && there.keys().any(|key| key.ends_with(".tar")) {
        return Err(ShardError::Foreign(name));
    }
    Ok(there)
}

fn differing(before: &Options, now: &Options) -> String {
    let names = before.keys().chain(now.keys());
    let names: std::collections::BTreeSet<&String> = names.collect();
    let nothing = String::from("-");
    let told = names.into_iter().filter_map(|name| {
        let [was, is] = [before, now].map(|options| options.get(name).unwrap_or(&nothing));
        (was != is).then(|| format!("{name} was {was}, is {is}"))
    });
    told.collect::<Vec<_>>().join("; ")
}
