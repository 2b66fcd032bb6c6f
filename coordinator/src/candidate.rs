//! From a process that could lead to one that does: at once, or as a standby that waits until the
//! leader's lease runs out. It knows the journal, and nothing of what a leader does.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use belfry_configs::Timeouts;
use belfry_proto::journal::Closed;
use shard_tools::store::Root;

use crate::error::CoordinatorError;
use crate::journal::{self, Entry, Journal};
use crate::lease::Lease;
use crate::persist::Persist;
use crate::shell::Outcome;

/// Who wants to lead.
#[derive(Clone, Debug, Default)]
pub struct Candidate {
    /// Where workers will reach it.
    pub address: String,
    /// Its own name; the same after a restart. May be empty.
    pub name: String,
    /// Whether it waits while another leads.
    pub standby: bool,
}

/// What became of it.
pub enum Candidacy {
    /// It leads.
    Leads(Box<Journal>),
    /// The run ended while it waited.
    Ended(Outcome),
}

/// Takes the leadership: at once, or when it is this standby's turn.
///
/// A plain start leads at once, because whoever starts it knows that the leader before is dead; of
/// two plain starts one leads. A standby leads at once where nobody leads, where the leader released
/// it, and where the newest entry is of its own name: its predecessor is dead, it stands here itself.
///
/// # Errors
/// [`CoordinatorError`]: the root is refused, or a plain start lost a race.
pub async fn lead(
    root: &Root,
    candidate: &Candidate,
    timeouts: &Timeouts,
) -> Result<Candidacy, CoordinatorError> {
    let persist = Persist::starting(timeouts.silence);
    let nonce = nonce();
    loop {
        let read = || journal::newest(root);
        let mut before = persist.until_done("the journal", read).await?;
        if candidate.standby
            && let Some(newest) = before
        {
            before = match wait(root, candidate, timeouts, newest).await {
                Turn::Mine(entry) => Some(*entry),
                Turn::Over(outcome) => return Ok(Candidacy::Ended(outcome)),
            };
        }
        let leader = before.as_ref().map_or(0, |entry| entry.term);
        let succeed = || Journal::succeed(root, before.clone(), candidate, nonce);
        match persist.until_done("the journal", succeed).await {
            Ok(journal) => return Ok(Candidacy::Leads(Box::new(journal))),
            // The leader lives, or its last entry landed late.
            Err(CoordinatorError::Superseded { term, .. })
                if candidate.standby || term == leader => {}
            Err(error) => return Err(error),
        }
    }
}

/// Differs for every process.
fn nonce() -> u64 {
    let clock = SystemTime::now().duration_since(UNIX_EPOCH);
    let clock = clock.map_or(0, |d| d.as_nanos());
    clock as u64 ^ (u64::from(std::process::id()) << 40)
}

/// How a standby's wait ended.
enum Turn {
    /// It may write the entry behind this one.
    Mine(Box<Entry>),
    /// The run is over.
    Over(Outcome),
}

/// Waits until this standby may lead, or the run is over.
async fn wait(root: &Root, candidate: &Candidate, timeouts: &Timeouts, mut entry: Entry) -> Turn {
    let begun = Instant::now();
    let lease_ms = timeouts.lease.as_millis() as u64;
    let mut lease = Lease::new(lease_ms);
    let mut pause = tokio::time::interval(Duration::from_millis(Lease::pause(lease_ms)));
    pause.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut told, mut troubled) = (0, false);
    loop {
        match &entry.closed {
            // A run that failed before this standby came is gone on with by whoever starts it now.
            Some(Closed::Ended { success, reason }) if *success || told > 0 => {
                let (success, reason) = (*success, reason.clone());
                return Turn::Over(Outcome { success, reason });
            }
            Some(_) => return Turn::Mine(Box::new(entry)),
            None if !candidate.name.is_empty() && entry.name == candidate.name => {
                return Turn::Mine(Box::new(entry));
            }
            None => {}
        }
        if told != entry.term {
            told = entry.term;
            let Entry { term, address, .. } = &entry;
            tracing::info!(term, address, "standing by: another coordinator leads");
        }
        pause.tick().await;
        match tokio::time::timeout(timeouts.lease / 2, journal::after(root, entry.seq)).await {
            Ok(Ok(Some(next))) => entry = next,
            Ok(Ok(None)) => {
                let now = begun.elapsed().as_millis() as u64;
                if lease.saw(now, entry.seq) {
                    let Entry { term, address, .. } = &entry;
                    tracing::warn!(term, address, "the leader's lease ran out; succeeding it");
                    return Turn::Mine(Box::new(entry));
                }
                troubled = false;
                continue;
            }
            Ok(Err(error)) if !troubled => {
                tracing::warn!(%error, "cannot watch the leader; standing by");
                troubled = true;
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_millis(200);

    fn timeouts() -> Timeouts {
        Timeouts::new(LEASE * 2)
    }

    fn candidate(name: &str, standby: bool) -> Candidate {
        Candidate {
            address: format!("{name}:1"),
            name: name.into(),
            standby,
        }
    }

    async fn leads(root: &Root, name: &str, standby: bool) -> Journal {
        let led = lead(root, &candidate(name, standby), &timeouts()).await;
        match led.expect("leads") {
            Candidacy::Leads(journal) => *journal,
            Candidacy::Ended(outcome) => panic!("{outcome:?}"),
        }
    }

    async fn write(journal: &mut Journal, closed: Option<Closed>) {
        let next = Entry {
            closed,
            ..journal.next()
        };
        journal::put(journal.root(), &next).await.expect("leads");
        journal.settled(next);
    }

    #[tokio::test]
    async fn a_standby_waits_for_the_lease_and_a_plain_start_does_not() {
        let root = Root::open("memory://").expect("opens");
        let first = leads(&root, "a", true).await;
        assert_eq!(first.last().term, 1, "nobody led");
        let plain = leads(&root, "b", false).await;
        assert_eq!(plain.last().term, 2);
        let begun = Instant::now();
        let standby = leads(&root, "c", true).await;
        assert!(begun.elapsed() >= LEASE, "{:?}", begun.elapsed());
        assert_eq!((standby.last().term, standby.last().seq), (3, 3));
        let late = journal::put(&root, &plain.next()).await;
        assert!(matches!(
            late,
            Err(CoordinatorError::Superseded { term: 3, .. })
        ));
    }

    /// The leader writes at every look of the standby, for three leases; then it falls silent.
    #[tokio::test]
    async fn a_leader_that_renews_is_not_succeeded() {
        let root = Root::open("memory://").expect("opens");
        let mut leader = leads(&root, "a", false).await;
        let standby = {
            let root = root.clone();
            tokio::spawn(async move { leads(&root, "b", true).await })
        };
        let begun = Instant::now();
        let mut renewal = tokio::time::interval(LEASE / 5);
        while begun.elapsed() < LEASE * 3 {
            renewal.tick().await;
            write(&mut leader, None).await;
        }
        let last = leader.last().seq;
        let standby = standby.await.expect("leads");
        assert_eq!((standby.last().seq, standby.last().term), (last + 1, 2));
    }

    #[tokio::test]
    async fn who_is_released_or_started_again_need_not_wait() {
        let root = Root::open("memory://").expect("opens");
        let patient = Timeouts::new(Duration::from_secs(3600));
        leads(&root, "a", false).await;
        let again = lead(&root, &candidate("a", true), &patient).await;
        assert!(matches!(again, Ok(Candidacy::Leads(_))), "of its own name");
        let mut leader = leads(&root, "a", true).await;
        write(&mut leader, Some(Closed::Released)).await;
        let next = lead(&root, &candidate("b", true), &patient).await;
        assert!(matches!(next, Ok(Candidacy::Leads(_))), "released");
    }

    #[tokio::test]
    async fn a_finished_run_ends_its_standby() {
        let root = Root::open("memory://").expect("opens");
        let mut leader = leads(&root, "a", false).await;
        let closed = Closed::Ended {
            success: true,
            reason: "trained to the last step".into(),
        };
        write(&mut leader, Some(closed)).await;
        let ended = lead(&root, &candidate("b", true), &timeouts()).await;
        let Ok(Candidacy::Ended(outcome)) = ended else {
            panic!("it must not lead")
        };
        assert!(outcome.success, "{outcome:?}");
    }

    #[tokio::test]
    async fn of_two_standbys_one_succeeds_and_the_other_stands_by() {
        let root = Root::open("memory://").expect("opens");
        let _silent = leads(&root, "a", false).await;
        let (b, c) = (root.clone(), root.clone());
        let mut both = tokio::task::JoinSet::new();
        both.spawn(async move { leads(&b, "b", true).await });
        both.spawn(async move { leads(&c, "c", true).await });
        let first = both.join_next().await.expect("one").expect("leads");
        let second = both.join_next().await.expect("two").expect("leads later");
        assert_eq!((first.last().term, second.last().term), (2, 3));
    }
}
