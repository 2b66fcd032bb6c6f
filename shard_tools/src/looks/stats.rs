//! `stats`: how images, texts, labels and sources are distributed, and what comes twice. Words are
//! what white space separates: tokens are a tokenizer's, which this program has not.

use std::collections::BTreeMap;

use clap::Args;
use serde::Serialize;
use serde_json::json;

use super::dataset::{Dataset, byte_bar, pairs_of};
use super::pixels::size;
use super::table::{Histogram, bars, bytes, thousands};
use super::verify::short_hash;
use crate::error::ShardError;
use crate::manifest::{ANSWERS_FILE, SampleEntry, ShardEntry, ShardIndex};
use crate::pair::Contents;
use crate::reader;

/// Labels and duplicates that are shown by name.
const SHOWN: usize = 12;
const KIB: f64 = 1024.0;
const IMAGE_BYTES: [f64; 10] = [
    4.0 * KIB,
    8.0 * KIB,
    16.0 * KIB,
    32.0 * KIB,
    64.0 * KIB,
    128.0 * KIB,
    256.0 * KIB,
    512.0 * KIB,
    1024.0 * KIB,
    4096.0 * KIB,
];
/// Around the sides that the model is trained with: 224, 288, 384, 576.
const SIDES: [f64; 11] = [
    32.0, 64.0, 128.0, 224.0, 288.0, 384.0, 480.0, 576.0, 768.0, 1024.0, 2048.0,
];
const ASPECTS: [f64; 9] = [0.33, 0.5, 0.66, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0];
const CHARACTERS: [f64; 9] = [10.0, 20.0, 40.0, 60.0, 80.0, 120.0, 160.0, 240.0, 400.0];
/// Around the text lengths of the paper: 40 and 50 tokens.
const WORDS: [f64; 10] = [2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 40.0, 50.0];
const PAIRS: [f64; 9] = [2.0, 3.0, 4.0, 5.0, 6.0, 10.0, 20.0, 50.0, 100.0];

/// What to count.
#[derive(Debug, Args)]
pub struct StatsArguments {
    /// Folder or URL.
    dataset: String,
    /// One JSON object, for machines.
    #[arg(long)]
    json: bool,
    /// Do not look for duplicates, which takes 24 bytes of memory an image and 16 a text.
    #[arg(long)]
    no_duplicates: bool,
}

/// Prints the distributions.
///
/// # Errors
/// What went wrong, naming the file.
pub async fn run(arguments: &StatsArguments) -> anyhow::Result<()> {
    let dataset = Dataset::open(&arguments.dataset).await?;
    let manifest = &dataset.manifest;
    let sources = manifest.sources.len();
    let first: BTreeMap<String, u32> = manifest
        .shards
        .iter()
        .enumerate()
        .map(|(place, shard)| (shard.file.clone(), place as u32))
        .collect();
    let hashes = !arguments.no_duplicates;
    let bar = byte_bar("reading", manifest.shards.iter().map(|s| s.bytes).sum());
    let mut all = Counts::new(sources);
    let look = move |entry: &ShardEntry, index: &ShardIndex, tar: &bytes::Bytes| {
        let mut counts = Counts::new(sources);
        for (place, sample) in index.samples.iter().enumerate() {
            let place = Place {
                shard: first[&entry.file],
                sample: place as u32,
            };
            counts.add(entry, sample, tar, hashes.then_some(place))?;
        }
        Ok(counts)
    };
    dataset
        .each_shard(&bar, look, |counts| all.merge(counts))
        .await?;
    bar.finish_and_clear();
    let duplicates = Duplicates::of(&dataset, &mut all).await?;
    let answers = answers(&dataset).await?;
    if arguments.json {
        println!("{:#}", json!({ "counts": all, "duplicates": duplicates }));
    } else {
        print!("{}", all.text(&dataset, &answers));
        if hashes {
            print!("{}", duplicates.text());
        }
    }
    Ok(())
}

/// Names of labels, where the dataset has them.
async fn answers(dataset: &Dataset) -> anyhow::Result<Vec<String>> {
    Ok(match dataset.manifest.contents {
        Contents::Captions => Vec::new(),
        Contents::Vqa => serde_json::from_slice(&dataset.root.get(ANSWERS_FILE).await?)?,
        Contents::SnliVe => ["contradiction", "neutral", "entailment"]
            .map(String::from)
            .to_vec(),
        Contents::Nlvr2 => ["false", "true"].map(String::from).to_vec(),
    })
}

/// Where a sample lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    shard: u32,
    sample: u32,
}

#[derive(Serialize)]
struct SourceCounts {
    samples: u64,
    pairs: u64,
    image_bytes: u64,
}

#[derive(Serialize)]
struct Counts {
    images: u64,
    /// Images whose size cannot be read; `verify` names them.
    unreadable_images: u64,
    formats: BTreeMap<&'static str, u64>,
    image_bytes: Histogram,
    shorter_side: Histogram,
    longer_side: Histogram,
    width_by_height: Histogram,
    pairs_per_sample: Histogram,
    text_characters: Histogram,
    text_words: Histogram,
    labels: BTreeMap<u32, u64>,
    pairs_without_label: u64,
    sources: Vec<SourceCounts>,
    #[serde(skip)]
    image_hashes: Vec<([u8; 16], Place)>,
    #[serde(skip)]
    text_hashes: Vec<[u8; 16]>,
}

impl Counts {
    fn new(sources: usize) -> Self {
        let empty = || SourceCounts {
            samples: 0,
            pairs: 0,
            image_bytes: 0,
        };
        Counts {
            images: 0,
            unreadable_images: 0,
            formats: BTreeMap::new(),
            image_bytes: Histogram::new(&IMAGE_BYTES),
            shorter_side: Histogram::new(&SIDES),
            longer_side: Histogram::new(&SIDES),
            width_by_height: Histogram::new(&ASPECTS),
            pairs_per_sample: Histogram::new(&PAIRS),
            text_characters: Histogram::new(&CHARACTERS),
            text_words: Histogram::new(&WORDS),
            labels: BTreeMap::new(),
            pairs_without_label: 0,
            sources: (0..sources).map(|_| empty()).collect(),
            image_hashes: Vec::new(),
            text_hashes: Vec::new(),
        }
    }

    fn add(
        &mut self,
        entry: &ShardEntry,
        sample: &SampleEntry,
        tar: &[u8],
        place: Option<Place>,
    ) -> Result<(), ShardError> {
        let mut image_bytes = 0;
        for image in &sample.images {
            let data = reader::member_bytes(tar, &entry.file, image)?;
            self.image(data);
            image_bytes += data.len() as u64;
            self.image_hashes
                .extend(place.map(|place| (short_hash(data), place)));
        }
        let text = reader::member_bytes(tar, &entry.file, &sample.text)?;
        let pairs = pairs_of(&entry.file, sample, text)?;
        self.pairs_per_sample.add(pairs.len() as f64);
        for pair in &pairs {
            self.text_characters.add(pair.text.chars().count() as f64);
            self.text_words
                .add(pair.text.split_whitespace().count() as f64);
            pair.labels
                .iter()
                .for_each(|l| *self.labels.entry(*l).or_default() += 1);
            self.pairs_without_label += u64::from(pair.labels.is_empty());
            self.text_hashes
                .extend(place.map(|_| short_hash(pair.text.as_bytes())));
        }
        if let Some(source) = self.sources.get_mut(sample.source as usize) {
            source.samples += 1;
            source.pairs += pairs.len() as u64;
            source.image_bytes += image_bytes;
        }
        Ok(())
    }

    fn image(&mut self, data: &[u8]) {
        self.images += 1;
        self.image_bytes.add(data.len() as f64);
        let format = match image::guess_format(data) {
            Ok(image::ImageFormat::Jpeg) => "jpeg",
            Ok(image::ImageFormat::Png) => "png",
            Ok(image::ImageFormat::WebP) => "webp",
            _ => "other",
        };
        *self.formats.entry(format).or_default() += 1;
        let Ok((width, height)) = size(data) else {
            self.unreadable_images += 1;
            return;
        };
        let (width, height) = (width as f64, height as f64);
        self.shorter_side.add(width.min(height));
        self.longer_side.add(width.max(height));
        self.width_by_height.add(width / height);
    }

    fn merge(&mut self, other: Counts) {
        self.images += other.images;
        self.unreadable_images += other.unreadable_images;
        for (format, count) in other.formats {
            *self.formats.entry(format).or_default() += count;
        }
        self.image_bytes.merge(&other.image_bytes);
        self.shorter_side.merge(&other.shorter_side);
        self.longer_side.merge(&other.longer_side);
        self.width_by_height.merge(&other.width_by_height);
        self.pairs_per_sample.merge(&other.pairs_per_sample);
        self.text_characters.merge(&other.text_characters);
        self.text_words.merge(&other.text_words);
        for (label, count) in other.labels {
            *self.labels.entry(label).or_default() += count;
        }
        self.pairs_without_label += other.pairs_without_label;
        for (source, more) in self.sources.iter_mut().zip(other.sources) {
            source.samples += more.samples;
            source.pairs += more.pairs;
            source.image_bytes += more.image_bytes;
        }
        self.image_hashes.extend(other.image_hashes);
        self.text_hashes.extend(other.text_hashes);
    }

    fn text(&self, dataset: &Dataset, names: &[String]) -> String {
        let manifest = &dataset.manifest;
        let whole = |value: f64| thousands(value.round() as u64);
        let mut text = format!(
            "{}: {} samples, {} pairs, {} images\n\n",
            manifest.dataset,
            thousands(manifest.samples),
            thousands(manifest.pairs),
            thousands(self.images)
        );
        for (source, counts) in manifest.sources.iter().zip(&self.sources) {
            text.push_str(&format!(
                "source {}: {} samples, {} pairs, {} of images\n",
                source.name,
                thousands(counts.samples),
                thousands(counts.pairs),
                bytes(counts.image_bytes as f64)
            ));
        }
        let named = |(name, count): (&&str, &u64)| ((*name).to_owned(), *count);
        let formats: Vec<_> = self.formats.iter().map(named).collect();
        text.push_str(&format!("\nimage formats\n{}", bars(&formats)));
        if self.unreadable_images > 0 {
            let count = thousands(self.unreadable_images);
            text.push_str(&format!(
                "  {count} have no readable size: `verify` names them\n"
            ));
        }
        let parts = [
            self.image_bytes.text("bytes of an image", bytes),
            self.shorter_side.text("shorter side in pixels", whole),
            self.longer_side.text("longer side in pixels", whole),
            self.width_by_height
                .text("width / height", |v| format!("{v:.2}")),
            self.pairs_per_sample.text("pairs of a sample", |v| {
                format!("{v:.4}")
                    .trim_end_matches('0')
                    .trim_end_matches('.')
                    .to_owned()
            }),
            self.text_characters.text("characters of a text", whole),
            self.text_words.text("words of a text", whole),
        ];
        for part in parts {
            text.push('\n');
            text.push_str(&part);
        }
        text.push_str(&self.label_text(names));
        text
    }

    /// The most frequent labels; ties in the order of labels.
    fn label_text(&self, names: &[String]) -> String {
        if self.labels.is_empty() {
            return String::new();
        }
        let mut labels: Vec<(u32, u64)> = self.labels.iter().map(|(l, c)| (*l, *c)).collect();
        labels.sort_by_key(|(label, count)| (std::cmp::Reverse(*count), *label));
        let rest: u64 = labels.iter().skip(SHOWN).map(|(_, count)| count).sum();
        let rows = labels.iter().take(SHOWN).map(|(label, count)| {
            let name = names.get(*label as usize).map_or("?", String::as_str);
            (format!("{name} ({label})"), *count)
        });
        let mut rows: Vec<_> = rows.collect();
        if rest > 0 {
            rows.push((format!("{} others", labels.len() - SHOWN), rest));
        }
        format!(
            "\nlabels: {} of them, {} pairs without one\n{}",
            thousands(labels.len() as u64),
            thousands(self.pairs_without_label),
            bars(&rows)
        )
    }
}

/// What comes more than once in the whole dataset.
#[derive(Serialize)]
struct Duplicates {
    /// Images beyond the first of each group with the same bytes.
    images: u64,
    /// Texts beyond the first of each group of the same characters.
    texts: u64,
    /// Keys of the first groups of samples that share an image.
    samples: Vec<Vec<String>>,
}

impl Duplicates {
    /// Sorts the hashes where they are, so that nothing more is held.
    async fn of(dataset: &Dataset, counts: &mut Counts) -> Result<Self, ShardError> {
        counts.image_hashes.sort_unstable();
        counts.text_hashes.sort_unstable();
        let images = &counts.image_hashes;
        let mut groups: Vec<Vec<Place>> = Vec::new();
        let mut repeated = 0;
        for group in images.chunk_by(|a, b| a.0 == b.0).filter(|g| g.len() > 1) {
            repeated += group.len() as u64 - 1;
            groups.push(group.iter().take(SHOWN).map(|(_, place)| *place).collect());
            groups.sort_unstable();
            groups.truncate(SHOWN);
        }
        let texts = counts.text_hashes.chunk_by(|a, b| a == b);
        let texts = texts.map(|group| group.len() as u64 - 1).sum();
        let mut samples = Vec::new();
        for group in groups {
            let mut keys = Vec::new();
            for place in group {
                let entry = &dataset.manifest.shards[place.shard as usize];
                let index = super::dataset::index(&dataset.root, entry).await?;
                keys.push(index.samples[place.sample as usize].key.clone());
            }
            samples.push(keys);
        }
        Ok(Duplicates {
            images: repeated,
            texts,
            samples,
        })
    }

    fn text(&self) -> String {
        let mut text = format!(
            "\nduplicates: {} images with the bytes of another, {} texts equal to another\n",
            thousands(self.images),
            thousands(self.texts)
        );
        for keys in &self.samples {
            text.push_str(&format!("  the same image: {}\n", keys.join(", ")));
        }
        text
    }
}
