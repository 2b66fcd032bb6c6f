//! Lanes follow measured speed: how long a lane takes on each worker, and when it pays to cut anew.
//!
//! A cut changes who computes which lane and never a bit. It is made anew at a step's border, and
//! only if the slowest worker's share of a step would take less than nine tenths of what it takes.
//! Where measures are within a twentieth of the truth, lanes therefore never move in circles.

use super::*;

/// Steps whose median is a worker's speed: one odd step changes nothing.
const WINDOW: usize = 8;
/// Steps under one cut before another is thought of: every measure in the windows is of this cut.
const STEPS_PER_CUT: u64 = 16;
/// What a new cut must bring the predicted step down to.
const GAIN: f64 = 0.9;

/// How long a lane takes on one worker.
#[derive(Clone, Debug, Default)]
pub(super) struct Speed {
    lane_seconds: VecDeque<f64>,
}

impl Speed {
    /// A step in which so many lanes took so long.
    pub(super) fn add(&mut self, lanes: usize, seconds: f64) {
        if lanes == 0 || !seconds.is_finite() || seconds <= 0.0 {
            return;
        }
        if self.lane_seconds.len() == WINDOW {
            self.lane_seconds.pop_front();
        }
        self.lane_seconds.push_back(seconds / lanes as f64);
    }

    /// Seconds that a lane takes: the median of what is known.
    pub(super) fn lane_seconds(&self) -> Option<f64> {
        let mut known: Vec<f64> = self.lane_seconds.iter().copied().collect();
        known.sort_by(f64::total_cmp);
        known.get(known.len() / 2).copied()
    }

    fn is_measured(&self) -> bool {
        self.lane_seconds.len() == WINDOW
    }
}

/// What the slowest worker's share of a step takes.
fn predicted(ranges: &[Range<u32>], lane_seconds: &[f64]) -> f64 {
    let shares = ranges.iter().zip(lane_seconds);
    let times = shares.map(|(range, seconds)| range.len() as f64 * seconds);
    times.fold(0.0, f64::max)
}

/// A range of lanes per worker: even, unless a cut by speed makes the step clearly shorter.
fn best_cut(lanes: u32, lane_seconds: &[f64], nodes_max: u32) -> Vec<Range<u32>> {
    let even = lanes::cut(lanes, &vec![1.0; lane_seconds.len()], nodes_max);
    let speeds: Vec<f64> = lane_seconds.iter().map(|s| 1.0 / s).collect();
    let fast = lanes::cut(lanes, &speeds, nodes_max);
    let pays = predicted(&fast, lane_seconds) < GAIN * predicted(&even, lane_seconds);
    if pays { fast } else { even }
}

impl Core {
    /// Seconds per lane by worker; who was not measured counts as the mean of the others.
    fn lane_seconds(&self, ids: &[u64]) -> Vec<f64> {
        let measured = |id: &u64| {
            let speed = &self.workers.get(id)?.speed;
            speed.lane_seconds().filter(|_| speed.is_measured())
        };
        let known: Vec<Option<f64>> = ids.iter().map(measured).collect();
        let there: Vec<f64> = known.iter().copied().flatten().collect();
        let mean = match there.len() {
            0 => 1.0,
            count => there.iter().sum::<f64>() / count as f64,
        };
        known.into_iter().map(|s| s.unwrap_or(mean)).collect()
    }

    /// Lanes of the next step for those who get any.
    pub(super) fn cut_lanes(&self, ids: &[u64]) -> Vec<Range<u32>> {
        best_cut(self.s.lanes, &self.lane_seconds(ids), self.s.nodes_max)
    }

    /// Between a commit and the next step: lanes move if that pays.
    pub(super) fn move_lanes(&mut self, now: Millis, fx: &mut Vec<Effect>) {
        self.steps_of_cut += 1;
        if self.steps_of_cut < STEPS_PER_CUT {
            return;
        }
        // Thought of now and then only: a cut looks at every member.
        self.steps_of_cut = STEPS_PER_CUT - WINDOW as u64;
        let holders = self.lane_holders(&self.members);
        let measured = |id: &u64| self.workers.get(id).is_some_and(|w| w.speed.is_measured());
        if !holders.iter().all(measured) {
            return;
        }
        let ranges: Vec<Range<u32>> = holders
            .iter()
            .map(|id| self.lanes_next[id].clone())
            .collect();
        let seconds = self.lane_seconds(&holders);
        let (before, cut) = (predicted(&ranges, &seconds), self.cut_lanes(&holders));
        let after = predicted(&cut, &seconds);
        if after >= GAIN * before {
            return;
        }
        let moved = holders.iter().zip(ranges.iter().zip(&cut));
        let moved = moved.filter(|(_, (from, to))| from.len() != to.len());
        let moved = moved.map(|(id, (from, to))| format!("{id}: {} to {}", from.len(), to.len()));
        let moved: Vec<String> = moved.take(8).collect();
        let text = format!(
            "lanes follow measured speed, a step's computation falls from {before:.2} s to {after:.2} s \
             (worker {})",
            moved.join(", worker ")
        );
        self.notice(Reason::LanesMoved, text, fx);
        // Nothing is computed of this step yet.
        self.nodes_now.clear();
        self.open_generation(now, fx);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn speed(lane_seconds: f64) -> Speed {
        let mut speed = Speed::default();
        for _ in 0..WINDOW {
            speed.add(1, lane_seconds);
        }
        speed
    }

    #[test]
    fn a_worker_at_half_the_speed_gets_half_the_lanes() {
        let cut = best_cut(64, &[1.0, 2.0, 1.0, 1.0], 4);
        let lens: Vec<usize> = cut.iter().map(ExactSizeIterator::len).collect();
        assert_eq!(lens.iter().sum::<usize>(), 64);
        assert!((8..=10).contains(&lens[1]), "{lens:?}");
        assert!(lens[0] >= 17 && lens[2] >= 17 && lens[3] >= 17, "{lens:?}");
        // A twentieth is not worth a move.
        let even = best_cut(64, &[1.0, 1.05, 1.0, 1.0], 4);
        assert!(even.iter().all(|range| range.len() == 16), "{even:?}");
    }

    #[test]
    fn one_odd_step_is_no_speed() {
        let mut odd = speed(0.5);
        odd.add(2, 80.0);
        odd.add(0, 3.0);
        odd.add(1, f64::NAN);
        assert_eq!(odd.lane_seconds(), Some(0.5));
    }

    proptest! {
        /// Measures within a twentieth of constant speeds: every cut is made at most once.
        #[test]
        fn lanes_do_not_move_in_circles(
            truth in prop::collection::vec(0.2f64..5.0, 1..9),
            lanes in 8u32..130,
            noise in prop::collection::vec(-0.05f64..0.05, 400),
        ) {
            let mut noise = noise.iter().cycle();
            let mut current = best_cut(lanes, &vec![1.0; truth.len()], 4);
            let mut seen = vec![current.clone()];
            for _ in 0..40 {
                let measured: Vec<f64> = truth
                    .iter()
                    .map(|t| t * (1.0 + noise.next().expect("cycles")))
                    .collect();
                let cut = best_cut(lanes, &measured, 4);
                if predicted(&cut, &measured) < GAIN * predicted(&current, &measured) {
                    prop_assert!(!seen.contains(&cut), "{:?} comes again", cut);
                    seen.push(cut.clone());
                    current = cut;
                }
            }
            let even = best_cut(lanes, &vec![1.0; truth.len()], 4);
            prop_assert!(predicted(&current, &truth) <= 1.001 * predicted(&even, &truth));
        }
    }
}
