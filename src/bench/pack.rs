//! `belfry bench pack`: how fast a folder of images becomes shards, beside copying the same files.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, ensure};
use clap::Args;
use rayon::prelude::*;
use shard_tools::check::Check;
use shard_tools::pack::{self, PackOptions};

use super::table::{Report, gigabytes};
use super::timing::Rounds;

/// Arguments of `belfry bench pack`.
#[derive(Args)]
pub struct PackArguments {
    /// Folder of key.jpg|png|webp and key.txt.
    input: PathBuf,
    /// The folder's files are taken again under other names up to so many megabytes.
    #[arg(long, value_name = "N", default_value_t = 200)]
    megabytes: u64,
    /// Rounds; the first is not counted.
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: usize,
    /// Where to work; default: a temporary folder.
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
}

const CHECKS: [(Check, &str); 3] = [
    (Check::Headers, "--check headers"),
    (Check::Structure, "--check structure (default)"),
    (Check::Decode, "--check decode"),
];

/// Measures and prints.
pub async fn run(arguments: PackArguments) -> anyhow::Result<()> {
    ensure!(arguments.rounds > 0, "--rounds: must be at least 1");
    let folder = match &arguments.folder {
        Some(folder) => tempfile::tempdir_in(folder)?,
        None => tempfile::tempdir()?,
    };
    let input = folder.path().join("input");
    let (files, bytes) = multiplied(&arguments.input, &input, arguments.megabytes << 20)?;
    let (mut alone, mut together): (Rounds, Rounds) = Default::default();
    let mut packs: [Rounds; 3] = Default::default();
    for round in 0..=arguments.rounds {
        let add = |rounds: &mut Rounds, seconds: f64| {
            if round > 0 {
                rounds.add(seconds);
            }
        };
        let output = folder.path().join("output");
        add(&mut alone, copied(&input, &files, &output, false)?);
        add(&mut together, copied(&input, &files, &output, true)?);
        for ((check, _), rounds) in CHECKS.iter().zip(&mut packs) {
            add(rounds, packed(&input, &output, *check).await?);
        }
    }
    let mut report = Report::new(
        "pack",
        format!(
            "bench pack: {} files, {}, {} cores",
            files.len(),
            gigabytes(bytes as f64),
            rayon::current_num_threads()
        ),
    );
    report.note(
        "medians; each round copies by one thread and by all, then packs; packing also hashes",
    );
    let rate = |rounds: &Rounds| bytes as f64 / rounds.median();
    let told = |rounds: &Rounds| gigabytes(rate(rounds)) + "/s";
    for ((_, name), rounds) in CHECKS.iter().zip(&packs) {
        for (floor, by) in [(&alone, "one thread"), (&together, "all threads")] {
            let floor_told = format!("{}, copy by {by}", told(floor));
            report.row(name, told(rounds), floor_told, rate(rounds) / rate(floor));
        }
    }
    report.json("copy_bytes_per_second", rate(&alone));
    report.json("copy_all_threads_bytes_per_second", rate(&together));
    for (name, rounds) in ["headers", "structure", "decode"].iter().zip(&packs) {
        report.json(&format!("pack_{name}_bytes_per_second"), rate(rounds));
    }
    report.print();
    Ok(())
}

/// Copies the folder's samples under new keys until they are `bytes_min`; names and bytes.
fn multiplied(from: &Path, to: &Path, bytes_min: u64) -> anyhow::Result<(Vec<String>, u64)> {
    std::fs::create_dir(to)?;
    let listed = std::fs::read_dir(from).with_context(|| from.display().to_string())?;
    let mut names = Vec::new();
    for entry in listed {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    ensure!(!names.is_empty(), "{} is empty", from.display());
    names.sort();
    let (mut files, mut bytes, mut copy) = (Vec::new(), 0, 0);
    while bytes < bytes_min {
        for name in &names {
            let new = format!("{copy}-{name}");
            bytes += std::fs::copy(from.join(name), to.join(&new))?;
            files.push(new);
        }
        copy += 1;
        ensure!(bytes > 0, "{} holds no bytes", from.display());
    }
    Ok((files, bytes))
}

fn copied(input: &Path, files: &[String], output: &Path, parallel: bool) -> anyhow::Result<f64> {
    std::fs::create_dir(output)?;
    let begun = Instant::now();
    let copy = |name: &String| std::fs::copy(input.join(name), output.join(name)).map(drop);
    if parallel {
        files.par_iter().try_for_each(copy)?;
    } else {
        files.iter().try_for_each(copy)?;
    }
    let seconds = begun.elapsed().as_secs_f64();
    std::fs::remove_dir_all(output)?;
    Ok(seconds)
}

async fn packed(input: &Path, output: &Path, check: Check) -> anyhow::Result<f64> {
    let begun = Instant::now();
    let options = PackOptions {
        check,
        ..PackOptions::new(output.display().to_string(), "bench")
    };
    pack::pack(pack::folder(input, None)?, &options).await?;
    let seconds = begun.elapsed().as_secs_f64();
    std::fs::remove_dir_all(output)?;
    Ok(seconds)
}
