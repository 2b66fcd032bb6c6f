//! `diff`: what differs between two datasets, whatever their shards and order: manifests, samples
//! that only one holds, images with other bytes, pairs that say something else.

use std::collections::BTreeMap;

use anyhow::bail;
use bytes::Bytes;
use clap::Args;
use futures::{StreamExt as _, TryStreamExt as _};
use indicatif::ProgressBar;

use super::dataset::{self, Dataset, READS, byte_bar, pairs_of};
use super::verify::short_hash;
use crate::error::ShardError;
use crate::manifest::{Manifest, Member, SampleEntry, ShardEntry, ShardIndex};
use crate::pair::{PAIRS_EXTENSION, Pair, TEXT_EXTENSION};

/// Which datasets.
#[derive(Debug, Args)]
pub struct DiffArguments {
    /// Folder or URL.
    a: String,
    /// Folder or URL.
    b: String,
}

/// Prints what differs: exit code 0 for nothing, 1 for something, 2 for trouble, as `diff` has it.
///
/// # Errors
/// How many differences there are.
pub async fn run(arguments: &DiffArguments) -> anyhow::Result<()> {
    let mut count = 0u64;
    let mut report = |difference: String| {
        count += 1;
        println!("{difference}");
    };
    match compare(&arguments.a, &arguments.b, &mut report).await {
        Err(error) => {
            eprintln!("Error: {error:#}");
            std::process::exit(2);
        }
        Ok(()) if count > 0 => {
            let plural = if count == 1 {
                "difference"
            } else {
                "differences"
            };
            bail!("{} and {}: {count} {plural}", arguments.a, arguments.b)
        }
        Ok(()) => {
            println!("{} and {}: the same", arguments.a, arguments.b);
            Ok(())
        }
    }
}

/// Where a sample of the other dataset lies: its index, short enough to hold all of them.
#[derive(Clone, Copy)]
struct Place {
    key: [u8; 16],
    shard: u32,
    /// Offset and bytes of text, then images.
    members: [(u64, u32); 3],
    images: u8,
    /// Whether the text is `pairs.json`.
    labelled: bool,
}

impl Place {
    fn of(shard: u32, sample: &SampleEntry) -> Self {
        let mut members = [(0, 0); 3];
        let all = [&sample.text].into_iter().chain(&sample.images);
        for (place, member) in members.iter_mut().zip(all) {
            *place = (member.offset, member.bytes as u32);
        }
        Place {
            key: short_hash(sample.key.as_bytes()),
            shard,
            members,
            images: sample.images.len() as u8,
            labelled: sample
                .text
                .name
                .to_ascii_lowercase()
                .ends_with(PAIRS_EXTENSION),
        }
    }

    /// Its members, text first, without the names that were given up.
    fn members(&self) -> Vec<Member> {
        let kind = if self.labelled {
            PAIRS_EXTENSION
        } else {
            TEXT_EXTENSION
        };
        let all = self.members[..=usize::from(self.images)].iter().enumerate();
        let member = |(place, (offset, bytes)): (usize, &(u64, u32))| Member {
            name: if place == 0 {
                kind.into()
            } else {
                String::new()
            },
            offset: *offset,
            bytes: u64::from(*bytes),
        };
        all.map(member).collect()
    }
}

/// Hands every difference to `report`: of the manifests, then in A's order, then what only B has.
/// Shards whose hashes stand in both manifests are the same and are not read. Holds 72 bytes for each
/// sample of B's other shards, 16 for A's, and a few shards.
///
/// # Errors
/// A reason that names the file.
pub async fn compare(
    a: &str,
    b: &str,
    report: &mut (dyn FnMut(String) + Send),
) -> anyhow::Result<()> {
    let (a, b) = (Dataset::open(a).await?, Dataset::open(b).await?);
    manifests(&a.manifest, &b.manifest, report);
    let (a, b) = apart(a, b);
    let mut places = Vec::new();
    each_index(&b, |shard, index| {
        places.extend(index.samples.iter().map(|sample| Place::of(shard, sample)));
    })
    .await?;
    places.sort_unstable_by_key(|place| place.key);

    let bar = byte_bar("comparing", a.manifest.shards.iter().map(|s| s.bytes).sum());
    let compared = Compared {
        a: &a,
        b: &b,
        places: &places,
        bar: &bar,
    };
    let walk = futures::stream::iter(&a.manifest.shards).map(|entry| compared.shard(entry));
    // A shard of A and its counterparts of B: about twice the bytes of a walk over one dataset.
    let mut walk = walk.buffered(Dataset::in_flight(&a.manifest.shards).div_ceil(2));
    let mut keys = Vec::new();
    while let Some(found) = walk.try_next().await? {
        bar.suspend(|| found.differences.into_iter().for_each(&mut *report));
        keys.extend(found.keys);
    }
    bar.finish_and_clear();
    keys.sort_unstable();
    each_index(&b, |_, index| {
        for sample in &index.samples {
            if keys
                .binary_search(&short_hash(sample.key.as_bytes()))
                .is_err()
            {
                report(format!("sample `{}` is only in {}", sample.key, b.root));
            }
        }
    })
    .await
}

/// Both without the shards that are the same: their tars have the same hash, and so the same samples.
fn apart(mut a: Dataset, mut b: Dataset) -> (Dataset, Dataset) {
    let hash = |entry: &ShardEntry| (entry.sha256.clone(), entry.bytes);
    let count = |shards: &[ShardEntry]| {
        let mut counts: BTreeMap<(String, u64), usize> = BTreeMap::new();
        shards
            .iter()
            .for_each(|s| *counts.entry(hash(s)).or_default() += 1);
        counts
    };
    let (in_a, in_b) = (count(&a.manifest.shards), count(&b.manifest.shards));
    let same = |entry: &ShardEntry| in_a.get(&hash(entry)) == in_b.get(&hash(entry));
    a.manifest.shards.retain(|entry| !same(entry));
    b.manifest.shards.retain(|entry| !same(entry));
    (a, b)
}

/// Every index of the dataset, with its shard's place, in order.
async fn each_index(
    dataset: &Dataset,
    mut take: impl FnMut(u32, ShardIndex),
) -> anyhow::Result<()> {
    let read = |entry| dataset::index(&dataset.root, entry);
    let mut walk = futures::stream::iter(&dataset.manifest.shards)
        .map(read)
        .buffered(READS);
    let mut shard = 0;
    while let Some(index) = walk.try_next().await? {
        take(shard, index);
        shard += 1;
    }
    Ok(())
}

fn manifests(a: &Manifest, b: &Manifest, report: &mut dyn FnMut(String)) {
    let mut field = |name: &str, a: String, b: String| {
        if a != b {
            report(format!("manifest: {name} is {a}, and {b}"));
        }
    };
    field(
        "dataset",
        format!("`{}`", a.dataset),
        format!("`{}`", b.dataset),
    );
    field(
        "contents",
        format!("{:?}", a.contents),
        format!("{:?}", b.contents),
    );
    field("samples", a.samples.to_string(), b.samples.to_string());
    field("pairs", a.pairs.to_string(), b.pairs.to_string());
    field(
        "shards",
        a.shards.len().to_string(),
        b.shards.len().to_string(),
    );
    let sources = |m: &Manifest| {
        let all = m.sources.iter();
        let all = all.map(|s| format!("{} ({} samples, {} pairs)", s.name, s.samples, s.pairs));
        all.collect::<Vec<_>>().join(", ")
    };
    field("sources", sources(a), sources(b));
    let names: std::collections::BTreeSet<&String> =
        a.files.iter().chain(&b.files).map(|f| &f.file).collect();
    for name in names {
        let of = |m: &Manifest| {
            let file = m.files.iter().find(|f| f.file == *name);
            file.map_or("absent".to_owned(), |f| {
                format!("{} bytes, sha256 {}", f.bytes, f.sha256)
            })
        };
        field(&format!("file {name}"), of(a), of(b));
    }
}

struct Found {
    differences: Vec<String>,
    /// Keys of A's shard.
    keys: Vec<[u8; 16]>,
}

struct Compared<'a> {
    a: &'a Dataset,
    b: &'a Dataset,
    places: &'a [Place],
    bar: &'a ProgressBar,
}

impl Compared<'_> {
    async fn shard(&self, entry: &ShardEntry) -> Result<Found, ShardError> {
        let index = dataset::index(&self.a.root, entry).await?;
        let short = |sample: &SampleEntry| short_hash(sample.key.as_bytes());
        let keys: Vec<[u8; 16]> = index.samples.iter().map(short).collect();
        // Differences by the sample's place in A, so that they come in order.
        let mut told: BTreeMap<usize, Vec<String>> = BTreeMap::new();
        let mut common = Vec::new();
        for (place, key) in keys.iter().enumerate() {
            match self.places.binary_search_by_key(key, |p| p.key) {
                Ok(found) => common.push((place, self.places[found])),
                Err(_) => {
                    let key = &index.samples[place].key;
                    let only = format!("sample `{key}` is only in {}", self.a.root);
                    told.entry(place).or_default().push(only);
                }
            }
        }
        let mut here = self.here(entry, &index, &common).await?;
        let mut there = self.there(&common).await?;
        for (place, other) in common {
            let data = here.remove(&place).unwrap_or_default();
            let other_data = there.remove(&place).unwrap_or_default();
            let one = (entry.file.as_str(), &index.samples[place], data);
            let file = &self.b.manifest.shards[other.shard as usize].file;
            let found = sample(one, (file, &other, other_data))?;
            told.entry(place).or_default().extend(found);
        }
        self.bar.inc(entry.bytes);
        Ok(Found {
            differences: told.into_values().flatten().collect(),
            keys,
        })
    }

    /// Data of A's samples, text first, by their places.
    async fn here(
        &self,
        entry: &ShardEntry,
        index: &ShardIndex,
        common: &[(usize, Place)],
    ) -> Result<BTreeMap<usize, Vec<Bytes>>, ShardError> {
        let of = |(place, _): &(usize, Place)| {
            let sample = &index.samples[*place];
            let images = sample.images.iter().cloned();
            (
                *place,
                [sample.text.clone()].into_iter().chain(images).collect(),
            )
        };
        read(self.a, entry, common.iter().map(of).collect()).await
    }

    /// Data of their counterparts, wherever B has them, by their places in A.
    async fn there(
        &self,
        common: &[(usize, Place)],
    ) -> Result<BTreeMap<usize, Vec<Bytes>>, ShardError> {
        let mut shards: BTreeMap<u32, Vec<(usize, Vec<Member>)>> = BTreeMap::new();
        for (place, there) in common {
            let wanted = (*place, there.members());
            shards.entry(there.shard).or_default().push(wanted);
        }
        let reads = futures::stream::iter(shards).map(|(shard, wanted)| {
            let entry = &self.b.manifest.shards[shard as usize];
            read(self.b, entry, wanted)
        });
        let mut reads = reads.buffer_unordered(READS);
        let mut all = BTreeMap::new();
        while let Some(data) = reads.try_next().await? {
            all.extend(data);
        }
        Ok(all)
    }
}

/// The data of members of one shard, by the place under which they are wanted.
async fn read(
    dataset: &Dataset,
    entry: &ShardEntry,
    wanted: Vec<(usize, Vec<Member>)>,
) -> Result<BTreeMap<usize, Vec<Bytes>>, ShardError> {
    let members = wanted.iter().flat_map(|(_, members)| members.clone());
    let data = dataset.members(entry, &members.collect::<Vec<_>>()).await?;
    let mut data = data.into_iter();
    let of = |(place, members): (usize, Vec<Member>)| {
        (place, data.by_ref().take(members.len()).collect())
    };
    Ok(wanted.into_iter().map(of).collect())
}

/// What differs in one sample that both have; shard, place and data (text first) of each.
fn sample(
    (shard, entry, data): (&str, &SampleEntry, Vec<Bytes>),
    (other_shard, other, other_data): (&str, &Place, Vec<Bytes>),
) -> Result<Vec<String>, ShardError> {
    let mut found = Vec::new();
    let key = &entry.key;
    let (images, other_images) = (entry.images.len(), usize::from(other.images));
    if images != other_images {
        found.push(format!(
            "sample `{key}`: {images} images, and {other_images}"
        ));
    }
    let short = |bytes: &[u8]| crate::manifest::sha256(bytes)[..12].to_owned();
    for (image, (one, two)) in entry
        .images
        .iter()
        .zip(data.iter().zip(&other_data).skip(1))
    {
        if one != two {
            found.push(format!(
                "sample `{key}`: image {} has {} bytes with sha256 {}…, and {} with {}…",
                image.name,
                one.len(),
                short(one),
                two.len(),
                short(two)
            ));
        }
    }
    let labelled = entry
        .text
        .name
        .to_ascii_lowercase()
        .ends_with(PAIRS_EXTENSION);
    if data[0] == other_data[0] && labelled == other.labelled {
        return Ok(found);
    }
    let one = pairs_of(shard, entry, &data[0])?;
    let mut there = entry.clone();
    there.text = other.members().swap_remove(0);
    let two = pairs_of(other_shard, &there, &other_data[0])?;
    if one.len() != two.len() {
        found.push(format!(
            "sample `{key}`: {} pairs, and {}",
            one.len(),
            two.len()
        ));
    }
    let differ = one
        .iter()
        .zip(&two)
        .enumerate()
        .find(|(_, (one, two))| one != two);
    if let Some((place, (one, two))) = differ {
        let (one, two) = (said(one), said(two));
        found.push(format!("sample `{key}`, pair {place}: {one}, and {two}"));
    }
    Ok(found)
}

/// A pair on one line.
fn said(pair: &Pair) -> String {
    serde_json::to_string(pair).expect("plain data")
}
