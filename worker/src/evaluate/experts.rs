//! Encoded texts or images between the towers' one run and the fusion passes.
//!
//! Features stay in memory, they are few numbers. Experts are many: chunks stay in memory while there
//! is room, the others lie in files, one per chunk, in a temporary folder or in one that the
//! processes of an evaluation share; so nothing is encoded twice. It refuses to know models and what
//! rows stand for.

use std::borrow::Cow;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use belfry_model::HostExperts;
use serde::{Deserialize, Serialize};
use tempfile::{NamedTempFile, TempDir};
use xxhash_rust::xxh3::xxh3_64;

use crate::error::WorkerError;

/// Bytes in front of a chunk file's numbers: its header as JSON, padded with spaces.
const HEADER_BYTES: usize = 512;

/// What a chunk's rows became.
#[derive(Clone, Debug, PartialEq)]
pub struct Encoded {
    /// Contrastive features of length 1, `[rows, width]`.
    pub features: Vec<f32>,
    /// Their experts.
    pub experts: HostExperts,
}

/// One side's rows, chunk by chunk.
pub struct ExpertStore {
    /// `texts` or `images`: names its files.
    side: &'static str,
    /// Whose rows they are: a shared file of another evaluation is not taken.
    owner: String,
    rows_per_chunk: usize,
    chunks: Vec<Option<Chunk>>,
    folder: Folder,
    bytes: u64,
    bytes_max: u64,
}

enum Folder {
    /// Of processes that evaluate together.
    Shared(PathBuf),
    /// Made in this folder when memory is full.
    Temporary {
        within: PathBuf,
        made: Option<TempDir>,
    },
}

struct Chunk {
    features: Vec<f32>,
    shape: [usize; 3],
    kept: Kept,
}

enum Kept {
    Memory(Vec<Vec<f32>>),
    /// Experts of row r begin `first + r * bytes of a row` into it.
    File {
        file: File,
        first: u64,
    },
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    owner: String,
    rows: usize,
    features: usize,
    shape: [usize; 3],
    /// XXH3-64 of what follows, hexadecimal.
    xxh3: String,
}

impl ExpertStore {
    /// Room for `rows` rows in chunks. `shared` is the folder of an evaluation by several processes,
    /// `within` where a temporary one may be made.
    pub fn new(
        side: &'static str,
        owner: &str,
        (rows, rows_per_chunk): (usize, usize),
        bytes_max: u64,
        (shared, within): (Option<&Path>, &Path),
    ) -> Self {
        let folder = match shared {
            Some(folder) => Folder::Shared(folder.to_owned()),
            None => Folder::Temporary {
                within: within.to_owned(),
                made: None,
            },
        };
        let chunks = rows.div_ceil(rows_per_chunk);
        ExpertStore {
            side,
            owner: owner.to_owned(),
            rows_per_chunk,
            chunks: (0..chunks).map(|_| None).collect(),
            folder,
            bytes: 0,
            bytes_max,
        }
    }

    /// Chunks.
    pub fn chunks(&self) -> usize {
        self.chunks.len()
    }

    /// Keeps an encoded chunk, and gives it to the others where the folder is shared.
    ///
    /// # Errors
    /// [`WorkerError::Scratch`] naming the file.
    pub fn keep(&mut self, number: usize, encoded: Encoded) -> Result<(), WorkerError> {
        let bytes: u64 = encoded
            .experts
            .rows
            .iter()
            .map(|r| 4 * r.len() as u64)
            .sum();
        let room = self.bytes + bytes <= self.bytes_max;
        let shared = matches!(self.folder, Folder::Shared(_));
        if shared || !room {
            let file = self.file(number)?;
            write(&file, &self.owner, &encoded).map_err(failed(&file))?;
            if !room {
                self.take(number)?;
                return Ok(());
            }
        }
        self.bytes += bytes;
        self.chunks[number] = Some(Chunk {
            features: encoded.features,
            shape: encoded.experts.shape,
            kept: Kept::Memory(encoded.experts.rows),
        });
        Ok(())
    }

    /// Takes a chunk that another process has encoded; false where there is none, or a broken one.
    ///
    /// # Errors
    /// [`WorkerError::Scratch`] naming the file.
    pub fn take(&mut self, number: usize) -> Result<bool, WorkerError> {
        if matches!(&self.folder, Folder::Temporary { made: None, .. }) {
            return Ok(false);
        }
        let path = self.file(number)?;
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(failed(&path)(error)),
        };
        let Some(read) = read(&file, &self.owner).map_err(failed(&path))? else {
            return Ok(false);
        };
        let bytes = 4 * read.experts.rows.iter().map(Vec::len).sum::<usize>() as u64;
        let first = (HEADER_BYTES + 4 * read.features.len()) as u64;
        let kept = if self.bytes + bytes <= self.bytes_max {
            self.bytes += bytes;
            Kept::Memory(read.experts.rows)
        } else {
            Kept::File { file, first }
        };
        self.chunks[number] = Some(Chunk {
            features: read.features,
            shape: read.experts.shape,
            kept,
        });
        Ok(true)
    }

    /// Whether a chunk is here.
    pub fn has(&self, number: usize) -> bool {
        self.chunks[number].is_some()
    }

    /// All features, `[rows, width]`.
    pub fn features(&self) -> Vec<f32> {
        let chunks = self.chunks.iter().flatten();
        chunks.flat_map(|chunk| &chunk.features).copied().collect()
    }

    /// Experts, tokens, width of every row.
    pub fn shape(&self) -> [usize; 3] {
        let mut chunks = self.chunks.iter().flatten();
        chunks.next().map_or([0; 3], |chunk| chunk.shape)
    }

    /// A row's experts, `[experts, tokens, width]`.
    ///
    /// # Errors
    /// [`WorkerError::Scratch`] if its file cannot be read.
    pub fn row(&self, row: usize) -> Result<Cow<'_, [f32]>, WorkerError> {
        let (number, nth) = (row / self.rows_per_chunk, row % self.rows_per_chunk);
        let Some(chunk) = &self.chunks[number] else {
            let what = format!("{} {row} were not encoded", self.side);
            return Err(WorkerError::Internal(what));
        };
        match &chunk.kept {
            Kept::Memory(rows) => Ok(Cow::Borrowed(&rows[nth])),
            Kept::File { file, first } => {
                let elements: usize = chunk.shape.iter().product();
                let mut values = vec![0.0f32; elements];
                let bytes = bytemuck::cast_slice_mut(&mut values);
                let offset = first + (nth * 4 * elements) as u64;
                let name = PathBuf::from(file_name(self.side, number));
                file.read_exact_at(bytes, offset).map_err(failed(&name))?;
                Ok(Cow::Owned(values))
            }
        }
    }

    fn file(&mut self, number: usize) -> Result<PathBuf, WorkerError> {
        let folder = match &mut self.folder {
            Folder::Shared(folder) => folder.clone(),
            Folder::Temporary { within, made } => {
                if made.is_none() {
                    std::fs::create_dir_all(&*within).map_err(failed(within))?;
                    let new = tempfile::Builder::new()
                        .prefix("experts-")
                        .tempdir_in(&*within);
                    *made = Some(new.map_err(failed(within))?);
                }
                made.as_ref()
                    .map(|made| made.path().to_owned())
                    .unwrap_or_default()
            }
        };
        Ok(folder.join(file_name(self.side, number)))
    }
}

fn file_name(side: &str, number: usize) -> String {
    format!("{side}-{number:06}.f32")
}

fn failed(path: &Path) -> impl Fn(std::io::Error) -> WorkerError {
    let path = path.to_owned();
    move |source| WorkerError::Scratch {
        path: path.clone(),
        source,
    }
}

/// A reader sees the whole file or none.
fn write(path: &Path, owner: &str, encoded: &Encoded) -> Result<(), std::io::Error> {
    use std::io::Write as _;
    let mut numbers: Vec<u8> = bytemuck::cast_slice(&encoded.features).to_vec();
    for row in &encoded.experts.rows {
        numbers.extend_from_slice(bytemuck::cast_slice(row));
    }
    let header = Header {
        owner: owner.to_owned(),
        rows: encoded.experts.rows.len(),
        features: encoded.features.len(),
        shape: encoded.experts.shape,
        xxh3: format!("{:016x}", xxh3_64(&numbers)),
    };
    let mut head = serde_json::to_vec(&header)?;
    if head.len() > HEADER_BYTES {
        return Err(std::io::Error::other("the header has no room"));
    }
    head.resize(HEADER_BYTES, b' ');
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    let mut unfinished = NamedTempFile::new_in(folder)?;
    unfinished.write_all(&head)?;
    unfinished.write_all(&numbers)?;
    unfinished.persist(path)?;
    Ok(())
}

/// None where the file is another evaluation's, cut off or changed.
fn read(file: &File, owner: &str) -> Result<Option<Encoded>, std::io::Error> {
    let bytes_len = file.metadata()?.len() as usize;
    let mut head = [0u8; HEADER_BYTES];
    if bytes_len < HEADER_BYTES || !bytes_len.is_multiple_of(4) {
        return Ok(None);
    }
    file.read_exact_at(&mut head, 0)?;
    let Ok(header) = serde_json::from_slice::<Header>(&head) else {
        return Ok(None);
    };
    let mut numbers = vec![0.0f32; (bytes_len - HEADER_BYTES) / 4];
    file.read_exact_at(bytemuck::cast_slice_mut(&mut numbers), HEADER_BYTES as u64)?;
    let found = format!("{:016x}", xxh3_64(bytemuck::cast_slice(&numbers)));
    let row: usize = header.shape.iter().product();
    let whole = header.features + header.rows * row == numbers.len();
    if header.owner != owner || header.xxh3 != found || !whole || row == 0 {
        return Ok(None);
    }
    let rows = numbers.split_off(header.features);
    Ok(Some(Encoded {
        features: numbers,
        experts: HostExperts {
            shape: header.shape,
            rows: rows.chunks(row).map(<[f32]>::to_vec).collect(),
        },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(chunk: usize, rows: usize) -> Encoded {
        let row = |r: usize| (0..6).map(|i| (100 * chunk + 10 * r + i) as f32).collect();
        Encoded {
            features: (0..2 * rows).map(|i| (chunk * 10 + i) as f32).collect(),
            experts: HostExperts {
                shape: [3, 2, 1],
                rows: (0..rows).map(row).collect(),
            },
        }
    }

    fn filled(store: &mut ExpertStore) {
        for chunk in 0..3 {
            let rows = if chunk == 2 { 1 } else { 2 };
            store.keep(chunk, encoded(chunk, rows)).expect("is kept");
        }
    }

    #[test]
    fn rows_come_back_from_memory_and_from_disk() {
        let folder = tempfile::tempdir().expect("a folder");
        for bytes_max in [0, 50, 1 << 20] {
            let places = (None, folder.path());
            let mut store = ExpertStore::new("texts", "me", (5, 2), bytes_max, places);
            filled(&mut store);
            assert_eq!((store.chunks(), store.shape()), (3, [3, 2, 1]));
            assert_eq!(store.features().len(), 10);
            for row in 0..5 {
                let expected = &encoded(row / 2, 2).experts.rows[row % 2];
                assert_eq!(
                    *store.row(row).expect("is there"),
                    expected[..],
                    "{bytes_max}"
                );
            }
        }
        let left = std::fs::read_dir(folder.path())
            .expect("is a folder")
            .count();
        assert_eq!(left, 0, "temporary files go");
    }

    #[test]
    fn others_take_what_one_has_encoded_unless_it_is_broken_or_of_others() {
        let folder = tempfile::tempdir().expect("a folder");
        let open = |owner: &str, bytes_max| {
            let places = (Some(folder.path()), folder.path());
            ExpertStore::new("images", owner, (5, 2), bytes_max, places)
        };
        filled(&mut open("me", 1 << 20));
        for bytes_max in [0, 1 << 20] {
            let mut other = open("me", bytes_max);
            for chunk in 0..3 {
                assert!(!other.has(chunk) && other.take(chunk).expect("is read"));
            }
            assert_eq!(
                *other.row(4).expect("is there"),
                encoded(2, 1).experts.rows[0][..]
            );
        }
        assert!(
            !open("you", 0).take(0).expect("is read"),
            "of other weights"
        );
        let file = folder.path().join("images-000001.f32");
        let mut bytes = std::fs::read(&file).expect("is there");
        bytes[HEADER_BYTES + 9] ^= 1;
        std::fs::write(&file, &bytes).expect("writes");
        assert!(!open("me", 0).take(1).expect("is read"), "a flipped bit");
        std::fs::write(&file, &bytes[..HEADER_BYTES + 8]).expect("writes");
        assert!(!open("me", 0).take(1).expect("is read"), "cut off");
        std::fs::remove_file(&file).expect("is there");
        assert!(!open("me", 0).take(1).expect("is looked for"));
    }
}
