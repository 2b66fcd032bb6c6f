//! A step that takes far too long is said once, with whom it waits for and what they said last.

use super::*;

/// A step hangs when it takes so many times as long as those before it.
const STEPS_PER_HANG: u32 = 3;
/// So many are named; the others are counted.
const NAMED_MAX: usize = 4;

/// The generation and step of which it was said.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Told(Option<(u64, u64)>);

impl Core {
    /// Says that the open step hangs, once in a generation.
    pub(super) fn say_hang(&mut self, fx: &mut Vec<Effect>) {
        let times = self.timeouts();
        let limit = times.stuck.max(self.measured.step * STEPS_PER_HANG);
        let time = self.now.saturating_sub(self.step_since);
        let told = Told(Some((self.generation, self.committed)));
        if self.phase != Phase::Training || time <= millis(limit) || self.hang_told == told {
            return;
        }
        self.hang_told = told;
        let late = |id: &&u64| !self.ready.contains_key(*id);
        let late: Vec<u64> = self.members.iter().filter(late).copied().collect();
        let whom = match late.len() {
            0 => self.withheld(),
            _ => {
                let named: Vec<String> = late
                    .iter()
                    .take(NAMED_MAX)
                    .map(|id| self.tell(*id))
                    .collect();
                let more = match late.len().saturating_sub(NAMED_MAX) {
                    0 => String::new(),
                    more => format!("; and {more} more"),
                };
                named.join("; ") + &more
            }
        };
        let (step, seconds) = (self.committed, time as f64 / 1000.0);
        let text = format!("step {step} takes {seconds:.1} s already and waits for {whom}");
        match late.first() {
            Some(id) => self.about(*id, Reason::StepHangs, text, fx),
            None => self.notice(Reason::StepHangs, text, fx),
        }
    }

    /// All are ready and nothing is committed: what stands in the way.
    fn withheld(&self) -> String {
        let copying = self.workers.iter().find(|(_, w)| w.copying.is_some());
        match copying {
            _ if !self.waiting_for.is_empty() => self.waiting_for.clone(),
            Some((id, _)) => format!("worker {id}, which copies the state"),
            None => match self.evaluation.workers().next() {
                Some(id) => format!("worker {id}, which evaluates the state before it"),
                None => "the store".into(),
            },
        }
    }

    /// A member, where it is, and what it said last.
    fn tell(&self, id: u64) -> String {
        let Some(worker) = self.workers.get(&id) else {
            return format!("worker {id}");
        };
        let rank = self.members.binary_search(&id).unwrap_or_default();
        let nodes = self
            .nodes_now
            .get(&id)
            .map(Vec::as_slice)
            .unwrap_or_default();
        let lanes: u32 = nodes.iter().map(|n| n.lanes()).sum();
        let ranges: Vec<String> = nodes.iter().map(ToString::to_string).collect();
        let beat = &worker.beat;
        let elsewhere = match (beat.generation, beat.step) {
            (g, s) if (g, s) == (self.generation, self.committed) => String::new(),
            (g, s) => format!(" in generation {g} at step {s}"),
        };
        let phase = if beat.phase.is_empty() {
            "silent"
        } else {
            &beat.phase
        };
        format!(
            "rank {rank} (worker {id} on {}, lanes {}): {phase}{elsewhere}, {} of {lanes} lanes done, \
             last message {} {:.1} s ago",
            report::host(worker),
            ranges.concat(),
            beat.lanes_done,
            worker.last_said,
            self.now.saturating_sub(worker.last_seen) as f64 / 1000.0
        )
    }
}
