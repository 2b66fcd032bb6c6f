//! Batches made ahead of the step that trains on them: a few threads, a bounded number, no waiting
//! but on a change.
//!
//! What is made is a pure function of (step, lane, quarantine), so making it early, twice or not at
//! all changes no bit. It refuses to know what a batch is.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use crate::error::DataError;
use crate::quarantine::Quarantine;

/// Threads: while one reads, another decodes. Each uses all cores for what can be split.
const THREADS: usize = 2;

/// Step and lane.
type Place = (u64, u32);
type Made<T> = Result<T, DataError>;
type Make<T> = dyn Fn(Place, &Quarantine) -> Made<T> + Send + Sync;

/// See the module.
pub struct Ahead<T: Send + 'static> {
    shared: Arc<Shared<T>>,
}

struct Shared<T> {
    make: Box<Make<T>>,
    limits: Limits,
    state: Mutex<State<T>>,
    changed: Condvar,
}

/// How far ahead.
#[derive(Clone, Copy)]
pub struct Limits {
    /// Steps behind the one that is hinted at.
    pub steps: u64,
    /// Lanes' steps that may be in the making or wait, together.
    pub places: usize,
}

struct State<T> {
    /// What was hinted at last.
    step: u64,
    lanes: Vec<u32>,
    quarantine: Quarantine,
    queue: VecDeque<Place>,
    /// In the making, and whether somebody may still want it.
    running: BTreeMap<Place, bool>,
    ready: BTreeMap<Place, Made<T>>,
    closed: bool,
}

impl<T: Send + 'static> Drop for Ahead<T> {
    fn drop(&mut self) {
        // A thread ends with what it is making; nobody waits for a store that does not answer.
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
    }
}

impl<T: Send + 'static> Ahead<T> {
    /// Starts the threads.
    ///
    /// # Errors
    /// [`DataError::Cache`] when the system gives no thread.
    pub fn new(
        limits: Limits,
        make: impl Fn(Place, &Quarantine) -> Made<T> + Send + Sync + 'static,
    ) -> Result<Self, DataError> {
        let shared = Arc::new(Shared {
            make: Box::new(make),
            limits,
            state: Mutex::new(State {
                step: 0,
                lanes: Vec::new(),
                quarantine: Quarantine::new(),
                queue: VecDeque::new(),
                running: BTreeMap::new(),
                ready: BTreeMap::new(),
                closed: false,
            }),
            changed: Condvar::new(),
        });
        for number in 0..if limits.places > 0 { THREADS } else { 0 } {
            let shared = Arc::clone(&shared);
            super::thread(&format!("ahead-{number}"), move || shared.work())?;
        }
        Ok(Ahead { shared })
    }

    /// These lanes will be asked for at `step`, and probably at the steps behind it. What an
    /// earlier hint asked for and nobody began is forgotten. Never blocks on reading.
    pub fn hint(&self, step: u64, lanes: &[u32]) {
        let mut state = self.shared.lock();
        (state.step, state.lanes) = (step, lanes.to_vec());
        state.forget_before(step);
        state.plan(self.shared.limits);
        self.shared.changed.notify_all();
    }

    /// The batches of (step, lane): ready, awaited, or made now.
    ///
    /// # Errors
    /// What making them said; [`DataError::Panicked`] with their place.
    pub fn take(&self, place: Place, quarantine: &Quarantine) -> Made<T> {
        let mut state = self.shared.lock();
        if state.quarantine != *quarantine {
            state.quarantine = quarantine.clone();
            state.ready.clear();
            state
                .running
                .values_mut()
                .for_each(|wanted| *wanted = false);
            state.plan(self.shared.limits);
        }
        state.forget_before(place.0);
        while state.running.get(&place) == Some(&true) {
            state = self.shared.changed.wait(state).expect("no holder panics");
        }
        let ready = state.ready.remove(&place);
        state.queue.retain(|queued| *queued != place);
        drop(state);
        // There is room for another.
        self.shared.changed.notify_all();
        ready.unwrap_or_else(|| self.shared.make(place, quarantine))
    }
}

impl<T> State<T> {
    fn forget_before(&mut self, step: u64) {
        self.queue.retain(|(s, _)| *s >= step);
        self.ready.retain(|(s, _), _| *s >= step);
        for ((s, _), wanted) in &mut self.running {
            *wanted &= *s >= step;
        }
    }

    fn plan(&mut self, limits: Limits) {
        let steps = self.step..=self.step + limits.steps;
        let lanes = &self.lanes;
        let all = steps.flat_map(|step| lanes.iter().map(move |lane| (step, *lane)));
        let begun = |p: &Place| self.ready.contains_key(p) || self.running.contains_key(p);
        self.queue = all.filter(|p| !begun(p)).take(limits.places).collect();
    }

    /// The next place to be made, where there is room for it.
    fn next(&mut self, limits: Limits) -> Option<Place> {
        let next = *self.queue.front()?;
        if self.ready.len() + self.running.len() >= limits.places {
            // Lanes that another worker has now make room; the open step's may be asked for.
            let (last, lanes) = (self.step + limits.steps, self.lanes.iter().copied());
            let lanes: BTreeSet<u32> = lanes.collect();
            let stale = |(s, l): &&Place| *s > last || (*s > self.step && !lanes.contains(l));
            let stale = *self.ready.keys().find(stale)?;
            self.ready.remove(&stale);
        }
        self.queue.pop_front();
        Some(next)
    }
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().expect("no holder panics")
    }

    /// Makes what is queued until closed.
    fn work(&self) {
        let mut state = self.lock();
        while !state.closed {
            let Some(place) = state.next(self.limits) else {
                state = self.changed.wait(state).expect("no holder panics");
                continue;
            };
            state.running.insert(place, true);
            let quarantine = state.quarantine.clone();
            drop(state);
            let made = self.make(place, &quarantine);
            state = self.lock();
            if state.running.remove(&place) == Some(true) {
                state.ready.insert(place, made);
            }
            self.changed.notify_all();
        }
    }

    fn make(&self, place: Place, quarantine: &Quarantine) -> Made<T> {
        let made = catch_unwind(AssertUnwindSafe(|| (self.make)(place, quarantine)));
        made.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let reason = text.or_else(|| panic.downcast_ref::<&str>().copied());
            Err(DataError::Panicked {
                step: place.0,
                lane: place.1,
                reason: reason.unwrap_or("without words").to_owned(),
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quarantine::ShardRef;
    use std::sync::mpsc;

    const LIMITS: Limits = Limits {
        steps: 1,
        places: 3,
    };

    type Text = (Place, usize);

    /// Makes (place, shards under quarantine), and says what it begins.
    fn ahead(limits: Limits) -> (Ahead<Text>, mpsc::Receiver<Place>) {
        let (begun, begins) = mpsc::channel();
        let begun = Mutex::new(begun);
        let make = move |place: Place, quarantine: &Quarantine| {
            let _ = begun.lock().expect("whole").send(place);
            assert!(place.1 != 13, "lane 13 has no luck");
            Ok((place, quarantine.len()))
        };
        (Ahead::new(limits, make).expect("starts"), begins)
    }

    /// Waits until as many are ready, and says how often each was begun.
    fn wait_ready(ahead: &Ahead<Text>, ready: usize) {
        let mut state = ahead.shared.lock();
        while state.ready.len() < ready || !state.running.is_empty() {
            state = ahead.shared.changed.wait(state).expect("whole");
        }
        assert_eq!(state.ready.len(), ready);
    }

    #[test]
    fn what_is_hinted_at_is_made_once_and_no_more_than_there_is_room_for() {
        let (ahead, begins) = ahead(LIMITS);
        ahead.hint(7, &[4, 5]);
        wait_ready(&ahead, 3);
        for place in [(7, 4), (7, 5), (8, 4), (8, 5)] {
            assert_eq!(
                ahead.take(place, &Quarantine::new()).expect("made"),
                (place, 0)
            );
        }
        let mut begun: Vec<Place> = begins.try_iter().collect();
        begun.sort_unstable();
        assert_eq!(begun, [(7, 4), (7, 5), (8, 4), (8, 5)]);
    }

    #[test]
    fn a_quarantine_makes_everything_anew() {
        let (ahead, begins) = ahead(LIMITS);
        ahead.hint(0, &[1, 2]);
        wait_ready(&ahead, 3);
        let shard = ShardRef {
            dataset: 0,
            shard: 9,
        };
        let quarantine = Quarantine::from([shard]);
        for place in [(0, 1), (0, 2), (1, 1)] {
            assert_eq!(ahead.take(place, &quarantine).expect("made"), (place, 1));
        }
        assert!(begins.try_iter().count() >= 6);
    }

    #[test]
    fn lanes_that_went_elsewhere_make_room() {
        let (ahead, _begins) = ahead(LIMITS);
        ahead.hint(3, &[1, 2]);
        wait_ready(&ahead, 3);
        // Lane 1 of step 4 is not wanted any more; lanes of the open step may be.
        ahead.hint(3, &[8]);
        let mut state = ahead.shared.lock();
        while !state.ready.contains_key(&(3, 8)) {
            state = ahead.shared.changed.wait(state).expect("whole");
        }
        let ready: Vec<Place> = state.ready.keys().copied().collect();
        assert_eq!(ready, [(3, 1), (3, 2), (3, 8)]);
        drop(state);
        // A passed step goes.
        ahead.hint(4, &[8]);
        assert!(ahead.shared.lock().ready.keys().all(|(step, _)| *step >= 4));
    }

    #[test]
    fn a_panic_names_its_place_ahead_and_at_once() {
        let (ahead, _begins) = ahead(LIMITS);
        ahead.hint(2, &[13]);
        wait_ready(&ahead, 2);
        for _ in 0..2 {
            let error = ahead
                .take((2, 13), &Quarantine::new())
                .expect_err("no luck");
            let text = error.to_string();
            assert!(
                text.contains("step 2, lane 13") && text.contains("no luck"),
                "{text}"
            );
        }
    }

    #[test]
    fn without_room_nothing_is_made_ahead() {
        let (ahead, begins) = ahead(Limits {
            steps: 1,
            places: 0,
        });
        ahead.hint(0, &[1]);
        assert_eq!(
            ahead.take((0, 1), &Quarantine::new()).expect("made"),
            ((0, 1), 0)
        );
        assert_eq!(begins.try_iter().count(), 1);
    }
}
