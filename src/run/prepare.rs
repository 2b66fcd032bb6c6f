//! Before the first process starts: data packed, root claimed.

use std::path::Path;

use anyhow::{Context as _, bail};
use belfry_configs::{Task, ValidConfig};
use belfry_data::contents_of;
use bytes::Bytes;
use shard_tools::manifest::{MANIFEST_FILE, sha256};
use shard_tools::pack::formats::pixels;
use shard_tools::pack::{self, Catalog, PackOptions, list_keys};
use shard_tools::store::{Created, Root};

/// Pairs per shard of data that the launcher packs: small, so that a small dataset has shards to
/// shuffle.
pub const PAIRS_PER_SHARD: u32 = 32;
/// The run's resolved configuration, relative to its root.
pub const RUN_FILE: &str = "run.toml";

/// Packs `data.pack_from` where `data.train` or `data.validation` do not exist yet.
pub async fn pack(config: &ValidConfig) -> anyhow::Result<()> {
    let Some(input) = &config.data.pack_from else {
        return Ok(());
    };
    let (train, keys) = split(config, Path::new(input))?;
    let splits = [
        (config.data.train.only(), train),
        (config.data.validation.only(), keys),
    ];
    for (output, keys) in splits {
        let Some(output) = output else {
            continue;
        };
        if keys.is_empty() || Root::open(output)?.exists(MANIFEST_FILE).await? {
            continue;
        }
        let options = PackOptions {
            pairs_per_shard: PAIRS_PER_SHARD,
            resume: true,
            progress: true,
            ..PackOptions::new(output, config.run.name.as_str())
        };
        let catalog = catalog(config, Path::new(input), &keys)?;
        let manifest = pack::pack(catalog, &options).await?.manifest;
        eprintln!("packed {} pairs into {output}", manifest.pairs);
    }
    Ok(())
}

/// The images `keys` of `data.pack_from` with the texts that `model.task` trains on: their captions, or
/// what their pixels answer.
pub fn catalog(config: &ValidConfig, input: &Path, keys: &[String]) -> anyhow::Result<Catalog> {
    let task = config.model.task;
    let plain = matches!(task, Task::Pretrain | Task::PretrainItc) && !config.data.pack_pixels;
    let catalog = if plain {
        pack::folder(input, Some(keys))
    } else {
        pixels::catalog(input, Some(keys), contents_of(task))
    };
    catalog.context("data.pack_from")
}

/// Keys of the images of `data.pack_from` that are trained on, and of those held out.
pub fn split(config: &ValidConfig, input: &Path) -> anyhow::Result<(Vec<String>, Vec<String>)> {
    let mut keys = list_keys(input).context("data.pack_from")?;
    // Held out by hash: the same images whatever else the folder holds.
    keys.sort_by_cached_key(|key| sha256(format!("holdout/{key}").as_bytes()));
    let held_out = config.data.pack_holdout as usize;
    if held_out >= keys.len() {
        bail!(
            "data.pack_holdout: {held_out} of {} images leave none to train on",
            keys.len()
        );
    }
    let train = keys.split_off(held_out);
    Ok((train, keys))
}

/// The resolved configuration that a run left under its root, with `settings` over it.
pub async fn of_root(root: &Root, settings: &[String]) -> anyhow::Result<ValidConfig> {
    let text = root.get(RUN_FILE).await;
    let text = text.with_context(|| format!("{root} holds no run"))?;
    let text = String::from_utf8(text.to_vec()).context(RUN_FILE)?;
    let origin = format!("{root}/{RUN_FILE}");
    Ok(belfry_configs::load_str(&text, &origin, settings)?)
}

/// Makes the root this run's, or checks that it is.
pub async fn claim(root: &Root, config: &ValidConfig, resume: bool) -> anyhow::Result<()> {
    let resolved = config.to_toml();
    let created = root.create(RUN_FILE, Bytes::from(resolved.clone())).await?;
    if created == Created::Yes {
        if resume {
            eprintln!("nothing to resume under {root}: starting from the beginning");
        }
        return Ok(());
    }
    if !resume {
        bail!("{root} already holds a run; go on with it by --resume, or choose another --root");
    }
    let before = root.get(RUN_FILE).await?;
    let before = String::from_utf8_lossy(&before);
    let differing: Vec<&str> = resolved
        .lines()
        .filter(|line| !before.lines().any(|old| old == *line))
        .collect();
    if !differing.is_empty() {
        bail!(
            "{root} holds a run with another configuration; these lines differ now: {}; undo them, or \
             choose another --root",
            differing.join(", ")
        );
    }
    Ok(())
}
