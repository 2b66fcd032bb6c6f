//! The command line of packing.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::formats::{
    Input, dataset, downloads, folder, img2dataset, karpathy, nlvr2, pixels, snli_ve,
    visual_genome, vqav2, webdataset,
};
use super::{Catalog, MaxBad, PackOptions, Packed, by_kind, engine, journal};
use crate::check::Check;
use crate::error::ShardError;
use crate::pair::Contents;
use crate::store::Root;

/// How the input is laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// key.jpg|png|webp beside key.txt, one caption a line
    #[default]
    Folder,
    /// Tars with an image and .txt (or .pairs.json) a sample; also a packed dataset, to repack it
    Webdataset,
    /// img2dataset's output, as tars or folders of .jpg, .txt and .json
    Img2dataset,
    /// COCO captions: dataset_coco.json (Karpathy) beside train2014 and val2014
    Coco,
    /// Flickr30K: dataset_flickr30k.json (Karpathy) beside flickr30k-images
    Flickr30k,
    /// Conceptual Captions: Train_GCC-training.tsv beside train_image, files named by row
    Cc,
    /// SBU captions: sbu-captions-all.json, or the two .txt, beside SBU, files named by URL
    Sbu,
    /// Visual Genome: region_descriptions.json beside VG_100K and VG_100K_2
    Vg,
    /// VQAv2: v2_*_questions.json and v2_*_annotations.json beside train2014, val2014, test2015
    Vqav2,
    /// SNLI-VE: snli_ve_*.jsonl beside flickr30k-images
    SnliVe,
    /// NLVR2: train.json, dev.json, test1.json beside images/train, dev and test1
    Nlvr2,
    /// A folder as above: captions behind words that its pixels allow
    PixelsCaptions,
    /// A folder as above: questions that its pixels answer
    PixelsVqa,
    /// A folder as above: hypotheses that its pixels decide
    PixelsSnliVe,
    /// A folder as above: statements that compare two images by their pixels
    PixelsNlvr2,
}

impl Format {
    /// As on the command line.
    fn name(self) -> String {
        let value = self.to_possible_value();
        value.map_or(String::new(), |value| value.get_name().to_owned())
    }

    /// Whether it has neither splits nor annotation files.
    fn tars_or_folder(self) -> bool {
        let tars = matches!(self, Format::Webdataset | Format::Img2dataset);
        let pixels = matches!(
            self,
            Format::PixelsCaptions | Format::PixelsVqa | Format::PixelsSnliVe | Format::PixelsNlvr2
        );
        tars || pixels || self == Format::Folder
    }
}

/// One example per format.
const EXAMPLES: &str = "\
Splits are the paper's: coco train is Karpathy's train and restval, flickr30k train is train and val, \
both validate and test on Karpathy's test; vqav2 train is train2014 and val2014.

Examples:
  pack photos packed
  pack --format webdataset s3://theirs/tars s3://ours/packed
  pack --format img2dataset laion/out packed --max-bad 5%
  pack --format coco coco s3://ours/coco --split train --dataset coco
  pack --format flickr30k flickr30k packed/flickr-test --split test
  pack --format cc cc s3://ours/cc --max-bad 15%
  pack --format sbu sbu s3://ours/sbu --max-bad 15%
  pack --format vg vg s3://ours/vg --images vg/images
  pack --format vqav2 coco s3://ours/vqa --split train
  pack --format vqav2 coco s3://ours/vqa-test --split test --answers answers.json
  pack --format snli-ve snli s3://ours/snli --split dev
  pack --format nlvr2 nlvr2 s3://ours/nlvr2 --split test1
  pack --format pixels-vqa data/stamps packed/questions";

const MIX_EXAMPLE: &str = "\
Example:
  mix s3://ours/pretrain coco=s3://ours/coco vg=s3://ours/vg sbu=s3://ours/sbu cc=s3://ours/cc";

/// What every kind of packing takes.
#[derive(Args, Debug)]
pub struct Common {
    /// A name for people [default: the publisher's dataset, else "dataset"]
    #[arg(long, value_name = "NAME")]
    dataset: Option<String>,
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
    fn options(&self, output: String, dataset: &str) -> PackOptions {
        PackOptions {
            output,
            dataset: self.dataset.as_deref().unwrap_or(dataset).to_owned(),
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
#[command(after_long_help = EXAMPLES)]
pub struct PackArguments {
    /// How the input is laid out
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// Folder as the publisher's files unpack; of tars also a URL
    input: String,
    /// Folder or s3:// URL of the new dataset
    output: String,
    /// Which split, where the publisher has several [default: train]
    #[arg(long)]
    split: Option<String>,
    /// The annotation file, in another place than the usual; SBU's text form takes two
    #[arg(long, value_name = "FILE")]
    annotations: Vec<PathBuf>,
    /// The images' folder, in another place than the usual
    #[arg(long, value_name = "FOLDER")]
    images: Option<PathBuf>,
    /// vqav2: answers.json of another split's dataset, instead of counting answers
    #[arg(long, value_name = "FILE")]
    answers: Option<PathBuf>,
    /// webdataset: begin keys with the tar's name, for tars that each count from 0
    #[arg(long)]
    tar_in_key: bool,
    #[command(flatten)]
    common: Common,
}

/// Arguments of `mix`.
#[derive(Args, Debug)]
#[command(after_long_help = MIX_EXAMPLE)]
pub struct MixArguments {
    /// Folder or s3:// URL of the new dataset
    output: String,
    /// Packed datasets: a name, which begins the keys of its samples, and a folder or URL
    #[arg(required = true, value_name = "NAME=DATASET", value_parser = named)]
    datasets: Vec<(String, String)>,
    #[command(flatten)]
    common: Common,
}

fn named(text: &str) -> Result<(String, String), String> {
    let (name, location) = text.split_once('=').ok_or("not NAME=DATASET")?;
    Ok((name.to_owned(), location.to_owned()))
}

/// Runs `pack`.
///
/// # Errors
/// [`ShardError`], naming the file.
pub async fn pack(arguments: PackArguments) -> Result<(), ShardError> {
    arguments.check()?;
    let name = match arguments.format.tars_or_folder() {
        true => "dataset".to_owned(),
        false => arguments.format.name(),
    };
    let options = arguments.common.options(arguments.output.clone(), &name);
    // Before hundreds of megabytes of annotations are read.
    journal::vacant(&Root::open(&options.output)?, options.resume).await?;
    let catalog = arguments.catalog().await?;
    tell(&options.output, &engine::pack(catalog, &options).await?);
    Ok(())
}

/// Runs `mix`.
///
/// # Errors
/// [`ShardError`], naming the file.
pub async fn mix(arguments: MixArguments) -> Result<(), ShardError> {
    let options = arguments.common.options(arguments.output, "mix");
    journal::vacant(&Root::open(&options.output)?, options.resume).await?;
    let catalog = dataset::mixed(&arguments.datasets).await?;
    tell(&options.output, &engine::pack(catalog, &options).await?);
    Ok(())
}

impl PackArguments {
    /// Refuses options that the format would not look at.
    fn check(&self) -> Result<(), ShardError> {
        use Format as F;
        let f = self.format;
        let tars = f.tars_or_folder();
        let given = [
            ("--split", self.split.is_some(), !tars),
            (
                "--annotations",
                !self.annotations.is_empty(),
                !tars && f != F::Vqav2,
            ),
            ("--images", self.images.is_some(), !tars),
            ("--answers", self.answers.is_some(), f == F::Vqav2),
            ("--tar-in-key", self.tar_in_key, f == F::Webdataset),
        ];
        match given.iter().find(|(_, given, takes)| *given && !takes) {
            None => Ok(()),
            Some((option, ..)) => {
                let reason = format!("{option}: --format {} does not take it", f.name());
                Err(ShardError::Option(reason))
            }
        }
    }

    async fn catalog(&self) -> Result<Catalog, ShardError> {
        let input = Input {
            folder: self.input.clone().into(),
            split: self.split.clone(),
            annotations: self.annotations.clone(),
            images: self.images.clone(),
            answers: self.answers.clone(),
        };
        let of_pixels = |contents| pixels::catalog(&input.folder, None, contents);
        match self.format {
            Format::Folder => folder::catalog(&input.folder, None),
            Format::Webdataset => {
                let members = webdataset::Members {
                    records: false,
                    tar_in_key: self.tar_in_key,
                };
                webdataset::catalog(&self.input, members).await
            }
            Format::Img2dataset => img2dataset::catalog(&self.input).await,
            Format::Coco => karpathy::coco(&input),
            Format::Flickr30k => karpathy::flickr30k(&input),
            Format::Cc => downloads::conceptual_captions(&input),
            Format::Sbu => downloads::sbu(&input),
            Format::Vg => visual_genome::catalog(&input),
            Format::Vqav2 => vqav2::catalog(&input),
            Format::SnliVe => snli_ve::catalog(&input),
            Format::Nlvr2 => nlvr2::catalog(&input),
            Format::PixelsCaptions => of_pixels(Contents::Captions),
            Format::PixelsVqa => of_pixels(Contents::Vqa),
            Format::PixelsSnliVe => of_pixels(Contents::SnliVe),
            Format::PixelsNlvr2 => of_pixels(Contents::Nlvr2),
        }
    }
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
