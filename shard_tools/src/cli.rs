//! The command line of `shard_tools`, also reached as `belfry shards`.

use anyhow::{Context as _, bail};
use clap::Subcommand;

use crate::pack;
use crate::pack::cli::{MixArguments, PackArguments};
use crate::store::Root;
use crate::{pair, reader, verify};

/// What to do with a dataset.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Pack a publisher's files, a folder of images and captions, or webdataset tars into shards.
    Pack(PackArguments),
    /// Shuffle several packed datasets into one, each a source of its own.
    Mix(MixArguments),
    /// Write manifest and indexes beside webdataset tars that another program wrote.
    Index {
        /// Folder or s3:// URL with the tars.
        dataset: String,
        /// A name for people.
        #[arg(long, default_value = "dataset")]
        name: String,
    },
    /// Check every hash and decode every member; lists all that is wrong.
    Verify {
        /// Folder or s3:// URL.
        dataset: String,
    },
    /// List samples with their captions.
    Ls {
        /// Folder or s3:// URL.
        dataset: String,
        /// At most this many samples.
        #[arg(long, default_value_t = 20)]
        limit: usize,
    },
    /// Totals of a dataset.
    Info {
        /// Folder or s3:// URL.
        dataset: String,
    },
}

/// Runs a command; results go to standard output.
///
/// # Errors
/// What went wrong, naming the file.
pub async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Pack(arguments) => pack::cli::pack(arguments).await?,
        Command::Mix(arguments) => pack::cli::mix(arguments).await?,
        Command::Index { dataset, name } => {
            let manifest = verify::index_foreign(&Root::open(&dataset)?, &name).await?;
            println!(
                "{dataset}: indexed {} shards, {} pairs",
                manifest.shards.len(),
                manifest.pairs
            );
        }
        Command::Verify { dataset } => {
            let problems = verify::problems(&existing(&dataset)?).await?;
            for problem in &problems {
                println!("{problem}");
            }
            if !problems.is_empty() {
                bail!("{dataset}: {} problems", problems.len());
            }
            println!("{dataset}: all hashes agree and every member decodes");
        }
        Command::Ls { dataset, limit } => list(&existing(&dataset)?, limit).await?,
        Command::Info { dataset } => {
            let manifest = verify::manifest(&existing(&dataset)?).await?;
            let bytes: u64 = manifest.shards.iter().map(|s| s.bytes).sum();
            println!("dataset  {}", manifest.dataset);
            println!("shards   {}", manifest.shards.len());
            println!("samples  {}", manifest.samples);
            println!("pairs    {}", manifest.pairs);
            println!("bytes    {bytes}");
        }
    }
    Ok(())
}

/// Opens a dataset to read; a folder that is not there is not made.
fn existing(location: &str) -> anyhow::Result<Root> {
    if !location.contains("://") && !std::path::Path::new(location).is_dir() {
        bail!("{location} is not a folder");
    }
    Ok(Root::open(location)?)
}

async fn list(root: &Root, limit: usize) -> anyhow::Result<()> {
    let mut left = limit;
    for entry in &verify::manifest(root).await?.shards {
        if left == 0 {
            break;
        }
        let index = verify::index(root, entry).await?;
        let tar = root.get(&entry.file).await?;
        for sample in index.samples.iter().take(left) {
            let text = reader::member_bytes(&tar, &entry.file, &sample.text)?;
            let pairs = pair::pairs(&sample.text.name, text).map_err(anyhow::Error::msg);
            let pairs = pairs.with_context(|| format!("{}: {}", entry.file, sample.key))?;
            let texts: Vec<&str> = pairs.iter().map(|pair| pair.text.as_str()).collect();
            println!("{}\t{}\t{}", entry.file, sample.key, texts.join(" | "));
        }
        left -= index.samples.len().min(left);
    }
    Ok(())
}
