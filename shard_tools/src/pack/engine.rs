//! From a catalog to a dataset: read in parallel, cut in order, written while the next is read.
//!
//! Where a shard ends depends only on the samples before it in the packing order, never on timing:
//! the same input and options give the same bytes with any number of threads and after any crash.
//! In memory are the catalog and a few shards.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use tokio::task::JoinHandle;

use super::PackOptions;
use super::bad::{BAD_FILE, Bad};
use super::catalog::{Catalog, Description};
use super::cut::{Closed, Cutter, Tally};
use super::journal::{Entry, Found, Journal, Options};
use super::order::Order;
use super::read::{self, Outcome};
use super::shard;
use crate::error::ShardError;
use crate::manifest::{DataFile, Manifest, SCHEMA_VERSION, sha256};
use crate::store::Root;
use crate::verify;

/// Samples that are read as one group; some groups are on their way at once.
const GROUP_SAMPLES: usize = 32;
const GROUPS_IN_FLIGHT: usize = 4;
/// Requests to a store of one group at once.
const REQUESTS: usize = 16;
/// Shards that are being written while the next is read.
const SHARDS_IN_FLIGHT: usize = 2;
/// The rule by which a sample keeps each caption once (model_spec 13).
const REPEATED: &str = "captions that their sample has already, or that are blank";

/// A packed dataset, and what did not go into it.
pub struct Packed {
    /// The dataset.
    pub manifest: Manifest,
    /// What could not be packed, as [`BAD_FILE`] lists it.
    pub bad: Vec<Bad>,
    /// What rules left out, with numbers.
    pub left_out: BTreeMap<String, u64>,
}

/// What every task needs.
struct Work {
    catalog: Catalog,
    order: Order,
    pool: rayon::ThreadPool,
    root: Root,
    options: PackOptions,
}

/// A group of samples: each one's descriptions, and the position after it.
type Group = Vec<(Vec<Description>, u64)>;

/// Packs `catalog`; the manifest is written last.
///
/// # Errors
/// [`ShardError`], naming the file.
pub async fn pack(catalog: Catalog, options: &PackOptions) -> Result<Packed, ShardError> {
    let root = Root::open(&options.output)?;
    let deciding = deciding(&catalog, options);
    let (journal, mut entries) = match Journal::open(&root, &deciding, options.resume).await? {
        Found::Unfinished(journal, entries) => (journal, entries),
        Found::Finished => return finished_before(&root).await,
    };
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(options.threads)
        .build()
        .map_err(|e| ShardError::Option(format!("--threads {}: {e}", options.threads)))?;
    let order = pool.install(|| Order::of(&catalog, options.seed));
    let work = Arc::new(Work {
        catalog,
        order,
        pool,
        root,
        options: options.clone(),
    });
    let tally = Tally::begin(options, &work.catalog, work.order.samples(), &entries)?;
    let begin = entries.last().map_or(0, |entry| entry.end);
    let cutter = Cutter::new(outcomes(work.clone(), begin).boxed(), tally, begin);
    write(&work, cutter, &journal, &mut entries).await?;
    finish(&work, journal, entries).await
}

/// What decides a dataset's bytes. What may be bad, threads and the like do not.
fn deciding(catalog: &Catalog, options: &PackOptions) -> Options {
    let values = [
        ("schema", SCHEMA_VERSION.to_string()),
        ("input sha256", catalog.sha256()),
        ("--dataset", options.dataset.clone()),
        ("--pairs-per-shard", options.pairs_per_shard.to_string()),
        ("--shard-bytes", options.shard_bytes.to_string()),
        ("--seed", options.seed.to_string()),
        ("--check", format!("{:?}", options.check).to_lowercase()),
    ];
    values.map(|(name, value)| (name.to_owned(), value)).into()
}

/// Every sample from position `begin` on: its outcome and the position after it, in order.
fn outcomes(
    work: Arc<Work>,
    begin: u64,
) -> impl stream::Stream<Item = Result<Vec<(u64, Outcome)>, ShardError>> {
    let groups = {
        let work = work.clone();
        stream::iter(Groups {
            work,
            position: begin as usize,
        })
    };
    groups
        .map(move |group| tokio::spawn(read_group(work.clone(), group)))
        .buffered(GROUPS_IN_FLIGHT)
        .map(|task| task.expect("reading does not panic"))
}

struct Groups {
    work: Arc<Work>,
    position: usize,
}

impl Iterator for Groups {
    type Item = Group;

    fn next(&mut self) -> Option<Group> {
        let (order, catalog) = (&self.work.order, &self.work.catalog);
        let mut group = Vec::with_capacity(GROUP_SAMPLES);
        while group.len() < GROUP_SAMPLES && self.position < order.len() {
            let (parts, end) = order.sample(catalog, self.position);
            group.push((parts, end as u64));
            self.position = end;
        }
        (!group.is_empty()).then_some(group)
    }
}

async fn read_group(work: Arc<Work>, group: Group) -> Result<Vec<(u64, Outcome)>, ShardError> {
    use rayon::prelude::*;
    let fetches = group
        .iter()
        .map(|(parts, _)| read::fetch(&work.catalog, parts));
    let fetches: Vec<_> = fetches.collect();
    let fetched: Vec<_> = stream::iter(fetches)
        .buffered(REQUESTS)
        .try_collect()
        .await?;
    let read = move || {
        let (catalog, check) = (&work.catalog, work.options.check);
        let one = |((parts, end), fetched): (&(Vec<Description>, u64), &_)| {
            read::read(catalog, parts, fetched, check).map(|outcome| (*end, outcome))
        };
        let samples = || group.par_iter().zip(&fetched).map(one).collect();
        work.pool.install(samples)
    };
    let task = tokio::task::spawn_blocking(read);
    task.await.expect("reading does not panic")
}

/// Writes every shard that `cutter` closes; adds their entries.
async fn write(
    work: &Arc<Work>,
    mut cutter: Cutter,
    journal: &Journal,
    entries: &mut Vec<Entry>,
) -> Result<(), ShardError> {
    let mut number = entries.len();
    let mut in_flight = VecDeque::new();
    // At the end, and after a sample too many is bad, what is on its way is finished.
    let ended = loop {
        if in_flight.len() == SHARDS_IN_FLIGHT {
            note(&mut in_flight, journal, entries).await?;
        }
        match cutter.next().await {
            Ok(Some(closed)) => {
                let task = tokio::spawn(write_shard(work.clone(), number, closed));
                in_flight.push_back(task);
                number += 1;
            }
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    while !in_flight.is_empty() {
        note(&mut in_flight, journal, entries).await?;
    }
    ended
}

/// Waits for the shard that was begun first and notes it: entries are always a prefix.
async fn note(
    in_flight: &mut VecDeque<JoinHandle<Result<Entry, ShardError>>>,
    journal: &Journal,
    entries: &mut Vec<Entry>,
) -> Result<(), ShardError> {
    if let Some(task) = in_flight.pop_front() {
        let entry = task.await.expect("writing does not panic")?;
        journal.put(entries.len(), &entry).await?;
        entries.push(entry);
    }
    Ok(())
}

async fn write_shard(work: Arc<Work>, number: usize, closed: Closed) -> Result<Entry, ShardError> {
    let Closed { samples, mut entry } = closed;
    if samples.is_empty() {
        return Ok(entry);
    }
    let file = format!("{number:06}.tar");
    let sources = work.catalog.sources.clone();
    let build = move || {
        let members = samples.into_iter().flat_map(|sample| sample.members);
        let tar = shard::tar_of(members);
        shard::describe_only(&file, &tar, &sources).map(|(shard, index)| (tar, shard, index))
    };
    let built = tokio::task::spawn_blocking(build).await;
    let (tar, shard, index) = built.expect("building does not panic")?;
    let tar = work.root.put_large(&shard.file, Bytes::from(tar));
    let index = work.root.put(&shard.index_file, index);
    futures::try_join!(tar, index)?;
    entry.shard = Some(shard);
    Ok(entry)
}

async fn finish(work: &Work, journal: Journal, entries: Vec<Entry>) -> Result<Packed, ShardError> {
    let Work {
        catalog,
        root,
        options,
        ..
    } = work;
    let mut bad = catalog.bad.clone();
    let mut left_out = catalog.left_out.clone();
    let repeated: u64 = entries.iter().map(|entry| entry.repeated).sum();
    if repeated > 0 {
        left_out.insert(REPEATED.into(), repeated);
    }
    let mut shards = Vec::new();
    for entry in entries {
        bad.extend(entry.bad);
        shards.extend(entry.shard);
    }
    if shards.is_empty() {
        return Err(ShardError::Sample {
            file: catalog.folder.display().to_string(),
            reason: "not one sample could be packed".into(),
        });
    }
    let mut files = catalog.files.clone();
    if !bad.is_empty() {
        files.push((BAD_FILE.into(), bad_lines(&bad)));
    }
    let mut manifest =
        shard::manifest_of(&options.dataset, catalog.contents, &catalog.sources, shards);
    for (file, bytes) in files {
        manifest.files.push(DataFile {
            file: file.clone(),
            bytes: bytes.len() as u64,
            sha256: sha256(&bytes),
        });
        root.put(&file, bytes).await?;
    }
    shard::write_manifest(root, &manifest).await?;
    journal.remove().await?;
    Ok(Packed {
        manifest,
        bad,
        left_out,
    })
}

fn bad_lines(bad: &[Bad]) -> Bytes {
    let mut lines = Vec::new();
    for one in bad {
        serde_json::to_writer(&mut lines, one).expect("plain data into memory");
        lines.push(b'\n');
    }
    lines.into()
}

/// The dataset whose packer was killed behind its manifest.
async fn finished_before(root: &Root) -> Result<Packed, ShardError> {
    let manifest = verify::manifest(root).await?;
    let mut bad = Vec::new();
    if manifest.files.iter().any(|file| file.file == BAD_FILE) {
        let text = root.get(BAD_FILE).await?;
        let lines = serde_json::Deserializer::from_slice(&text).into_iter();
        bad = lines
            .collect::<Result<_, _>>()
            .map_err(|e| ShardError::Manifest {
                origin: format!("{root}/{BAD_FILE}"),
                reason: format!("not as expected: {e}"),
            })?;
    }
    Ok(Packed {
        manifest,
        bad,
        left_out: BTreeMap::new(),
    })
}
