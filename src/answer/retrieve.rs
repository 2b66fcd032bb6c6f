//! `belfry retrieve`: images of a folder for a text, or its captions for an image.
//!
//! The nearest by contrastive features come first out of the index; the best of them go through
//! fusion and are ordered by how well they match (model_spec 14).

use std::path::PathBuf;

use anyhow::{bail, ensure};
use belfry_configs::Task;
use belfry_model::{EncodedImages, EncodedTexts, best, similarity};
use clap::Args;
use serde_json::{Value, json};

use super::index::{Entry, Index};
use super::{Reader, probability};
use crate::trained::{Trained, TrainedArguments};

/// Arguments of `belfry retrieve`.
#[derive(Args)]
pub struct RetrieveArguments {
    #[command(flatten)]
    trained: TrainedArguments,
    /// A folder of images, with captions in key.txt beside key.jpg if there are any; its index is made
    /// when it is searched for the first time, and kept in it.
    #[arg(long, value_name = "FOLDER")]
    index: PathBuf,
    /// Find images for this text.
    #[arg(long, value_name = "TEXT", required_unless_present = "image")]
    query: Option<String>,
    /// Find captions for this image.
    #[arg(long, value_name = "FILE", conflicts_with = "query")]
    image: Option<PathBuf>,
    /// So many results.
    #[arg(long, default_value_t = 10, value_name = "N")]
    top: usize,
    /// So many of the nearest are ordered by the matching head; 0: none, which is faster.
    #[arg(long, default_value_t = 32, value_name = "N")]
    rerank: usize,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What was found.
struct Result {
    place: usize,
    similarity: f32,
    /// Where it was ordered by the matching head.
    matches: Option<f64>,
}

/// Searches; see the module.
pub async fn retrieve(arguments: RetrieveArguments) -> anyhow::Result<()> {
    ensure!(arguments.top > 0, "--top: must be at least 1");
    let trained = arguments.trained.open(&[]).await?;
    trained.must_be(&[Task::Retrieval, Task::PretrainItc], "belfry retrieve")?;
    tokio::task::spawn_blocking(move || search(&arguments, &trained)).await?
}

fn search(arguments: &RetrieveArguments, trained: &Trained) -> anyhow::Result<()> {
    let reader = Reader::new(&trained.config)?;
    let (model, weights) = (&trained.model, &trained.weights);
    // The query first: what is wrong with it is said before a folder is encoded.
    let asked = match (&arguments.query, &arguments.image) {
        (Some(query), _) => {
            let tokens = reader.texts([query.as_str()])?;
            Asked::Text(model.encode_texts(weights, &tokens.ids, &tokens.mask)?)
        }
        (None, Some(image)) => Asked::Image(model.encode_images(weights, &reader.image(image)?)?),
        (None, None) => bail!("--query or --image: what is looked for?"),
    };
    let index = Index::of(&arguments.index, trained, &reader)?;
    for (file, reason) in &index.broken {
        eprintln!("left out: {file}: {reason}");
    }
    if index.fresh > 0 {
        let (images, captions) = (index.images.len(), index.captions.len());
        eprintln!(
            "indexed {} anew of {images} images and {captions} captions",
            index.fresh
        );
    }
    let entries = match &asked {
        Asked::Text(_) => &index.images,
        Asked::Image(_) => &index.captions,
    };
    ensure!(
        !entries.is_empty(),
        "--index {}: holds nothing to find; captions are looked for in key.txt beside key.jpg",
        arguments.index.display()
    );
    let found = found(arguments, trained, (&reader, &asked), entries)?;
    print(arguments, trained, &found, entries);
    Ok(())
}

enum Asked {
    Text(EncodedTexts),
    Image(EncodedImages),
}

fn found(
    arguments: &RetrieveArguments,
    trained: &Trained,
    (reader, asked): (&Reader, &Asked),
    entries: &[Entry],
) -> anyhow::Result<Vec<Result>> {
    let feature = match asked {
        Asked::Text(text) => text.features(),
        Asked::Image(image) => image.features(),
    };
    let near: Vec<f32> = entries
        .iter()
        .map(|e| similarity(&e.feature, feature))
        .collect();
    let nearest = best(&near, arguments.top.max(arguments.rerank));
    let result = |(place, similarity)| Result {
        place,
        similarity,
        matches: None,
    };
    let mut found: Vec<Result> = nearest.into_iter().map(result).collect();
    let size = trained.config.eval.pairs_per_batch as usize;
    let again = arguments.rerank.min(found.len());
    for results in found[..again].chunks_mut(size) {
        let entries: Vec<&Entry> = results.iter().map(|r| &entries[r.place]).collect();
        let logits = fused(arguments, trained, (reader, asked), &entries)?;
        for (result, logits) in results.iter_mut().zip(logits) {
            result.matches = Some(probability(logits));
        }
    }
    found[..again].sort_by(|a, b| {
        let key = |r: &Result| r.matches.unwrap_or_default();
        key(b)
            .total_cmp(&key(a))
            .then(b.similarity.total_cmp(&a.similarity))
    });
    found.truncate(arguments.top);
    Ok(found)
}

/// Logits of no match and match of what is asked with some entries.
fn fused(
    arguments: &RetrieveArguments,
    trained: &Trained,
    (reader, asked): (&Reader, &Asked),
    entries: &[&Entry],
) -> anyhow::Result<Vec<[f32; 2]>> {
    let (model, weights) = (&trained.model, &trained.weights);
    let rows = 0..entries.len();
    match asked {
        Asked::Text(text) => {
            let mut pixels = Vec::new();
            for entry in entries {
                pixels.extend(reader.image(&arguments.index.join(&entry.file))?);
            }
            let images = model.encode_images(weights, &pixels)?;
            let pairs: Vec<(usize, usize)> = rows.map(|image| (0, image)).collect();
            Ok(model.pair_logits(weights, text, &images, &pairs)?)
        }
        Asked::Image(image) => {
            let tokens = reader.cut_texts(entries.iter().map(|e| e.caption.as_str()))?;
            let texts = model.encode_texts(weights, &tokens.ids, &tokens.mask)?;
            let pairs: Vec<(usize, usize)> = rows.map(|text| (text, 0)).collect();
            Ok(model.pair_logits(weights, &texts, image, &pairs)?)
        }
    }
}

fn print(arguments: &RetrieveArguments, trained: &Trained, found: &[Result], entries: &[Entry]) {
    if arguments.json {
        let result = |result: &Result| {
            let entry = &entries[result.place];
            let mut line = json!({
                "file": entry.file, "similarity": result.similarity, "match": result.matches,
            });
            if !entry.caption.is_empty() {
                line["caption"] = json!(entry.caption);
            }
            line
        };
        let results: Vec<Value> = found.iter().map(result).collect();
        println!("{}", json!({"model": trained.origin, "results": results}));
        return;
    }
    println!("{:>9}  {:>10}  found", "match", "similarity");
    for result in found {
        let entry = &entries[result.place];
        let matches = result
            .matches
            .map_or("-".into(), |m| format!("{:.2} %", 100.0 * m));
        let name = match entry.caption.is_empty() {
            true => entry.file.clone(),
            false => format!("{} ({})", entry.caption, entry.file),
        };
        println!("{matches:>9}  {:>10.4}  {name}", result.similarity);
    }
}
