//! The audited lane of a step, as one worker sees it: its digest taken before it is folded, or the
//! whole lane computed besides the own ones.
//!
//! What is computed for an audit is hashed and dropped; it never enters the sum. It waits until no
//! own lane is missing, so that it costs what the exchange does not hide. Who is right is not this
//! worker's to say.

use super::*;

/// Audited lanes that may wait to be computed here: the auditor's, and one more for a decision.
const WAITING_MAX: usize = 2;

/// One computation of an audited lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// The open step.
    pub step: u64,
    /// The audited lane.
    pub lane: u32,
    /// 0 by who holds the lane, 1 by the auditor, 2 to decide between them.
    pub number: u32,
    /// Tells what was asked for before the step began anew from what is asked now.
    round: u64,
}

/// The audit of the open step.
#[derive(Debug, Default)]
pub(super) struct Audited {
    /// Step and lane.
    what: Option<(u64, u32)>,
    round: u64,
    /// Computations of it that are still to be done here.
    waiting: VecDeque<u32>,
    /// Digests found here, by attempt: another generation asks for them again.
    found: BTreeMap<u32, Digest>,
    /// Digests that are being taken.
    taking: u32,
}

impl Audited {
    /// Whatever was found or asked belongs to the past.
    pub(super) fn clear(&mut self) {
        *self = Audited {
            round: self.round + 1,
            ..Audited::default()
        };
    }

    fn attempt(&self, number: u32) -> Option<Attempt> {
        let (step, lane) = self.what?;
        let round = self.round;
        Some(Attempt {
            step,
            lane,
            number,
            round,
        })
    }

    fn is(&self, step: u64, lane: u32) -> bool {
        self.what == Some((step, lane))
    }
}

impl Core {
    /// What a commit or a generation says of the open step's audit.
    pub(super) fn begin_audit(&mut self, audit: Option<v1::Audit>, effects: &mut Vec<Effect>) {
        let Some(audit) = audit.filter(|a| a.step == self.applied) else {
            self.audited.clear();
            return;
        };
        let (step, lane) = (audit.step, audit.lane);
        if !self.audited.is(step, lane) {
            self.audited.clear();
            self.audited.what = Some((step, lane));
        }
        self.audited.waiting.clear();
        let holds = self.membership.as_ref().is_some_and(|m| {
            let mut nodes = m.nodes_now.iter();
            nodes.any(|n| n.start <= lane && lane < n.end)
        });
        if holds {
            self.tell_first(lane, effects);
        }
        if audit.worker_id == self.me.worker_id {
            self.compute_or_tell(1, effects);
        }
    }

    /// The holder's digest, if the lane is not computed only now.
    fn tell_first(&mut self, lane: u32, effects: &mut Vec<Effect>) {
        let (Some(m), Some(first)) = (&self.membership, self.audited.attempt(0)) else {
            return;
        };
        let missing = self.partials.missing(&m.nodes_now).contains(&lane);
        if let Some(digest) = self.audited.found.get(&0) {
            effects.push(self.told(first, Ok(*digest), 0.0));
        } else if !missing && self.audited.taking == 0 {
            let error = "the lane was folded before it was audited".to_owned();
            effects.push(self.told(first, Err(error), 0.0));
        }
    }

    fn compute_or_tell(&mut self, number: u32, effects: &mut Vec<Effect>) {
        let Some(attempt) = self.audited.attempt(number) else {
            return;
        };
        let under_way = self.in_flight.as_ref().is_some_and(|f| {
            let now = self.quarantine_at(f.step);
            f.step == attempt.step && f.of == Of::Audit(number) && f.quarantine == now
        });
        if let Some(digest) = self.audited.found.get(&number) {
            effects.push(self.told(attempt, Ok(*digest), 0.0));
        } else if !under_way && self.audited.waiting.len() < WAITING_MAX {
            self.audited.waiting.push_back(number);
        }
    }

    /// Two computations differ and this worker is asked for another.
    pub(super) fn compute_once_more(&mut self, audit: v1::Audit, effects: &mut Vec<Effect>) {
        let current = self.accepts(audit.term)
            && audit.generation == self.generation
            && audit.step == self.applied
            && self.membership.is_some();
        if !current {
            return;
        }
        if !self.audited.is(audit.step, audit.lane) {
            self.audited.clear();
            self.audited.what = Some((audit.step, audit.lane));
        }
        self.compute_or_tell(2, effects);
        self.proceed_with_audit(effects);
    }

    /// Computes an audited lane when no own lane is missing and nothing else is computed.
    pub(super) fn proceed_with_audit(&mut self, effects: &mut Vec<Effect>) {
        let own_done = matches!(self.phase, Phase::Linking | Phase::Reducing | Phase::Ready);
        let Some((step, lane)) = self.audited.what.filter(|(s, _)| *s == self.applied) else {
            return;
        };
        if !own_done || self.in_flight.is_some() {
            return;
        }
        if let Some(number) = self.audited.waiting.pop_front() {
            let quarantine = self.quarantine_at(step);
            self.in_flight = Some(InFlight {
                step,
                lane,
                quarantine: quarantine.clone(),
                round: self.features.round(),
                of: Of::Audit(number),
            });
            effects.push(Effect::Compute {
                step,
                lane,
                quarantine,
                features: self.features.gathered(),
            });
        }
    }

    /// An audited lane was computed besides the own ones.
    pub(super) fn audited_lane_done(
        &mut self,
        flight: InFlight,
        computed: Result<(Gradient, f64), String>,
        effects: &mut Vec<Effect>,
    ) {
        let outdated = flight.quarantine != self.quarantine_at(flight.step);
        let here = self.has_state() && flight.step == self.applied && self.membership.is_some();
        if outdated || !here || !self.audited.is(flight.step, flight.lane) {
            return;
        }
        let attempt = match flight.of {
            Of::Audit(number) => self.audited.attempt(number),
            Of::Features | Of::Gradient => None,
        };
        match (attempt, computed) {
            (Some(attempt), Ok((gradient, seconds))) => effects.push(Effect::DigestLane {
                attempt,
                gradient,
                seconds,
            }),
            (Some(attempt), Err(error)) => effects.push(self.told(attempt, Err(error), 0.0)),
            (None, _) => {}
        }
    }

    /// An own lane is about to be folded: its digest is taken if it is the audited one.
    pub(super) fn before_folding(
        &mut self,
        (step, lane): (u64, u32),
        gradient: &Gradient,
        effects: &mut Vec<Effect>,
    ) {
        if self.audited.is(step, lane)
            && let Some(attempt) = self.audited.attempt(0)
        {
            self.audited.taking += 1;
            effects.push(Effect::DigestLane {
                attempt,
                gradient: gradient.clone(),
                seconds: 0.0,
            });
        }
    }

    pub(super) fn lane_digest(
        &mut self,
        attempt: Attempt,
        digest: Result<Digest, String>,
        seconds: f64,
        effects: &mut Vec<Effect>,
    ) {
        if self.audited.attempt(attempt.number) != Some(attempt) || self.membership.is_none() {
            return;
        }
        if attempt.number == 0 {
            self.audited.taking = self.audited.taking.saturating_sub(1);
        }
        if let Ok(digest) = &digest {
            self.audited.found.insert(attempt.number, *digest);
        }
        effects.push(self.told(attempt, digest, seconds));
    }

    fn told(&self, attempt: Attempt, digest: Result<Digest, String>, seconds: f64) -> Effect {
        let (digest, error) = match digest {
            Ok(digest) => (digest.to_bytes(), String::new()),
            Err(error) => (Vec::new(), error),
        };
        Effect::Send(up::Body::LaneAudited(v1::LaneAudited {
            term: self.term,
            generation: self.generation,
            step: attempt.step,
            lane: attempt.lane,
            attempt: attempt.number,
            digest,
            seconds,
            error,
        }))
    }
}
