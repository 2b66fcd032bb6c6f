//! `belfry eval`: a trained state judged on packed data, by one process or shared by several.
//!
//! The same evaluator as in training, so the same numbers. What was found is kept under `--to`, and
//! a command that is given again goes on from there. Progress and a table go to standard error, one
//! line of JSON to standard output.

mod evalai;
pub mod report;
mod workers;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use belfry_data::{Split, identities};
use belfry_worker::evaluate::{
    EncoderRuns, Evaluator, Finding, Identity, Share, TallyFile, Together, found, settings_sha256,
};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use crate::trained::{Trained, TrainedArguments};

/// So long without a new chunk from the processes beside this one, and it encodes their chunks too.
const PATIENCE: Duration = Duration::from_secs(120);

/// Arguments of `belfry eval`.
#[derive(Args, Clone)]
pub struct EvalArguments {
    #[command(flatten)]
    trained: TrainedArguments,
    /// Packed shards to judge on: a folder or an s3:// URL. Default: data.validation.
    #[arg(long, value_name = "FOLDER_OR_URL")]
    data: Option<String>,
    /// Folder for figures.json, a VQA result file and what was found so far: given again, finished
    /// work is not done again. Default: nothing is kept.
    #[arg(long, value_name = "FOLDER")]
    to: Option<PathBuf>,
    /// Processes on this machine that share the work.
    #[arg(long, default_value_t = 1, conflicts_with = "share")]
    workers: u32,
    /// Do the K-th of N shares of the work; the last one to end under the same --to makes the
    /// figures.
    #[arg(long, value_name = "K/N", requires = "to")]
    share: Option<Share>,
    /// Make the figures of shares that were done elsewhere, from their tally files.
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with_all = ["share", "run", "weights"])]
    join: Vec<PathBuf>,
    /// VQA's answers, class i at place i: a JSON list. Default: answers.json of the data.
    #[arg(long, value_name = "FILE")]
    answers: Option<PathBuf>,
    /// Check a result file for the VQA server instead: every question once, ids whole numbers,
    /// answers texts.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["join", "run", "weights"])]
    check_evalai: Option<PathBuf>,
    /// The published questions that --check-evalai must find answered.
    #[arg(long, value_name = "FILE", requires = "check_evalai")]
    questions: Option<PathBuf>,
    /// Folder of the shard cache; default: a temporary one.
    #[arg(long, value_name = "FOLDER")]
    cache: Option<PathBuf>,
    /// Print the line of JSON alone.
    #[arg(long)]
    json: bool,
    /// One of several processes with a parent that holds the other end of standard input.
    #[arg(long, hide = true)]
    together: bool,
    /// End when standard input closes: the launcher holds the other end.
    #[arg(long, hide = true)]
    follow_stdin: bool,
}

/// Judges; see the module.
pub async fn eval(arguments: EvalArguments) -> anyhow::Result<()> {
    if let Some(file) = &arguments.check_evalai {
        return check_evalai(file, arguments.questions.as_deref());
    }
    if !arguments.join.is_empty() {
        return report::joined(&arguments);
    }
    ensure!(arguments.workers > 0, "--workers: must be at least 1");
    if arguments.together || arguments.follow_stdin {
        workers::follow_parent();
    }
    let data = arguments.data.iter();
    let more: Vec<String> = data
        .map(|data| format!("data.validation={data:?}"))
        .collect();
    let trained = arguments.trained.open(&more).await?;
    let judging = move || judge(&arguments, &trained);
    tokio::task::spawn_blocking(judging).await?
}

fn check_evalai(file: &Path, questions: Option<&Path>) -> anyhow::Result<()> {
    let read = |file: &Path| {
        std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))
    };
    let questions = match questions {
        Some(path) => {
            let found = evalai::questions(&read(path)?);
            Some(found.with_context(|| path.display().to_string())?)
        }
        None => None,
    };
    let checked = evalai::check(&read(file)?, questions.as_ref());
    let count = checked.with_context(|| file.display().to_string())?;
    println!(
        "{}: {count} answers, as the server takes them",
        file.display()
    );
    Ok(())
}

/// Folders of one evaluation; temporary ones are removed when it is dropped.
struct Places {
    to: PathBuf,
    cache: PathBuf,
    _temporary: tempfile::TempDir,
}

impl Places {
    fn of(arguments: &EvalArguments) -> anyhow::Result<Self> {
        let temporary = tempfile::tempdir()?;
        let or = |given: &Option<PathBuf>, name: &str| match given {
            Some(folder) => folder.clone(),
            None => temporary.path().join(name),
        };
        let to = or(&arguments.to, "to");
        std::fs::create_dir_all(&to).with_context(|| format!("cannot create {}", to.display()))?;
        Ok(Places {
            cache: or(&arguments.cache, "cache"),
            to,
            _temporary: temporary,
        })
    }
}

fn judge(arguments: &EvalArguments, trained: &Trained) -> anyhow::Result<()> {
    let places = Places::of(arguments)?;
    let (config, model) = (&trained.config, Arc::clone(&trained.model));
    let mut evaluator = Evaluator::open(config, &places.cache, model, &trained.weights)?;
    let identity = identity(trained, &evaluator)?;
    let mut runs = EncoderRuns::default();
    if arguments.workers > 1 {
        drop(evaluator);
        runs = workers::run(arguments, trained, &places, identity.work.units)?;
    } else {
        let share = arguments.share.unwrap_or(Share::WHOLE);
        work(arguments, &mut evaluator, (&identity, share), &places)?;
        runs.images += evaluator.encoder_runs().images;
        runs.texts += evaluator.encoder_runs().texts;
    }
    let findings = all_found(&tally_files(&places.to)?, &identity)?;
    let (done, units) = (findings.len() as u64, identity.work.units);
    if done < units {
        ensure!(
            arguments.share.is_some(),
            "{done} of {units} units of work are done"
        );
        return report::unfinished(arguments, (done, units), runs);
    }
    let _ = std::fs::remove_dir_all(encoded_folder(&places.to));
    let findings: Vec<Finding> = findings.into_values().collect();
    let answers = || report::answers(arguments.answers.as_deref(), Some(config));
    report::concluded(arguments, &identity, &findings, runs, answers)
}

/// Does what is left of a share.
fn work(
    arguments: &EvalArguments,
    evaluator: &mut Evaluator,
    (identity, share): (&Identity, Share),
    places: &Places,
) -> anyhow::Result<()> {
    let done = all_found(&tally_files(&places.to)?, identity)?;
    let units = share.of(identity.work.units);
    let left: Vec<u64> = units.filter(|unit| !done.contains_key(unit)).collect();
    if left.is_empty() {
        return Ok(());
    }
    let mut file = TallyFile::open(&places.to.join(share.file_name()), identity)?;
    let bar = progress(arguments, left.len() as u64);
    let folder = encoded_folder(&places.to);
    let together = Together {
        folder: &folder,
        share: if arguments.together {
            share.place()
        } else {
            (0, 1)
        },
        patience: if arguments.together {
            PATIENCE
        } else {
            Duration::ZERO
        },
    };
    // Shares of other machines would fill their folder for nobody.
    let shared = arguments.together.then_some(&together);
    evaluator.encode(&identity.owner(), shared)?;
    for unit in left {
        file.append(unit, &evaluator.find(unit)?)?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(())
}

fn progress(arguments: &EvalArguments, units: u64) -> ProgressBar {
    if arguments.together || arguments.json {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:30} {pos} of {len} units, {eta} left");
    let bar = ProgressBar::new(units);
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

fn identity(trained: &Trained, evaluator: &Evaluator) -> anyhow::Result<Identity> {
    let data = identities(&trained.config, Split::Validation)?;
    Ok(Identity {
        format: Identity::FORMAT,
        step: trained.step,
        weights_sha256: trained.sha256.clone(),
        settings_sha256: settings_sha256(&trained.config),
        data_sha256: data.into_iter().map(|d| d.manifest_sha256).collect(),
        work: evaluator.work().clone(),
    })
}

fn encoded_folder(to: &Path) -> PathBuf {
    to.join("encoded")
}

/// Tally files under a folder, by name.
fn tally_files(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("tally-") && name.ends_with(".jsonl") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Findings of an evaluation in some files; those of others are passed over.
fn all_found(files: &[PathBuf], identity: &Identity) -> anyhow::Result<BTreeMap<u64, Finding>> {
    let mut all = BTreeMap::new();
    for file in files {
        // A file that a crash left without its first line holds nothing.
        let Ok((of, findings)) = found(file) else {
            continue;
        };
        if of != *identity {
            continue;
        }
        for (unit, finding) in findings {
            match all.get(&unit) {
                None => drop(all.insert(unit, finding)),
                Some(known) if *known == finding => {}
                Some(_) => bail!(
                    "{}: unit {unit} was found otherwise by another process: their machines do not \
                     give the same bits",
                    file.display()
                ),
            }
        }
    }
    Ok(all)
}
