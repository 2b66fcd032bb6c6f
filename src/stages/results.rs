//! What a plan came to: for every figure that its stages report, what was reached beside the paper's
//! number, over all seeds. Pure but for reading stages' results and writing two files.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use belfry_configs::figures;
use belfry_configs::plan::Target;
use belfry_coordinator::RESULT_FILE;
use belfry_coordinator::plan::{End, Queue};
use belfry_proto::v1::PlanStatus;
use bytes::Bytes;
use serde::Serialize;
use serde_json::{Value, json};
use shard_tools::store::Root;

use super::place::{FIGURES_FILE, RESULTS_FILE, RESULTS_TABLE, folder};

/// One row of the table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// The stage, as the plan file calls it.
    pub stage: String,
    /// What is reported.
    pub name: String,
    /// The figure of the evaluation.
    pub metric: String,
    /// Mean over the seeds that ended well, in the paper's units; none ended: nothing.
    pub reached: Option<f64>,
    /// Lowest and highest of them.
    pub range: Option<[f64; 2]>,
    /// The paper's number.
    pub paper: Option<f64>,
    /// Repetitions that have the figure, and all.
    pub seeds: [usize; 2],
}

/// The rows of a plan. `figures` holds the evaluations of each stage that ended well; of several the
/// best counts, as checkpoints are chosen.
pub fn rows(queue: &Queue, figures: &BTreeMap<String, Vec<Value>>) -> Vec<Row> {
    let mut groups: Vec<(&str, &[Target])> = Vec::new();
    for queued in &queue.stages {
        let stage = &queued.stage;
        if !groups.iter().any(|(group, _)| *group == stage.group) {
            groups.push((&stage.group, &stage.results));
        }
    }
    let mut rows = Vec::new();
    for (group, targets) in groups {
        let stages = queue.stages.iter().filter(|q| q.stage.group == group);
        let names: Vec<&str> = stages.map(|q| q.stage.name.as_str()).collect();
        for target in targets {
            let reached = names.iter().filter_map(|name| {
                let all = figures.get(*name)?.iter();
                let values = all.filter_map(|e| figure(e, &target.metric));
                Some(values.reduce(|a, b| better(&target.metric, a, b))? * target.scale)
            });
            let reached: Vec<f64> = reached.collect();
            let range = reached
                .iter()
                .copied()
                .fold(None, |range: Option<[f64; 2]>, x| {
                    let [low, high] = range.unwrap_or([x, x]);
                    Some([low.min(x), high.max(x)])
                });
            let mean = reached.iter().sum::<f64>() / reached.len().max(1) as f64;
            rows.push(Row {
                stage: group.to_owned(),
                name: target.name.clone(),
                metric: target.metric.clone(),
                reached: range.map(|_| mean),
                range,
                paper: target.paper,
                seeds: [reached.len(), names.len()],
            });
        }
    }
    rows
}

/// A figure of an evaluation, wherever it keeps them.
fn figure(evaluation: &Value, metric: &str) -> Option<f64> {
    let nested = evaluation["figures"][metric].as_f64();
    nested.or_else(|| evaluation[metric].as_f64())
}

/// The better one.
fn better(metric: &str, a: f64, b: f64) -> f64 {
    let wins = figures::score(metric, a) >= figures::score(metric, b);
    if wins { a } else { b }
}

/// The best value that these evaluations have of a figure.
pub fn best(evaluations: &[Value], metric: &str) -> Option<f64> {
    let values = evaluations.iter().filter_map(|e| figure(e, metric));
    values.reduce(|a, b| better(metric, a, b))
}

/// The table for people, in Markdown.
pub fn markdown(rows: &[Row]) -> String {
    let mut out = String::from(
        "| stage | figure | reached | paper | seeds |\n| --- | --- | --- | --- | --- |\n",
    );
    let number = |value: Option<f64>| value.map_or("-".into(), |v| format!("{v:.2}"));
    for row in rows {
        let range = match row.range {
            Some([low, high]) if low < high => format!(" ({low:.2} to {high:.2})"),
            _ => String::new(),
        };
        let Row { stage, name, .. } = row;
        let [of, all] = row.seeds;
        let (reached, paper) = (number(row.reached), number(row.paper));
        let _ = writeln!(
            out,
            "| {stage} | {name} | {reached}{range} | {paper} | {of} of {all} |"
        );
    }
    out
}

/// Reads what each stage left, and writes both files.
///
/// # Errors
/// The store's; and a result that is not JSON.
pub async fn keep(root: &Root, queue: &Queue, status: &PlanStatus) -> anyhow::Result<()> {
    let mut figures = BTreeMap::new();
    let mut stages = Vec::new();
    for (queued, told) in queue.stages.iter().zip(&status.stages) {
        let name = &queued.stage.name;
        let mut stage = json!({
            "name": name, "state": told.state, "why": told.why, "failures": queued.failures,
        });
        if queued.end == Some(End::Done) {
            let (result, evaluations) = left(root, name, queued.stage.work.trains()).await?;
            for key in ["step", "parameters_sha256", "optimizer_sha256"] {
                stage[key] = result[key].clone();
            }
            figures.insert(name.clone(), evaluations);
        }
        stages.push(stage);
    }
    let rows = rows(queue, &figures);
    let all = json!({"plan": queue.plan, "stages": stages, "results": rows});
    let text = serde_json::to_vec_pretty(&all)?;
    root.put(RESULTS_TABLE, Bytes::from(markdown(&rows)))
        .await?;
    root.put(RESULTS_FILE, Bytes::from(text)).await?;
    Ok(())
}

/// The result of a stage that ended well, and its evaluations.
async fn left(root: &Root, stage: &str, trains: bool) -> anyhow::Result<(Value, Vec<Value>)> {
    let file = if trains { RESULT_FILE } else { FIGURES_FILE };
    let bytes = root.get(&format!("{}/{file}", folder(stage))).await?;
    let result: Value = serde_json::from_slice(&bytes)?;
    let evaluations = match trains {
        true => result["evaluations"]
            .as_array()
            .cloned()
            .unwrap_or_default(),
        false => vec![result.clone()],
    };
    Ok((result, evaluations))
}

#[cfg(test)]
mod tests {
    use super::*;
    use belfry_configs::plan::{Stage, Work};
    use belfry_coordinator::plan::Queued;

    fn queue(names: &[(&str, &str)]) -> Queue {
        let target = |metric: &str, scale| Target {
            metric: metric.into(),
            name: format!("VQAv2 {metric}"),
            paper: Some(79.39),
            scale,
        };
        let stages = names.iter().map(|(name, group)| {
            Queued::new(Stage {
                name: (*name).into(),
                group: (*group).into(),
                work: Work::Eval {
                    of: "t".into(),
                    data: None,
                    best: None,
                    set: Vec::new(),
                },
                after: Vec::new(),
                min_workers: 1,
                preferred_workers: 1,
                priority: 0,
                retries: 0,
                results: vec![target("vqa_score", 100.0), target("vqa_loss", 1.0)],
            })
        });
        Queue {
            stages: stages.collect(),
            ..Default::default()
        }
    }

    #[test]
    fn seeds_of_a_stage_share_a_row_and_the_best_evaluation_counts() {
        let queue = queue(&[("v-seed0", "v"), ("v-seed1", "v"), ("v-seed2", "v")]);
        let flat = |score: f64, loss: f64| json!({"vqa_score": score, "vqa_loss": loss});
        let figures = BTreeMap::from([
            (
                "v-seed0".to_owned(),
                vec![flat(0.5, 2.0), flat(0.75, 1.0), flat(0.7, 1.5)],
            ),
            (
                "v-seed2".to_owned(),
                vec![json!({"step": 3, "figures": {"vqa_score": 0.25}})],
            ),
        ]);
        let rows = rows(&queue, &figures);
        assert_eq!(rows.len(), 2, "one per figure");
        assert_eq!(rows[0].reached, Some(50.0), "the mean of 75 and 25");
        assert_eq!((rows[0].range, rows[0].seeds), (Some([25.0, 75.0]), [2, 3]));
        assert_eq!((rows[1].reached, rows[1].seeds), (Some(1.0), [1, 3]));
        let text = markdown(&rows);
        let line = "| v | VQAv2 vqa_score | 50.00 (25.00 to 75.00) | 79.39 | 2 of 3 |";
        assert!(text.contains(line), "{text}");
    }

    #[test]
    fn what_was_not_reached_has_its_row() {
        let rows = rows(&queue(&[("v", "v")]), &BTreeMap::new());
        assert_eq!((rows[0].reached, rows[0].seeds), (None, [0, 1]));
        assert!(markdown(&rows).contains("| v | VQAv2 vqa_score | - | 79.39 | 0 of 1 |"));
    }
}
