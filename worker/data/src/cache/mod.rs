//! The shard cache: whole shards, hash-checked, on local disk; and their indexes.
//!
//! Shards of a local dataset are read in place. Others are fetched whole by parallel ranged GETs
//! into a bounded folder that the workers of a host share, once per host. A file's hash is checked
//! whenever it is opened; one whose hash is wrong is fetched again. Memory holds the totals of the
//! manifest, a few compact indexes and no image.

mod fetch;
mod folder;
mod index;
mod open;
mod shard;

use std::path::Path;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use shard_tools::manifest::{Manifest, Member, ShardEntry, ShardIndex, sha256};
use shard_tools::store::Root;
use shard_tools::{reader, verify};

pub use fetch::{Counts, RANGE_BYTES, RANGES_OF_SHARD};
pub use index::Index;
pub use shard::Shard;

use crate::error::DataError;
use fetch::{ATTEMPTS_MAX, Fetcher, count};
use folder::{Claim, Folder, Part};
use open::{Held, Slots};

/// Open shards of one dataset, each a file handle and no more. Below the usual limit of 1,024 open
/// files with room for the rest of a worker.
const SHARDS_OPEN_MAX: usize = 256;
/// Bytes of indexes held in memory; the others are read from the folder in a millisecond.
const INDEX_BYTES_MAX: usize = 4 << 20;

/// One dataset's shards.
pub struct Cache {
    root: Root,
    /// What the dataset holds.
    pub manifest: Manifest,
    folder: Arc<Folder>,
    fetcher: Fetcher,
    shards: Slots<Shard>,
    indexes: Mutex<Held<Index>>,
}

impl Cache {
    /// Opens the dataset at `location`, caching in `folder` no more than `bytes_max`.
    ///
    /// # Errors
    /// [`DataError`], naming location or key.
    pub fn open(location: &str, folder: &Path, bytes_max: u64) -> Result<Self, DataError> {
        let root = Root::existing(location)?;
        let fetcher = Fetcher::new(root.clone()).map_err(|source| DataError::Cache {
            path: "threads of the shard cache".into(),
            source,
        })?;
        let folder = Arc::new(Folder::open(folder, bytes_max)?);
        let manifest = fetcher.handle().block_on(verify::manifest(&root))?;
        Ok(Cache {
            root,
            manifest,
            folder,
            fetcher,
            shards: Slots::new(SHARDS_OPEN_MAX),
            indexes: Mutex::new(Held::new(INDEX_BYTES_MAX)),
        })
    }

    /// The shard's name in errors.
    pub fn name(&self, shard: usize) -> String {
        format!("{}/{}", self.root, self.manifest.shards[shard].file)
    }

    /// What was done so far.
    pub fn counts(&self) -> &Counts {
        &self.fetcher.counts
    }

    /// The index of a shard.
    ///
    /// # Errors
    /// [`DataError::GivenUp`] where it stays unreadable, else what keeps the dataset from being read.
    pub fn index(&self, shard: usize) -> Result<Arc<Index>, DataError> {
        let held = self.indexes.lock().expect("no holder panics").get(shard);
        if let Some(index) = held {
            return Ok(index);
        }
        let entry = &self.manifest.shards[shard];
        let origin = format!("{}/{}", self.root, entry.index_file);
        let bytes = self.index_bytes(entry, &origin)?;
        let index = ShardIndex::parse(&bytes, entry, &origin)?;
        let index = Index::of(&index).map_err(|_| DataError::Setting {
            key: "data.train or data.validation",
            reason: format!("{origin} is too large; pack smaller shards"),
        })?;
        let index = Arc::new(index);
        let mut held = self.indexes.lock().expect("no holder panics");
        held.put(shard, Arc::clone(&index), index.bytes());
        Ok(index)
    }

    /// The index's bytes, their hash checked.
    fn index_bytes(&self, entry: &ShardEntry, origin: &str) -> Result<Vec<u8>, DataError> {
        let fetched = || {
            self.fetched(origin, || {
                let bytes = self.fetcher.object(&entry.index_file)?;
                self.agrees(origin, &entry.index_sha256, sha256(&bytes))?;
                Ok(Vec::from(bytes))
            })
        };
        if self.root.local_folder().is_some() {
            return fetched();
        }
        let name = format!("{}.json", entry.index_sha256);
        for _ in 0..ATTEMPTS_MAX {
            let Some(file) = self.folder.find(&name)? else {
                break;
            };
            let mut bytes = Vec::new();
            let read = std::io::Read::read_to_end(&mut &file, &mut bytes);
            if read.is_ok() && sha256(&bytes) == entry.index_sha256 {
                return Ok(bytes);
            }
            self.discard(&name, &file)?;
        }
        // Its length is known only when it is here, and then there is nothing left to wait for: two
        // workers may both fetch an index, which is small.
        let bytes = fetched()?;
        if let Claim::Mine(part) = self.folder.claim(&name, bytes.len() as u64)? {
            part.writer()?.write(&bytes, 0)?;
            part.finish()?;
        }
        Ok(bytes)
    }

    /// The whole shard, open and verified: fetched where no worker of this host has it. May be asked
    /// for from several threads; those that ask for the same shard wait for one of them.
    ///
    /// # Errors
    /// [`DataError::GivenUp`] where it stays unreadable, else what keeps the dataset from being read,
    /// or the folder from being written.
    pub fn shard(&self, shard: usize) -> Result<Arc<Shard>, DataError> {
        let slot = self.shards.slot(shard);
        let mut opened = slot.lock().expect("a panic of its opener ends the worker");
        if let Some(shard) = &*opened {
            // A shard that the folder no longer holds serves whoever asks for it, until another one
            // is opened: then its room is given back.
            shard.used();
            return Ok(Arc::clone(shard));
        }
        self.shards.drop_where(|shard| !shard.is_held());
        let new = Arc::new(self.opened(&self.manifest.shards[shard])?);
        *opened = Some(Arc::clone(&new));
        Ok(new)
    }

    /// One member: from the shard where it is at hand, else by one ranged GET.
    ///
    /// # Errors
    /// As [`Cache::shard`].
    pub fn member(&self, shard: usize, member: &Member) -> Result<Bytes, DataError> {
        let entry = &self.manifest.shards[shard];
        let at_hand = self.root.local_folder().is_some()
            || self.shards.is_open(shard)
            || self.folder.find(&cached_name(entry))?.is_some();
        if at_hand {
            return self.shard(shard)?.member(member);
        }
        let range = member.offset..member.offset + member.bytes;
        let fetched = self.fetcher.range(&entry.file, range);
        fetched.map_err(|e| self.fetcher.given_up(&self.name(shard), 1, e))
    }

    fn opened(&self, entry: &ShardEntry) -> Result<Shard, DataError> {
        let name = format!("{}/{}", self.root, entry.file);
        if let Some(folder) = self.root.local_folder() {
            let file = folder.join(&entry.file);
            let opened = self.fetched(&name, || in_place(&file, &name, entry));
            return Ok(Shard::new(opened?, name, entry.bytes));
        }
        let cached = cached_name(entry);
        // A cached file that is wrong is fetched again; one that is always wrong is a broken disk.
        for _ in 0..ATTEMPTS_MAX {
            match self.folder.claim(&cached, entry.bytes)? {
                Claim::There(file) => {
                    let right = (entry.bytes, entry.sha256.clone());
                    if shard::measured(&file).is_ok_and(|found| found == right) {
                        return Ok(Shard::new(file, name, entry.bytes));
                    }
                    self.discard(&cached, &file)?;
                }
                Claim::Mine(part) => {
                    self.fetched(&name, || self.fill(&part, &name, entry))?;
                    let file = part.finish()?;
                    return Ok(Shard::new(file, name, entry.bytes));
                }
            }
        }
        Err(DataError::Cache {
            path: cached,
            source: std::io::Error::other("is corrupt whenever it is read; check the disk"),
        })
    }

    fn discard(&self, name: &str, file: &std::fs::File) -> Result<(), DataError> {
        tracing::warn!(
            name,
            "a file of the shard cache is corrupt; fetching it again"
        );
        count(&self.fetcher.counts.corrupt);
        self.folder.remove(name, file)
    }

    /// Fetches the shard into `part`: written as it comes, hashed in order while the rest comes.
    fn fill(&self, part: &Part, name: &str, entry: &ShardEntry) -> Result<(), DataError> {
        let mut hash = Sha256::new();
        let write = part.writer()?;
        let write = move |bytes: &[u8], at| write.write(bytes, at);
        self.fetcher
            .whole(&entry.file, entry.bytes, write, |piece| hash.update(piece))?;
        self.agrees(name, &entry.sha256, shard::hexadecimal(hash))
    }

    fn agrees(&self, name: &str, expected: &str, found: String) -> Result<(), DataError> {
        if found == expected {
            return Ok(());
        }
        Err(DataError::Hash {
            shard: name.to_owned(),
            found,
            expected: expected.to_owned(),
        })
    }

    /// Runs `fetch` again while what it gets is wrong; at the end says what it is that stays wrong.
    fn fetched<T>(
        &self,
        name: &str,
        fetch: impl Fn() -> Result<T, DataError>,
    ) -> Result<T, DataError> {
        let mut attempt = 1;
        loop {
            match fetch() {
                Ok(fetched) => return Ok(fetched),
                Err(DataError::Hash { found, .. }) if attempt < ATTEMPTS_MAX => {
                    tracing::warn!(
                        name,
                        attempt,
                        found,
                        "wrong bytes came; fetching them again"
                    );
                    count(&self.fetcher.counts.refetches);
                    attempt += 1;
                }
                // Other errors were tried again where they came from.
                Err(error) => return Err(self.fetcher.given_up(name, attempt, error)),
            }
        }
    }
}

fn cached_name(entry: &ShardEntry) -> String {
    format!("{}.tar", entry.sha256)
}

/// A shard of a local dataset, verified where it stands.
fn in_place(file: &Path, name: &str, entry: &ShardEntry) -> Result<std::fs::File, DataError> {
    let cannot = |source| shard_tools::ShardError::Input {
        file: file.display().to_string(),
        source,
    };
    let opened = std::fs::File::open(file).map_err(cannot)?;
    let (_, found) = shard::measured(&opened).map_err(cannot)?;
    if found == entry.sha256 {
        return Ok(opened);
    }
    // A cut or a lying header can be named more exactly than a hash.
    let bytes = std::fs::read(file).map_err(cannot)?;
    reader::scan(&bytes, name)?;
    Err(DataError::Hash {
        shard: name.to_owned(),
        found,
        expected: entry.sha256.clone(),
    })
}
