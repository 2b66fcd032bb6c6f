//! What was measured of late, steps and round trips, and the times that follow from it.
//!
//! All of them are functions of the one setting and of these figures; workers are told the figures
//! and derive the same. It refuses to know what the times are used for.

use std::time::Duration;

use super::*;

/// Round trips that are looked at: the shortest of them is the network's, what is above it was this
/// or that process's.
const ROUND_TRIPS: usize = 8;
/// What remains of a long step's memory after each shorter one: a tenth of it after 22 steps.
const STEP_MEMORY: f64 = 0.9;
/// Commits from which the rate is told.
const COMMITS: usize = 32;
/// Workers are told again when a time has changed by this factor.
const TELL_FACTOR: f64 = 1.25;

/// A duration on the core's clock.
pub(super) fn millis(duration: Duration) -> Millis {
    duration.as_millis() as Millis
}

/// A worker's last round trips.
#[derive(Clone, Debug, Default)]
pub(super) struct RoundTrips {
    micros: VecDeque<u64>,
}

impl RoundTrips {
    /// One more, as the worker measured it; 0 is none.
    pub(super) fn add(&mut self, micros: u64) {
        if micros == 0 {
            return;
        }
        if self.micros.len() == ROUND_TRIPS {
            self.micros.pop_front();
        }
        self.micros.push_back(micros);
    }

    /// The shortest that is known.
    pub(super) fn shortest(&self) -> Option<Duration> {
        let shortest = self.micros.iter().min().copied();
        shortest.map(Duration::from_micros)
    }

    /// The network's round trip, when enough of them are known.
    pub(super) fn network(&self) -> Option<Duration> {
        self.shortest().filter(|_| self.micros.len() == ROUND_TRIPS)
    }
}

/// What was measured, and what workers were told of it.
#[derive(Debug, Default)]
pub(super) struct Measured {
    /// A long step of late, from commit to commit in one generation.
    pub(super) step: Duration,
    /// Of the farthest worker.
    pub(super) round_trip: Duration,
    /// The last commit of this generation.
    last_commit: Option<(u64, Millis)>,
    told: (Duration, Duration),
    /// Times of the last commits.
    commits: VecDeque<Millis>,
}

impl Measured {
    /// The open step's time is not a step's alone: something else was waited for in it.
    pub(super) fn came_between(&mut self) {
        self.last_commit = None;
    }

    /// Of the last commits; 0 before there are two.
    pub(super) fn steps_per_second(&self) -> f64 {
        let (Some(first), Some(last)) = (self.commits.front(), self.commits.back()) else {
            return 0.0;
        };
        match last.saturating_sub(*first) {
            0 => 0.0,
            millis => (self.commits.len() - 1) as f64 * 1000.0 / millis as f64,
        }
    }
}

impl Core {
    /// The times that hold now.
    pub(super) fn timeouts(&self) -> Timeouts {
        let Measured {
            step, round_trip, ..
        } = self.measured;
        self.s.timeouts.measured(step, round_trip)
    }

    /// A step was committed: the time since the one before it, if nothing came between.
    pub(super) fn measure_step(&mut self, now: Millis) {
        if self.measured.commits.len() == COMMITS {
            self.measured.commits.pop_front();
        }
        self.measured.commits.push_back(now);
        self.step_since = now;
        let before = self.measured.last_commit.replace((self.generation, now));
        if let Some((generation, then)) = before
            && generation == self.generation
        {
            let remembered = self.measured.step.mul_f64(STEP_MEMORY);
            let took = Duration::from_millis(now.saturating_sub(then));
            self.measured.step = took.max(remembered);
        }
    }

    /// Looks at all round trips; workers are told when their times change by it.
    pub(super) fn measure_round_trips(&mut self, fx: &mut Vec<Effect>) {
        let known = self
            .workers
            .values()
            .filter_map(|w| w.round_trips.network());
        self.measured.round_trip = known.max().unwrap_or_default();
        let (step, round_trip) = self.measured.told;
        let told = self.s.timeouts.measured(step, round_trip);
        let changed = |(then, now): ((&str, Duration), (&str, Duration))| {
            let (then, now) = (then.1, now.1);
            now > then.mul_f64(TELL_FACTOR) || then > now.mul_f64(TELL_FACTOR)
        };
        let pairs = told.listed().into_iter().zip(self.timeouts().listed());
        if pairs.into_iter().any(changed) {
            self.measured.told = (self.measured.step, self.measured.round_trip);
            let welcome = down::Body::Welcome(self.welcome());
            self.send_all(self.workers.keys(), welcome, fx);
        }
    }

    /// What a worker is told of the times.
    pub(super) fn welcome(&self) -> v1::Welcome {
        let (step, round_trip) = self.measured.told;
        v1::Welcome {
            term: self.s.term,
            step_us: step.as_micros() as u64,
            round_trip_us: round_trip.as_micros() as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_slow_answer_is_not_a_slow_network() {
        let mut trips = RoundTrips::default();
        for micros in [300, 0, 250, 2_900_000, 400, 310, 305, 290] {
            trips.add(micros);
        }
        assert_eq!(trips.network(), None, "seven are known");
        trips.add(301);
        assert_eq!(trips.network(), Some(Duration::from_micros(250)));
        for _ in 0..ROUND_TRIPS {
            trips.add(80_000);
        }
        assert_eq!(trips.network(), Some(Duration::from_millis(80)));
    }
}
