//! `belfry checkpoint verify`.

use anyhow::bail;
use belfry_coordinator::stored::verify::{Pace, Verdict, verify};
use belfry_coordinator::stored::{self, Stored};
use indicatif::{ProgressBar, ProgressStyle};
use shard_tools::store::Root;

use crate::bench::table::gigabytes;

/// Arguments of `belfry checkpoint verify`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Folder or URL of the run.
    root: String,
    /// The checkpoint of this step; default the newest.
    #[arg(long, value_name = "N", conflicts_with = "all")]
    step: Option<u64>,
    /// All of them.
    #[arg(long)]
    all: bool,
    /// Read at most so many megabytes in a second; default as fast as it goes.
    #[arg(long, value_name = "MB")]
    megabytes_per_second: Option<f64>,
}

/// Verifies; says whether all is right.
pub async fn run(arguments: &Arguments) -> anyhow::Result<bool> {
    let root = Root::existing(&arguments.root)?;
    let rate = arguments
        .megabytes_per_second
        .map_or(f64::INFINITY, |mb| mb * 1e6);
    if rate.is_nan() || rate <= 0.0 {
        bail!("--megabytes-per-second: must be more than 0");
    }
    let mut pace = Pace::new(rate);
    let mut right = true;
    for stored in chosen(&root, arguments).await? {
        let verdict = verify_with_progress(&root, &stored, &mut pace).await?;
        right &= verdict.faults.is_empty();
        print(&verdict);
        if let Err(error) = stored::mark(&root, &verdict).await {
            eprintln!("warning: not marked beside the checkpoint: {error}");
        }
    }
    Ok(right)
}

/// The checkpoints to be read, and a word on folders that hold none.
async fn chosen(root: &Root, arguments: &Arguments) -> anyhow::Result<Vec<Stored>> {
    let found = stored::list(root).await?;
    let (whole, parts): (Vec<Stored>, Vec<Stored>) = found
        .into_values()
        .partition(|stored| stored.made.is_some());
    if arguments.all && !parts.is_empty() {
        eprintln!(
            "no checkpoints, for want of a manifest: of steps {}",
            super::steps_of(parts.iter().map(|stored| stored.step))
        );
    }
    let steps = super::steps_of(whole.iter().map(|stored| stored.step));
    let chosen: Vec<Stored> = match (arguments.step, arguments.all) {
        (_, true) => whole,
        (Some(step), _) => whole.into_iter().filter(|s| s.step == step).collect(),
        (None, false) => whole.into_iter().next_back().into_iter().collect(),
    };
    if chosen.is_empty() {
        let which = arguments
            .step
            .map_or(String::new(), |step| format!(" of step {step}"));
        bail!("{root} has no checkpoint{which}; it has those of steps: {steps}");
    }
    Ok(chosen)
}

/// Reads a checkpoint again, with a bar where people watch.
///
/// # Errors
/// The store does not answer.
pub async fn verify_with_progress(
    root: &Root,
    stored: &Stored,
    pace: &mut Pace,
) -> anyhow::Result<Verdict> {
    let style = ProgressStyle::with_template("{msg} {bytes}/{total_bytes} {bar:24} ETA {eta}");
    let bar = ProgressBar::new(stored.bytes()).with_style(style.expect("a valid template"));
    bar.set_message(format!("step {}", stored.step));
    let verdict = verify(root, stored.step, pace, |bytes| bar.inc(bytes)).await;
    bar.finish_and_clear();
    Ok(verdict?)
}

fn print(verdict: &Verdict) {
    let (step, read) = (verdict.step, gigabytes(verdict.bytes as f64));
    match verdict.faults.len() {
        0 => println!("step {step}: {read} read, all right"),
        1 => println!("step {step}: {read} read, CORRUPT:"),
        count => println!("step {step}: {read} read, CORRUPT in {count} places:"),
    }
    for fault in &verdict.faults {
        println!("  {fault}");
    }
}
