//! From a folder of `key.jpg|png|webp` + `key.txt` to shards. The same input gives the same bytes.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use indicatif::{ProgressBar, ProgressStyle};
use rayon::prelude::*;

use crate::error::ShardError;
use crate::manifest::{
    MANIFEST_FILE, Manifest, SCHEMA_VERSION, ShardEntry, ShardIndex, Source, sha256,
};
use crate::pair::Contents;
use crate::store::{Root, StoreError};
use crate::{check, pair, reader};

/// What to pack, and how.
#[derive(Clone, Debug)]
pub struct PackOptions {
    /// Folder of images and captions.
    pub input: PathBuf,
    /// Folder or URL of the dataset.
    pub output: String,
    /// A name for people.
    pub dataset: String,
    /// A shard is closed when it holds this many pairs.
    pub pairs_per_shard: u32,
    /// Seeds the shuffle of samples over shards.
    pub seed: u64,
    /// Only these keys; all when none are given.
    pub keys: Option<Vec<String>>,
    /// Go on with an unfinished dataset: shards already there with the right bytes are kept.
    pub resume: bool,
    /// Draw a progress bar.
    pub progress: bool,
}

struct Sample {
    key: String,
    extension: String,
    image: Vec<u8>,
    captions: Vec<String>,
}

/// Keys of a folder's images, sorted.
///
/// # Errors
/// [`ShardError::Input`].
pub fn list_keys(folder: &Path) -> Result<Vec<String>, ShardError> {
    Ok(images(folder)?.into_iter().map(|(key, _)| key).collect())
}

fn input_error(file: &Path) -> impl FnOnce(std::io::Error) -> ShardError + '_ {
    |source| ShardError::Input {
        file: file.display().to_string(),
        source,
    }
}

/// (key, extension) of every image in `folder`, sorted.
fn images(folder: &Path) -> Result<BTreeSet<(String, String)>, ShardError> {
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(folder).map_err(input_error(folder))? {
        let name = entry.map_err(input_error(folder))?.file_name();
        let name = name.to_string_lossy();
        if let Some((key, extension)) = name.split_once('.')
            && reader::is_image(extension)
        {
            found.insert((key.to_owned(), extension.to_owned()));
        }
    }
    Ok(found)
}

fn read_sample(folder: &Path, key: &str, extension: &str) -> Result<Sample, ShardError> {
    let read = |extension: &str| {
        let file = folder.join(format!("{key}.{extension}"));
        let bytes = std::fs::read(&file).map_err(input_error(&file))?;
        Ok::<_, ShardError>((file, bytes))
    };
    let wrong = |file: &Path, reason| ShardError::Sample {
        file: file.display().to_string(),
        reason,
    };
    let (image_file, image) = read(extension)?;
    check::image(&image).map_err(|reason| wrong(&image_file, reason))?;
    let (text_file, text) = read("txt")?;
    let captions = pair::captions(&text).map_err(|reason| wrong(&text_file, reason))?;
    Ok(Sample {
        key: key.to_owned(),
        extension: extension.to_ascii_lowercase(),
        image,
        captions,
    })
}

/// A tar of `members`, in order, with nothing in it but names and data.
pub fn tar_of(members: impl IntoIterator<Item = (String, Vec<u8>)>) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, data) in members {
        let mut header = tar::Header::new_ustar();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(0);
        builder
            .append_data(&mut header, name, data.as_slice())
            .expect("a plain name into memory");
    }
    builder.into_inner().expect("memory does not fail")
}

/// Packs a folder; the manifest is written last.
///
/// # Errors
/// [`ShardError`], naming the file.
pub async fn pack_folder(options: &PackOptions) -> Result<Manifest, ShardError> {
    let root = Root::open(&options.output)?;
    if root.exists(MANIFEST_FILE).await? {
        return Err(ShardError::Exists(root.to_string()));
    }
    if !options.resume
        && root
            .list("")
            .await?
            .iter()
            .any(|(key, _)| key.ends_with(".tar"))
    {
        return Err(ShardError::Exists(root.to_string()));
    }
    let mut chosen: Vec<(String, String)> = images(&options.input)?.into_iter().collect();
    if let Some(keys) = &options.keys {
        let keys: BTreeSet<&String> = keys.iter().collect();
        chosen.retain(|(key, _)| keys.contains(key));
    }
    if chosen.is_empty() {
        return Err(ShardError::Sample {
            file: options.input.display().to_string(),
            reason: "no image (key.jpg, key.png, key.webp) in this folder".into(),
        });
    }
    // Shuffled by hash, so that neighbours in the folder do not stay neighbours in a shard.
    chosen.sort_by_cached_key(|(key, _)| sha256(format!("{}/{key}", options.seed).as_bytes()));

    let bar = progress_bar(options.progress, chosen.len() as u64);
    let mut shards = Vec::new();
    let mut open: Vec<Sample> = Vec::new();
    // Read and checked in parallel, a bounded number at a time, in order.
    for group in chosen.chunks(256) {
        let samples: Vec<Sample> = group
            .par_iter()
            .map(|(key, extension)| read_sample(&options.input, key, extension))
            .collect::<Result<_, _>>()?;
        for sample in samples {
            let pairs: usize = open.iter().map(|s| s.captions.len()).sum();
            if !open.is_empty() && pairs + sample.captions.len() > options.pairs_per_shard as usize
            {
                write_shard(&root, std::mem::take(&mut open), &mut shards).await?;
            }
            open.push(sample);
            bar.inc(1);
        }
    }
    write_shard(&root, open, &mut shards).await?;
    let manifest = manifest_of(&options.dataset, Contents::Captions, &[], shards);
    write_manifest(&root, &manifest).await?;
    bar.finish_and_clear();
    Ok(manifest)
}

/// Puts the manifest, which makes the shards a dataset.
pub(crate) async fn write_manifest(root: &Root, manifest: &Manifest) -> Result<(), StoreError> {
    let text = serde_json::to_vec_pretty(manifest).expect("plain data");
    root.put(MANIFEST_FILE, Bytes::from(text)).await
}

async fn write_shard(
    root: &Root,
    samples: Vec<Sample>,
    shards: &mut Vec<ShardEntry>,
) -> Result<(), ShardError> {
    let file = format!("{:06}.tar", shards.len());
    let tar = tar_of(samples.into_iter().flat_map(|s| {
        let text = s.captions.join("\n") + "\n";
        [
            (format!("{}.{}", s.key, s.extension), s.image),
            (format!("{}.txt", s.key), text.into_bytes()),
        ]
    }));
    let entry = describe(root, &file, &tar, &[]).await?;
    let there = root
        .get(&file)
        .await
        .ok()
        .is_some_and(|b| sha256(&b) == entry.sha256);
    if !there {
        root.put(&file, Bytes::from(tar)).await?;
    }
    shards.push(entry);
    Ok(())
}

/// A manifest of `shards`. Without names of `sources` the dataset is its own source.
pub(crate) fn manifest_of(
    dataset: &str,
    contents: Contents,
    sources: &[String],
    shards: Vec<ShardEntry>,
) -> Manifest {
    let samples = shards.iter().map(|s| u64::from(s.samples)).sum();
    let pairs = shards.iter().map(|s| u64::from(s.pairs)).sum();
    let sources = match sources {
        [] => {
            let name = dataset.replace(['/', '\\', '.'], "-");
            vec![Source {
                name,
                samples,
                pairs,
            }]
        }
        names => names
            .iter()
            .enumerate()
            .map(|(i, name)| Source {
                name: name.clone(),
                samples: shards.iter().map(|s| u64::from(s.source_samples[i])).sum(),
                pairs: shards.iter().map(|s| u64::from(s.source_pairs[i])).sum(),
            })
            .collect(),
    };
    Manifest {
        schema_version: SCHEMA_VERSION,
        dataset: dataset.to_owned(),
        contents,
        sources,
        files: Vec::new(),
        samples,
        pairs,
        shards,
    }
}

/// Which of `sources` the sample is from, by the first folder of its key.
fn source_of(key: &str, sources: &[String]) -> Option<u32> {
    if sources.len() < 2 {
        return Some(0);
    }
    let (folder, _) = key.split_once('/')?;
    let index = sources.iter().position(|name| name == folder)?;
    Some(index as u32)
}

/// Scans a shard's bytes, writes its index and returns its manifest entry.
pub(crate) async fn describe(
    root: &Root,
    file: &str,
    tar: &[u8],
    sources: &[String],
) -> Result<ShardEntry, ShardError> {
    let mut samples = reader::scan(tar, file)?;
    let (mut source_samples, mut source_pairs) = (vec![0; sources.len()], vec![0; sources.len()]);
    for sample in &mut samples {
        let source = source_of(&sample.key, sources).ok_or_else(|| ShardError::Member {
            shard: file.to_owned(),
            member: sample.key.clone(),
            offset: sample.text.offset,
            reason: "its key does not begin with a source's name".into(),
        })?;
        sample.source = source;
        if let Some(count) = source_samples.get_mut(source as usize) {
            *count += 1;
            source_pairs[source as usize] += sample.pairs;
        }
    }
    let index_file = format!("{}.index.json", file.trim_end_matches(".tar"));
    let pairs = samples.iter().map(|s| s.pairs).sum();
    let index = ShardIndex {
        schema_version: SCHEMA_VERSION,
        file: file.to_owned(),
        samples,
    };
    let text = serde_json::to_vec(&index).expect("plain data");
    let entry = ShardEntry {
        file: file.to_owned(),
        index_file,
        bytes: tar.len() as u64,
        sha256: sha256(tar),
        index_sha256: sha256(&text),
        samples: index.samples.len() as u32,
        pairs,
        source_samples,
        source_pairs,
    };
    root.put(&entry.index_file, Bytes::from(text)).await?;
    Ok(entry)
}

fn progress_bar(wanted: bool, samples: u64) -> ProgressBar {
    if !wanted {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("packing {bar:30} {pos}/{len} {per_sec} ETA {eta}");
    ProgressBar::new(samples).with_style(style.expect("a valid template"))
}
