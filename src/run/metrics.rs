//! `metrics.jsonl`: one line per committed step, in order, for people and plots.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use belfry_coordinator::ledger;
use belfry_proto::v1;
use serde_json::Value;
use shard_tools::store::Root;

use crate::files::replace;

/// The file, and how far it goes.
pub struct Metrics {
    path: PathBuf,
    last: Option<u64>,
}

impl Metrics {
    /// Goes on behind the last line that stands in `folder`'s file.
    pub fn open(folder: &Path) -> Self {
        let path = folder.join("metrics.jsonl");
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let last = text.lines().rev().find_map(step_of);
        Metrics { path, last }
    }

    /// The step whose line comes next.
    pub fn next(&self) -> u64 {
        self.last.map_or(0, |last| last + 1)
    }

    /// Writes a step's line, with what the launcher alone knows. A step that was committed again
    /// after a crash is the same step.
    pub fn append(&mut self, record: &v1::StepRecord, extra: Value) -> anyhow::Result<()> {
        if record.step < self.next() {
            return Ok(());
        }
        self.last = Some(record.step);
        let mut line = ledger::to_json(record);
        if let (Some(line), Value::Object(extra)) = (line.as_object_mut(), extra) {
            line.extend(extra);
        }
        let opened = File::options().create(true).append(true).open(&self.path);
        opened
            .and_then(|mut file| writeln!(file, "{line}"))
            .with_context(|| format!("cannot write {}", self.path.display()))
    }

    /// Fills in from the ledger what was committed while nobody watched.
    pub async fn complete(&self, root: &Root) -> anyhow::Result<()> {
        let text = std::fs::read_to_string(&self.path).unwrap_or_default();
        let lines = text
            .lines()
            .filter_map(|line| Some((step_of(line)?, line.to_owned())));
        let mut lines: BTreeMap<u64, String> = lines.collect();
        let there = lines.len();
        for (step, receipt) in ledger::read(root, 0..u64::MAX, |receipt| receipt).await? {
            let line = || ledger::to_json(&receipt).to_string();
            lines.entry(step).or_insert_with(line);
        }
        if lines.len() == there {
            return Ok(());
        }
        let whole: Vec<String> = lines.into_values().collect();
        replace(&self.path, &(whole.join("\n") + "\n"))
    }
}

fn step_of(line: &str) -> Option<u64> {
    let value: Value = serde_json::from_str(line).ok()?;
    value["step"].as_u64()
}
