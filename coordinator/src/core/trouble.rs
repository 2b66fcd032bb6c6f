//! Exchanges that fail between workers that live: which pairs cannot reach each other, and who goes
//! for it.
//!
//! A failed exchange opens the step's next generation: the death that caused it is usually heard of
//! first, and a lost packet does not come twice. A pair that fails twice in one step cannot talk, so
//! whoever is in most such pairs is removed, which leaves most of the others together, and is put
//! aside for a while: its link is as broken after its next hello.

use super::*;

/// Failures of one pair in one step after which one of the two is removed.
const PAIR_FAILURES_MAX: u32 = 2;
/// Failed exchanges of one step after which everybody who was named is removed.
const FAILURES_MAX: u32 = 6;

/// Two workers, the lower id first.
type Pair = (u64, u64);

/// What the open step's exchanges have come to.
#[derive(Debug, Default)]
pub(super) struct Troubles {
    /// When the open generation's exchange was first said to have failed.
    since: Option<Millis>,
    /// Who cannot reach whom in the open generation.
    named: BTreeSet<Pair>,
    /// In how many generations of the open step each pair failed.
    failures: BTreeMap<Pair, u32>,
    /// How often each worker was named by others, to tell the ends of a pair apart.
    accused: BTreeMap<u64, u32>,
    /// Generations of the open step that failed.
    generations: u32,
}

impl Troubles {
    /// Another generation begins, of the same step.
    pub(super) fn next_generation(&mut self) {
        self.since = None;
        self.named.clear();
    }

    /// Whoever is to go so that no broken pair is left, by who breaks most.
    fn cover(&self, failures_max: u32) -> Vec<u64> {
        let broken = self.failures.iter().filter(|(_, n)| **n >= failures_max);
        let mut broken: BTreeSet<Pair> = broken.map(|(pair, _)| *pair).collect();
        let mut gone = Vec::new();
        while !broken.is_empty() {
            let mut worst: BTreeMap<u64, u32> = BTreeMap::new();
            for (a, b) in &broken {
                *worst.entry(*a).or_default() += 1;
                *worst.entry(*b).or_default() += 1;
            }
            let accused = |id: u64| self.accused.get(&id).copied().unwrap_or(0);
            let worst = worst
                .into_iter()
                .max_by_key(|(id, n)| (*n, accused(*id), *id));
            let Some((id, _)) = worst else { break };
            broken.retain(|(a, b)| *a != id && *b != id);
            gone.push(id);
        }
        gone
    }
}

impl Core {
    /// A member's exchange failed.
    pub(super) fn take_trouble(
        &mut self,
        now: Millis,
        id: u64,
        told: &v1::PeerTrouble,
        fx: &mut Vec<Effect>,
    ) {
        if told.generation != self.generation || !self.is_member(id) {
            return;
        }
        let accused = told
            .ranks
            .iter()
            .filter_map(|r| self.members.get(*r as usize));
        let accused: Vec<u64> = accused.copied().filter(|other| *other != id).collect();
        let first = self.troubles.since.is_none();
        self.troubles.since.get_or_insert(now);
        let mut new = first;
        for other in accused {
            new |= self.troubles.named.insert((id.min(other), id.max(other)));
            *self.troubles.accused.entry(other).or_default() += 1;
        }
        if new {
            let text = format!("worker {id} reports trouble: {}", told.detail);
            self.about(id, Reason::PeerTrouble, text, fx);
        }
    }

    /// Opens the next generation when an exchange failed, without whom it cannot be had. Returns
    /// whether one was opened.
    pub(super) fn settle_trouble(&mut self, now: Millis, fx: &mut Vec<Effect>) -> bool {
        // The death that caused it is usually heard of first.
        let heartbeat = millis(self.timeouts().heartbeat);
        let settled = |since: Millis| now.saturating_sub(since) >= heartbeat;
        if !self.troubles.since.is_some_and(settled) {
            return false;
        }
        let named = std::mem::take(&mut self.troubles.named);
        self.troubles.since = None;
        self.troubles.generations += 1;
        if named.is_empty() && self.links_broke(fx) {
            self.troubles = Troubles::default();
        }
        for pair in named {
            *self.troubles.failures.entry(pair).or_default() += 1;
        }
        let failures_max = match self.troubles.generations {
            FAILURES_MAX.. => 1,
            _ => PAIR_FAILURES_MAX,
        };
        let gone = self.troubles.cover(failures_max);
        let generation = self.generation;
        if !gone.is_empty() {
            self.troubles = Troubles::default();
        }
        for id in gone {
            self.remove(now, id, Loss::Unreachable, fx);
            self.put_aside(id, "its peers cannot reach it", fx);
        }
        // Removing a member has opened one already.
        if self.phase == Phase::Training && self.generation == generation {
            self.open_generation(now, fx);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(pairs: &[Pair]) -> Troubles {
        let mut troubles = Troubles::default();
        for (a, b) in pairs {
            *troubles.failures.entry((*a.min(b), *a.max(b))).or_default() += 2;
            *troubles.accused.entry(*b).or_default() += 1;
        }
        troubles
    }

    #[test]
    fn who_breaks_most_goes_and_nobody_else() {
        assert!(failed(&[]).cover(2).is_empty());
        assert_eq!(failed(&[(1, 2)]).cover(2), [2], "the one that is named");
        assert_eq!(failed(&[(1, 2), (2, 1)]).cover(2), [2], "one, not both");
        assert_eq!(failed(&[(0, 1), (2, 1), (3, 1)]).cover(2), [1]);
        assert_eq!(
            failed(&[(1, 0), (1, 2), (1, 3)]).cover(2),
            [1],
            "who cannot reach anybody"
        );
        assert_eq!(failed(&[(0, 4), (1, 5)]).cover(2), [5, 4]);
        assert!(failed(&[(0, 1)]).cover(3).is_empty(), "once too few");
    }
}
