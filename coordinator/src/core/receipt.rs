//! A step's receipt: what its lanes reported, folded in lane order.
//!
//! Which pairs a lane trained is told by its digest alone: eight bytes of it stay in the receipt, so
//! that `belfry audit` can name the lane of a step that trained others. All lanes of a step stand at
//! the same positions of their streams, which are kept once.

use belfry_proto::objective;

use super::*;

/// Bytes that a receipt keeps of each lane's digest: a wrong lane passes once in 2^64.
pub const LANE_DIGEST_BYTES: usize = 8;
/// Bytes of a receipt without its lanes, rounded up.
const RECEIPT_BYTES: usize = 512;
/// Bytes of receipts in one message: a quarter of gRPC's limit.
const MESSAGE_BYTES: usize = 1 << 20;
/// Receipts that may wait for the next checkpoint where lanes are few.
const RECEIPTS_WAITING_MAX: usize = 2048;

impl Core {
    /// Receipts that may wait for the next checkpoint; more are put into the ledger before it, so
    /// that every message that carries them stays small.
    pub(super) fn receipts_waiting_max(&self) -> usize {
        let bytes = RECEIPT_BYTES + LANE_DIGEST_BYTES * self.s.lanes as usize;
        (MESSAGE_BYTES / bytes).clamp(1, RECEIPTS_WAITING_MAX)
    }

    /// The open step's receipt: lane reports folded in f64 in lane order.
    ///
    /// # Errors
    /// In words: a lane is missing, or trained another number of pairs than its share.
    pub(super) fn receipt(&self) -> Result<v1::StepRecord, String> {
        let step = self.committed;
        let mut lanes: BTreeMap<u32, &v1::LaneReport> = BTreeMap::new();
        let reports = self.ready.values().flat_map(|r| &r.lanes);
        lanes.extend(reports.map(|report| (report.lane, report)));
        let share = self.s.pairs_per_lane;
        for lane in 0..self.s.lanes {
            match lanes.get(&lane).map(|report| report.pairs) {
                None => return Err(format!("step {step}: nobody reported lane {lane}")),
                Some(pairs) if pairs != share => {
                    return Err(format!(
                        "step {step}: lane {lane} trained {pairs} pairs, its share is {share}"
                    ));
                }
                Some(_) => {}
            }
        }
        let first = self.ready.values().next();
        let digest = first.and_then(|r| Digest::from_bytes(&r.sum_digest));
        let first_position = step * share;
        let quarantine = self.durable.quarantine.at(step).cloned().collect();
        let skipped = self.ready.values().any(|r| !r.finite);
        let mut receipt = folded(lanes.values().copied(), f64::from(self.s.micro_batches));
        if skipped {
            // No number in JSON says what they are.
            for objective in &mut receipt.objectives {
                let loss = objective.loss;
                objective.loss = if loss.is_finite() { loss } else { 0.0 };
            }
        }
        Ok(v1::StepRecord {
            step,
            skipped,
            sum_digest: digest.map(|d| d.to_string()).unwrap_or_default(),
            first_position,
            last_position: first_position + share - 1,
            quarantine,
            ..receipt
        })
    }
}

/// Sums and digests of reports in lane order.
fn folded<'a>(
    lanes: impl Iterator<Item = &'a v1::LaneReport>,
    micro_batches: f64,
) -> v1::StepRecord {
    let mut sum = v1::LaneReport::default();
    let mut pairs_digest = Digest(0);
    let mut lane_digests = Vec::new();
    for lane in lanes {
        objective::add(&mut sum.objectives, &lane.objectives);
        sum.pairs += lane.pairs;
        sum.substituted += lane.substituted;
        let digest = Digest::from_bytes(&lane.pairs_digest).unwrap_or(Digest(0));
        pairs_digest = pairs_digest.fold(digest);
        lane_digests.extend_from_slice(&digest.0.to_le_bytes()[..LANE_DIGEST_BYTES]);
    }
    v1::StepRecord {
        objectives: objective::means(&sum.objectives, micro_batches),
        pairs: sum.pairs,
        pairs_digest: pairs_digest.to_string(),
        lane_digests,
        substituted: sum.substituted,
        ..Default::default()
    }
}
