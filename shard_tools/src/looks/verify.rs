//! `verify`: checks everything that a dataset claims, and reports all that is wrong, not the first
//! only.

use std::collections::HashMap;

use anyhow::bail;
use bytes::Bytes;
use clap::Args;
use futures::StreamExt as _;
use rayon::prelude::*;

use super::dataset::{Dataset, blocking, byte_bar, pairs_of};
pub use super::dataset::{index, manifest};
use crate::error::ShardError;
use crate::manifest::{
    ANSWERS_FILE, DataFile, Manifest, SampleEntry, ShardEntry, ShardIndex, sha256,
};
use crate::pair::Contents;
use crate::store::{Root, StoreError};
use crate::{check, reader};

/// What to check.
#[derive(Debug, Args)]
pub struct VerifyArguments {
    /// Folder or URL.
    dataset: String,
    /// Manifest, indexes, sizes and hashes only: no image is decoded, no pair is read.
    #[arg(long)]
    quick: bool,
}

/// Prints every problem as it is found.
///
/// # Errors
/// How many there are, or that there is no dataset.
pub async fn run(arguments: &VerifyArguments) -> anyhow::Result<()> {
    let dataset = &arguments.dataset;
    let root = Root::existing(dataset)?;
    let mut count = 0u64;
    let mut report = |problem: String| {
        count += 1;
        println!("{problem}");
    };
    let manifest = verify(&root, arguments.quick, &mut report).await?;
    if count > 0 {
        let plural = if count == 1 { "problem" } else { "problems" };
        bail!("{dataset}: {count} {plural}; pack or copy again what is named");
    }
    let checked = if arguments.quick {
        "all sizes and hashes agree; pairs and images were not looked at"
    } else {
        "all hashes agree and every member decodes"
    };
    println!(
        "{dataset}: {checked} ({} samples, {} pairs in {} shards)",
        manifest.samples,
        manifest.pairs,
        manifest.shards.len()
    );
    Ok(())
}

/// Everything that is wrong with the dataset, in words that name shard, member and offset.
///
/// # Errors
/// [`ShardError`] when there is no manifest to begin with.
pub async fn problems(root: &Root) -> Result<Vec<String>, ShardError> {
    let mut found = Vec::new();
    verify(root, false, &mut |problem| found.push(problem)).await?;
    Ok(found)
}

/// Hands every problem to `report`, in the manifest's order, and returns the manifest. Holds a few
/// shards at once and 20 bytes for each sample's key.
///
/// # Errors
/// [`ShardError`] when there is no manifest to begin with.
pub async fn verify(
    root: &Root,
    quick: bool,
    report: &mut (dyn FnMut(String) + Send),
) -> Result<Manifest, ShardError> {
    let manifest = manifest(root).await?;
    let answers = files(root, &manifest, report).await;
    let claims = Claims {
        contents: manifest.contents,
        classes: manifest.contents.classes().or(answers),
        sources: manifest.sources.iter().map(|s| s.name.clone()).collect(),
        quick,
    };
    let bytes = manifest.shards.iter().map(|shard| shard.bytes).sum();
    let bar = byte_bar("verifying", bytes);
    let walk = futures::stream::iter(&manifest.shards).map(|entry| {
        let (bar, claims) = (bar.clone(), claims.clone());
        async move {
            let index_bytes = root.get(&entry.index_file).await;
            let tar = root.get(&entry.file).await;
            let (entry, root) = (entry.clone(), root.to_string());
            blocking(move || {
                let found = shard(&claims, &root, &entry, index_bytes, tar);
                bar.inc(entry.bytes);
                found
            })
            .await
        }
    });
    let mut walk = walk.buffered(Dataset::in_flight(&manifest.shards));
    let mut keys: HashMap<[u8; 16], u32> = HashMap::new();
    let mut totals = vec![0u64; manifest.sources.len()];
    let mut place = 0u32;
    while let Some(found) = walk.next().await {
        bar.suspend(|| found.problems.into_iter().for_each(&mut *report));
        for (key, source) in &found.keys {
            if let Some(total) = totals.get_mut(*source as usize) {
                *total += 1;
            }
            if let Some(first) = keys.insert(short_hash(key.as_bytes()), place) {
                let [one, two] = [first, place].map(|i| &manifest.shards[i as usize].file);
                bar.suspend(|| report(format!("sample `{key}` is in shard {one} and in {two}")));
            }
        }
        place += 1;
    }
    drop(walk);
    bar.finish_and_clear();
    let seen: u64 = totals.iter().sum();
    for (source, total) in manifest.sources.iter().zip(&totals) {
        // Where an index could not be read, that is the problem, and it is told.
        if seen == manifest.samples && source.samples != *total {
            report(format!(
                "source {}: the manifest says {} samples, the indexes hold {total}",
                source.name, source.samples
            ));
        }
    }
    Ok(manifest)
}

/// The first 16 bytes of a SHA-256: enough to tell any two things of a dataset apart.
pub(super) fn short_hash(bytes: &[u8]) -> [u8; 16] {
    use sha2::{Digest as _, Sha256};
    Sha256::digest(bytes)[..16].try_into().expect("32 bytes")
}

/// Checks the files beside the shards; returns the number of answers of a VQA dataset.
async fn files(root: &Root, manifest: &Manifest, report: &mut dyn FnMut(String)) -> Option<u32> {
    let mut answers = None;
    for file in &manifest.files {
        match root.get(&file.file).await {
            Err(error) => report(error.to_string()),
            Ok(bytes) => {
                report_file(file, &bytes, report);
                if file.file == ANSWERS_FILE {
                    match serde_json::from_slice::<Vec<String>>(&bytes) {
                        Ok(list) => answers = Some(list.len() as u32),
                        Err(e) => report(format!("file {ANSWERS_FILE}: not a list of texts: {e}")),
                    }
                }
            }
        }
    }
    if manifest.contents == Contents::Vqa && !manifest.files.iter().any(|f| f.file == ANSWERS_FILE)
    {
        report(format!(
            "the manifest names no {ANSWERS_FILE}, which names the classes of vqa"
        ));
    }
    answers
}

fn report_file(file: &DataFile, bytes: &[u8], report: &mut dyn FnMut(String)) {
    if let Some(problem) = differs("file", &file.file, bytes, (file.bytes, &file.sha256)) {
        report(problem);
    }
}

/// Where bytes are not those that were packed.
fn differs(what: &str, name: &str, bytes: &[u8], packed: (u64, &str)) -> Option<String> {
    let (length, found) = (bytes.len() as u64, sha256(bytes));
    (length != packed.0 || found != packed.1).then(|| {
        format!(
            "{what} {name}: {length} bytes with sha256 {found}, the manifest says {} bytes with {}",
            packed.0, packed.1
        )
    })
}

/// What every shard is held against.
#[derive(Clone)]
struct Claims {
    contents: Contents,
    /// Bound of labels, where it is known.
    classes: Option<u32>,
    sources: Vec<String>,
    quick: bool,
}

/// What was found in a shard: problems, and key and source of each sample of its index.
#[derive(Default)]
struct Found {
    problems: Vec<String>,
    keys: Vec<(String, u32)>,
}

fn shard(
    claims: &Claims,
    root: &str,
    entry: &ShardEntry,
    index: Result<Bytes, StoreError>,
    tar: Result<Bytes, StoreError>,
) -> Found {
    let mut found = Found::default();
    let origin = format!("{root}/{}", entry.index_file);
    let index = index.map_err(ShardError::from);
    let index = index.and_then(|bytes| ShardIndex::parse(&bytes, entry, &origin));
    let index = match index {
        Ok(index) => Some(index),
        Err(error) => {
            found.problems.push(error.to_string());
            None
        }
    };
    if let Some(index) = &index {
        let keys = index.samples.iter().map(|s| (s.key.clone(), s.source));
        found.keys = keys.collect();
        found.problems.extend(source_problems(claims, entry, index));
    }
    let tar = match tar {
        Ok(tar) => tar,
        Err(error) => {
            found.problems.push(error.to_string());
            return found;
        }
    };
    let packed = (entry.bytes, entry.sha256.as_str());
    found
        .problems
        .extend(differs("shard", &entry.file, &tar, packed));
    if claims.quick {
        return found;
    }
    let samples = match reader::scan(&tar, &entry.file) {
        Ok(samples) => {
            let index = index.map(|index| index.samples);
            found
                .problems
                .extend(index.and_then(|i| index_problem(entry, &i, &samples)));
            samples
        }
        // Behind a broken header the tar cannot be walked; the index still says where members are.
        Err(error) => {
            found.problems.push(error.to_string());
            index.map(|index| index.samples).unwrap_or_default()
        }
    };
    let looked = samples
        .par_iter()
        .flat_map_iter(|s| sample(claims, &tar, entry, s));
    found.problems.par_extend(looked);
    found
}

/// Sources as the manifest counts them, and as the keys name them.
fn source_problems(claims: &Claims, entry: &ShardEntry, index: &ShardIndex) -> Vec<String> {
    let sources = claims.sources.len();
    let mut found = Vec::new();
    let (mut samples, mut pairs) = (vec![0u32; sources], vec![0u32; sources]);
    for sample in &index.samples {
        let place = sample.source as usize;
        let Some(name) = claims.sources.get(place) else {
            found.push(format!(
                "index {}: sample `{}` is of source {place}, the manifest has {sources}",
                entry.index_file, sample.key
            ));
            continue;
        };
        samples[place] += 1;
        pairs[place] += sample.pairs;
        let folder = sample.key.split_once('/').map(|(folder, _)| folder);
        if sources > 1 && folder != Some(name) {
            found.push(format!(
                "index {}: sample `{}` is of source {name}, and its key does not begin with it",
                entry.index_file, sample.key
            ));
        }
    }
    if sources > 1 && (samples != entry.source_samples || pairs != entry.source_pairs) {
        found.push(format!(
            "index {}: samples of each source are {samples:?} and pairs {pairs:?}, the manifest \
             says {:?} and {:?}",
            entry.index_file, entry.source_samples, entry.source_pairs
        ));
    }
    found
}

/// The first sample in which index and tar disagree.
fn index_problem(entry: &ShardEntry, index: &[SampleEntry], tar: &[SampleEntry]) -> Option<String> {
    let same = |(a, b): (&SampleEntry, &SampleEntry)| {
        (&a.key, &a.images, &a.text, a.pairs) == (&b.key, &b.images, &b.text, b.pairs)
    };
    let agree = index.iter().zip(tar).take_while(|pair| same(*pair)).count();
    if agree == index.len() && agree == tar.len() {
        return None;
    }
    let named = |samples: &[SampleEntry]| match samples.get(agree) {
        Some(s) => format!(
            "`{}` with {} pairs at offset {}",
            s.key, s.pairs, s.images[0].offset
        ),
        None => "nothing".to_owned(),
    };
    Some(format!(
        "shard {}, sample {agree}: the index {} says {}, the tar holds {}",
        entry.file,
        entry.index_file,
        named(index),
        named(tar)
    ))
}

/// What is wrong with one sample's pairs and images.
fn sample(claims: &Claims, tar: &[u8], entry: &ShardEntry, sample: &SampleEntry) -> Vec<String> {
    let mut found = Vec::new();
    let at = |name: &str, offset: u64, reason: String| {
        let (shard, member) = (entry.file.clone(), name.to_owned());
        let error = ShardError::Member {
            shard,
            member,
            offset,
            reason,
        };
        error.to_string()
    };
    let text = &sample.text;
    let pairs = reader::member_bytes(tar, &entry.file, text)
        .and_then(|bytes| pairs_of(&entry.file, sample, bytes));
    match pairs {
        Err(error) => found.push(error.to_string()),
        Ok(pairs) => {
            let highest = pairs.iter().flat_map(|p| &p.labels).max();
            if let (Some(label), Some(classes)) = (highest, claims.classes)
                && *label >= classes
            {
                let reason = format!("label {label}, and there are {classes} classes");
                found.push(at(&text.name, text.offset, reason));
            }
        }
    }
    let (images, wanted) = (sample.images.len(), claims.contents.images());
    if images != wanted {
        let reason = format!("its sample has {images} images, its contents want {wanted}");
        found.push(at(&text.name, text.offset, reason));
    }
    for image in &sample.images {
        match reader::member_bytes(tar, &entry.file, image) {
            Err(error) => found.push(error.to_string()),
            Ok(bytes) => {
                let reason = check::image(bytes).err();
                found.extend(reason.map(|reason| at(&image.name, image.offset, reason)));
            }
        }
    }
    found
}
