//! When a leader may be succeeded: its newest entry did not change for the lease, on the watcher's
//! own monotonic clock. Pure; who reads the journal, and when, is the caller's business.

use crate::core::Millis;

/// What a standby has seen of the leader.
#[derive(Clone, Debug)]
pub struct Lease {
    lease: Millis,
    seen: Option<Seen>,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    /// Number of the newest entry.
    seq: u64,
    /// Since when it has been the newest without a gap in what was seen.
    since: Millis,
    /// When it was looked at last.
    looked: Millis,
}

impl Lease {
    /// A watcher that has seen nothing yet.
    pub fn new(lease: Millis) -> Self {
        Lease { lease, seen: None }
    }

    /// The pause between looks: a few of them make a lease, and a leader renews more rarely.
    pub fn pause(lease: Millis) -> Millis {
        (lease / 10).max(1)
    }

    /// At `now` the newest entry was the one of this number; returns whether the lease ran out.
    ///
    /// A gap of half a lease between two looks, because the store or this process was away itself,
    /// begins the watch anew: the leader may have been as unable to write as this one to read.
    pub fn saw(&mut self, now: Millis, seq: u64) -> bool {
        let kept = self.seen.filter(|seen| {
            let gap = now.saturating_sub(seen.looked);
            seen.seq == seq && gap <= self.lease / 2
        });
        let since = kept.map_or(now, |seen| seen.since);
        let looked = now;
        self.seen = Some(Seen { seq, since, looked });
        now.saturating_sub(since) >= self.lease
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leader_that_writes_keeps_its_lease() {
        let mut lease = Lease::new(1000);
        for now in (0..10_000).step_by(100) {
            assert!(!lease.saw(now, now / 500), "at {now}");
        }
    }

    #[test]
    fn a_silent_leader_is_succeeded_after_the_lease_and_not_before() {
        let mut lease = Lease::new(1000);
        let out: Vec<u64> = (0..3_000)
            .step_by(100)
            .filter(|now| lease.saw(*now, if *now < 700 { 4 } else { 5 }))
            .collect();
        assert_eq!(out.first(), Some(&1700), "from the change on");
    }

    #[test]
    fn who_was_away_itself_begins_anew() {
        let mut lease = Lease::new(1000);
        assert!(!lease.saw(0, 4));
        assert!(!lease.saw(60_000, 4), "a minute was not watched");
        assert!(!lease.saw(60_500, 4));
        assert!(lease.saw(61_000, 4));
    }
}
