//! `belfry checkpoint ls`.

use std::time::{SystemTime, UNIX_EPOCH};

use belfry_coordinator::evaluation_file;
use belfry_coordinator::stored::{self, Stored};
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
    evaluation: Option<Value>,
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
        "{:>10}  {:<19}  {:>9}  {:>5}  {:<34}  state",
        "step", "made (UTC)", "size", "parts", "evaluation"
    );
    for line in &lines {
        println!("{}", line.text());
    }
    Ok(())
}

async fn evaluation(root: &Root, step: u64) -> Result<Option<Value>, StoreError> {
    match root.get(&evaluation_file(step)).await {
        Ok(text) => Ok(serde_json::from_slice(&text).ok()),
        Err(StoreError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error),
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
        let number = |key: &str| self.evaluation.as_ref().and_then(|e| e[key].as_f64());
        let evaluation = [
            ("MLM", "mlm_loss", "mlm_accuracy"),
            ("ITM", "itm_loss", "itm_accuracy"),
        ];
        let evaluation = evaluation.iter().filter_map(|(name, loss, accuracy)| {
            Some(format!(
                "{name} {:.4} ({:.3})",
                number(loss)?,
                number(accuracy)?
            ))
        });
        let evaluation: Vec<String> = evaluation.collect();
        let evaluation = match evaluation.is_empty() {
            true => "-".into(),
            false => evaluation.join(" "),
        };
        let mut state = self.state().to_owned();
        if let (Some(at), false) = (stored.verified, stored.corrupt) {
            state += &format!(" {}", time(at));
        }
        format!(
            "{:>10}  {made:<19}  {:>9}  {:>5}  {evaluation:<34}  {state}",
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
            "state": self.state(), "evaluation": self.evaluation, "cost": self.cost,
        })
    }
}
