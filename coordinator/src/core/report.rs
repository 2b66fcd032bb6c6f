//! The run as it stands, for people: phase, times, workers, checkpoints and the last decisions.
//! It changes nothing.

use super::*;

/// Decisions that are remembered.
const DECISIONS_MAX: usize = 50;
/// Checkpoints that are listed.
const CHECKPOINTS_MAX: usize = 10;

/// A decision, and when.
#[derive(Debug)]
pub(super) struct Decided {
    at: Millis,
    step: u64,
    reason: i32,
    worker_id: Option<u64>,
    text: String,
}

/// What a message is called.
pub(super) fn name(body: &up::Body) -> &'static str {
    match body {
        up::Body::Hello(_) => "hello",
        up::Body::Heartbeat(_) => "heartbeat",
        up::Body::Ready(_) => "ready",
        up::Body::Applied(_) => "applied",
        up::Body::PeerTrouble(_) => "peer trouble",
        up::Body::StateReady(_) => "state ready",
        up::Body::PartStored(_) => "part stored",
        up::Body::SnapshotHeld(_) => "snapshot held",
        up::Body::LaneAudited(_) => "lane audited",
        up::Body::StateDigest(_) => "state digest",
        up::Body::ShareEvaluated(_) => "share evaluated",
        up::Body::Evaluated(_) => "evaluated",
        up::Body::Exported(_) => "exported",
        up::Body::Leaving(_) => "leaving",
        up::Body::Fatal(_) => "fatal",
        up::Body::LinkId(_) => "link id",
        up::Body::Unreadable(_) => "unreadable shard",
    }
}

/// The machine of a worker; its address where the machine has no name.
pub(super) fn host(worker: &Worker) -> &str {
    match worker.device.host.as_str() {
        "" => &worker.address,
        host => host,
    }
}

impl Core {
    /// Remembers what was decided in this event.
    pub(super) fn remember_decisions(&mut self, fx: &[Effect]) {
        let emitted = fx.iter().filter_map(|effect| match effect {
            Effect::Emit(event) if !event.notice.is_empty() => Some(event),
            _ => None,
        });
        for event in emitted {
            if self.decided_lately.len() == DECISIONS_MAX {
                self.decided_lately.pop_front();
            }
            self.decided_lately.push_back(Decided {
                at: self.now,
                step: event.step,
                reason: event.reason,
                worker_id: event.worker_id,
                text: event.notice.clone(),
            });
        }
    }

    /// Everything that an operator asks, as of the last event.
    pub fn report(&self) -> v1::RunStatus {
        let now = self.now;
        let status = self.status();
        let rate = self.measured.steps_per_second();
        let pairs = self.s.pairs_per_lane * u64::from(self.s.lanes);
        let newest = self.durable.manifests.iter().rev().take(CHECKPOINTS_MAX);
        v1::RunStatus {
            run_id: self.s.run_id.clone(),
            term: status.term,
            generation: status.generation,
            step: status.step,
            steps_total: status.steps_total,
            phase: status.phase,
            waiting_for: status.waiting_for,
            steps_per_second: rate,
            pairs_per_second: rate * pairs as f64,
            step_us: self.measured.step.as_micros() as u64,
            round_trip_us: self.measured.round_trip.as_micros() as u64,
            timeouts: self.timeouts_listed(),
            workers: self
                .workers
                .iter()
                .map(|(id, w)| self.worker_status(now, *id, w))
                .collect(),
            lanes: self.s.lanes,
            min_workers: self.s.min_workers as u32,
            members_max: self.members_max() as u32,
            checkpoint: self.checkpoint.as_ref().map(OpenCheckpoint::status),
            checkpoints: newest.rev().copied().collect(),
            quarantine: self.durable.quarantine.all().cloned().collect(),
            skipped_steps: self.skipped(),
            decisions: self.decided_lately.iter().map(|d| d.told(now)).collect(),
            led_ms: now,
        }
    }

    fn skipped(&self) -> u64 {
        let durable = &self.durable.receipts;
        let recent = self.receipts.values();
        let recent = recent.filter(|r| r.skipped && !durable.contains_key(&r.step));
        let stored = durable.values().filter(|r| r.skipped);
        (recent.count() + stored.count()) as u64
    }

    fn timeouts_listed(&self) -> Vec<v1::Timeout> {
        let (derived, now) = (self.s.timeouts.listed(), self.timeouts().listed());
        let both = derived.iter().zip(now);
        both.map(|((name, derived), (_, now))| v1::Timeout {
            name: (*name).into(),
            derived_us: derived.as_micros() as u64,
            now_us: now.as_micros() as u64,
        })
        .collect()
    }

    fn worker_status(&self, now: Millis, id: u64, worker: &Worker) -> v1::WorkerStatus {
        let member = self.members.binary_search(&id).ok();
        let rank = member.filter(|_| matches!(self.phase, Phase::Training | Phase::Finishing));
        let nodes = rank
            .and_then(|_| self.nodes_now.get(&id))
            .map(Vec::as_slice)
            .unwrap_or_default();
        let aside = self.aside_for(id).filter(|_| rank.is_none());
        let role = match rank {
            _ if worker.leaving => "leaving",
            Some(_) if self.lanes_next.get(&id).is_some_and(|l| !l.is_empty()) => "member",
            Some(_) => "spare",
            None if worker.copying.is_some() => "copying",
            None if aside.is_some() => "aside",
            None if matches!(self.phase, Phase::Training | Phase::Finishing) => "standby",
            None => "here",
        };
        let micros = |d: std::time::Duration| d.as_micros() as u64;
        v1::WorkerStatus {
            id,
            host: host(worker).to_owned(),
            role: role.into(),
            rank: rank.map(|r| r as u32),
            nodes: nodes.iter().map(|n| (*n).into()).collect(),
            phase: worker.beat.phase.clone(),
            step: worker.beat.step,
            lanes_done: worker.beat.lanes_done,
            lanes_per_second: worker.speed.lane_seconds().map_or(0.0, |s| 1.0 / s),
            round_trip_us: worker.round_trips.shortest().map_or(0, micros),
            heard_ms: now.saturating_sub(worker.last_seen),
            said: worker.last_said.into(),
            copying_step: worker.copying.map(|c| c.step),
            waits_for: worker.waits_for.clone(),
            aside_ms: aside.unwrap_or(0),
            departures: self.departures_of(id) as u32,
        }
    }
}

impl Decided {
    fn told(&self, now: Millis) -> v1::Decision {
        v1::Decision {
            ago_ms: now.saturating_sub(self.at),
            step: self.step,
            reason: self.reason,
            worker_id: self.worker_id,
            text: self.text.clone(),
        }
    }
}
