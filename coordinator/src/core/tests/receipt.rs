//! What a receipt holds, and what it costs.

use std::time::Instant;

use belfry_proto::objective;

use super::*;
use crate::ledger;

/// A receipt must stay below this share of a step.
const SHARE_MAX: f64 = 0.01;
/// Far below any step of 4,096 pairs: 3.2 PFLOP take a second at 3.2 PFLOP/s.
const STEP_SECONDS: f64 = 1.0;

#[test]
fn a_receipt_keeps_positions_and_a_digest_of_every_lane() {
    let mut core = training(1, Durable::default());
    let lanes = (0..4).map(|lane| v1::LaneReport {
        lane,
        pairs: 1,
        substituted: 1,
        pairs_digest: Digest(u128::from(lane) + 1).to_bytes(),
        ..Default::default()
    });
    let mut ready = v1::Ready {
        term: 1,
        generation: core.generation,
        sum_digest: Digest(9).to_bytes(),
        finite: true,
        lanes: lanes.collect(),
        ..Default::default()
    };
    let whole = ready.clone();
    ready.lanes[2].pairs = 0;
    let effects = core.apply(10, Event::Message(100, up::Body::Ready(ready)));
    let (_, reason) = ended(&effects).expect("a lane lacks a pair");
    assert!(reason.contains("lane 2 trained 0 pairs"), "{reason}");

    let mut core = training(1, Durable::default());
    core.committed = 2;
    core.ready.insert(0, v1::Ready { step: 2, ..whole });
    let receipt = core.receipt().expect("all lanes are there");
    assert_eq!((receipt.first_position, receipt.last_position), (2, 2));
    assert_eq!((receipt.pairs, receipt.substituted), (4, 4));
    let digests = receipt.lane_digests.chunks(LANE_DIGEST_BYTES);
    let digests: Vec<u64> = digests
        .map(|d| u64::from_le_bytes(d.try_into().expect("eight bytes")))
        .collect();
    assert_eq!(digests, [1, 2, 3, 4]);
    let folded = (1..=4).fold(Digest(0), |all, lane| all.fold(Digest(lane)));
    assert_eq!(receipt.pairs_digest, folded.to_string());
}

/// Time and bytes of a receipt of 128 lanes, in a step of the paper's pre-training.
#[test]
fn receipts_cost_less_than_a_hundredth_of_a_step() {
    const TIMES: u32 = 200;
    let mut s = settings(8);
    (s.lanes, s.pairs_per_lane, s.micro_batches) = (128, 32, 512);
    let mut core = training_as(s, Durable::default());
    for id in 0..8u64 {
        let lanes = (id as u32 * 16..(id as u32 + 1) * 16).map(|lane| v1::LaneReport {
            lane,
            pairs: 32,
            objectives: ["mlm", "itm"]
                .map(|name| objective::sum_of(name, f64::from(lane) + 0.1))
                .to_vec(),
            pairs_digest: Digest(u128::from(lane) << 64 | 0x1234_5678).to_bytes(),
            ..Default::default()
        });
        let ready = v1::Ready {
            generation: core.generation,
            sum_digest: Digest(9).to_bytes(),
            lanes: lanes.collect(),
            ..Default::default()
        };
        core.ready.insert(id, ready);
    }
    let begun = Instant::now();
    let mut bytes = 0;
    for _ in 0..TIMES {
        let receipt = core.receipt().expect("all lanes are there");
        bytes = ledger::to_line(&receipt).len() + 1;
    }
    let seconds = begun.elapsed().as_secs_f64() / f64::from(TIMES);
    let waiting = core.receipts_waiting_max();
    println!(
        "a receipt of 128 lanes: {bytes} bytes, {:.0} µs: {:.4} % of a step of {STEP_SECONDS} s; a \
         ledger of 100,000 steps: {:.0} MB in files of up to {waiting} steps",
        seconds * 1e6,
        100.0 * seconds / STEP_SECONDS,
        bytes as f64 * 0.1
    );
    assert!(seconds < SHARE_MAX * STEP_SECONDS, "{seconds} s");
    assert!(bytes < 3_000, "{bytes}");
    assert!(waiting * bytes < 4 << 20, "one message holds what waits");
}
