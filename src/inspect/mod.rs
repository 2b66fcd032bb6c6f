//! `belfry inspect`: what a checkpoint's managers do with their experts, as figures and tables.

pub mod figures;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use belfry_configs::ValidConfig;
use belfry_model::{Inspection, ManagerTower, Modality, Part, SimilarityRow, Source, WeightRow};
use belfry_worker::{checkpoint_parameters, weights};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use crate::files;
use crate::weights::{open_run, with_files};

/// Endings of files that hold weights.
const WEIGHT_FILES: [&str; 5] = ["safetensors", "bin", "pt", "pth", "ckpt"];
/// Names of manager parameters contain this.
const MANAGERS: &str = "_manager_tower.";

/// Arguments of `belfry inspect`.
#[derive(Args)]
pub struct InspectArguments {
    /// The root of a run (folder or s3:// URL), or a file of weights (then with --config).
    checkpoint: String,
    /// Packed shards whose pairs are looked at: a folder or an s3:// URL. Default: data.validation.
    #[arg(long, value_name = "FOLDER_OR_URL")]
    data: Option<String>,
    /// The run file, where CHECKPOINT is a file of weights.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The checkpoint's step, where CHECKPOINT is a run's root; default the newest.
    #[arg(long)]
    step: Option<u64>,
    /// Look at the first N pairs only.
    #[arg(long, value_name = "N", default_value_t = u64::MAX, hide_default_value = true)]
    pairs: u64,
    /// Folder for weights.csv, similarity.csv and the figures.
    #[arg(long, value_name = "FOLDER", default_value = "inspect")]
    to: PathBuf,
    /// Folder of the shard cache; default: a temporary one.
    #[arg(long, value_name = "FOLDER")]
    cache: Option<PathBuf>,
    /// Override a key; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
}

/// Runs the data through the model and writes what was seen.
pub async fn inspect(arguments: InspectArguments) -> anyhow::Result<()> {
    ensure!(arguments.pairs > 0, "--pairs: must be at least 1");
    let mut settings = arguments.settings.clone();
    if let Some(data) = &arguments.data {
        settings.push(format!("data.validation={data:?}"));
    }
    let (config, parameters, origin) = read(&arguments, settings).await?;
    // Removed when it is dropped.
    let temporary = tempfile::tempdir()?;
    let cache = arguments
        .cache
        .clone()
        .unwrap_or_else(|| temporary.path().to_owned());
    let looking = move || look(&config, &parameters, &cache, arguments.pairs);
    let inspection = tokio::task::spawn_blocking(looking).await??;
    let (weights, similarities) = (inspection.weights(), inspection.similarities());
    let folder = &arguments.to;
    std::fs::create_dir_all(folder)
        .with_context(|| format!("cannot create {}", folder.display()))?;
    let title = format!("{origin}, {} pairs", inspection.pairs());
    for (name, text) in [
        ("weights.csv", weights_csv(&weights)),
        ("similarity.csv", similarity_csv(&similarities)),
        ("weights.svg", figures::weights(&title, &weights)?),
        (
            "weights_by_layer.svg",
            figures::weights_by_layer(&title, &weights)?,
        ),
        (
            "similarity.svg",
            figures::similarity(&title, &similarities)?,
        ),
    ] {
        files::replace(&folder.join(name), &text)?;
    }
    print!("{}", summary(&weights, &similarities));
    eprintln!(
        "{title}: wrote two tables and three figures to {}",
        folder.display()
    );
    Ok(())
}

/// Configuration, parameters, and what to call them.
async fn read(
    arguments: &InspectArguments,
    settings: Vec<String>,
) -> anyhow::Result<(ValidConfig, Vec<f32>, String)> {
    let checkpoint = &arguments.checkpoint;
    let ending = Path::new(checkpoint).extension().and_then(|e| e.to_str());
    if !ending.is_some_and(|ending| WEIGHT_FILES.contains(&ending)) {
        ensure!(
            arguments.config.is_none(),
            "--config: a run's root has its own run.toml"
        );
        let (root, config) = open_run(checkpoint, &settings).await?;
        let model = ManagerTower::new(&config.model, config.data.text_len as usize)?;
        let (step, parameters) = checkpoint_parameters(&root, &model, arguments.step).await?;
        return Ok((config, parameters, format!("{checkpoint} at step {step}")));
    }
    ensure!(
        arguments.step.is_none(),
        "--step: {checkpoint} is a file, not a run's root"
    );
    let Some(file) = &arguments.config else {
        bail!("--config: name the run file whose [model] the weights in {checkpoint} are of");
    };
    let settings = with_files(settings, std::slice::from_ref(checkpoint), &[]);
    let config = belfry_configs::load(file, &settings)?;
    let model = ManagerTower::new(&config.model, config.data.text_len as usize)?;
    let targets = weights::Targets::from(model.table());
    let fresh = model.table().init(config.run.seed);
    let (parameters, report) = weights::import(&config.init, &targets, fresh).await?;
    let entries = model.table().entries().iter();
    let mut managers = entries.filter(|e| e.trained && e.name.contains(MANAGERS));
    if let Some(missing) = managers.find(|e| !report.holds(&e.name)) {
        bail!(
            "{checkpoint} holds no `{}`: there are no trained managers to look at",
            missing.name
        );
    }
    Ok((config, parameters, checkpoint.clone()))
}

fn look(
    config: &ValidConfig,
    parameters: &[f32],
    cache: &Path,
    pairs_max: u64,
) -> anyhow::Result<Inspection> {
    let style = ProgressStyle::with_template("{bar:30} {pos} of {len} pairs, {eta} left")?;
    let bar = ProgressBar::new(0).with_style(style);
    let progress = |done, all| {
        bar.set_length(all);
        bar.set_position(done);
    };
    let inspection = belfry_worker::inspect(config, parameters, cache, pairs_max, progress)?;
    bar.finish_and_clear();
    Ok(inspection)
}

fn modality(modality: Modality) -> &'static str {
    match modality {
        Modality::Text => "text",
        Modality::Image => "image",
    }
}

fn weights_csv(rows: &[WeightRow]) -> String {
    let mut text = String::from("modality,cross_layer,source,source_layer,mean,deviation\n");
    for row in rows {
        let (source, layer) = match row.source {
            Source::Expert(layer) => ("expert", layer),
            Source::Cross(layer) => ("cross", layer),
        };
        let _ = writeln!(
            text,
            "{},{},{source},{layer},{:.8},{:.8}",
            modality(row.modality),
            row.layer,
            row.mean,
            row.deviation
        );
    }
    text
}

fn part(part: Part) -> &'static str {
    match part {
        Part::Experts => "uni-modal",
        Part::Cross => "cross-modal",
    }
}

fn similarity_csv(rows: &[SimilarityRow]) -> String {
    let mut text = String::from("modality,part,lower_cross_layer,upper_cross_layer,cosine\n");
    for row in rows {
        let _ = writeln!(
            text,
            "{},{},{},{},{:.8}",
            modality(row.modality),
            part(row.part),
            row.layer - 1,
            row.layer,
            row.mean
        );
    }
    text
}

/// What a reader asks first: the favourite expert of every manager, and how alike neighbours are.
fn summary(weights: &[WeightRow], similarities: &[SimilarityRow]) -> String {
    let mut text = format!(
        "{:<9} {:>5} {:>16} {:>8} {:>16} {:>18}\n",
        "modality", "layer", "favourite expert", "weight", "uni-modal cosine", "cross-modal cosine"
    );
    let mut managers: Vec<(Modality, u32)> =
        weights.iter().map(|r| (r.modality, r.layer)).collect();
    managers.dedup();
    for (side, layer) in managers {
        let own = weights
            .iter()
            .filter(|r| (r.modality, r.layer) == (side, layer));
        let experts = own.filter_map(|r| match r.source {
            Source::Expert(expert) => Some((expert, r.mean)),
            Source::Cross(_) => None,
        });
        let favourite = experts.max_by(|a, b| a.1.total_cmp(&b.1));
        let (expert, weight) = favourite.expect("a manager has experts");
        let alike = |wanted: Part| {
            let mut rows = similarities.iter();
            let row = rows.find(|r| (r.modality, r.layer, r.part) == (side, layer, wanted));
            row.map_or("-".into(), |row| format!("{:.4}", row.mean))
        };
        let _ = writeln!(
            text,
            "{:<9} {layer:>5} {expert:>16} {weight:>8.4} {:>16} {:>18}",
            modality(side),
            alike(Part::Experts),
            alike(Part::Cross)
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Vec<WeightRow> {
        let row = |source, mean| WeightRow {
            modality: Modality::Text,
            layer: 2,
            source,
            mean,
            deviation: 0.0,
        };
        vec![
            row(Source::Expert(11), 0.25),
            row(Source::Expert(12), 0.75),
            row(Source::Cross(1), 1.0),
        ]
    }

    #[test]
    fn tables_name_layers_as_the_paper_counts_them() {
        let csv = weights_csv(&rows());
        assert!(
            csv.contains("\ntext,2,expert,12,0.75000000,0.00000000\n"),
            "{csv}"
        );
        assert!(
            csv.contains("\ntext,2,cross,1,1.00000000,0.00000000\n"),
            "{csv}"
        );
        let row = SimilarityRow {
            modality: Modality::Image,
            layer: 3,
            part: Part::Cross,
            mean: 0.5,
        };
        let csv = similarity_csv(&[row]);
        assert!(
            csv.ends_with("\nimage,cross-modal,2,3,0.50000000\n"),
            "{csv}"
        );
    }

    #[test]
    fn the_summary_names_each_managers_favourite() {
        let text = summary(&rows(), &[]);
        let line = text.lines().last().expect("a line per manager");
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(words, ["text", "2", "12", "0.7500", "-", "-"]);
    }

    #[test]
    fn figures_are_drawn_of_one_expert_and_of_many() {
        for rows in [&rows()[..1], &rows()] {
            for figure in [
                figures::weights("title", rows).unwrap(),
                figures::weights_by_layer("title", rows).unwrap(),
            ] {
                assert!(figure.starts_with("<svg") && figure.contains("title"));
                assert!(figure.trim_end().ends_with("</svg>"));
            }
        }
        let nothing = figures::similarity("title", &[]).unwrap();
        assert!(nothing.contains("</svg>"));
    }
}
