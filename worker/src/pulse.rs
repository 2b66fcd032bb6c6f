//! The worker's pulse: heartbeats from a task of their own, and the round trips that they measure.
//!
//! It beats while the loop is busy with an update, and stops when the process does. What it says is
//! what the loop said of itself last; it refuses to know what that means.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use belfry_proto::v1::{Heartbeat, worker_message as up};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::link::Link;

/// Every so many heartbeats one is echoed: the coordinator's answers stay few.
const BEATS_PER_ECHO: u64 = 4;
/// Numbers whose echo may be awaited at once; older ones are forgotten.
const AWAITED_MAX: usize = 8;

/// What a beat says besides the loop's own words.
#[derive(Debug, Default)]
struct Trips {
    beats: u64,
    awaited: VecDeque<(u64, Instant)>,
    last: Option<Duration>,
}

impl Trips {
    /// Numbers a beat that is to be echoed.
    fn stamp(&mut self, now: Instant, beat: &mut Heartbeat) {
        self.beats += 1;
        beat.round_trip_us = self.last.map_or(0, |d| (d.as_micros() as u64).max(1));
        if self.beats % BEATS_PER_ECHO == 1 {
            beat.number = self.beats;
            self.awaited.truncate(AWAITED_MAX - 1);
            self.awaited.push_front((self.beats, now));
        }
    }

    fn echoed(&mut self, now: Instant, number: u64) {
        if let Some(place) = self.awaited.iter().position(|(n, _)| *n == number) {
            self.last = Some(now.saturating_duration_since(self.awaited[place].1));
            // What was sent before it will not be answered after it.
            self.awaited.truncate(place);
        }
    }
}

/// See the module. Dropping it ends it.
pub struct Pulse {
    says: watch::Sender<Heartbeat>,
    every: watch::Sender<Duration>,
    echoes: watch::Sender<u64>,
    _beating: JoinSet<()>,
}

impl Pulse {
    /// Begins to beat over `link`.
    pub fn start(link: Link, every: Duration, first: Heartbeat) -> Self {
        let (says, said) = watch::channel(first);
        let (every, pauses) = watch::channel(every);
        let (echoes, echoed) = watch::channel(0);
        let mut beating = JoinSet::new();
        beating.spawn(beat(link, said, pauses, echoed));
        Pulse {
            says,
            every,
            echoes,
            _beating: beating,
        }
    }

    /// What is said from now on.
    pub fn says(&self, beat: Heartbeat) {
        self.says.send_replace(beat);
    }

    /// Another pause between beats.
    pub fn every(&self, pause: Duration) {
        self.every.send_replace(pause);
    }

    /// The coordinator has echoed a number.
    pub fn echoed(&self, number: u64) {
        self.echoes.send_replace(number);
    }
}

async fn beat(
    link: Link,
    said: watch::Receiver<Heartbeat>,
    pauses: watch::Receiver<Duration>,
    mut echoed: watch::Receiver<u64>,
) {
    let mut trips = Trips::default();
    loop {
        let mut beat = said.borrow().clone();
        trips.stamp(Instant::now(), &mut beat);
        link.send(up::Body::Heartbeat(beat));
        let pause = sleep(*pauses.borrow());
        tokio::pin!(pause);
        loop {
            tokio::select! {
                () = &mut pause => break,
                changed = echoed.changed() => match changed {
                    Ok(()) => trips.echoed(Instant::now(), *echoed.borrow_and_update()),
                    Err(_) => return,
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_trip_is_measured_by_its_own_number() {
        let (mut trips, start) = (Trips::default(), Instant::now());
        let after = |millis| start + Duration::from_millis(millis);
        let mut numbers = Vec::new();
        for millis in 0..9 {
            let mut beat = Heartbeat::default();
            trips.stamp(after(millis * 100), &mut beat);
            assert_eq!(beat.round_trip_us, 0, "nothing was echoed");
            numbers.push(beat.number);
        }
        assert_eq!(numbers, [1, 0, 0, 0, 5, 0, 0, 0, 9]);
        trips.echoed(after(407), 5);
        trips.echoed(after(900), 1);
        let mut beat = Heartbeat::default();
        trips.stamp(after(900), &mut beat);
        assert_eq!(
            beat.round_trip_us, 7_000,
            "an echo that comes late is no measure"
        );
    }
}
