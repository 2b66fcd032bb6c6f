//! Several processes of one evaluation on this machine: started, watched, ended together.

use std::ffi::OsString;
use std::io::Read as _;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};
use belfry_worker::evaluate::EncoderRuns;
use belfry_worker::evaluate::Share;
use serde_json::Value;

use super::{EvalArguments, Places, progress, tally_files};
use crate::trained::Trained;

/// How often children are looked after.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// Exit code of a process whose parent is gone.
const ORPHAN: i32 = 3;

/// Runs all shares, each in a process of its own, until they end; how often they ran encoders.
pub fn run(
    arguments: &EvalArguments,
    trained: &Trained,
    places: &Places,
    units: u64,
) -> anyhow::Result<EncoderRuns> {
    let program = std::env::current_exe().context("where is this program?")?;
    let start = |number| {
        let share = Share::new(number, arguments.workers);
        let mut command = Command::new(&program);
        command.args(child_arguments(arguments, trained.step, (share, places)));
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command
            .spawn()
            .context("cannot start a process of the evaluation")
    };
    let mut children = Family(Vec::new());
    for number in 1..=arguments.workers {
        children.0.push(start(number)?);
    }
    let bar = progress(arguments, units);
    while !children.all_ended()? {
        bar.set_position(lines(places));
        std::thread::sleep(LOOK_INTERVAL);
    }
    bar.finish_and_clear();
    let mut runs = EncoderRuns::default();
    for child in &mut children.0 {
        let mut said = String::new();
        let out = child.stdout.as_mut().context("its output is piped")?;
        out.read_to_string(&mut said)?;
        let said: Value = serde_json::from_str(said.lines().last().unwrap_or_default())
            .context("a process of the evaluation said nothing")?;
        let count = |side: &str| said["encoder_runs"][side].as_u64().unwrap_or_default();
        runs.images += count("images");
        runs.texts += count("texts");
    }
    Ok(runs)
}

/// Findings written so far, over all files.
fn lines(places: &Places) -> u64 {
    let files = tally_files(&places.to).unwrap_or_default();
    let lines = files.iter().map(|file| {
        let text = std::fs::read(file).unwrap_or_default();
        text.iter()
            .filter(|byte| **byte == b'\n')
            .count()
            .saturating_sub(1) as u64
    });
    lines.sum()
}

/// What a child is told: the same model and data, its share, and that it is not alone.
fn child_arguments(
    arguments: &EvalArguments,
    step: Option<u64>,
    (share, places): (Share, &Places),
) -> Vec<OsString> {
    let mut all: Vec<OsString> = vec!["eval".into()];
    let mut give = |name: &str, value: OsString| all.extend([name.into(), value]);
    let model = &arguments.trained;
    if let Some(run) = &model.run {
        give("--run", run.into());
        // The newest or best one may be another one by now.
        if let Some(step) = step {
            give("--step", step.to_string().into());
        }
    }
    if let (Some(weights), Some(config)) = (&model.weights, &model.config) {
        give("--weights", weights.into());
        give("--config", config.into());
    }
    for setting in &model.settings {
        give("--set", setting.into());
    }
    if let Some(data) = &arguments.data {
        give("--data", data.into());
    }
    if let Some(answers) = &arguments.answers {
        give("--answers", answers.into());
    }
    give("--to", places.to.clone().into());
    give("--cache", places.cache.clone().into());
    give("--share", share.to_string().into());
    all.extend(["--together".into(), "--json".into()]);
    all
}

/// Children that end when this is dropped.
struct Family(Vec<Child>);

impl Family {
    /// Whether all have ended well.
    fn all_ended(&mut self) -> anyhow::Result<bool> {
        let mut all = true;
        for (number, child) in self.0.iter_mut().enumerate() {
            match child.try_wait()? {
                None => all = false,
                Some(status) if status.success() => {}
                Some(status) => bail!("process {} of the evaluation ended: {status}", number + 1),
            }
        }
        Ok(all)
    }
}

impl Drop for Family {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Ends this process when its parent closes standard input.
pub fn follow_parent() {
    std::thread::spawn(|| {
        let mut bytes = [0u8; 64];
        while matches!(std::io::stdin().read(&mut bytes), Ok(n) if n > 0) {}
        std::process::exit(ORPHAN);
    });
}
