//! What an evaluation leaves: a table, a line of JSON, `figures.json`, a result file of VQA.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use belfry_configs::{Task, ValidConfig};
use belfry_worker::evaluate::{EncoderRuns, Evaluation, Figure, Finding, Identity, found};
use serde_json::{Map, Value, json};

use super::{EvalArguments, all_found, evalai};
use crate::files;
use crate::trained::task_name;

/// The figures with what they are of.
pub const FIGURES_FILE: &str = "figures.json";
/// Answers for the VQA server.
pub const VQA_RESULT_FILE: &str = "vqa_result.json";

/// Joins tally files of shares that were done anywhere.
pub fn joined(arguments: &EvalArguments) -> anyhow::Result<()> {
    let mut first: Option<(Identity, &Path)> = None;
    for file in &arguments.join {
        let (identity, _) = found(file)?;
        match &first {
            None => first = Some((identity, file)),
            Some((known, of)) => ensure!(
                *known == identity,
                "{} and {} are of different evaluations: {}",
                of.display(),
                file.display(),
                difference(known, &identity)
            ),
        }
    }
    let (identity, _) = first.context("--join: name tally files")?;
    let findings = all_found(&arguments.join, &identity)?;
    let units = identity.work.units;
    if let Some(missing) = (0..units).find(|unit| !findings.contains_key(unit)) {
        bail!(
            "--join: {} of {units} units of work are done, the first one missing is {missing}; do its \
             share too",
            findings.len()
        );
    }
    let findings: Vec<Finding> = findings.into_values().collect();
    let given = || answers(arguments.answers.as_deref(), None);
    concluded(
        arguments,
        &identity,
        &findings,
        EncoderRuns::default(),
        given,
    )
}

fn difference(one: &Identity, other: &Identity) -> &'static str {
    if one.weights_sha256 != other.weights_sha256 {
        "other weights"
    } else if one.settings_sha256 != other.settings_sha256 {
        "other settings"
    } else if one.data_sha256 != other.data_sha256 {
        "other data"
    } else {
        "other steps or work"
    }
}

/// VQA's answers: as given, else of the data. None of both: none.
pub fn answers(
    given: Option<&Path>,
    config: Option<&ValidConfig>,
) -> anyhow::Result<Option<Vec<String>>> {
    if let Some(file) = given {
        let text = std::fs::read(file).with_context(|| format!("--answers {}", file.display()))?;
        let answers = serde_json::from_slice(&text);
        let answers =
            answers.with_context(|| format!("--answers {}: no list of texts", file.display()))?;
        return Ok(Some(answers));
    }
    let Some(config) = config else {
        return Ok(None);
    };
    let mut paths = config
        .data
        .validation
        .paths()
        .chain(config.data.train.paths());
    let path = paths.next().context("no data")?;
    Ok(Some(belfry_data::answers(path)?))
}

/// A share is done, others are not.
pub fn unfinished(
    arguments: &EvalArguments,
    (done, units): (u64, u64),
    runs: EncoderRuns,
) -> anyhow::Result<()> {
    let share = arguments.share.map(|share| share.to_string());
    if !arguments.json {
        eprintln!("{done} of {units} units of work are done; the figures come with the last share");
    }
    println!(
        "{}",
        json!({
            "share": share, "done": done, "units": units, "encoder_runs": counted(runs),
        })
    );
    Ok(())
}

/// Makes and writes everything.
pub fn concluded(
    arguments: &EvalArguments,
    identity: &Identity,
    findings: &[Finding],
    runs: EncoderRuns,
    answers: impl FnOnce() -> anyhow::Result<Option<Vec<String>>>,
) -> anyhow::Result<()> {
    let Evaluation { figures, chosen } = identity.work.conclude(findings)?;
    let mut line = json!({
        "step": identity.step,
        "task": task_name(identity.work.task),
        "pairs": identity.work.pairs,
        "figures": map(&figures),
    });
    if let Some(folder) = &arguments.to {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let mut kept = line.clone();
        kept["weights_sha256"] = json!(identity.weights_sha256);
        kept["data_sha256"] = json!(identity.data_sha256);
        files::replace(&folder.join(FIGURES_FILE), &format!("{kept:#}\n"))?;
        if identity.work.task == Task::Vqa && !chosen.is_empty() {
            match answers()? {
                Some(answers) => {
                    let text = evalai::text(&chosen, &answers)?;
                    files::replace(&folder.join(VQA_RESULT_FILE), &text)?;
                }
                None => eprintln!("no {VQA_RESULT_FILE}: name the answers by --answers FILE"),
            }
        }
    }
    line["encoder_runs"] = counted(runs);
    if !arguments.json {
        eprint!("{}", table(&figures, identity));
    }
    println!("{line}");
    Ok(())
}

fn map(figures: &[Figure]) -> Value {
    let pairs = figures.iter().map(|f| (f.name.clone(), json!(f.value)));
    Value::Object(pairs.collect::<Map<String, Value>>())
}

fn counted(runs: EncoderRuns) -> Value {
    json!({"images": runs.images, "texts": runs.texts})
}

fn table(figures: &[Figure], identity: &Identity) -> String {
    let work = &identity.work;
    let state = identity
        .step
        .map_or(String::new(), |step| format!(" at step {step}"));
    let mut text = format!("{}{state}, {} pairs\n", task_name(work.task), work.pairs);
    if figures.is_empty() {
        text.push_str("  nothing to compare with: the data hold no labels\n");
    }
    let width = figures
        .iter()
        .map(|f| f.name.len())
        .max()
        .unwrap_or_default();
    for figure in figures {
        let _ = match figure.name.contains("loss") {
            true => writeln!(text, "  {:<width$}  {:>9.4}", figure.name, figure.value),
            false => writeln!(
                text,
                "  {:<width$}  {:>8.2} %",
                figure.name,
                100.0 * figure.value
            ),
        };
    }
    text
}
