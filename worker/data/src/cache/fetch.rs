//! From the store: objects whole, by parallel ranged GETs, in order; retry lives here and nowhere
//! else. It knows no disk and no hashes; what it fetched goes to a sink.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use shard_tools::manifest::MANIFEST_FILE;
use shard_tools::store::{Root, StoreError};
use tokio::runtime::{Handle, Runtime};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;

use crate::error::DataError;

/// Bytes of one ranged GET: large against a round trip, small against a worker's memory.
pub const RANGE_BYTES: u64 = 8 << 20;
/// Ranges of one shard that are under way or wait for their turn.
pub const RANGES_OF_SHARD: usize = 8;
/// The same of a dataset: with [`RANGE_BYTES`], 128 MiB at most.
const RANGES_MAX: usize = 16;
/// Attempts over the store client's own retries, which go on where a body broke.
pub(super) const ATTEMPTS_MAX: u32 = 3;
const BACK_OFF: Duration = Duration::from_millis(500);
const BACK_OFF_FACTOR: u32 = 4;

/// What was done, for tests and benchmarks.
#[derive(Debug, Default)]
pub struct Counts {
    /// Requests, without the store client's own retries.
    pub gets: AtomicU64,
    /// Requests that were tried again.
    pub retries: AtomicU64,
    /// Shards and indexes whose bytes were wrong and that were fetched again.
    pub refetches: AtomicU64,
    /// Cached files whose bytes were wrong.
    pub corrupt: AtomicU64,
}

pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// See the module.
pub(super) struct Fetcher {
    root: Root,
    runtime: Option<Runtime>,
    ranges: Arc<Semaphore>,
    pub(super) counts: Arc<Counts>,
}

impl Drop for Fetcher {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // A blocking drop is not allowed where futures run.
            runtime.shutdown_background();
        }
    }
}

/// A task that ends with who waits for it.
struct Task<T>(JoinHandle<T>);

impl<T> Drop for Task<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Fetcher {
    pub(super) fn new(root: Root) -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .thread_name("shards")
            .build()?;
        Ok(Fetcher {
            root,
            runtime: Some(runtime),
            ranges: Arc::new(Semaphore::new(RANGES_MAX)),
            counts: Arc::default(),
        })
    }

    pub(super) fn handle(&self) -> &Handle {
        self.runtime.as_ref().expect("there until drop").handle()
    }

    /// A small object, whole.
    ///
    /// # Errors
    /// [`DataError::Shard`].
    pub(super) fn object(&self, file: &str) -> Result<Bytes, DataError> {
        let get = || async { Ok(self.root.get(file).await?) };
        self.handle().block_on(retried(&self.counts, file, get))
    }

    /// A part of an object.
    ///
    /// # Errors
    /// [`DataError::Shard`], [`DataError::Short`].
    pub(super) fn range(&self, file: &str, range: Range<u64>) -> Result<Bytes, DataError> {
        let get = || ranged(&self.root, file, range.clone());
        self.handle().block_on(retried(&self.counts, file, get))
    }

    /// The object of `bytes` by parallel ranged GETs. `write` gets what comes as it comes, on threads
    /// of the fetcher, at its offset; `read` gets the same in order, on the calling thread.
    ///
    /// # Errors
    /// [`DataError::Shard`], [`DataError::Short`], or those of `write`.
    pub(super) fn whole(
        &self,
        file: &str,
        bytes: u64,
        write: impl Fn(&[u8], u64) -> Result<(), DataError> + Clone + Send + Sync + 'static,
        mut read: impl FnMut(&[u8]),
    ) -> Result<(), DataError> {
        let starts = (0..bytes).step_by(RANGE_BYTES as usize);
        let ranges = starts.map(|start| start..(start + RANGE_BYTES).min(bytes));
        let fetches = ranges.map(|range| {
            let (root, counts) = (self.root.clone(), Arc::clone(&self.counts));
            let (room, file) = (Arc::clone(&self.ranges), file.to_owned());
            let write = write.clone();
            async move {
                // Asked for in order, so the first of a shard always gets its room first.
                let room = room.acquire_owned().await.expect("is never closed");
                let task = tokio::spawn(async move {
                    let get = || streamed(&root, &file, range.clone(), &write);
                    retried(&counts, &file, get).await
                });
                fetched(Task(task), room).await
            }
        });
        self.handle().block_on(async {
            let mut fetched = stream::iter(fetches).buffered(RANGES_OF_SHARD);
            while let Some(part) = fetched.next().await {
                let (pieces, _room) = part?;
                pieces.iter().for_each(|piece| read(piece));
            }
            Ok(())
        })
    }

    /// What to say of an object that could not be read: that it is given up, if the dataset itself
    /// can be read, and so neither credentials nor network nor server are at fault. `wrong` counts the
    /// attempts that gave wrong bytes.
    pub(super) fn given_up(&self, shard: &str, wrong: u32, error: DataError) -> DataError {
        if !error.is_of_one_shard() {
            return error;
        }
        let attempts = if error.may_pass() {
            ATTEMPTS_MAX
        } else {
            wrong
        };
        let manifest = self.handle().block_on(self.root.exists(MANIFEST_FILE));
        match manifest {
            Ok(true) => DataError::GivenUp {
                shard: shard.to_owned(),
                attempts,
                source: Box::new(error),
            },
            Ok(false) => error,
            Err(manifest) => manifest.into(),
        }
    }
}

async fn fetched(
    mut task: Task<Result<Vec<Bytes>, DataError>>,
    room: OwnedSemaphorePermit,
) -> Result<(Vec<Bytes>, OwnedSemaphorePermit), DataError> {
    match (&mut task.0).await {
        Ok(pieces) => Ok((pieces?, room)),
        Err(ended) => std::panic::resume_unwind(ended.into_panic()),
    }
}

/// A GET that must give as much as was asked for: where an object is too short, stores give less.
async fn ranged(root: &Root, file: &str, range: Range<u64>) -> Result<Bytes, DataError> {
    let bytes = root.get_range(file, range.clone()).await?;
    enough(root, file, &range, bytes.len() as u64)?;
    Ok(bytes)
}

/// The same in pieces, each given to `write` when it comes.
async fn streamed(
    root: &Root,
    file: &str,
    range: Range<u64>,
    write: &impl Fn(&[u8], u64) -> Result<(), DataError>,
) -> Result<Vec<Bytes>, DataError> {
    let mut stream = root.stream_range(file, range.clone()).await?;
    let (mut pieces, mut at) = (Vec::new(), range.start);
    while let Some(piece) = stream.next().await {
        let piece = piece?;
        write(&piece, at)?;
        at += piece.len() as u64;
        pieces.push(piece);
    }
    enough(root, file, &range, at - range.start)?;
    Ok(pieces)
}

fn enough(root: &Root, file: &str, range: &Range<u64>, found: u64) -> Result<(), DataError> {
    let expected = range.end - range.start;
    if found == expected {
        return Ok(());
    }
    Err(DataError::Short {
        shard: format!("{root}/{file}"),
        offset: range.start,
        found,
        expected,
    })
}

/// Runs a request until it succeeds, cannot succeed, or was tried often enough.
async fn retried<T, F>(counts: &Counts, key: &str, request: impl Fn() -> F) -> Result<T, DataError>
where
    F: Future<Output = Result<T, DataError>>,
{
    let mut attempt = 1;
    loop {
        count(&counts.gets);
        let error = match request().await {
            Ok(got) => return Ok(got),
            Err(error) => error,
        };
        if attempt == ATTEMPTS_MAX || !error.may_pass() {
            return Err(error);
        }
        tracing::warn!(key, attempt, %error, "reading failed; trying again");
        count(&counts.retries);
        tokio::time::sleep(BACK_OFF * BACK_OFF_FACTOR.pow(attempt - 1)).await;
        attempt += 1;
    }
}

impl From<StoreError> for DataError {
    fn from(error: StoreError) -> Self {
        DataError::Shard(error.into())
    }
}
