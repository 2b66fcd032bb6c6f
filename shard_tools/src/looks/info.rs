//! `info`: what a dataset's manifest says, in one small read.

use clap::Args;
use serde_json::{Value, json};

use super::table::{bytes, thousands};
use crate::manifest::{MANIFEST_FILE, Manifest, sha256};
use crate::store::Root;

/// Whose totals.
#[derive(Debug, Args)]
pub struct InfoArguments {
    /// Folder or URL.
    dataset: String,
    /// One JSON object, for machines.
    #[arg(long)]
    json: bool,
}

/// Prints the totals.
///
/// # Errors
/// That there is no dataset, or what is wrong with its manifest.
pub async fn run(arguments: &InfoArguments) -> anyhow::Result<()> {
    let root = Root::existing(&arguments.dataset)?;
    let text = root.get(MANIFEST_FILE).await?;
    let manifest = Manifest::parse(&text, &format!("{root}/{MANIFEST_FILE}"))?;
    let sha256 = sha256(&text);
    if arguments.json {
        println!("{:#}", as_json(&manifest, &sha256));
    } else {
        print!("{}", as_text(&manifest, &sha256));
    }
    Ok(())
}

struct Sizes {
    total: u64,
    min: u64,
    mean: f64,
    max: u64,
}

fn sizes(values: impl Iterator<Item = u64> + Clone) -> Sizes {
    let total = values.clone().sum();
    let count = values.clone().count().max(1);
    Sizes {
        total,
        min: values.clone().min().unwrap_or(0),
        mean: total as f64 / count as f64,
        max: values.max().unwrap_or(0),
    }
}

fn pairs_per_sample(manifest: &Manifest) -> f64 {
    manifest.pairs as f64 / (manifest.samples as f64).max(1.0)
}

fn as_json(manifest: &Manifest, sha256: &str) -> Value {
    let bytes = sizes(manifest.shards.iter().map(|s| s.bytes));
    let pairs = sizes(manifest.shards.iter().map(|s| u64::from(s.pairs)));
    let spread = |s: &Sizes| json!({"min": s.min, "mean": s.mean, "max": s.max});
    json!({
        "dataset": manifest.dataset,
        "contents": manifest.contents,
        "manifest_sha256": sha256,
        "shards": manifest.shards.len(),
        "samples": manifest.samples,
        "pairs": manifest.pairs,
        "pairs_per_sample": pairs_per_sample(manifest),
        "bytes": bytes.total,
        "shard_bytes": spread(&bytes),
        "shard_pairs": spread(&pairs),
        "sources": manifest.sources,
        "files": manifest.files,
    })
}

fn as_text(manifest: &Manifest, sha256: &str) -> String {
    let shard_bytes = sizes(manifest.shards.iter().map(|s| s.bytes));
    let shard_pairs = sizes(manifest.shards.iter().map(|s| u64::from(s.pairs)));
    let contents = serde_json::to_value(manifest.contents).expect("plain data");
    let mut lines = vec![
        ("dataset", manifest.dataset.clone()),
        ("contents", contents.as_str().unwrap_or_default().to_owned()),
        ("shards", thousands(manifest.shards.len() as u64)),
        ("samples", thousands(manifest.samples)),
        (
            "pairs",
            format!(
                "{}, {:.2} a sample",
                thousands(manifest.pairs),
                pairs_per_sample(manifest)
            ),
        ),
        ("bytes", bytes(shard_bytes.total as f64)),
        (
            "a shard",
            format!(
                "{} to {}, mean {}; {} to {} pairs, mean {:.0}",
                bytes(shard_bytes.min as f64),
                bytes(shard_bytes.max as f64),
                bytes(shard_bytes.mean),
                thousands(shard_pairs.min),
                thousands(shard_pairs.max),
                shard_pairs.mean
            ),
        ),
    ];
    for source in &manifest.sources {
        let (samples, pairs) = (thousands(source.samples), thousands(source.pairs));
        lines.push((
            "source",
            format!("{}: {samples} samples, {pairs} pairs", source.name),
        ));
    }
    for file in &manifest.files {
        let size = bytes(file.bytes as f64);
        lines.push((
            "file",
            format!("{}, {size}, sha256 {}", file.file, file.sha256),
        ));
    }
    lines.push(("manifest", format!("sha256 {sha256}")));
    let print = |(name, value): &(&str, String)| format!("{name:<9} {value}\n");
    lines.iter().map(print).collect()
}
