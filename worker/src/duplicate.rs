//! The copy of a state that a checkpoint reads, so that the next update happens in place.
//!
//! It is made on a thread of its own while the next step is computed: between two updates the state is
//! only read. The update waits for what is left of it, which is nothing where a step takes longer
//! than a copy. Rejected: to write the update beside a state that is still read. It took two to three
//! times as long as in place, more than the copy that it saved. The buffers stay: what one checkpoint
//! needed the next will need, without the page faults, and a run that fits in memory at its first
//! checkpoint fits at every other. Knows no disks and no peers.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};

use tokio::sync::oneshot;

use crate::held::HeldState;
use crate::state::TrainState;

/// Buffers that wait for the next copy: one set at most.
#[derive(Clone, Debug, Default)]
pub struct Buffers(Arc<Mutex<Option<TrainState>>>);

/// Copies of states, one at a time.
#[derive(Debug, Default)]
pub struct Duplicates {
    buffers: Buffers,
    /// Ends when the copy that is being made reads its state no more.
    under_way: Option<mpsc::Receiver<()>>,
}

impl Duplicates {
    /// Begins to copy `state`, which is in host memory; gives where the copy comes out. A device's
    /// state is not copied: its next update makes another anyway.
    pub fn begin(&mut self, state: &Arc<HeldState>) -> oneshot::Receiver<Arc<HeldState>> {
        self.wait();
        let (out, copied) = oneshot::channel();
        if let HeldState::Device(_) = &**state {
            // The receiver is here.
            let _ = out.send(Arc::clone(state));
            return copied;
        }
        let (reading, under_way) = mpsc::channel();
        let (state, buffers) = (Arc::clone(state), self.buffers.clone());
        tokio::task::spawn_blocking(move || {
            let copy = Arc::new(buffers.copy(&state));
            drop(state);
            drop(reading);
            // A checkpoint that was given up meanwhile needs no copy.
            if let Err(copy) = out.send(copy) {
                buffers.give(copy);
            }
        });
        self.under_way = Some(under_way);
        copied
    }

    /// Waits until no state is being copied: it may be changed then.
    pub fn wait(&mut self) {
        if let Some(under_way) = self.under_way.take() {
            // Nothing is ever sent; the sender is dropped, also by a panic.
            let _ = under_way.recv();
        }
    }

    /// For whoever reads a copy and gives its buffers back.
    pub fn buffers(&self) -> Buffers {
        self.buffers.clone()
    }
}

impl Buffers {
    /// Takes the buffers of a copy that nobody else reads; a second set is freed.
    pub fn give(&self, state: Arc<HeldState>) {
        if let Some(HeldState::Host(state)) = Arc::into_inner(state) {
            self.locked().get_or_insert(state);
        }
    }

    fn copy(&self, state: &HeldState) -> HeldState {
        let HeldState::Host(state) = state else {
            unreachable!("only states in host memory are copied");
        };
        let there = self.locked().take();
        HeldState::Host(match there {
            Some(mut copy) if copy.parameters.len() == state.parameters.len() => {
                copy.clone_from(state);
                copy
            }
            _ => state.clone(),
        })
    }

    fn locked(&self) -> MutexGuard<'_, Option<TrainState>> {
        // Nothing that holds it can leave it half written.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(step: u64) -> Arc<HeldState> {
        let values = |seed: usize| (0..5000).map(|i| (i * seed) as f32 + step as f32).collect();
        Arc::new(HeldState::Host(TrainState {
            step,
            parameters: values(1),
            exp_avg: values(2),
            exp_avg_sq: values(3),
        }))
    }

    fn address(state: &HeldState) -> *const f32 {
        state.host().expect("is here").parameters.as_ptr()
    }

    #[tokio::test]
    async fn a_copy_is_the_state_and_lets_it_go_and_its_buffers_are_used_again() {
        let mut duplicates = Duplicates::default();
        let mut first = state(4);
        let copied = duplicates.begin(&first);
        duplicates.wait();
        assert!(
            Arc::get_mut(&mut first).is_some(),
            "nobody reads it any more"
        );
        let copy = copied.await.expect("is made");
        assert_eq!(
            copy.host().expect("is here"),
            first.host().expect("is here")
        );
        let place = address(&copy);
        duplicates.buffers().give(copy);
        let second = state(8);
        let copy = duplicates.begin(&second).await.expect("is made");
        assert_eq!(
            copy.host().expect("is here"),
            second.host().expect("is here")
        );
        assert_eq!(address(&copy), place);
    }

    #[tokio::test]
    async fn a_copy_that_nobody_wants_gives_its_buffers_back() {
        let mut duplicates = Duplicates::default();
        drop(duplicates.begin(&state(4)));
        duplicates.wait();
        let copy = duplicates.begin(&state(8)).await.expect("is made");
        assert_eq!(copy.step(), 8);
    }
}
