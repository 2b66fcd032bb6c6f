//! A second set of buffers for the state: the next update goes there while a checkpoint still reads
//! the old one, so that nothing is copied and training does not wait.
//!
//! Memory is touched on a thread of its own, because a first touch of four gigabytes takes longer
//! than the update. Once made the set is kept: what one checkpoint needed the next will need, and a
//! run that fits in memory at its first checkpoint fits at every other. Knows no disks and no peers.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::held::HeldState;
use crate::state::TrainState;

/// f32 values in the smallest page of any system.
const PAGE: usize = 4096 / 4;

/// Where a set of buffers waits.
type Slot = Arc<Mutex<Option<TrainState>>>;

/// At most one set of buffers, and the thread that makes it.
#[derive(Debug, Default)]
pub struct Spare {
    slot: Slot,
    making: Option<JoinHandle<()>>,
}

impl Spare {
    /// Begins to make buffers of `elements`, if there are none yet. Called when a checkpoint begins:
    /// they are needed one step later.
    pub fn prepare(&mut self, elements: usize) {
        if self.making.is_some() || locked(&self.slot).is_some() {
            return;
        }
        let slot = Arc::clone(&self.slot);
        let make = move || {
            let made = touched(elements);
            locked(&slot).get_or_insert(made);
        };
        // Without a thread the update makes them itself, later and slower.
        let thread = std::thread::Builder::new().name("spare-state".into());
        self.making = thread.spawn(make).ok();
    }

    /// Waits until what is being prepared is there.
    pub fn wait(&mut self) {
        if let Some(making) = self.making.take() {
            // One that panicked left no buffers; they are made when they are taken.
            let _ = making.join();
        }
    }

    /// Buffers of `elements`, of any content; made now if nobody has made them.
    pub(crate) fn take(&mut self, elements: usize) -> TrainState {
        self.wait();
        let there = locked(&self.slot).take();
        let there = there.filter(|state| state.parameters.len() == elements);
        there.unwrap_or_else(|| touched(elements))
    }

    /// For whoever reads a state: gives its buffers back when he is the last.
    pub fn returns(&self) -> Returns {
        Returns(Arc::clone(&self.slot))
    }
}

/// The way back of buffers.
#[derive(Clone, Debug)]
pub struct Returns(Slot);

impl Returns {
    /// Ends a reading.
    pub fn give(&self, state: Arc<HeldState>) {
        if let Some(HeldState::Host(state)) = Arc::into_inner(state) {
            locked(&self.0).get_or_insert(state);
        }
    }
}

fn locked(slot: &Slot) -> MutexGuard<'_, Option<TrainState>> {
    // Nothing that holds it can leave it half written.
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A state whose every page is there.
fn touched(elements: usize) -> TrainState {
    let vector = || {
        let mut vector = vec![0.0f32; elements];
        for page in vector.chunks_mut(PAGE) {
            // Zeroes that come from the system are only promised; a write that cannot be known to
            // change nothing makes it keep the promise.
            page[0] = std::hint::black_box(0.0);
        }
        vector
    };
    TrainState {
        step: 0,
        parameters: vector(),
        exp_avg: vector(),
        exp_avg_sq: vector(),
    }
}
