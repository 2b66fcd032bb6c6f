//! A dataset that is there, and the walk over its shards: several at once, in order, in bounded
//! memory. It refuses to know what is looked for.

use std::future::Future;

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use indicatif::{ProgressBar, ProgressStyle};

use crate::error::ShardError;
use crate::manifest::{MANIFEST_FILE, Manifest, Member, SampleEntry, ShardEntry, ShardIndex};
use crate::pair::{self, Pair};
use crate::reader;
use crate::store::Root;

/// Bytes of shards that are held at once, unless one alone is larger.
const HELD_BYTES_MAX: u64 = 2 << 30;
/// Shards that are held at once beyond one per core: the next ones are on their way.
const AHEAD: usize = 2;
/// Small reads that are under way at once.
pub(crate) const READS: usize = 16;
/// A ranged read costs about as much as this many bytes of a longer one.
const RANGE_COST_BYTES: u64 = 256 << 10;

/// Reads a dataset's manifest.
///
/// # Errors
/// [`ShardError`], naming the file.
pub async fn manifest(root: &Root) -> Result<Manifest, ShardError> {
    Manifest::parse(
        &root.get(MANIFEST_FILE).await?,
        &format!("{root}/{MANIFEST_FILE}"),
    )
}

/// Reads the index of a shard.
///
/// # Errors
/// [`ShardError`], naming the file.
pub async fn index(root: &Root, entry: &ShardEntry) -> Result<ShardIndex, ShardError> {
    let bytes = root.get(&entry.index_file).await?;
    ShardIndex::parse(&bytes, entry, &format!("{root}/{}", entry.index_file))
}

/// Where a dataset lies, and its manifest.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// Where.
    pub root: Root,
    /// What it claims.
    pub manifest: Manifest,
}

impl Dataset {
    /// Opens a folder or URL that holds a dataset; a folder that is not there is not made.
    ///
    /// # Errors
    /// A reason that names the folder or file.
    pub async fn open(location: &str) -> anyhow::Result<Self> {
        let root = Root::existing(location)?;
        let manifest = manifest(&root).await?;
        Ok(Dataset { root, manifest })
    }

    /// How many of `shards` are held at once.
    pub(crate) fn in_flight(shards: &[ShardEntry]) -> usize {
        in_flight(shards.iter().map(|shard| shard.bytes))
    }

    /// Index and bytes of every shard go through `look`, on a thread of its own, several at once;
    /// `take` gets what it made, in the manifest's order. `bar` counts bytes.
    pub(crate) async fn each_shard<T: Send + 'static>(
        &self,
        bar: &ProgressBar,
        look: impl Fn(&ShardEntry, &ShardIndex, &Bytes) -> Result<T, ShardError>
        + Clone
        + Send
        + 'static,
        mut take: impl FnMut(T),
    ) -> Result<(), ShardError> {
        let shards = &self.manifest.shards;
        let walk = futures::stream::iter(shards).map(|entry| {
            let look = look.clone();
            async move {
                let index = index(&self.root, entry).await?;
                let tar = self.root.get(&entry.file).await?;
                let entry = entry.clone();
                let bar = bar.clone();
                blocking(move || {
                    let made = look(&entry, &index, &tar);
                    bar.inc(entry.bytes);
                    made
                })
                .await
            }
        });
        let mut walk = walk.buffered(Self::in_flight(shards));
        while let Some(made) = walk.try_next().await? {
            take(made);
        }
        Ok(())
    }

    /// The data of `members` of one shard, in order: by ranges where they are few, else whole.
    pub(crate) async fn members(
        &self,
        entry: &ShardEntry,
        members: &[Member],
    ) -> Result<Vec<Bytes>, ShardError> {
        let wanted: u64 = members.iter().map(|m| m.bytes + RANGE_COST_BYTES).sum();
        if wanted < entry.bytes {
            let reads = futures::stream::iter(members.to_vec()).map(|m| self.range(entry, m));
            return reads.buffered(READS).try_collect().await;
        }
        let tar = self.root.get(&entry.file).await?;
        let slices = members.iter().map(|member| {
            let data = reader::member_bytes(&tar, &entry.file, member)?;
            Ok(tar.slice_ref(data))
        });
        slices.collect()
    }

    async fn range(&self, entry: &ShardEntry, member: Member) -> Result<Bytes, ShardError> {
        if member.bytes == 0 {
            return Ok(Bytes::new());
        }
        let range = member.offset..member.offset + member.bytes;
        Ok(self.root.get_range(&entry.file, range).await?)
    }
}

/// How many things of these `bytes` each may be held at once.
pub(crate) fn in_flight(bytes: impl Iterator<Item = u64>) -> usize {
    let largest = bytes.max().unwrap_or(0).max(1);
    let fit = usize::try_from(HELD_BYTES_MAX / largest).unwrap_or(usize::MAX);
    fit.clamp(1, rayon::current_num_threads() + AHEAD)
}

/// Runs what takes a core's time where it keeps no reads waiting.
pub(crate) fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> impl Future<Output = T> {
    let running = tokio::task::spawn_blocking(work);
    async { running.await.expect("the work does not panic") }
}

/// The pairs of a sample, from its text member's data.
pub(crate) fn pairs_of(
    shard: &str,
    sample: &SampleEntry,
    text: &[u8],
) -> Result<Vec<Pair>, ShardError> {
    pair::pairs(&sample.text.name, text).map_err(|reason| ShardError::Member {
        shard: shard.to_owned(),
        member: sample.text.name.clone(),
        offset: sample.text.offset,
        reason,
    })
}

/// A bar that counts bytes, with rate and ETA, on standard error where that is a terminal.
pub(crate) fn byte_bar(what: &str, bytes: u64) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} ETA {eta}",
    );
    let bar = ProgressBar::new(bytes).with_style(style.expect("a valid template"));
    bar.with_message(what.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_shards_are_held_one_at_a_time() {
        assert_eq!(in_flight([5 << 30, 1].into_iter()), 1);
        let many = in_flight([1 << 20].into_iter());
        assert_eq!(many, rayon::current_num_threads() + AHEAD);
        assert!(in_flight(std::iter::empty()) >= 1);
    }

    #[test]
    fn a_folder_that_is_not_there_is_not_made() {
        let folder = tempfile::tempdir().expect("a folder");
        let missing = folder.path().join("no").display().to_string();
        for location in [missing.clone(), format!("file://{missing}")] {
            let told = Root::existing(&location)
                .expect_err("is missing")
                .to_string();
            assert!(told.contains("no such folder"), "{told}");
        }
        assert!(!folder.path().join("no").exists());
    }
}
