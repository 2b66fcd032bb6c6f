//! A run's status for people: tables that fit a hundred columns.

use std::fmt::Write as _;
use std::time::Duration;

use belfry_proto::v1::{RunStatus, WorkerStatus};
use indicatif::HumanDuration;

use super::find::Found;
use super::json::reason;

/// Columns that a line may have.
const WIDTH: usize = 100;
/// Workers that are listed; the others are counted.
const WORKERS_MAX: usize = 64;
/// Decisions that are listed.
const DECISIONS_MAX: usize = 12;

/// What the coordinator says.
pub fn table(s: &RunStatus) -> String {
    let mut out = String::new();
    let rate = match s.steps_per_second {
        0.0 => "rate not known yet".into(),
        rate => format!("{rate:.2} steps/s, {:.0} pairs/s", s.pairs_per_second),
    };
    line(
        &mut out,
        &format!(
            "{}: step {} of {}, {rate}; term {}, generation {}",
            s.phase, s.step, s.steps_total, s.term, s.generation
        ),
    );
    if s.steps_per_second > 0.0 {
        let left = s.steps_total.saturating_sub(s.step) as f64 / s.steps_per_second;
        line(
            &mut out,
            &format!(
                "about {} to go",
                HumanDuration(Duration::from_secs_f64(left))
            ),
        );
    }
    if !s.waiting_for.is_empty() {
        line(&mut out, &format!("waits for: {}", s.waiting_for));
    }
    workers(&mut out, s);
    let list: Vec<String> = s.checkpoints.iter().map(u64::to_string).collect();
    let list = if list.is_empty() {
        "none yet".into()
    } else {
        list.join(" ")
    };
    line(&mut out, &format!("checkpoints of steps: {list}"));
    if let Some(open) = &s.checkpoint {
        line(
            &mut out,
            &format!(
                "the checkpoint of step {} is being written: {} of {} parts",
                open.step, open.stored, open.parts
            ),
        );
    }
    for shard in &s.quarantine {
        line(
            &mut out,
            &format!(
                "under quarantine from step {}: {}",
                shard.from_step, shard.file
            ),
        );
    }
    if s.skipped_steps > 0 {
        line(
            &mut out,
            &format!(
                "steps skipped for a gradient that was not finite: {}",
                s.skipped_steps
            ),
        );
    }
    times(&mut out, s);
    if !s.decisions.is_empty() {
        out.push_str("\ndecisions, oldest first\n");
    }
    let hidden = s.decisions.len().saturating_sub(DECISIONS_MAX);
    for d in &s.decisions[hidden..] {
        line(
            &mut out,
            &format!(
                "{:>8} ago  step {:<7} {:<20} {}",
                short(d.ago_ms * 1000),
                d.step,
                reason(d.reason()),
                d.text
            ),
        );
    }
    out
}

fn workers(out: &mut String, s: &RunStatus) {
    let _ = writeln!(
        out,
        "\n{:>6} {:>5} {:<8} {:<14} {:<15} {:>7} {:>9} {:>8} {:>7} {:>8}",
        "worker", "rank", "role", "host", "phase", "step", "lanes", "lanes/s", "trip", "heard"
    );
    for w in s.workers.iter().take(WORKERS_MAX) {
        let lanes: u32 = w.nodes.iter().map(|n| n.end - n.start).sum();
        let rank = w.rank.map_or("-".into(), |r| r.to_string());
        let speed = match w.lanes_per_second {
            0.0 => "-".into(),
            speed => format!("{speed:.2}"),
        };
        let trip = if w.round_trip_us == 0 {
            "-".into()
        } else {
            short(w.round_trip_us)
        };
        let _ = writeln!(
            out,
            "{:>6} {rank:>5} {:<8} {:<14} {:<15} {:>7} {:>9} {speed:>8} {trip:>7} {:>8}",
            w.id,
            w.role,
            cut(&w.host, 14),
            cut(&phase(w), 15),
            w.step,
            format!("{}/{lanes}", w.lanes_done),
            short(w.heard_ms * 1000)
        );
    }
    match s.workers.len().saturating_sub(WORKERS_MAX) {
        0 => {}
        more => line(out, &format!("and {more} more; --json lists all")),
    }
    out.push('\n');
}

fn phase(w: &WorkerStatus) -> String {
    match (w.copying_step, w.aside_ms) {
        (Some(step), _) => format!("copies {step}"),
        (None, 0) if w.phase.is_empty() => w.said.clone(),
        (None, 0) => w.phase.clone(),
        (None, aside) => format!("for {}", short(aside * 1000)),
    }
}

fn times(out: &mut String, s: &RunStatus) {
    let _ = writeln!(
        out,
        "\ntimes, all from cluster.max_stall_seconds\nmeasured: step {}, round trip {}",
        measured(s.step_us),
        measured(s.round_trip_us)
    );
    let told = s.timeouts.iter().map(|t| match t.derived_us == t.now_us {
        true => format!("{} {}", t.name, short(t.now_us)),
        false => format!(
            "{} {} (longer than {})",
            t.name,
            short(t.now_us),
            short(t.derived_us)
        ),
    });
    let mut row = String::new();
    for one in told {
        if !row.is_empty() && row.len() + 3 + one.len() > WIDTH {
            line(out, &std::mem::take(&mut row));
        }
        row += if row.is_empty() { "" } else { " · " };
        row += &one;
    }
    line(out, &row);
}

fn measured(micros: u64) -> String {
    if micros == 0 {
        "? (not measured yet)".into()
    } else {
        short(micros)
    }
}

/// What the root says when nobody leads.
pub fn away(found: &Found, why: &str) -> String {
    let mut out = String::new();
    if let Some(result) = &found.result {
        line(
            &mut out,
            &format!("the run is over: trained {} steps", result["step"]),
        );
        return out;
    }
    line(&mut out, &format!("nobody leads this run: {why}"));
    match &found.entry {
        Some(entry) => {
            line(
                &mut out,
                &format!(
                    "journal: entry {}, term {}, generation {}, at least {} steps committed, members {}",
                    entry["seq"],
                    entry["term"],
                    entry["generation"],
                    entry["committed"],
                    entry["members"]
                ),
            );
        }
        None => line(
            &mut out,
            "no journal was read; --root or --local names where it is",
        ),
    }
    match found.checkpoints.last() {
        Some(step) => line(
            &mut out,
            &format!("the newest checkpoint is of step {step}"),
        ),
        None => line(&mut out, "no checkpoint is durable"),
    }
    line(
        &mut out,
        "workers that live keep their state and wait for the next coordinator",
    );
    out
}

/// A time in at most seven characters.
fn short(micros: u64) -> String {
    match micros {
        0..1_000 => format!("{micros} µs"),
        1_000..1_000_000 => format!("{} ms", micros / 1_000),
        1_000_000..100_000_000 => format!("{:.1} s", micros as f64 / 1e6),
        100_000_000..10_000_000_000 => format!("{} s", micros / 1_000_000),
        _ => format!("{} h", micros / 3_600_000_000),
    }
}

fn cut(text: &str, max: usize) -> String {
    match text.chars().count() > max {
        true => text.chars().take(max - 1).chain(['…']).collect(),
        false => text.to_owned(),
    }
}

/// A line, broken at words where it is too long.
fn line(out: &mut String, text: &str) {
    let mut used = 0;
    for word in text.split(' ') {
        let len = word.chars().count();
        if used > 0 && used + 1 + len > WIDTH {
            out.push_str("\n    ");
            used = 4;
        } else if used > 0 {
            out.push(' ');
            used += 1;
        }
        out.push_str(word);
        used += len;
    }
    out.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use belfry_proto::v1::{self, Reason};

    fn status() -> RunStatus {
        let times = belfry_configs::Timeouts::new(Duration::from_secs(10)).listed();
        let timeout = |(name, time): (&str, Duration)| v1::Timeout {
            name: name.into(),
            derived_us: time.as_micros() as u64,
            now_us: 2 * time.as_micros() as u64,
        };
        let worker = v1::WorkerStatus {
            id: 9_999,
            host: "a-very-long-host-name.example.org".into(),
            role: "standby".into(),
            rank: Some(9_999),
            nodes: vec![v1::Node {
                start: 0,
                end: 4096,
            }],
            phase: "acquiring state".into(),
            step: 1_000_000,
            lanes_done: 4095,
            lanes_per_second: 12_345.67,
            round_trip_us: 123_456,
            heard_ms: 99_999,
            ..Default::default()
        };
        let text = "worker 1 on a host is lost: nothing was heard from it for 3.1 s, and so on; "
            .repeat(4);
        RunStatus {
            phase: "training".into(),
            waiting_for: text.clone(),
            steps_per_second: 0.5,
            steps_total: 100_000,
            timeouts: times.into_iter().map(timeout).collect(),
            workers: vec![worker; 70],
            decisions: vec![
                v1::Decision {
                    reason: Reason::WorkerSilent.into(),
                    text,
                    ..Default::default()
                };
                20
            ],
            ..Default::default()
        }
    }

    #[test]
    fn every_line_fits() {
        let text = table(&status());
        for line in text.lines() {
            assert!(line.chars().count() <= WIDTH, "{line}");
        }
        for part in [
            "worker_silent",
            "lease 10.0 s (longer than 5.0 s)",
            "and 6 more",
            "4095/4096",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn when_nobody_leads_the_root_is_told() {
        let found = Found {
            entry: Some(
                serde_json::json!({"seq": 7, "term": 2, "generation": 5, "committed": 40,
                "members": [0, 1]}),
            ),
            checkpoints: vec![20, 30],
            ..Found::default()
        };
        let text = away(&found, "nobody answers at 127.0.0.1:1");
        for part in [
            "nobody answers",
            "term 2",
            "at least 40 steps",
            "of step 30",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
