//! The lanes of the open step: which is computed next, what comes of it, and the exchange when none
//! is missing.

use super::*;

impl Core {
    /// Computes the next missing lane, or starts the exchange when none is missing.
    pub(super) fn proceed(&mut self, effects: &mut Vec<Effect>) {
        self.proceed_with_lanes(effects);
        self.proceed_with_audit(effects);
    }

    fn proceed_with_lanes(&mut self, effects: &mut Vec<Effect>) {
        let Some(m) = &self.membership else { return };
        let before = matches!(
            self.phase,
            Phase::Idle | Phase::Featuring | Phase::Computing | Phase::Linking
        );
        if m.step != self.applied || !before || !self.has_features(effects) {
            return;
        }
        let Some(m) = &self.membership else { return };
        let missing = self.partials.missing(&m.nodes_now);
        if let Some(&lane) = missing.first() {
            self.phase = Phase::Computing;
            if self.in_flight.is_none() {
                let step = self.applied;
                let quarantine = self.quarantine_at(step);
                if self.lanes_done == 0 && missing.len() > 1 && !self.me.gathers {
                    effects.push(Effect::Prefetch {
                        step,
                        lanes: missing[1..].to_vec(),
                        quarantine: quarantine.clone(),
                    });
                }
                self.in_flight = Some(InFlight {
                    step,
                    lane,
                    quarantine: quarantine.clone(),
                    round: self.features.round(),
                    of: Of::Gradient,
                });
                effects.push(Effect::Compute {
                    step,
                    lane,
                    quarantine,
                    features: self.features.gathered(),
                });
            }
            return;
        }
        if let Some(partials) = self.partials.complete(&m.nodes_now) {
            let Some(links) = m.links.ready() else {
                self.phase = Phase::Linking;
                return;
            };
            let exchange = Exchange {
                generation: m.generation,
                step: self.applied,
                rank: m.rank,
                members: m.addresses(),
                partials,
                links,
            };
            self.phase = Phase::Reducing;
            effects.push(Effect::Reduce(exchange));
            // The next step's images can be fetched while the network works.
            let own = &m.members[m.rank];
            effects.push(Effect::Prefetch {
                step: self.applied + 1,
                lanes: (own.lanes_start..own.lanes_end).collect(),
                quarantine: self.quarantine_at(self.applied + 1),
            });
        }
    }

    pub(super) fn lane_done(
        &mut self,
        step: u64,
        report: v1::LaneReport,
        gradient: Gradient,
        seconds: f64,
        effects: &mut Vec<Effect>,
    ) {
        if let Some(flight) = self.take_audit((step, report.lane)) {
            self.audited_lane_done(flight, Ok((gradient, seconds)), effects);
            self.proceed(effects);
            return;
        }
        if self.landed(step, report.lane) {
            self.before_folding((step, report.lane), &gradient, effects);
            self.fold(report, gradient, seconds, effects);
        }
        self.proceed(effects);
    }

    fn fold(
        &mut self,
        report: v1::LaneReport,
        gradient: Gradient,
        seconds: f64,
        effects: &mut Vec<Effect>,
    ) {
        let step = self.applied;
        let Some(m) = &self.membership else { return };
        self.compute_seconds += seconds;
        self.lanes_done += 1;
        match self.partials.insert(report, gradient, &m.nodes_now) {
            Ok(Some((node, sum))) => effects.push(Effect::Stage { step, node, sum }),
            Ok(None) => {}
            Err(error) => {
                effects.extend(self.apply(Event::Failed(format!("step {step}: {error}"))))
            }
        }
    }

    fn take_audit(&mut self, (step, lane): (u64, u32)) -> Option<InFlight> {
        let is_it =
            |f: &mut InFlight| matches!(f.of, Of::Audit(_)) && (f.step, f.lane) == (step, lane);
        self.in_flight.take_if(is_it)
    }

    /// A lane that cannot be computed: the coordinator decides, and a new generation tells what. Until
    /// then this worker computes nothing.
    pub(super) fn unreadable(
        &mut self,
        (step, lane): (u64, u32),
        shards: Vec<v1::Shard>,
        detail: String,
        effects: &mut Vec<Effect>,
    ) {
        if let Some(flight) = self.take_audit((step, lane)) {
            self.audited_lane_done(flight, Err(detail), effects);
            self.proceed(effects);
            return;
        }
        let features = self.take_features(step, lane);
        if !features.unwrap_or_else(|| self.landed(step, lane)) {
            self.proceed(effects);
            return;
        }
        effects.push(Effect::Send(up::Body::Unreadable(v1::Unreadable {
            term: self.term,
            generation: self.generation,
            step,
            shards,
            detail,
        })));
    }

    /// Takes the lane in flight; says whether what comes of it is wanted: it is missing, and it was
    /// computed without the shards that its step does without.
    fn landed(&mut self, step: u64, lane: u32) -> bool {
        let is_it = |f: &mut InFlight| f.of == Of::Gradient && (f.step, f.lane) == (step, lane);
        let computed = self.in_flight.take_if(is_it);
        let outdated = computed.is_some_and(|f| !self.is_current(&f));
        let here = self.has_state() && step == self.applied && self.phase != Phase::Applying;
        let Some(m) = &self.membership else {
            return false;
        };
        here && !outdated && self.partials.missing(&m.nodes_now).contains(&lane)
    }

    /// Whether a lane is computed without the shards that its step does without, and from features
    /// that count.
    pub(super) fn is_current(&self, flight: &InFlight) -> bool {
        let anew = self.me.gathers && flight.round != self.features.round();
        flight.quarantine == self.quarantine_at(flight.step) && !anew
    }
}
