//! One time setting, `cluster.max_stall_seconds`; every other time is derived here and nowhere else.
//!
//! The setting is how long training may stand still through one failure: notice it, agree on a new
//! membership, compute the lost lanes again. Knows no clock: what was measured is passed in.

use std::time::Duration;

/// Every time by which a run decides. All are functions of the setting and of what was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// The setting.
    pub max_stall: Duration,
    /// Workers and coordinator say that they live this often (3 % of the setting).
    pub heartbeat: Duration,
    /// Silence after which a session or an exchange's peer counts as gone (30 %): ten heartbeats.
    pub silence: Duration,
    /// Time to make a connection (20 %).
    pub connect: Duration,
    /// A leader that has put no journal entry for so long may be succeeded (50 %).
    pub lease: Duration,
    /// A leader puts an entry at least this often (a fifth of the lease).
    pub renew: Duration,
    /// A start waits so long for workers that are expected but not here (twice the setting).
    pub gather: Duration,
    /// Longest time for which the commit is withheld while a newcomer copies the state.
    pub copy: Duration,
    /// A member of the open generation that does nothing for so long is as good as dead.
    pub stuck: Duration,
    /// Longest wait for a peer of an exchange that lives and has not begun yet.
    pub start: Duration,
}

impl Timeouts {
    /// Of this setting, before anything was measured.
    pub fn new(max_stall: Duration) -> Self {
        Timeouts {
            max_stall,
            heartbeat: max_stall.mul_f64(0.03),
            silence: max_stall.mul_f64(0.3),
            connect: max_stall.mul_f64(0.2),
            lease: max_stall.mul_f64(0.5),
            renew: max_stall.mul_f64(0.1),
            gather: max_stall * 2,
            copy: max_stall,
            stuck: max_stall,
            start: max_stall * 60,
        }
    }

    /// With a measured step and round trip: a slow network is not taken for a dead one, and a long
    /// step not for a stuck worker.
    #[must_use]
    pub fn measured(self, step: Duration, round_trip: Duration) -> Self {
        Timeouts {
            heartbeat: self.heartbeat.max(round_trip * 2),
            silence: self.silence.max(round_trip * 20),
            connect: self.connect.max(round_trip * 10),
            stuck: self.stuck.max(step),
            copy: self.copy.max(step),
            start: self.start.max(step * 4),
            ..self
        }
    }

    /// Names and values, for people.
    pub fn listed(&self) -> [(&'static str, Duration); 10] {
        [
            ("max_stall", self.max_stall),
            ("heartbeat", self.heartbeat),
            ("silence", self.silence),
            ("connect", self.connect),
            ("lease", self.lease),
            ("renew", self.renew),
            ("gather", self.gather),
            ("copy", self.copy),
            ("stuck", self.stuck),
            ("start", self.start),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_setting_notices_a_partition_in_three_seconds() {
        let timeouts = Timeouts::new(Duration::from_secs(10));
        assert_eq!(timeouts.silence, Duration::from_secs(3));
        assert_eq!(timeouts.silence, timeouts.heartbeat * 10);
        assert!(timeouts.renew * 5 <= timeouts.lease);
        assert!(timeouts.silence + timeouts.lease <= timeouts.max_stall);
    }

    #[test]
    fn what_was_measured_only_lengthens() {
        let before = Timeouts::new(Duration::from_secs(1));
        let after = before.measured(Duration::from_secs(40), Duration::from_millis(80));
        assert_eq!(after.silence, Duration::from_millis(1600));
        assert_eq!(after.stuck, Duration::from_secs(40));
        for ((name, short), (_, long)) in before.listed().iter().zip(after.listed()) {
            assert!(*short <= long, "{name}");
        }
    }
}
