//! Which shards are under quarantine at which step: a schedule that only grows.
//!
//! It is the coordinator's choice, journaled and told with every generation. Knows no data.

use std::collections::BTreeMap;

use crate::v1;

/// All shards under quarantine by (dataset, shard), each from its step on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Schedule(BTreeMap<(u32, u32), v1::Shard>);

impl Schedule {
    /// Adds a shard; one that is there keeps its first step.
    pub fn add(&mut self, shard: v1::Shard) {
        let place = (shard.dataset, shard.shard);
        self.0.entry(place).or_insert(shard);
    }

    /// The shards under quarantine at `step`, by (dataset, shard).
    pub fn at(&self, step: u64) -> impl Iterator<Item = &v1::Shard> {
        self.all().filter(move |shard| shard.from_step <= step)
    }

    /// All shards, by (dataset, shard).
    pub fn all(&self) -> impl Iterator<Item = &v1::Shard> {
        self.0.values()
    }

    /// The shard as it stands here, if it does.
    pub fn find(&self, shard: &v1::Shard) -> Option<&v1::Shard> {
        self.0.get(&(shard.dataset, shard.shard))
    }

    /// How many shards.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<v1::Shard> for Schedule {
    fn from_iter<T: IntoIterator<Item = v1::Shard>>(shards: T) -> Self {
        let mut schedule = Schedule::default();
        shards.into_iter().for_each(|shard| schedule.add(shard));
        schedule
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shard_stays_from_its_first_step_on() {
        let shard = |shard, from_step| v1::Shard {
            shard,
            from_step,
            ..Default::default()
        };
        let mut schedule: Schedule = [shard(4, 7), shard(2, 9)].into_iter().collect();
        schedule.add(shard(4, 3));
        let at = |step| schedule.at(step).map(|s| s.shard).collect::<Vec<_>>();
        assert_eq!((at(6), at(7), at(9)), (vec![], vec![4], vec![2, 4]));
        assert_eq!(schedule.find(&shard(4, 0)).map(|s| s.from_step), Some(7));
    }
}
