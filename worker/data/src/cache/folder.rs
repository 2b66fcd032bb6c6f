//! The cache's folder: files of known names and sizes, bounded, shared by the workers of a host.
//!
//! It knows no shards and no hashes. Workers agree by locks of the system (`flock`), which end with
//! their holder however it ends: nothing that a killed worker leaves blocks or is taken for whole.
//! - `lock` is held while files are counted, removed and begun, so the bound holds at every moment.
//!   A file that is being written stands there with its whole size from the beginning.
//! - `NAME.part` is locked by whoever writes it; others wait for that lock instead of fetching twice.
//!   One that nobody has locked is a leftover; one that does not grow is taken over.
//! - `NAME` is whole. The one whose last use is longest ago goes first, also under a reader: what is
//!   open stays readable, and its blocks are free when the last reader lets go.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crate::error::DataError;

const LOCK: &str = "lock";
const PART: &str = "part";
/// A cache file's name begins with a SHA-256; other files of the folder are not ours to remove.
const HASH_CHARACTERS: usize = 64;
/// A use is noted so often, not at every read.
const TOUCH_EVERY: Duration = Duration::from_secs(10);
/// Between two looks whether another worker's file is whole or has made room.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Looks for room: ten minutes of them.
const LOOKS_MAX: u32 = 60_000;
/// A part that has not grown for so long has a writer that lives and does nothing (a stopped process);
/// longer than a connection may be silent.
const STUCK_AFTER: Duration = Duration::from_secs(45);

/// See the module.
pub(super) struct Folder {
    path: PathBuf,
    bytes_max: u64,
}

/// What became of asking for a file.
pub(super) enum Claim {
    /// It is whole; some worker wrote it.
    There(File),
    /// It is to be written by the caller.
    Mine(Part),
}

/// A file that is being written; dropped unfinished, it is gone.
pub(super) struct Part {
    folder: Arc<Folder>,
    file: File,
    path: PathBuf,
    whole: PathBuf,
    finished: bool,
}

impl Folder {
    /// Opens the folder, makes it where it is missing, and clears away what killed workers left.
    pub(super) fn open(path: &Path, bytes_max: u64) -> Result<Self, DataError> {
        let folder = Folder {
            path: path.to_owned(),
            bytes_max,
        };
        folder.named(std::fs::create_dir_all(path))?;
        let lock = folder.locked()?;
        // A smaller limit than the last run's holds from now on.
        folder.make_room(0)?;
        drop(lock);
        Ok(folder)
    }

    fn named<T>(&self, result: io::Result<T>) -> Result<T, DataError> {
        result.map_err(|source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => DataError::CacheFull {
                path: self.path.display().to_string(),
                bytes_max: self.bytes_max,
            },
            _ => DataError::Cache {
                path: self.path.display().to_string(),
                source,
            },
        })
    }

    fn locked(&self) -> Result<File, DataError> {
        let mut options = OpenOptions::new();
        let options = options.create(true).truncate(false).write(true);
        let lock = self.named(options.open(self.path.join(LOCK)))?;
        self.named(lock.lock())?;
        Ok(lock)
    }

    /// The whole file `name`, with its use noted.
    pub(super) fn find(&self, name: &str) -> Result<Option<File>, DataError> {
        match File::open(self.path.join(name)) {
            Ok(file) => {
                touch(&file);
                Ok(Some(file))
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => self.named(Err(e)),
        }
    }

    /// The whole file `name`, or the right to write its `bytes`. Waits for a worker that is about to
    /// write it.
    pub(super) fn claim(self: &Arc<Self>, name: &str, bytes: u64) -> Result<Claim, DataError> {
        if bytes > self.bytes_max {
            return Err(DataError::Setting {
                key: "data.cache_bytes_max",
                reason: format!(
                    "{} bytes are less than one shard of {bytes}; give the cache room for the \
                     shards of its lanes' windows",
                    self.bytes_max
                ),
            });
        }
        let part = self.path.join(format!("{name}.{PART}"));
        for _ in 0..LOOKS_MAX {
            if let Some(file) = self.find(name)? {
                return Ok(Claim::There(file));
            }
            let stuck = self.named(await_writer(&part))?;
            let lock = self.locked()?;
            if let Some(stuck) = stuck
                && is_at(&stuck, &part)
            {
                tracing::warn!(file = %part.display(), "its writer does nothing; taking over");
                self.named(std::fs::remove_file(&part))?;
            }
            if let Some(file) = self.find(name)? {
                return Ok(Claim::There(file));
            }
            let room = self.make_room(bytes)?;
            if room && !part.exists() {
                return self.begin(name, part, bytes).map(Claim::Mine);
            }
            drop(lock);
            if !room {
                std::thread::sleep(LOOK_EVERY);
            }
        }
        Err(DataError::Cache {
            path: part.display().to_string(),
            source: io::Error::new(
                io::ErrorKind::TimedOut,
                "other workers have held the cache's whole room for ten minutes; raise \
                 data.cache_bytes_max or end what is stuck",
            ),
        })
    }

    /// Called under the folder's lock.
    fn begin(self: &Arc<Self>, name: &str, path: PathBuf, bytes: u64) -> Result<Part, DataError> {
        let mut options = OpenOptions::new();
        let options = options.create_new(true).read(true).write(true);
        let file = self.named(options.open(&path))?;
        let part = Part {
            folder: Arc::clone(self),
            file,
            path,
            whole: self.path.join(name),
            finished: false,
        };
        self.named(part.file.lock())?;
        self.named(part.file.set_len(bytes))?;
        Ok(part)
    }

    /// Removes leftovers, then the files longest unused, until `bytes` more may be held; whether they
    /// may. Called under the folder's lock.
    fn make_room(&self, bytes: u64) -> Result<bool, DataError> {
        let mut whole: Vec<(SystemTime, PathBuf, u64)> = Vec::new();
        let mut total = 0;
        for entry in self.named(std::fs::read_dir(&self.path))? {
            let path = self.named(entry)?.path();
            let extension = path.extension().and_then(|x| x.to_str()).unwrap_or("");
            // One that goes away meanwhile takes no room.
            let Ok(meta) = path.metadata() else { continue };
            if !is_ours(&path) || !meta.is_file() {
                continue;
            }
            if extension == PART {
                if abandoned(&path) {
                    tracing::info!(file = %path.display(), "cleared what a killed worker left");
                    self.named(std::fs::remove_file(&path))?;
                    continue;
                }
            } else {
                let used = self.named(meta.modified())?;
                whole.push((used, path, meta.len()));
            }
            total += meta.len();
        }
        whole.sort();
        for (_, path, len) in whole {
            if total + bytes <= self.bytes_max {
                break;
            }
            self.named(std::fs::remove_file(&path))?;
            total -= len;
        }
        Ok(total + bytes <= self.bytes_max)
    }

    /// Removes the file `name` where it is still the one that was opened as `bad`.
    pub(super) fn remove(&self, name: &str, bad: &File) -> Result<(), DataError> {
        let _lock = self.locked()?;
        let path = self.path.join(name);
        if is_at(bad, &path) {
            self.named(std::fs::remove_file(&path))?;
        }
        Ok(())
    }
}

/// Waits until the part's writer lets go of it, which it does when the file is whole and when it dies.
/// Returns the part where its writer lives and does nothing.
fn await_writer(part: &Path) -> io::Result<Option<File>> {
    let Ok(file) = File::open(part) else {
        return Ok(None);
    };
    let mut grown = (file.metadata()?.blocks(), Instant::now());
    loop {
        match file.try_lock_shared() {
            Ok(()) => return Ok(None),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(e)) => return Err(e),
        }
        let blocks = file.metadata()?.blocks();
        if blocks != grown.0 {
            grown = (blocks, Instant::now());
        } else if grown.1.elapsed() > STUCK_AFTER {
            return Ok(Some(file));
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Whether `path` is the name of `file`. Asked under the folder's lock.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), path.metadata()) {
        (Ok(file), Ok(named)) => (file.dev(), file.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

fn is_ours(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    let parts = name.and_then(|name| name.split_once('.'));
    parts.is_some_and(|(hash, _)| {
        hash.len() == HASH_CHARACTERS && hash.bytes().all(|b| b.is_ascii_hexdigit())
    })
}

/// Whether nobody writes `path` any more.
fn abandoned(path: &Path) -> bool {
    let Ok(file) = File::open(path) else {
        return false;
    };
    match file.try_lock() {
        Ok(()) => true,
        Err(TryLockError::WouldBlock | TryLockError::Error(_)) => false,
    }
}

/// Notes the use of an open file. On a folder that is only read there is nothing to note.
pub(super) fn touch(file: &File) {
    let now = SystemTime::now();
    let noted = file.metadata().and_then(|meta| meta.modified());
    let old = noted.is_ok_and(|at| now.duration_since(at).is_ok_and(|age| age >= TOUCH_EVERY));
    if old {
        let _ = file.set_modified(now);
    }
}

/// Whether the file still has a name: one without is room that only its readers hold.
pub(super) fn is_named(file: &File) -> bool {
    file.metadata().is_ok_and(|meta| meta.nlink() > 0)
}

impl Part {
    /// A way to write into it from any thread.
    pub(super) fn writer(&self) -> Result<Writer, DataError> {
        Ok(Writer {
            file: Arc::new(self.folder.named(self.file.try_clone())?),
            folder: Arc::clone(&self.folder),
        })
    }

    /// Gives the file its name and lets go of the lock that others wait for.
    pub(super) fn finish(mut self) -> Result<File, DataError> {
        let folder = &self.folder;
        // Under the folder's lock, so that who counts meets it once.
        let lock = folder.locked()?;
        // One that was taken over has no name left to change, and serves its writer alone.
        if is_at(&self.file, &self.path) {
            folder.named(std::fs::rename(&self.path, &self.whole))?;
        }
        self.finished = true;
        drop(lock);
        folder.named(self.file.unlock())?;
        folder.named(self.file.try_clone())
    }
}

/// Writes into a [`Part`].
#[derive(Clone)]
pub(super) struct Writer {
    file: Arc<File>,
    folder: Arc<Folder>,
}

impl Writer {
    pub(super) fn write(&self, bytes: &[u8], at: u64) -> Result<(), DataError> {
        self.folder.named(self.file.write_all_at(bytes, at))
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        // Without the lock another worker could have taken over in between; what stays behind then is
        // a leftover, which the next one clears.
        if let Ok(_lock) = self.folder.locked()
            && is_at(&self.file, &self.path)
        {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
