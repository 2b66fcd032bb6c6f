//! Whole shards fetched before a lane's window opens them. It never fails: what cannot be read is
//! said by the step that needs it.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex};

use crate::error::DataError;
use crate::quarantine::ShardRef;

/// Shards fetched at a time; each is itself fetched in parallel ranges.
const THREADS: usize = 2;
/// Shards that may wait: the windows of all lanes of a large worker.
const QUEUE_MAX: usize = 4096;

/// See the module.
pub struct Warm {
    shared: Arc<Shared>,
}

struct Shared {
    fetch: Box<dyn Fn(ShardRef) + Send + Sync>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<ShardRef>,
    /// Fetched or being fetched, of those that were wanted last.
    done: BTreeSet<ShardRef>,
    closed: bool,
}

impl Drop for Warm {
    fn drop(&mut self) {
        self.shared.state.lock().expect("no holder panics").closed = true;
        self.shared.changed.notify_all();
    }
}

impl Warm {
    /// Starts the threads.
    ///
    /// # Errors
    /// [`DataError::Cache`] when the system gives no thread.
    pub fn new(fetch: impl Fn(ShardRef) + Send + Sync + 'static) -> Result<Self, DataError> {
        let shared = Arc::new(Shared {
            fetch: Box::new(fetch),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        for number in 0..THREADS {
            let shared = Arc::clone(&shared);
            super::thread(&format!("shards-{number}"), move || shared.work())?;
        }
        Ok(Warm { shared })
    }

    /// These shards will be opened, in this order; others are not wanted any more.
    pub fn want(&self, shards: &[ShardRef]) {
        let mut state = self.shared.state.lock().expect("no holder panics");
        let wanted: BTreeSet<ShardRef> = shards.iter().copied().collect();
        state.done.retain(|shard| wanted.contains(shard));
        let mut seen = state.done.clone();
        let new = shards.iter().copied().filter(|shard| seen.insert(*shard));
        state.queue = new.take(QUEUE_MAX).collect();
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn work(&self) {
        let mut state = self.state.lock().expect("no holder panics");
        while !state.closed {
            let Some(shard) = state.queue.pop_front() else {
                state = self.changed.wait(state).expect("no holder panics");
                continue;
            };
            state.done.insert(shard);
            drop(state);
            (self.fetch)(shard);
            state = self.state.lock().expect("no holder panics");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn shards_are_fetched_once_while_they_are_wanted() {
        let (fetched, fetches) = mpsc::channel();
        let fetched = Mutex::new(fetched);
        let fetch = move |shard: ShardRef| {
            let sent = fetched.lock().expect("whole").send(shard.shard);
            sent.expect("somebody counts");
        };
        let warm = Warm::new(fetch).expect("starts");
        let shards = |numbers: &[u32]| -> Vec<ShardRef> {
            let shard = |shard: &u32| ShardRef {
                dataset: 0,
                shard: *shard,
            };
            numbers.iter().map(shard).collect()
        };
        let take = |count: usize| {
            let mut got: Vec<u32> = fetches.iter().take(count).collect();
            got.sort_unstable();
            got
        };
        warm.want(&shards(&[1, 2, 1]));
        assert_eq!(take(2), [1, 2]);
        warm.want(&shards(&[2, 3]));
        assert_eq!(take(1), [3], "2 is there already");
        warm.want(&shards(&[1]));
        assert_eq!(take(1), [1], "1 was not wanted in between");
    }
}
