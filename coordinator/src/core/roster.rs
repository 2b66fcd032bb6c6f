//! Who of those that are here takes part: who holds lanes, who follows as a spare, who stands by, and
//! who is put aside because it comes and goes too often.
//!
//! A spare is a member without lanes: it receives every sum, so it takes over at once. Whoever is
//! beyond lanes and spares stands by without a state, and is told so. Nobody is put aside whom the
//! run needs.

use super::*;

/// Departures within the window after which a worker is put aside.
const DEPARTURES_MAX: usize = 5;
/// The window, in the setting's unit: two minutes where it is ten seconds.
const WINDOW_STALLS: u32 = 12;
/// Doublings of the time aside.
const ASIDE_DOUBLINGS_MAX: u32 = 6;
/// Workers whose departures are remembered.
const REMEMBERED_MAX: usize = 16_384;

/// How often a worker came and went of late.
#[derive(Debug, Default)]
pub(super) struct Departures {
    times: VecDeque<Millis>,
    /// Times aside so far.
    asides: u32,
    /// Aside until then; 0: it is not.
    until: Millis,
}

impl Core {
    /// Workers that get lanes, at most.
    fn holders_max(&self) -> usize {
        let lanes = self.s.lanes as usize;
        match self.s.max_workers {
            0 => lanes,
            max => max.min(lanes),
        }
    }

    /// Workers that hold the state, at most.
    pub(super) fn members_max(&self) -> usize {
        self.holders_max() + self.s.spares
    }

    /// With fewer members nobody is left aside: the setting's minimum, and two, because the state of
    /// one is gone with it.
    pub(super) fn members_least(&self) -> usize {
        self.s.min_workers.max(2).min(self.members_max())
    }

    /// Whether it is a member of the open generation. Members ascend.
    pub(super) fn is_member(&self, id: u64) -> bool {
        self.members.binary_search(&id).is_ok()
    }

    /// Those of these members that get lanes: who has lanes now, then the lowest ids. Ascending.
    pub(super) fn lane_holders(&self, members: &[u64]) -> Vec<u64> {
        let max = self.holders_max();
        if members.len() <= max {
            return members.to_vec();
        }
        let holds = |id: &u64| {
            self.lanes_next
                .get(id)
                .is_some_and(|range| !range.is_empty())
        };
        let mut chosen: Vec<u64> = members.iter().copied().filter(holds).take(max).collect();
        let others = members.iter().copied().filter(|id| !holds(id));
        chosen.extend(others.take(max - chosen.len()));
        chosen.sort_unstable();
        chosen
    }

    /// Who will be a member of the next generation: whoever can and is wanted, members first.
    pub(super) fn next_members(&self) -> Vec<u64> {
        let able = self.workers.iter().filter(|(_, w)| self.eligible(w));
        let (able, leaving): (Vec<u64>, Vec<u64>) = able
            .map(|(id, _)| *id)
            .partition(|id| !self.workers[id].leaving);
        // The last that holds the state stays as long as it can.
        let able = if able.is_empty() { leaving } else { able };
        let wanted = |id: &&u64| !self.is_aside(**id);
        let mut chosen: Vec<u64> = able.iter().filter(wanted).copied().collect();
        if chosen.len() < self.members_least() {
            // Better one that comes and goes than none.
            chosen = able;
        }
        let max = self.members_max();
        if chosen.len() > max {
            let (mut stay, new): (Vec<u64>, Vec<u64>) =
                chosen.into_iter().partition(|id| self.is_member(*id));
            stay.truncate(max);
            let free = max - stay.len();
            stay.extend(new.into_iter().take(free));
            stay.sort_unstable();
            return stay;
        }
        chosen
    }

    /// Those that begin a run, or load its checkpoint: as many as may be members.
    pub(super) fn starters(&self) -> Vec<u64> {
        let here = self.workers.iter().filter(|(_, w)| !w.leaving);
        let (wanted, aside): (Vec<u64>, Vec<u64>) =
            here.map(|(id, _)| *id).partition(|id| !self.is_aside(*id));
        let needed = self.members_least().saturating_sub(wanted.len());
        let mut chosen = wanted;
        chosen.truncate(self.members_max());
        chosen.extend(aside.into_iter().take(needed));
        chosen.sort_unstable();
        chosen
    }

    /// Those that get a copy of the state now.
    pub(super) fn newcomers(&self, now: Millis) -> Vec<u64> {
        let copying = self
            .workers
            .values()
            .filter(|w| w.copying.is_some())
            .count();
        let free = self
            .members_max()
            .saturating_sub(self.members.len() + copying);
        let lacking = self.members.len() < self.members_least();
        let idle = |id: u64, w: &Worker| {
            let rests = w.copying.is_none() && !w.leaving && now >= w.copy_after;
            rests && !self.is_member(id) && (lacking || !self.is_aside(id))
        };
        let idle = self.workers.iter().filter(|(id, w)| idle(**id, w));
        idle.map(|(id, _)| *id).take(free).collect()
    }

    /// Departures within the window.
    pub(super) fn departures_of(&self, id: u64) -> usize {
        self.departures.get(&id).map_or(0, |d| d.times.len())
    }

    pub(super) fn is_aside(&self, id: u64) -> bool {
        self.aside_for(id).is_some()
    }

    /// How long a worker is still put aside.
    pub(super) fn aside_for(&self, id: u64) -> Option<Millis> {
        let until = self.departures.get(&id)?.until;
        until.checked_sub(self.now).filter(|left| *left > 0)
    }

    /// A worker went that was not asked to; whoever does so too often is put aside.
    pub(super) fn count_departure(&mut self, id: u64, fx: &mut Vec<Effect>) {
        let stall = self.s.timeouts.max_stall;
        let since = self.now.saturating_sub(millis(stall * WINDOW_STALLS));
        if self.departures.len() >= REMEMBERED_MAX {
            self.departures
                .retain(|_, d| d.times.back().is_some_and(|t| *t >= since));
        }
        let departures = self.departures.entry(id).or_default();
        departures.times.retain(|time| *time >= since);
        if departures.times.is_empty() {
            departures.asides = 0;
        }
        departures.times.push_back(self.now);
        let times = departures.times.len();
        let others = self
            .workers
            .keys()
            .filter(|w| **w != id && !self.is_aside(**w))
            .count();
        if times < DEPARTURES_MAX || others < self.members_least() {
            return;
        }
        let window = (stall * WINDOW_STALLS).as_secs();
        self.put_aside(id, &format!("it went {times} times within {window} s"), fx);
    }

    /// Leaves a worker that has just gone out of the run for a while, longer each time.
    pub(super) fn put_aside(&mut self, id: u64, why: &str, fx: &mut Vec<Effect>) {
        let Some(departures) = self.departures.get_mut(&id) else {
            return;
        };
        let time = self.s.timeouts.max_stall * (1 << departures.asides.min(ASIDE_DOUBLINGS_MAX));
        departures.asides += 1;
        departures.until = self.now + millis(time);
        departures.times.clear();
        departures.times.push_back(self.now);
        let text = format!(
            "worker {id} is put aside for {} s: {why}",
            time.as_secs_f32()
        );
        self.about(id, Reason::WorkerPutAside, text, fx);
    }

    /// Tells whoever has nothing to do why, and whoever was asked to leave that it may.
    pub(super) fn tell_waiting(&mut self, fx: &mut Vec<Effect>) {
        let running = matches!(self.phase, Phase::Training | Phase::Finishing);
        let mut told: Vec<(u64, String, Millis)> = Vec::new();
        let mut left: Vec<u64> = Vec::new();
        for (id, worker) in &self.workers {
            let busy = running && self.is_member(*id);
            if worker.leaving && !busy {
                left.push(*id);
            }
            if worker.leaving || !running || busy || worker.copying.is_some() {
                continue;
            }
            let aside = self.aside_for(*id);
            let why = match aside {
                Some(_) => "it came and went too often and is put aside",
                None if self.members.len() >= self.members_max() => {
                    "the run has all the workers it may have; this one stands by"
                }
                None => continue,
            };
            if worker.waits_for != why {
                told.push((*id, why.to_owned(), aside.unwrap_or(0)));
            }
        }
        for (id, why, for_ms) in told {
            let wait = v1::Wait {
                why: why.clone(),
                for_ms,
            };
            self.send(id, down::Body::Wait(wait), fx);
            if let Some(worker) = self.workers.get_mut(&id) {
                worker.waits_for = why;
            }
        }
        for id in left {
            self.dismiss(id, fx);
        }
    }

    /// A worker that was asked to leave holds nothing of the open step any more: it may go.
    fn dismiss(&mut self, id: u64, fx: &mut Vec<Effect>) {
        let reason = format!("left; the run is at step {}", self.committed);
        let finished = v1::Finished {
            success: true,
            reason,
        };
        self.send(id, down::Body::Finished(finished), fx);
        let text = format!("worker {id} has left");
        self.about(id, Reason::WorkerLeft, text, fx);
        self.forget(id, fx);
    }
}
