//! Which worker goes to which stage: a pure function of what there is, what is wanted and what is
//! held. A stage gets its minimum at once or nothing; taking a worker away is safe, because a run's
//! bits do not depend on who computes them.

use std::collections::BTreeSet;

/// A place for one worker: an agent's number, and which of its places.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot {
    /// The agent.
    pub agent: u32,
    /// Which of its places.
    pub index: u32,
}

/// What a stage that could run wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Demand {
    /// Higher numbers first.
    pub priority: i32,
    /// Fewer are of no use; at least 1.
    pub min: u32,
    /// More are of no use; at least `min`.
    pub preferred: u32,
    /// What it has now; some may be gone.
    pub held: BTreeSet<Slot>,
}

/// Gives `slots` to `demands`, which stand in the order of their submission: for each its slots,
/// none or `min..=preferred` of them.
///
/// Stages of a higher priority are served first, up to what they prefer. Among equals as many begin
/// as can, those that run already before others, and what is left goes to them evenly. Who keeps a
/// number of slots keeps the slots.
pub fn allocate(slots: &BTreeSet<Slot>, demands: &[Demand]) -> Vec<BTreeSet<Slot>> {
    let counts = counts(slots.len() as u32, demands);
    let mut given: Vec<BTreeSet<Slot>> = demands
        .iter()
        .zip(&counts)
        .map(|(demand, count)| {
            let held = demand.held.intersection(slots).copied();
            held.take(*count as usize).collect()
        })
        .collect();
    let mut free: BTreeSet<Slot> = slots.clone();
    for slot in given.iter().flatten() {
        free.remove(slot);
    }
    let busy: BTreeSet<Slot> = demands.iter().flat_map(|d| &d.held).copied().collect();
    for (given, count) in given.iter_mut().zip(&counts) {
        while given.len() < *count as usize {
            // Near the stage's others, then where nobody has to leave first.
            let near = |slot: &Slot| given.iter().any(|own| own.agent == slot.agent);
            let best = |slot: &&Slot| (!near(slot), busy.contains(*slot), **slot);
            let Some(slot) = free.iter().min_by_key(best).copied() else {
                break;
            };
            free.remove(&slot);
            given.insert(slot);
        }
    }
    given
}

/// How many each gets.
fn counts(slots: u32, demands: &[Demand]) -> Vec<u32> {
    let mut counts = vec![0; demands.len()];
    let mut free = slots;
    let priorities: BTreeSet<i32> = demands.iter().map(|d| d.priority).collect();
    for priority in priorities.into_iter().rev() {
        let mut class: Vec<usize> = (0..demands.len())
            .filter(|i| demands[*i].priority == priority)
            .collect();
        // Who has more than its minimum keeps it before others get more: nothing moves needlessly.
        class.sort_by_key(|i| {
            let held = demands[*i].held.len() as i64;
            let beyond = held - i64::from(demands[*i].min);
            (held == 0, std::cmp::Reverse(beyond), *i)
        });
        for i in &class {
            if demands[*i].min <= free {
                counts[*i] = demands[*i].min;
                free -= demands[*i].min;
            }
        }
        let mut grew = true;
        while grew {
            grew = false;
            for i in &class {
                if counts[*i] > 0 && counts[*i] < demands[*i].preferred && free > 0 {
                    counts[*i] += 1;
                    free -= 1;
                    grew = true;
                }
            }
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn slots(agents: u32, each: u32) -> BTreeSet<Slot> {
        let all = (0..agents).flat_map(|agent| (0..each).map(move |index| Slot { agent, index }));
        all.collect()
    }

    fn demand(priority: i32, min: u32, preferred: u32) -> Demand {
        Demand {
            priority,
            min,
            preferred,
            held: BTreeSet::new(),
        }
    }

    fn sizes(given: &[BTreeSet<Slot>]) -> Vec<usize> {
        given.iter().map(BTreeSet::len).collect()
    }

    #[test]
    fn a_gang_or_nothing_and_higher_priorities_first() {
        let there = slots(1, 3);
        let of = |demands: &[Demand]| sizes(&allocate(&there, demands));
        assert_eq!(of(&[demand(0, 4, 4)]), [0], "four are not there");
        assert_eq!(of(&[demand(0, 2, 3), demand(0, 2, 3)]), [3, 0]);
        assert_eq!(
            of(&[demand(0, 1, 3), demand(0, 1, 3)]),
            [2, 1],
            "equals share"
        );
        assert_eq!(of(&[demand(0, 1, 3), demand(1, 1, 3)]), [0, 3]);
        assert_eq!(of(&[demand(0, 1, 3), demand(1, 1, 2)]), [1, 2]);
        assert_eq!(
            of(&[demand(1, 4, 4), demand(0, 1, 3)]),
            [0, 3],
            "no idle workers"
        );
    }

    #[test]
    fn a_stage_shrinks_for_another_and_grows_again() {
        let there = slots(1, 4);
        let mut first = demand(0, 1, 4);
        first.held = there.clone();
        let second = demand(5, 2, 2);
        let given = allocate(&there, &[first.clone(), second]);
        assert_eq!(sizes(&given), [2, 2]);
        assert!(given[0].is_subset(&there));
        first.held = given[0].clone();
        let alone = allocate(&there, &[first]);
        assert_eq!(sizes(&alone), [4]);
        assert!(given[0].is_subset(&alone[0]), "what it had it keeps");
    }

    #[test]
    fn workers_of_one_agent_stay_together() {
        let there = slots(3, 2);
        let given = allocate(&there, &[demand(0, 2, 2), demand(0, 2, 2), demand(0, 2, 2)]);
        for stage in given {
            let agents: BTreeSet<u32> = stage.iter().map(|s| s.agent).collect();
            assert_eq!(agents.len(), 1, "{stage:?}");
        }
    }

    /// Demands whose held slots are disjoint, some of them gone.
    fn world() -> impl Strategy<Value = (BTreeSet<Slot>, Vec<Demand>)> {
        let one = (-2..3i32, 1..5u32, 0..6u32);
        let demands = prop::collection::vec(one, 0..7);
        let owners = prop::collection::vec(0..12usize, 24);
        (1..5u32, 1..6u32, demands, owners).prop_map(|(agents, each, demands, owners)| {
            let mut demands: Vec<Demand> = demands
                .into_iter()
                .map(|(priority, min, more)| demand(priority, min, min + more))
                .collect();
            // One agent more than is there: its workers are gone.
            for (slot, owner) in slots(agents + 1, each).into_iter().zip(owners) {
                if let Some(demand) = demands.get_mut(owner)
                    && demand.held.len() < demand.preferred as usize
                {
                    demand.held.insert(slot);
                }
            }
            (slots(agents, each), demands)
        })
    }

    proptest! {
        #[test]
        fn every_allocation_keeps_the_rules((slots, demands) in world()) {
            let given = allocate(&slots, &demands);
            let mut seen = BTreeSet::new();
            for (got, demand) in given.iter().zip(&demands) {
                let count = got.len() as u32;
                prop_assert!(count == 0 || (demand.min..=demand.preferred).contains(&count));
                for slot in got {
                    prop_assert!(slots.contains(slot), "a slot that is not there");
                    prop_assert!(seen.insert(*slot), "a slot given twice");
                }
                let alive = demand.held.intersection(&slots).count();
                let kept = demand.held.intersection(got).count();
                prop_assert_eq!(kept, alive.min(got.len()), "a worker moved needlessly");
            }
            for (i, demand) in demands.iter().enumerate() {
                let above = |j: usize| j != i && demands[j].priority >= demand.priority;
                let before: usize = (0..demands.len()).filter(|j| above(*j)).map(|j| given[j].len()).sum();
                if given[i].is_empty() {
                    let left = (slots.len() - before) as u32;
                    prop_assert!(left < demand.min, "it could have begun before lower ones");
                } else if given[i].len() < demand.preferred as usize {
                    prop_assert_eq!(seen.len(), slots.len(), "an idle worker, and a stage that wants it");
                    let lower = |j: usize| demands[j].priority < demand.priority;
                    let behind = (0..demands.len()).filter(|j| lower(*j)).all(|j| given[j].is_empty());
                    prop_assert!(behind, "a lower one has what it wants");
                }
            }
        }

        #[test]
        fn what_was_given_stays((slots, mut demands) in world()) {
            let given = allocate(&slots, &demands);
            for (demand, got) in demands.iter_mut().zip(&given) {
                demand.held = got.clone();
            }
            prop_assert_eq!(allocate(&slots, &demands), given);
        }
    }
}
