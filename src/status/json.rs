//! A run's status as one JSON object, for programs.

use belfry_proto::v1::{self, RunStatus};
use serde_json::{Value, json};

use super::find::Found;

/// The name of a reason, as logs have it without their prefix.
pub fn reason(reason: v1::Reason) -> String {
    let name = reason.as_str_name();
    name.strip_prefix("REASON_").unwrap_or(name).to_lowercase()
}

/// `leads` says whether a coordinator answered; what the root says is there either way.
pub fn json(found: &Found, answer: &Result<RunStatus, String>) -> Value {
    let mut value = match answer {
        Ok(status) => of(status),
        Err(why) => json!({"why": why}),
    };
    value["leads"] = json!(answer.is_ok());
    value["address"] = json!(found.address);
    value["journal"] = json!(found.entry);
    value["durable_checkpoints"] = json!(found.checkpoints);
    value["result"] = json!(found.result);
    value
}

fn of(s: &RunStatus) -> Value {
    let timeouts = s.timeouts.iter().map(|t| {
        let seconds = |micros: u64| micros as f64 / 1e6;
        let (derived, now) = (seconds(t.derived_us), seconds(t.now_us));
        (
            t.name.clone(),
            json!({"derived_seconds": derived, "seconds": now}),
        )
    });
    let timeouts: serde_json::Map<String, Value> = timeouts.collect();
    json!({
        "run_id": s.run_id, "term": s.term, "generation": s.generation, "step": s.step,
        "steps_total": s.steps_total, "phase": s.phase, "waiting_for": s.waiting_for,
        "steps_per_second": s.steps_per_second, "pairs_per_second": s.pairs_per_second,
        "step_seconds": s.step_us as f64 / 1e6, "round_trip_seconds": s.round_trip_us as f64 / 1e6,
        "timeouts": timeouts, "lanes": s.lanes, "min_workers": s.min_workers,
        "members_max": s.members_max, "skipped_steps": s.skipped_steps, "led_ms": s.led_ms,
        "workers": s.workers.iter().map(worker).collect::<Vec<_>>(),
        "checkpoint": s.checkpoint.map(|c| json!({"step": c.step, "parts": c.parts, "stored": c.stored})),
        "checkpoints": s.checkpoints,
        "quarantine": s.quarantine.iter().map(|q| json!({
            "dataset": q.dataset, "shard": q.shard, "file": q.file, "from_step": q.from_step,
        })).collect::<Vec<_>>(),
        "decisions": s.decisions.iter().map(|d| json!({
            "ago_ms": d.ago_ms, "step": d.step, "reason": reason(d.reason()),
            "worker": d.worker_id, "text": d.text,
        })).collect::<Vec<_>>(),
    })
}

fn worker(w: &v1::WorkerStatus) -> Value {
    json!({
        "id": w.id, "host": w.host, "role": w.role, "rank": w.rank,
        "nodes": w.nodes.iter().map(|n| [n.start, n.end]).collect::<Vec<_>>(),
        "phase": w.phase, "step": w.step, "lanes_done": w.lanes_done,
        "lanes_per_second": w.lanes_per_second, "round_trip_us": w.round_trip_us,
        "heard_ms": w.heard_ms, "said": w.said, "copying_step": w.copying_step,
        "waits_for": w.waits_for, "aside_ms": w.aside_ms, "departures": w.departures,
    })
}
