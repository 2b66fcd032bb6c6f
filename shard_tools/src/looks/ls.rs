//! `ls`: samples with their pairs, found by shard and key.

use anyhow::bail;
use clap::Args;
use futures::{StreamExt as _, TryStreamExt as _};
use serde_json::json;

use super::dataset::{self, Dataset, READS, pairs_of};
use crate::error::ShardError;
use crate::manifest::{Member, SampleEntry, ShardEntry, ShardIndex};
use crate::pair::Pair;

/// What to list.
#[derive(Debug, Args)]
pub struct LsArguments {
    /// Folder or URL.
    dataset: String,
    /// At most this many samples; 0 for all.
    #[arg(long, default_value_t = 20)]
    limit: usize,
    /// Only of this shard: its file or its number.
    #[arg(long)]
    shard: Option<String>,
    /// Only samples whose key holds this text.
    #[arg(long)]
    key: Option<String>,
    /// One JSON object a line, with members and labels.
    #[arg(long)]
    json: bool,
}

impl LsArguments {
    fn wants(&self, sample: &SampleEntry) -> bool {
        let key = self.key.as_ref();
        key.is_none_or(|part| sample.key.contains(part.as_str()))
    }
}

/// Prints a line for each sample: shard, key, pairs.
///
/// # Errors
/// What went wrong, naming the file; that nothing was found.
pub async fn run(arguments: &LsArguments) -> anyhow::Result<()> {
    let dataset = Dataset::open(&arguments.dataset).await?;
    let shards = chosen(&dataset, arguments.shard.as_deref())?;
    let mut left = match arguments.limit {
        0 => usize::MAX,
        limit => limit,
    };
    let everything = left;
    // A listing without a key ends soon: its indexes are read one by one.
    let ahead = if arguments.key.is_some() { READS } else { 1 };
    let root = &dataset.root;
    let read = |entry: ShardEntry| async move {
        let index = dataset::index(root, &entry).await?;
        Ok::<(ShardEntry, ShardIndex), ShardError>((entry, index))
    };
    let mut indexes = futures::stream::iter(shards).map(read).buffered(ahead);
    while left > 0
        && let Some((entry, index)) = indexes.try_next().await?
    {
        let wanted = index
            .samples
            .iter()
            .filter(|sample| arguments.wants(sample));
        let wanted: Vec<&SampleEntry> = wanted.take(left).collect();
        left -= wanted.len();
        let texts: Vec<Member> = wanted.iter().map(|sample| sample.text.clone()).collect();
        let texts = dataset.members(&entry, &texts).await?;
        for (sample, text) in wanted.into_iter().zip(texts) {
            let pairs = pairs_of(&entry.file, sample, &text)?;
            println!("{}", line(&entry.file, sample, &pairs, arguments.json));
        }
    }
    if left == everything
        && let Some(key) = &arguments.key
    {
        bail!("{}: no key holds `{key}`", arguments.dataset);
    }
    Ok(())
}

/// The shards that `name` means, by file or by number; all without one.
fn chosen(dataset: &Dataset, name: Option<&str>) -> anyhow::Result<Vec<ShardEntry>> {
    let shards = &dataset.manifest.shards;
    let Some(name) = name else {
        return Ok(shards.clone());
    };
    let by_file = shards.iter().find(|shard| shard.file == name);
    let by_number = name.parse::<usize>().ok().and_then(|n| shards.get(n));
    let Some(shard) = by_file.or(by_number) else {
        bail!(
            "--shard {name}: {} has {} shards, {} to {}",
            dataset.root,
            shards.len(),
            shards.first().map_or("", |s| &s.file),
            shards.last().map_or("", |s| &s.file)
        );
    };
    Ok(vec![shard.clone()])
}

fn line(shard: &str, sample: &SampleEntry, pairs: &[Pair], as_json: bool) -> String {
    if as_json {
        return json!({
            "shard": shard,
            "key": sample.key,
            "source": sample.source,
            "images": sample.images,
            "text": sample.text,
            "pairs": pairs,
        })
        .to_string();
    }
    let texts = pairs.iter().map(|pair| match &pair.labels[..] {
        [] => pair.text.clone(),
        labels => format!("{} {labels:?}", pair.text),
    });
    let texts: Vec<String> = texts.collect();
    format!("{shard}\t{}\t{}", sample.key, texts.join(" | "))
}
