//! What is held in memory, bounded: what was used longest ago goes first.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

/// Values by number, with a limit on the bytes of all.
pub(super) struct Held<T> {
    values: BTreeMap<usize, (u64, usize, Arc<T>)>,
    clock: u64,
    bytes: usize,
    bytes_max: usize,
}

impl<T> Held<T> {
    pub(super) fn new(bytes_max: usize) -> Self {
        Held {
            values: BTreeMap::new(),
            clock: 0,
            bytes: 0,
            bytes_max,
        }
    }

    pub(super) fn get(&mut self, number: usize) -> Option<Arc<T>> {
        self.clock += 1;
        let (used, _, value) = self.values.get_mut(&number)?;
        *used = self.clock;
        Some(Arc::clone(value))
    }

    /// Holds `value`, and if need be no other.
    pub(super) fn put(&mut self, number: usize, value: Arc<T>, bytes: usize) {
        self.remove(number);
        while self.bytes + bytes > self.bytes_max {
            let oldest = self.values.iter().min_by_key(|(_, (used, ..))| *used);
            let Some(oldest) = oldest.map(|(number, _)| *number) else {
                break;
            };
            self.remove(oldest);
        }
        self.clock += 1;
        self.bytes += bytes;
        self.values.insert(number, (self.clock, bytes, value));
    }

    fn remove(&mut self, number: usize) {
        if let Some((_, bytes, _)) = self.values.remove(&number) {
            self.bytes -= bytes;
        }
    }
}

/// A value's place: empty until its first user has opened it, for whom the others wait.
pub(super) type Slot<T> = Mutex<Option<Arc<T>>>;

/// Slots by number, with a limit on how many there are.
pub(super) struct Slots<T>(Mutex<Held<Slot<T>>>);

impl<T> Slots<T> {
    pub(super) fn new(slots_max: usize) -> Self {
        Slots(Mutex::new(Held::new(slots_max)))
    }

    fn held(&self) -> MutexGuard<'_, Held<Slot<T>>> {
        self.0.lock().expect("no holder panics")
    }

    /// The slot of `number`, made where there is none.
    pub(super) fn slot(&self, number: usize) -> Arc<Slot<T>> {
        let mut held = self.held();
        held.get(number).unwrap_or_else(|| {
            let slot = Arc::new(Slot::new(None));
            held.put(number, Arc::clone(&slot), 1);
            slot
        })
    }

    /// Whether the value is there, or about to be.
    pub(super) fn is_open(&self, number: usize) -> bool {
        let held = self.held();
        let slot = held.values.get(&number);
        slot.is_some_and(|(_, _, slot)| slot.try_lock().map_or(true, |value| value.is_some()))
    }

    /// Lets go of the values for which `is_over`; those that somebody opens now are not asked about.
    pub(super) fn drop_where(&self, is_over: impl Fn(&T) -> bool) {
        let mut held = self.held();
        let values = held.values.iter();
        let over = values.filter(|(_, (_, _, slot))| {
            let value = slot.try_lock();
            value.is_ok_and(|value| value.as_deref().is_some_and(&is_over))
        });
        let over: Vec<usize> = over.map(|(number, _)| *number).collect();
        for number in over {
            held.remove(number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_holds_and_the_longest_unused_goes() {
        let mut held = Held::new(10);
        for number in 0..3 {
            held.put(number, Arc::new(number), 3);
        }
        assert!(held.get(0).is_some());
        held.put(3, Arc::new(3), 4);
        assert_eq!(held.bytes, 10);
        assert!(held.get(1).is_none() && held.get(0).is_some() && held.get(2).is_some());
        held.put(9, Arc::new(9), 11);
        assert_eq!((held.values.len(), held.bytes), (1, 11));
        held.put(9, Arc::new(9), 2);
        assert_eq!((held.values.len(), held.bytes), (1, 2));
    }

    #[test]
    fn slots_are_given_back_where_their_value_is_over() {
        let slots: Slots<u32> = Slots::new(2);
        for number in 0..3 {
            *slots.slot(number).lock().expect("is free") = Some(Arc::new(number as u32));
        }
        assert!(!slots.is_open(0) && slots.is_open(1) && slots.is_open(2));
        let one = slots.slot(1);
        let guard = one.lock().expect("is free");
        slots.drop_where(|_| true);
        assert!(slots.is_open(1) && !slots.is_open(2));
        drop(guard);
    }
}
