//! `sample`: some samples of a dataset as a contact sheet, for the eye. The same seed draws the same.

use std::collections::BTreeSet;
use std::io::Cursor;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::Args;

use super::dataset::{Dataset, blocking, index, pairs_of};
use super::sheet::{Cell, draw, thumbnail};
use super::verify::short_hash;
use crate::error::ShardError;
use crate::manifest::{ANSWERS_FILE, Member, SampleEntry, ShardEntry};
use crate::pair::{Contents, Pair};

/// Most samples on one sheet: about 130 megapixels.
const COUNT_MAX: u64 = 2000;
/// Most answers of a question that are shown.
const ANSWERS_SHOWN: usize = 3;

/// What to draw.
#[derive(Debug, Args)]
pub struct SampleArguments {
    /// Folder or URL.
    dataset: String,
    /// The PNG to write.
    #[arg(long)]
    to: PathBuf,
    /// Samples on the sheet.
    #[arg(long, default_value_t = 24, value_parser = clap::value_parser!(u64).range(1..=COUNT_MAX))]
    count: u64,
    /// Samples in a row.
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..=40))]
    columns: u32,
    /// Another seed draws other samples.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// Draws and writes the sheet.
///
/// # Errors
/// What went wrong, naming the file.
pub async fn run(arguments: &SampleArguments) -> anyhow::Result<()> {
    let dataset = Dataset::open(&arguments.dataset).await?;
    let manifest = &dataset.manifest;
    let drawn = drawn(arguments.seed, arguments.count, manifest.samples);
    if drawn.is_empty() {
        bail!("{}: holds no sample", arguments.dataset);
    }
    let names = Names::of(&dataset).await?;
    let mut cells = Vec::new();
    let mut broken = 0;
    for (entry, places) in by_shard(&manifest.shards, &drawn) {
        let index = index(&dataset.root, entry).await?;
        let samples: Vec<SampleEntry> = places.iter().map(|p| index.samples[*p].clone()).collect();
        let read = read_cells(&dataset, entry, samples, names.clone()).await?;
        broken += read
            .iter()
            .flat_map(|c| &c.images)
            .filter(|i| i.is_err())
            .count();
        cells.extend(read);
    }
    let title = format!(
        "{}: {} of {} samples, seed {}",
        manifest.dataset,
        cells.len(),
        manifest.samples,
        arguments.seed
    );
    let (columns, shown) = (arguments.columns, cells.len());
    let sheet = blocking(move || draw(&title, &cells, columns)).await;
    let mut png = Vec::new();
    sheet.write_to(&mut Cursor::new(&mut png), image::ImageFormat::Png)?;
    let to = arguments.to.display();
    std::fs::write(&arguments.to, png).with_context(|| format!("cannot write {to}"))?;
    println!(
        "{to}: {shown} samples, {} x {} pixels",
        sheet.width(),
        sheet.height()
    );
    if broken > 0 {
        println!("{broken} images do not decode: see the sheet, and run `verify`");
    }
    Ok(())
}

/// Sorted numbers of `count` different samples, or of all.
fn drawn(seed: u64, count: u64, samples: u64) -> BTreeSet<u64> {
    if count >= samples {
        return (0..samples).collect();
    }
    let mut drawn = BTreeSet::new();
    let mut draw = 0u64;
    // Each draw hits a new sample with probability 1 - drawn / samples: this ends.
    while (drawn.len() as u64) < count {
        let hash = short_hash(format!("{seed}/{draw}").as_bytes());
        let bits = u64::from_le_bytes(hash[..8].try_into().expect("16 bytes"));
        drawn.insert(((u128::from(bits) * u128::from(samples)) >> 64) as u64);
        draw += 1;
    }
    drawn
}

/// The drawn samples of each shard, by their place in it.
fn by_shard<'a>(
    shards: &'a [ShardEntry],
    drawn: &BTreeSet<u64>,
) -> Vec<(&'a ShardEntry, Vec<usize>)> {
    let mut before = 0;
    let mut found = Vec::new();
    for entry in shards {
        let end = before + u64::from(entry.samples);
        let places: Vec<usize> = drawn
            .range(before..end)
            .map(|n| (n - before) as usize)
            .collect();
        if !places.is_empty() {
            found.push((entry, places));
        }
        before = end;
    }
    found
}

async fn read_cells(
    dataset: &Dataset,
    entry: &ShardEntry,
    samples: Vec<SampleEntry>,
    names: Names,
) -> Result<Vec<Cell>, ShardError> {
    let of = |sample: &SampleEntry| -> Vec<Member> {
        let images = sample.images.iter().cloned();
        images.chain([sample.text.clone()]).collect()
    };
    let members: Vec<Member> = samples.iter().flat_map(of).collect();
    let mut data = dataset.members(entry, &members).await?.into_iter();
    let file = entry.file.clone();
    let decode = move || {
        let cells = samples.into_iter().map(|sample| {
            let images = data.by_ref().take(sample.images.len());
            let images = images.map(|bytes| thumbnail(&bytes)).collect();
            let text = data.next().expect("one for each member");
            let pairs = pairs_of(&file, &sample, &text)?;
            let texts = pairs
                .iter()
                .map(|pair| (pair.text.clone(), names.label(pair)));
            Ok(Cell {
                key: sample.key.clone(),
                images,
                texts: texts.collect(),
            })
        });
        cells.collect()
    };
    blocking(decode).await
}

/// What labels are called.
#[derive(Clone)]
struct Names {
    contents: Contents,
    answers: Vec<String>,
}

impl Names {
    async fn of(dataset: &Dataset) -> anyhow::Result<Self> {
        let contents = dataset.manifest.contents;
        let answers = match contents {
            Contents::Captions => Vec::new(),
            Contents::Vqa => {
                let bytes = dataset.root.get(ANSWERS_FILE).await?;
                serde_json::from_slice(&bytes).context(ANSWERS_FILE)?
            }
            Contents::SnliVe => ["contradiction", "neutral", "entailment"]
                .map(String::from)
                .into(),
            Contents::Nlvr2 => ["false", "true"].map(String::from).into(),
        };
        Ok(Names { contents, answers })
    }

    /// Labels of a pair, the likeliest first.
    fn label(&self, pair: &Pair) -> Option<String> {
        if self.contents == Contents::Captions && pair.labels.is_empty() {
            return None;
        }
        if pair.labels.is_empty() {
            return Some("-> no label".into());
        }
        let score = |place: usize| pair.scores.get(place).copied();
        let mut order: Vec<usize> = (0..pair.labels.len()).collect();
        order.sort_by(|a, b| score(*b).partial_cmp(&score(*a)).unwrap_or(a.cmp(b)));
        let named = order.into_iter().take(ANSWERS_SHOWN).map(|place| {
            let label = pair.labels[place];
            let name = self.answers.get(label as usize);
            let name = name.cloned().unwrap_or_else(|| format!("label {label}"));
            score(place).map_or(name.clone(), |score| format!("{name} {score}"))
        });
        Some(format!("-> {}", named.collect::<Vec<_>>().join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_draws_the_same_different_samples() {
        let one = drawn(7, 20, 1000);
        assert_eq!((one.len(), &one), (20, &drawn(7, 20, 1000)));
        assert_ne!(one, drawn(8, 20, 1000));
        assert!(one.last().is_some_and(|last| *last < 1000));
        assert_eq!(drawn(0, 20, 3).into_iter().collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(drawn(0, 19, 20).len(), 19);
    }
}
