//! A worker that says what went wrong and ends: whether that is its own, or the run's.
//!
//! A full disk, a device that is gone, a host out of memory are one worker's; the others go on without
//! it. What follows the step to a second worker is in the data or the setting, and would take one
//! worker after the other: that ends the run, with both their words.

use super::*;

impl Core {
    /// A worker failed and ends.
    pub(super) fn take_failure(
        &mut self,
        now: Millis,
        id: u64,
        error: String,
        fx: &mut Vec<Effect>,
    ) {
        let others_go_on = self.phase == Phase::Training && self.members.iter().any(|m| *m != id);
        if self.phase == Phase::Training {
            self.failures.insert(id, error.clone());
        }
        if others_go_on && self.failures.len() < 2 {
            self.remove(now, id, Loss::Failed(error), fx);
            return;
        }
        let step = self.committed;
        let before = self.failures.iter().find(|(other, _)| **other != id);
        let text = match before {
            Some((other, first)) if *first == error => {
                format!("step {step} fails at worker {id} as it did at worker {other}: {error}")
            }
            Some((other, first)) => format!(
                "step {step} fails at worker {id}: {error}; before that at worker {other}: {first}"
            ),
            None => format!("worker {id}: {error}"),
        };
        self.fail(text, fx);
    }
}
