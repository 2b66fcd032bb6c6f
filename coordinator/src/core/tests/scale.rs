//! Ten thousand workers: what a decision takes, and what the core holds.

use std::time::Instant;

use super::*;

const WORKERS: u64 = 10_000;
const LANES: u32 = 16_384;
const STEPS: u64 = 12;
/// Ten times the bound that `belfry bench coordinator` measures: other tests share the processors, and
/// what looks at everybody for each event is slower by thousands.
const DECISION_MS_MAX: f64 = 500.0;
const BYTES_MAX: u64 = 500 << 20;

fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with("VmHWM:"));
    let number = line.and_then(|l| l.split_whitespace().nth(1)?.parse::<u64>().ok());
    number.unwrap_or(0) * 1024
}

/// Of the slowest of a hundred.
fn p99(mut millis: Vec<f64>) -> f64 {
    millis.sort_by(f64::total_cmp);
    millis[(millis.len() * 99).div_ceil(100) - 1]
}

#[test]
fn ten_thousand_workers_are_led_within_bounds() {
    let before = resident_bytes();
    let mut s = settings(WORKERS as usize);
    (s.lanes, s.micro_batches, s.steps_total) = (LANES, LANES, 1_000);
    let begun = Instant::now();
    let mut core = training_as(s, Durable::default());
    let opened = begun.elapsed().as_secs_f64();
    let digest = Digest(9).to_bytes();
    let (mut commits, mut others) = (Vec::new(), Vec::new());
    for step in 0..STEPS {
        for id in 0..WORKERS {
            let beat = v1::Heartbeat {
                generation: core.generation,
                step,
                phase: "computing".into(),
                ..Default::default()
            };
            let begun = Instant::now();
            core.apply(20, Event::Message(100 + id, up::Body::Heartbeat(beat)));
            others.push(begun.elapsed().as_secs_f64() * 1e3);
        }
        for id in 0..WORKERS {
            let lanes = core.nodes_now[&id].iter().flat_map(|n| n.start..n.end);
            let ready = v1::Ready {
                term: 1,
                generation: core.generation,
                step,
                sum_digest: digest.clone(),
                finite: true,
                lanes: lanes
                    .map(|lane| v1::LaneReport {
                        lane,
                        pairs: 1,
                        pairs_digest: digest.clone(),
                        ..Default::default()
                    })
                    .collect(),
                compute_seconds: 1.0,
                ..Default::default()
            };
            let begun = Instant::now();
            core.apply(20, Event::Message(100 + id, up::Body::Ready(ready)));
            let took = begun.elapsed().as_secs_f64() * 1e3;
            if id + 1 == WORKERS {
                &mut commits
            } else {
                &mut others
            }
            .push(took);
        }
        let begun = Instant::now();
        core.apply(20, Event::Tick);
        others.push(begun.elapsed().as_secs_f64() * 1e3);
    }
    assert_eq!(core.committed, STEPS);
    let begun = Instant::now();
    core.apply(30, Event::Gone(100 + WORKERS / 2));
    let reopened = begun.elapsed().as_secs_f64() * 1e3;
    assert_eq!(core.members.len() as u64, WORKERS - 1);
    let bytes = resident_bytes().saturating_sub(before);
    let mut sorted = commits.clone();
    sorted.sort_by(f64::total_cmp);
    let (median, commit, other) = (sorted[sorted.len() / 2], p99(commits), p99(others));
    println!(
        "{WORKERS} workers, {LANES} lanes: opened in {opened:.2} s, a commit decision takes \
         {median:.1} ms (p99 {commit:.1} of {STEPS}), another event {other:.3} ms (p99), a death {reopened:.1} ms, \
         {} MiB more held",
        bytes >> 20
    );
    if cfg!(not(debug_assertions)) {
        assert!(median < DECISION_MS_MAX, "{median} ms");
    }
    assert!(bytes < BYTES_MAX, "{bytes} bytes");
}
