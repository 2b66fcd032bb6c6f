//! The command line of packing.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{MaxBad, PackOptions, Packed, by_kind, engine, folder, journal};
use crate::check::Check;
use crate::error::ShardError;
use crate::store::Root;

/// How the input is laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// key.jpg|png|webp beside key.txt, one caption a line
    #[default]
    Folder,
}

/// What every kind of packing takes.
#[derive(Args, Debug)]
pub struct Common {
    /// A name for people
    #[arg(long, default_value = "dataset")]
    dataset: String,
    /// A shard is closed before it holds more pairs than this
    #[arg(long, value_name = "N", default_value_t = super::PAIRS_PER_SHARD)]
    pairs_per_shard: u32,
    /// A shard is closed before its tar is longer than this: bytes, or with KiB, MiB, GiB
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = size)]
    shard_bytes: u64,
    /// Seeds the shuffle of samples over shards
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// How closely images are looked at
    #[arg(long, value_enum, default_value_t)]
    check: Check,
    /// So many samples and records may be missing or broken, as a number or a share (0.5%); each is
    /// listed in bad.jsonl beside the manifest, none is replaced
    #[arg(long, value_name = "N|SHARE", default_value = "0")]
    max_bad: MaxBad,
    /// Go on with an unfinished dataset; finished shards are not read again
    #[arg(long)]
    resume: bool,
    /// Threads that read and check [default: one per core]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    threads: usize,
}

impl Common {
    fn options(self, output: String) -> PackOptions {
        PackOptions {
            output,
            dataset: self.dataset,
            pairs_per_shard: self.pairs_per_shard.max(1),
            shard_bytes: self.shard_bytes,
            seed: self.seed,
            check: self.check,
            max_bad: self.max_bad,
            resume: self.resume,
            threads: self.threads,
            progress: true,
        }
    }
}

/// Arguments of `pack`.
#[derive(Args, Debug)]
pub struct PackArguments {
    /// How the input is laid out
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// Folder as the publisher's files unpack, or with tars
    input: PathBuf,
    /// Folder or s3:// URL of the new dataset
    output: String,
    #[command(flatten)]
    common: Common,
}

/// Runs `pack`.
///
/// # Errors
/// [`ShardError`], naming the file.
pub async fn pack(arguments: PackArguments) -> Result<(), ShardError> {
    let options = arguments.common.options(arguments.output);
    // Before hundreds of megabytes of annotations are read.
    journal::vacant(&Root::open(&options.output)?, options.resume).await?;
    let catalog = match arguments.format {
        Format::Folder => folder::catalog(&arguments.input, None)?,
    };
    tell(&options.output, &engine::pack(catalog, &options).await?);
    Ok(())
}

/// What was packed and what was not.
fn tell(output: &str, packed: &Packed) {
    let manifest = &packed.manifest;
    println!(
        "{output}: {} samples, {} pairs in {} shards",
        manifest.samples,
        manifest.pairs,
        manifest.shards.len()
    );
    for (rule, count) in &packed.left_out {
        println!("left out  {count:>9}  {rule}");
    }
    for (kind, count) in by_kind(&packed.bad) {
        println!(
            "bad       {count:>9}  {kind} (listed in {})",
            super::BAD_FILE
        );
    }
}

/// Bytes, as `1048576`, `512KiB`, `256MiB` or `1GiB`.
fn size(text: &str) -> Result<u64, String> {
    let units = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("", 0)];
    let found = units.iter().find_map(|(unit, shift)| {
        let number: u64 = text.strip_suffix(unit)?.trim().parse().ok()?;
        number.checked_mul(1 << shift)
    });
    found
        .filter(|bytes| *bytes > 0)
        .ok_or_else(|| format!("`{text}` is no size; 268435456 and 256MiB are"))
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_have_units() {
        assert_eq!(size("256MiB"), Ok(256 << 20));
        assert_eq!(size("1000"), Ok(1000));
        for wrong in ["", "0", "1MB", "-1", "1.5GiB", "99999999999GiB"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
}
