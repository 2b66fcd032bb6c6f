//! Parts of a step on threads of their own.
//!
//! On the host only matrix products use all cores; graphs side by side keep them busy with the
//! rest. What is run side by side shares no graph, and results are combined in a fixed order by the
//! caller, so threads cannot change a bit. Plain threads instead of rayon's: a pool's thread that
//! waits for a product may take up another graph while it holds the first one's lock.

use std::panic::resume_unwind;
use std::thread;

use burn::tensor::Device;

use crate::phase::{WAITING, phase};

/// Runs all jobs, one after the other where the device is not the host or the process is given one
/// thread only; a single job stays on the caller's thread. Results stand in the order of the jobs.
pub(crate) fn side_by_side<T: Send, J: FnOnce() -> T + Send>(
    on_host: bool,
    jobs: impl IntoIterator<Item = J>,
) -> Vec<T> {
    let jobs: Vec<J> = jobs.into_iter().collect();
    if jobs.len() < 2 || !on_host || rayon::current_num_threads() < 2 {
        return jobs.into_iter().map(|job| job()).collect();
    }
    let _phase = phase!(&Device::flex(), WAITING);
    thread::scope(|scope| {
        let threads: Vec<_> = jobs.into_iter().map(|job| scope.spawn(job)).collect();
        let joined = threads.into_iter().map(thread::ScopedJoinHandle::join);
        joined
            .map(|result| result.unwrap_or_else(|panic| resume_unwind(panic)))
            .collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_stand_in_the_order_of_the_jobs() {
        let jobs = (0..5).map(|i| move || 2 * i);
        assert_eq!(side_by_side(true, jobs), [0, 2, 4, 6, 8]);
    }

    #[test]
    #[should_panic(expected = "its own words")]
    fn a_panic_goes_on_in_the_caller() {
        let jobs = (0..2).map(|i| move || assert_eq!(i, 0, "its own words"));
        side_by_side(true, jobs);
    }
}
