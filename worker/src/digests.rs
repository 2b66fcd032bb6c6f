//! What this worker's bits are, for the coordinator to compare: hashed off the loop's thread.
//!
//! A step's readiness tells of the state that the step was computed at: of all parameters, where
//! they lie in host memory, so that a lane computed from a corrupted one is never committed; and of
//! one slice of everything else, which rotates, so that no corruption stays for longer than a turn.
//! Of a state on a device only the slice is read. It refuses to know what others have.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use belfry_collective::digest::{digest_of, slice_digests, state_digest};
use belfry_model::Gradient;
use belfry_proto::{Digest, STATE_SLICES};
use tokio::sync::mpsc::Sender;

use crate::core::{Attempt, Event};
use crate::held::HeldState;

/// The elements of a vector that a step's readiness tells of.
fn slice_of_step(step: u64, len: usize) -> Range<usize> {
    let (turn, len, slices) = (
        u128::from(step % STATE_SLICES),
        len as u128,
        u128::from(STATE_SLICES),
    );
    let edge = |i: u128| (i * len / slices) as usize;
    edge(turn)..edge(turn + 1)
}

/// What a step's readiness tells of the state that it was computed at.
///
/// # Errors
/// What the device said.
pub(crate) fn of_step(state: &HeldState) -> Result<Digest, String> {
    let step = state.step();
    let digest = |tensors: &[&[f32]]| Digest(state_digest(step, &slice_digests(tensors)));
    match state {
        HeldState::Host(state) => {
            let slice = slice_of_step(step, state.parameters.len());
            let moments = (&state.exp_avg[slice.clone()], &state.exp_avg_sq[slice]);
            Ok(digest(&[&state.parameters, moments.0, moments.1]))
        }
        HeldState::Device(state) => {
            let slices = state.slices(slice_of_step(step, state.len()))?;
            let [parameters, exp_avg, exp_avg_sq] = &slices;
            Ok(digest(&[parameters, exp_avg, exp_avg_sq]))
        }
    }
}

/// Takes the digest of an audited lane's gradient.
pub(crate) fn of_lane(attempt: Attempt, gradient: Gradient, seconds: f64, events: Sender<Event>) {
    tokio::task::spawn_blocking(move || {
        let begun = Instant::now();
        let read = gradient.read().map_err(|e| e.to_string());
        let digest = read.map(|values| Digest(digest_of(&values)));
        let event = Event::LaneDigest {
            attempt,
            digest,
            seconds: seconds + begun.elapsed().as_secs_f64(),
        };
        // The loop is gone only with the process.
        let _ = events.blocking_send(event);
    });
}

/// Takes the digest of a whole state.
pub(crate) fn of_state(state: Arc<HeldState>, events: Sender<Event>) {
    tokio::task::spawn_blocking(move || {
        let (step, begun) = (state.step(), Instant::now());
        let digest = state.host().map(|host| host.digest());
        if let Err(error) = &digest {
            tracing::error!(step, %error, "no digest of the state");
        }
        // Before anybody hears of it: whoever applies an update next must find no other reader.
        drop(state);
        let event = Event::StateDigest {
            step,
            digest: digest.ok(),
            seconds: begun.elapsed().as_secs_f64(),
        };
        let _ = events.blocking_send(event);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::held::Place;
    use crate::state::TrainState;
    use belfry_model::Device;

    #[test]
    fn every_element_has_its_turn() {
        for len in [3, 64, 1000] {
            let mut next = 0;
            for step in 0..STATE_SLICES {
                let slice = slice_of_step(step, len);
                assert_eq!(slice.start, next);
                next = slice.end;
            }
            assert_eq!(next, len);
        }
    }

    #[test]
    fn one_flipped_bit_is_told_of() {
        let values = |seed: usize| (0..1000).map(|i| (i * seed) as f32).collect::<Vec<f32>>();
        let state = |step| TrainState {
            step,
            parameters: values(1),
            exp_avg: values(2),
            exp_avg_sq: values(3),
        };
        for apart in [false, true] {
            let told = |state: TrainState| {
                let held = Place::new(&Device::flex(), apart).hold(state);
                of_step(&held).expect("readable")
            };
            let flipped = |step| {
                let mut state = state(step);
                state.parameters[600] = f32::from_bits(state.parameters[600].to_bits() ^ 1);
                state
            };
            // On the host at once; on a device within a turn.
            let seen = (0..STATE_SLICES).filter(|s| told(state(*s)) != told(flipped(*s)));
            assert_eq!(seen.count(), if apart { 1 } else { STATE_SLICES as usize });
            let moment = |step| {
                let mut state = state(step);
                state.exp_avg_sq[3] = -1.0;
                state
            };
            let seen = (0..STATE_SLICES).filter(|s| told(state(*s)) != told(moment(*s)));
            assert_eq!(seen.count(), 1);
        }
    }
}
