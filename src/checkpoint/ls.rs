//! `belfry checkpoint ls`.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::bail;
use belfry_coordinator::stored::{self, Stored};
use belfry_coordinator::{evaluation_file, evaluation_json, evaluation_told, parse_evaluation};
use belfry_proto::v1;
use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use shard_tools::store::{Root, StoreError};

use crate::bench::table::gigabytes;

/// Arguments of `belfry checkpoint ls`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Folder or URL of the run.
    root: String,
    /// Print one JSON array instead.
    #[arg(long)]
    json: bool,
}

/// A line of the table.
struct Line {
    stored: Stored,
    evaluation: Option<v1::Evaluated>,
    cost: Option<Value>,
}

/// Lists.
pub async fn ls(arguments: &Arguments) -> anyhow::Result<()> {
    let root = Root::existing(&arguments.root)?;
    let mut lines = Vec::new();
    for (step, stored) in stored::list(&root).await? {
        lines.push(Line {
            evaluation: evaluation(&root, step).await?,
            cost: stored::cost(&root, step).await?,
            stored,
        });
    }
    if arguments.json {
        let all: Vec<Value> = lines.iter().map(Line::json).collect();
        println!("{}", serde_json::to_string(&all)?);
        return Ok(());
    }
    if lines.is_empty() {
        println!("{root} has no checkpoint");
        return Ok(());
    }
    println!(
        "{:>10}  {:<19}  {:>9}  {:>5}  {:<31}  evaluation",
        "step", "made (UTC)", "size", "parts", "state"
    );
    for line in &lines {
        println!("{}", line.text());
    }
    Ok(())
}

async fn evaluation(root: &Root, step: u64) -> anyhow::Result<Option<v1::Evaluated>> {
    let file = evaluation_file(step);
    match root.get(&file).await {
        Ok(text) => match parse_evaluation(&text) {
            Ok(evaluated) => Ok(Some(evaluated)),
            Err(why) => bail!("{root}/{file}: {why}"),
        },
        Err(StoreError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn time(at: SystemTime) -> String {
    DateTime::<Utc>::from(at)
        .format("%Y-%m-%d %H:%M:%S")
        .to_string()
}

fn seconds(at: Option<SystemTime>) -> Option<u64> {
    let since = at?.duration_since(UNIX_EPOCH).ok()?;
    Some(since.as_secs())
}

impl Line {
    fn state(&self) -> &'static str {
        match &self.stored {
            stored if stored.made.is_none() => "no manifest: not a checkpoint",
            stored if stored.corrupt => "CORRUPT",
            stored if stored.verified.is_some() => "verified",
            _ => "not verified",
        }
    }

    fn text(&self) -> String {
        let stored = &self.stored;
        let made = stored.made.map_or("-".into(), time);
        let evaluation = self.evaluation.as_ref().map_or("-".into(), evaluation_told);
        let mut state = self.state().to_owned();
        if let (Some(at), false) = (stored.verified, stored.corrupt) {
            state += &format!(" {}", time(at));
        }
        format!(
            "{:>10}  {made:<19}  {:>9}  {:>5}  {state:<31}  {evaluation}",
            stored.step,
            gigabytes(stored.bytes() as f64),
            stored.parts().count()
        )
    }

    fn json(&self) -> Value {
        let stored = &self.stored;
        json!({
            "step": stored.step, "made": seconds(stored.made), "bytes": stored.bytes(),
            "parts": stored.parts().count(), "usable": stored.is_usable(),
            "corrupt": stored.corrupt, "verified": seconds(stored.verified),
            "state": self.state(), "cost": self.cost,
            "evaluation": self.evaluation.as_ref().map(evaluation_json),
        })
    }
}
