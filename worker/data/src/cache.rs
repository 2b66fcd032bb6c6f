//! The shard cache: whole shards, hash-checked, on local disk and in memory; retry lives here.
//!
//! Shards of a local dataset are read in place. Others are fetched by parallel ranged GETs, written
//! under a name unique to the process and renamed, so several workers of one host share the folder
//! and a crash leaves nothing that is taken for whole. A file whose hash is wrong is fetched again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::future::try_join_all;
use shard_tools::manifest::{Manifest, Member, ShardEntry, ShardIndex, sha256};
use shard_tools::store::{Root, StoreError};
use shard_tools::{reader, verify};
use tokio::runtime::Runtime;

use crate::error::DataError;

/// Bytes of one ranged GET.
const RANGE_BYTES: u64 = 8 << 20;
/// Attempts per request, over the store client's own.
const ATTEMPTS_MAX: u32 = 6;
const BACK_OFF: Duration = Duration::from_millis(100);
/// Bytes of shards kept in memory.
const MEMORY_BYTES_MAX: u64 = 512 << 20;
/// Indexes kept in memory.
const INDEXES_MAX: usize = 1024;

/// A shard's bytes, verified.
pub type Shard = Bytes;

/// One dataset's shards.
pub struct Cache {
    root: Root,
    pub manifest: Manifest,
    folder: PathBuf,
    bytes_max: u64,
    runtime: Option<Runtime>,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    clock: u64,
    shards: BTreeMap<usize, (u64, Shard)>,
    indexes: BTreeMap<usize, Arc<ShardIndex>>,
}

impl Drop for Cache {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // A blocking drop is not allowed where futures run.
            runtime.shutdown_background();
        }
    }
}

impl Cache {
    /// Opens the dataset at `location`, caching in `folder`.
    pub fn open(location: &str, folder: &Path, bytes_max: u64) -> Result<Self, DataError> {
        let cache_error = |source| DataError::Cache {
            path: folder.display().to_string(),
            source,
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .thread_name("shards")
            .build()
            .map_err(cache_error)?;
        if !location.contains("://") && !Path::new(location).is_dir() {
            return Err(DataError::Setting {
                key: "data.train or data.validation",
                reason: format!("{location} is not a folder; pack it with `belfry shards pack`"),
            });
        }
        let root = Root::open(location).map_err(shard_tools::ShardError::from)?;
        std::fs::create_dir_all(folder).map_err(cache_error)?;
        let manifest = runtime.block_on(verify::manifest(&root))?;
        Ok(Cache {
            root,
            manifest,
            folder: folder.to_owned(),
            bytes_max,
            runtime: Some(runtime),
            open: Mutex::default(),
        })
    }

    fn runtime(&self) -> &Runtime {
        self.runtime.as_ref().expect("there until drop")
    }

    /// The shard's name in errors.
    pub fn name(&self, shard: usize) -> String {
        format!("{}/{}", self.root, self.manifest.shards[shard].file)
    }

    /// The index of a shard.
    pub fn index(&self, shard: usize) -> Result<Arc<ShardIndex>, DataError> {
        if let Some(index) = self.lock().indexes.get(&shard) {
            return Ok(Arc::clone(index));
        }
        let entry = &self.manifest.shards[shard];
        let bytes = self.retried(&entry.index_file, || self.root.get(&entry.index_file))?;
        let origin = format!("{}/{}", self.root, entry.index_file);
        let index = Arc::new(ShardIndex::parse(&bytes, entry, &origin)?);
        let mut open = self.lock();
        while open.indexes.len() >= INDEXES_MAX {
            open.indexes.pop_first();
        }
        open.indexes.insert(shard, Arc::clone(&index));
        Ok(index)
    }

    /// The whole shard, from memory, disk or the store.
    pub fn shard(&self, shard: usize) -> Result<Shard, DataError> {
        if let Some(bytes) = self.in_memory(shard) {
            return Ok(bytes);
        }
        let entry = &self.manifest.shards[shard];
        let bytes = if self.root.local_folder().is_some() {
            self.verified(entry, self.fetch(entry)?)?
        } else {
            self.through_disk(entry)?
        };
        let mut open = self.lock();
        open.clock += 1;
        let now = open.clock;
        open.shards.insert(shard, (now, bytes.clone()));
        let total = |open: &Open| {
            open.shards
                .values()
                .map(|(_, b)| b.len() as u64)
                .sum::<u64>()
        };
        while open.shards.len() > 1 && total(&open) > MEMORY_BYTES_MAX {
            let oldest = open.shards.iter().min_by_key(|(_, (used, _))| *used);
            let Some(oldest) = oldest.map(|(shard, _)| *shard) else {
                break;
            };
            open.shards.remove(&oldest);
        }
        Ok(bytes)
    }

    /// One member: from the shard where it is at hand, else by one ranged GET.
    pub fn member(&self, shard: usize, member: &Member) -> Result<Bytes, DataError> {
        let entry = &self.manifest.shards[shard];
        let at_hand = self.root.local_folder().is_some() || self.cached_file(entry).exists();
        let held = match self.in_memory(shard) {
            None if at_hand => Some(self.shard(shard)?),
            held => held,
        };
        if let Some(bytes) = held {
            let slice = reader::member_bytes(&bytes, &self.name(shard), member)?;
            return Ok(bytes.slice_ref(slice));
        }
        let range = member.offset..member.offset + member.bytes;
        self.retried(&entry.file, || {
            self.root.get_range(&entry.file, range.clone())
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Open> {
        self.open.lock().expect("no holder panics")
    }

    fn in_memory(&self, shard: usize) -> Option<Shard> {
        let mut open = self.lock();
        open.clock += 1;
        let now = open.clock;
        let (used, bytes) = open.shards.get_mut(&shard)?;
        *used = now;
        Some(bytes.clone())
    }

    fn cached_file(&self, entry: &ShardEntry) -> PathBuf {
        self.folder.join(format!("{}.tar", entry.sha256))
    }

    fn through_disk(&self, entry: &ShardEntry) -> Result<Shard, DataError> {
        let file = self.cached_file(entry);
        if let Ok(bytes) = std::fs::read(&file) {
            if sha256(&bytes) == entry.sha256 {
                return Ok(Bytes::from(bytes));
            }
            tracing::warn!(file = %file.display(), "a cached shard is corrupt; fetching it again");
        }
        let bytes = self.verified(entry, self.fetch(entry)?)?;
        self.keep(&file, &bytes)?;
        Ok(bytes)
    }

    fn keep(&self, file: &Path, bytes: &[u8]) -> Result<(), DataError> {
        let cache_error = |source| DataError::Cache {
            path: file.display().to_string(),
            source,
        };
        // Unique over threads, processes and hosts' namespaces that share the folder.
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let begun = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let unique = format!("{}-{}-{count}.part", std::process::id(), begun.as_nanos());
        let unfinished = file.with_extension(unique);
        std::fs::write(&unfinished, bytes)
            .and_then(|()| std::fs::rename(&unfinished, file))
            .inspect_err(|_| {
                let _ = std::fs::remove_file(&unfinished);
            })
            .map_err(cache_error)?;
        self.evict(file);
        Ok(())
    }

    /// Removes the files longest untouched until the limit holds; `newest` stays.
    fn evict(&self, newest: &Path) {
        let Ok(entries) = std::fs::read_dir(&self.folder) else {
            return;
        };
        let mut files: Vec<(SystemTime, u64, PathBuf)> = entries
            .flatten()
            .filter(|e| e.path().extension().is_some_and(|x| x == "tar"))
            .filter_map(|e| {
                let meta = e.metadata().ok()?;
                Some((meta.modified().ok()?, meta.len(), e.path()))
            })
            .collect();
        files.sort();
        let mut total: u64 = files.iter().map(|(_, len, _)| len).sum();
        for (_, len, path) in files {
            if total <= self.bytes_max {
                return;
            }
            if path != newest && std::fs::remove_file(&path).is_ok() {
                total -= len;
            }
        }
    }

    fn verified(&self, entry: &ShardEntry, bytes: Bytes) -> Result<Bytes, DataError> {
        let found = sha256(&bytes);
        if found == entry.sha256 {
            return Ok(bytes);
        }
        let shard = format!("{}/{}", self.root, entry.file);
        // A cut or a lying header can be named more exactly than a hash.
        reader::scan(&bytes, &shard)?;
        Err(DataError::Hash {
            shard,
            found,
            expected: entry.sha256.clone(),
        })
    }

    fn fetch(&self, entry: &ShardEntry) -> Result<Bytes, DataError> {
        if entry.bytes <= RANGE_BYTES || self.root.local_folder().is_some() {
            return self.retried(&entry.file, || self.root.get(&entry.file));
        }
        self.retried(&entry.file, || async {
            let starts = (0..entry.bytes).step_by(RANGE_BYTES as usize);
            let ranges = starts.map(|s| s..(s + RANGE_BYTES).min(entry.bytes));
            let parts = try_join_all(ranges.map(|r| self.root.get_range(&entry.file, r))).await?;
            Ok(Bytes::from(parts.concat()))
        })
    }

    /// Runs a request until it succeeds, cannot succeed, or was tried often enough.
    fn retried<F>(&self, key: &str, request: impl Fn() -> F) -> Result<Bytes, DataError>
    where
        F: Future<Output = Result<Bytes, StoreError>>,
    {
        let mut attempt = 1;
        loop {
            let error = match self.runtime().block_on(request()) {
                Ok(bytes) => return Ok(bytes),
                Err(error) => error,
            };
            let hopeless = !matches!(error, StoreError::Other { .. });
            if hopeless || attempt == ATTEMPTS_MAX {
                return Err(shard_tools::ShardError::from(error).into());
            }
            tracing::warn!(key, attempt, %error, "reading failed; trying again");
            std::thread::sleep(BACK_OFF * 2u32.pow(attempt));
            attempt += 1;
        }
    }
}
