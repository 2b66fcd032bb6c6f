//! `belfry status` of a plan: its stages, what runs, how far, and why the rest waits; from its
//! scheduler, and from its journal when nobody schedules it.

use std::fmt::Write as _;

use belfry_coordinator::journal;
use belfry_coordinator::plan::{Queue, describe};
use belfry_proto::v1::{PlanRequest, PlanStatus, StageStatus};
use serde_json::{Value, json};
use shard_tools::store::Root;

use super::client::Whereabouts;
use super::place::{FIGURES_FILE, PLAN_FILE, folder};
use super::results;

/// Columns of a reason; the rest is told by `--json`.
const WHY_MAX: usize = 100;

/// Shows the plan of a root, as text or as JSON; nothing where it is a run's.
pub async fn show(root: &Root, as_json: bool) -> anyhow::Result<Option<String>> {
    let (status, led) = match asked(root).await {
        Ok(status) => (status, Ok(())),
        Err(why) => match kept(root).await? {
            Some(status) => (status, Err(format!("{why:#}"))),
            None => return Ok(None),
        },
    };
    let mut figures = Vec::new();
    for stage in &status.stages {
        figures.push(evaluations(root, &stage.name).await?);
    }
    Ok(Some(match as_json {
        true => json_of(&status, &led, &figures).to_string() + "\n",
        false => table(&status, &led, &figures),
    }))
}

/// From the scheduler.
async fn asked(root: &Root) -> anyhow::Result<PlanStatus> {
    let mut client = Whereabouts::Journal(root.clone()).connect().await?;
    Ok(client.plan(PlanRequest {}).await?.into_inner())
}

/// From the journal.
async fn kept(root: &Root) -> anyhow::Result<Option<PlanStatus>> {
    if !root.exists(PLAN_FILE).await? {
        let newest = journal::newest(root).await?;
        if newest.is_none_or(|entry| entry.queue.is_none()) {
            return Ok(None);
        }
    }
    let newest = journal::newest(root).await?.unwrap_or_default();
    let queue: Queue = match newest.queue {
        Some(queue) => serde_json::from_value(queue)?,
        None => Queue::default(),
    };
    Ok(Some(PlanStatus {
        plan: queue.plan,
        term: newest.term,
        stages: queue.stages.iter().map(describe).collect(),
        agents: Vec::new(),
    }))
}

/// Every evaluation that a stage made durable so far, in the order of their steps.
async fn evaluations(root: &Root, stage: &str) -> anyhow::Result<Vec<Value>> {
    let folder = folder(stage);
    let listed = root.list(&format!("{folder}/metrics")).await?;
    let files = listed.into_iter().map(|(file, _)| file);
    let mut files: Vec<String> = files.filter(|f| f.ends_with(".json")).collect();
    files.sort();
    let figures = format!("{folder}/{FIGURES_FILE}");
    if root.exists(&figures).await? {
        files.push(figures);
    }
    let mut all = Vec::new();
    for file in files {
        let bytes = root.get(&file).await?;
        all.extend(serde_json::from_slice::<Value>(&bytes).ok());
    }
    Ok(all)
}

/// Names and best values of the figures that evaluations hold.
fn figures_of(evaluations: &[Value]) -> Vec<(String, f64)> {
    let Some(last) = evaluations.last().and_then(Value::as_object) else {
        return Vec::new();
    };
    let held = last
        .get("figures")
        .and_then(Value::as_object)
        .unwrap_or(last);
    let names = held.iter().filter(|(_, value)| value.is_number());
    let names = names.filter(|(name, _)| !["step", "pairs", "seconds"].contains(&name.as_str()));
    let best =
        names.filter_map(|(name, _)| Some((name.clone(), results::best(evaluations, name)?)));
    best.collect()
}

fn table(status: &PlanStatus, led: &Result<(), String>, figures: &[Vec<Value>]) -> String {
    let mut out = String::new();
    let done = status.stages.iter().filter(|s| s.state == "done").count();
    let all = status.stages.len();
    let _ = writeln!(out, "{}: {done} of {all} stages done", status.plan);
    match led {
        Ok(()) => {
            for agent in &status.agents {
                let (name, busy, slots) = (&agent.name, agent.busy, agent.slots);
                let _ = writeln!(out, "agent {name}: {busy} of {slots} workers busy");
            }
            if status.agents.is_empty() {
                out.push_str("no agent is here: start `belfry agent` on a host\n");
            }
        }
        Err(why) => {
            let _ = writeln!(out, "nobody schedules it ({why}); what runs goes on");
        }
    }
    let width = status
        .stages
        .iter()
        .map(|s| s.name.len())
        .max()
        .unwrap_or(0)
        .max(5);
    let _ = writeln!(
        out,
        "\n{:<width$} {:<9} {:>9} {:>15} {:>5}  best figures",
        "stage", "state", "workers", "step", "tries"
    );
    for (stage, evaluations) in status.stages.iter().zip(figures) {
        let best = figures_of(evaluations).into_iter();
        let best: Vec<String> = best
            .map(|(name, value)| format!("{name} {value:.4}"))
            .collect();
        let _ = writeln!(
            out,
            "{:<width$} {:<9} {:>9} {:>15} {:>5}  {}",
            stage.name,
            stage.state,
            workers(stage),
            step(stage),
            stage.failures + u32::from(!["waiting", "ready"].contains(&stage.state.as_str())),
            best.join(", ")
        );
        if !stage.why.is_empty() {
            let why: String = stage.why.chars().take(WHY_MAX).collect();
            let _ = writeln!(out, "{:<width$} {why}", "");
        }
    }
    out
}

fn workers(stage: &StageStatus) -> String {
    format!(
        "{}/{}-{}",
        stage.workers, stage.min_workers, stage.preferred_workers
    )
}

fn step(stage: &StageStatus) -> String {
    match stage.steps_total {
        0 => "-".into(),
        total => format!("{}/{total}", stage.step),
    }
}

fn json_of(status: &PlanStatus, led: &Result<(), String>, figures: &[Vec<Value>]) -> Value {
    let stages = status.stages.iter().zip(figures).map(|(s, evaluations)| {
        let best = figures_of(evaluations).into_iter();
        let best: serde_json::Map<String, Value> = best.map(|(k, v)| (k, json!(v))).collect();
        json!({
            "name": s.name, "group": s.group, "state": s.state, "workers": s.workers,
            "min_workers": s.min_workers, "preferred_workers": s.preferred_workers,
            "priority": s.priority, "failures": s.failures, "retries": s.retries, "step": s.step,
            "steps_total": s.steps_total, "why": s.why, "best": best,
        })
    });
    let agents = status
        .agents
        .iter()
        .map(|a| json!({"name": a.name, "slots": a.slots, "busy": a.busy, "heard_ms": a.heard_ms}));
    json!({
        "plan": status.plan, "term": status.term, "leads": led.is_ok(),
        "stages": stages.collect::<Vec<_>>(), "agents": agents.collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_says_what_runs_and_why_the_rest_waits() {
        let stage = |name: &str, state: &str, why: &str| StageStatus {
            name: name.into(),
            state: state.into(),
            min_workers: 1,
            preferred_workers: 8,
            why: why.into(),
            ..Default::default()
        };
        let status = PlanStatus {
            plan: "paper".into(),
            stages: vec![
                StageStatus {
                    workers: 3,
                    step: 10,
                    steps_total: 12,
                    ..stage("pretrain", "running", "")
                },
                stage("vqav2", "waiting", "comes after pretrain"),
            ],
            ..Default::default()
        };
        let told = vec![
            vec![
                json!({"step": 0, "mlm_loss": 9.0}),
                json!({"step": 4, "mlm_loss": 8.5}),
            ],
            Vec::new(),
        ];
        let text = table(&status, &Ok(()), &told);
        for part in [
            "3/1-8",
            "10/12",
            "mlm_loss 8.5",
            "comes after pretrain",
            "no agent",
        ] {
            assert!(text.contains(part), "`{part}` is not in: {text}");
        }
        let away = table(&status, &Err("no scheduler answers at h:1".into()), &told);
        assert!(
            away.contains("nobody schedules it (no scheduler answers"),
            "{away}"
        );
        let value = json_of(&status, &Ok(()), &told);
        assert_eq!(value["stages"][0]["best"]["mlm_loss"], 8.5);
    }
}
