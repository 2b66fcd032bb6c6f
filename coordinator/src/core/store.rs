//! The store as the core sees it: journal entries that are on their way, how far commits may go
//! without another, and what cannot be written at the moment. It knows no store, only what is owed.
//!
//! What is announced waits for its entry in the shell, so the core never sees a half-open generation;
//! it only lets its own timers rest while a generation cannot have been heard of.

use std::collections::VecDeque;

use super::*;

/// Commits stop when this many times the receipts that are put into the ledger at once wait: what
/// carries them stays well below the limit of a message.
const RECEIPTS_LAG: usize = 2;

/// Journal entries of this term.
#[derive(Debug)]
pub(super) struct Written {
    /// Entries asked for and not durable, oldest first.
    owed: VecDeque<Owed>,
    /// Number of the newest durable entry.
    seq: u64,
    /// No update at or beyond this one is committed before another entry is durable.
    horizon: u64,
    /// The same once everything that is owed is durable.
    horizon_owed: u64,
    /// When an entry was asked for last.
    asked: Millis,
    /// Of the newest entry: what it took for committed, and its members.
    committed: u64,
    members: Vec<u64>,
    /// What cannot be written, why, and since when.
    away: BTreeMap<String, (String, Millis)>,
    /// Receipts are being read from the ledger.
    reading: bool,
    /// What the run waits for the store for.
    waits: String,
}

#[derive(Debug)]
struct Owed {
    since: Millis,
    horizon: u64,
    ahead: bool,
}

impl Written {
    pub(super) fn new(now: Millis, durable: &Durable) -> Self {
        Written {
            owed: VecDeque::new(),
            seq: durable.entry,
            horizon: durable.horizon,
            horizon_owed: durable.horizon,
            asked: now,
            committed: durable.committed,
            members: durable.members.clone(),
            away: BTreeMap::new(),
            reading: false,
            waits: String::new(),
        }
    }

    /// The oldest entry that holds back what was announced behind it.
    fn barrier(&self) -> Option<(u64, &Owed)> {
        let numbered = (self.seq + 1..).zip(&self.owed);
        let mut barriers = numbered.filter(|(_, owed)| !owed.ahead);
        barriers.next()
    }
}

impl Core {
    /// Journals what a next term must know.
    pub(super) fn write_down(&mut self, now: Millis, ahead: bool, fx: &mut Vec<Effect>) {
        if matches!(self.phase, Phase::Training | Phase::Finishing) {
            let horizon = self.committed + self.s.horizon_steps;
            let horizon = horizon.min(self.s.steps_total);
            self.written.horizon_owed = self.written.horizon_owed.max(horizon);
            self.written.committed = self.decided_below();
            self.written.members.clone_from(&self.members);
        }
        let horizon = self.written.horizon_owed;
        self.written.asked = now;
        self.written.owed.push_back(Owed {
            since: now,
            horizon,
            ahead,
        });
        fx.push(Effect::Journal {
            generation: self.generation,
            committed: self.written.committed,
            horizon,
            members: self.written.members.clone(),
            quarantine: self.durable.quarantine.all().cloned().collect(),
            ahead,
        });
    }

    /// A leader writes at least this often, so that nobody takes it for dead. One entry at a time: a
    /// store that is away is owed no pile of them.
    pub(super) fn renew(&mut self, now: Millis, fx: &mut Vec<Effect>) {
        let due = now.saturating_sub(self.written.asked) >= millis(self.timeouts().renew);
        if due && self.written.owed.is_empty() && self.phase != Phase::Over {
            self.write_down(now, true, fx);
        }
    }

    /// The horizon moves on when half of it is used up, so that no commit waits for it.
    pub(super) fn write_ahead(&mut self, now: Millis, fx: &mut Vec<Effect>) {
        let horizon = self.written.horizon_owed;
        let half = horizon.saturating_sub(self.committed) <= self.s.horizon_steps / 2;
        if half && horizon < self.s.steps_total && self.written.owed.is_empty() {
            self.write_down(now, true, fx);
        }
    }

    /// Whether what is durable bears another commit.
    pub(super) fn store_allows_commit(&self) -> bool {
        self.committed < self.written.horizon && !self.receipts_lag()
    }

    /// Whether a step's receipt is in the ledger.
    pub(super) fn in_ledger(&self, step: u64) -> bool {
        step < self.durable.receipts_from || self.durable.receipts.contains_key(&step)
    }

    /// Whether the receipts of steps from this one on are known, by which what is computed again is
    /// judged; asks for them if not.
    pub(super) fn knows_receipts(&mut self, step: u64, fx: &mut Vec<Effect>) -> bool {
        let below = self.durable.receipts_from;
        if step >= below {
            return true;
        }
        if !self.written.reading {
            self.written.reading = true;
            fx.push(Effect::ReadReceipts(step..below));
        }
        let last = below - 1;
        self.wait_for(
            format!("the ledger's receipts of steps {step} to {last}"),
            fx,
        );
        false
    }

    pub(super) fn receipts_read(&mut self, from: u64, receipts: BTreeMap<u64, v1::StepRecord>) {
        self.written.reading = false;
        self.durable.receipts.extend(receipts);
        self.durable.receipts_from = self.durable.receipts_from.min(from);
    }

    fn receipts_lag(&self) -> bool {
        let waiting = self.committed.saturating_sub(self.receipts_durable);
        waiting as usize >= RECEIPTS_LAG * self.receipts_waiting_max()
    }

    /// What became durable, what cannot for now, and what can again.
    pub(super) fn hear_store(&mut self, now: Millis, event: Event, fx: &mut Vec<Effect>) {
        match event {
            Event::Journaled { seq } => self.journaled(now, seq),
            Event::StoreAway { what, error } => {
                let first = self.written.away.is_empty();
                let text =
                    format!("{what} cannot be written yet: {error}; it is tried until it can");
                self.written.away.insert(what, (error, now));
                if first {
                    self.notice(Reason::StoreUnavailable, text, fx);
                }
            }
            Event::StoreBack { what } => {
                let Some((_, since)) = self.written.away.remove(&what) else {
                    return;
                };
                if self.written.away.is_empty() {
                    let seconds = now.saturating_sub(since) as f64 / 1000.0;
                    let text = format!("{what} is written: the store was away for {seconds:.1} s");
                    self.notice(Reason::StoreBack, text, fx);
                }
            }
            _ => {}
        }
    }

    fn journaled(&mut self, now: Millis, seq: u64) {
        self.written.seq = seq;
        let Some(entry) = self.written.owed.pop_front() else {
            return;
        };
        self.written.horizon = self.written.horizon.max(entry.horizon);
        if !entry.ahead {
            self.rested(now.saturating_sub(entry.since));
        }
    }

    /// What was announced so long ago is heard of only now.
    fn rested(&mut self, time: Millis) {
        self.open_links.rested(time);
        for worker in self.workers.values_mut() {
            worker.idle = None;
            if let Some(copying) = &mut worker.copying {
                copying.until += time;
            }
        }
    }

    /// What the run waits for, in words; the store first.
    pub(super) fn waits(&self) -> &str {
        if self.written.waits.is_empty() {
            &self.waiting_for
        } else {
            &self.written.waits
        }
    }

    /// Tells it if it is not what was told `before`.
    pub(super) fn say_waits(&self, before: &str, fx: &mut Vec<Effect>) {
        if self.waits() != before {
            self.emit(|_| {}, fx);
        }
    }

    /// Says that the run waits for the store, and that it does no more.
    pub(super) fn say_store_waits(&mut self, fx: &mut Vec<Effect>) {
        let waits = self.store_waits().unwrap_or_default();
        if self.written.waits != waits {
            let before = self.waits().to_owned();
            self.written.waits = waits;
            self.say_waits(&before, fx);
        }
    }

    fn store_waits(&self) -> Option<String> {
        let written = &self.written;
        let why = || {
            let mut errors = written.away.values().map(|(error, _)| error.as_str());
            errors.next().map_or(String::new(), |e| format!(" ({e})"))
        };
        if let Some((seq, _)) = written.barrier().filter(|_| !written.away.is_empty()) {
            let why = why();
            return Some(format!(
                "the store: journal entry {seq} is not written yet{why}"
            ));
        }
        let ready = |id: &u64| self.ready.contains_key(id);
        if self.phase != Phase::Training || !self.members.iter().all(ready) {
            return None;
        }
        if self.committed >= written.horizon {
            let (seq, why) = (written.seq + 1, why());
            return Some(format!(
                "the store: step {} may be committed once journal entry {seq} is written{why}",
                self.committed
            ));
        }
        if self.receipts_lag() {
            let (below, why) = (self.receipts_durable, why());
            return Some(format!(
                "the store: receipts of steps from {below} on are not written yet{why}"
            ));
        }
        None
    }

    /// Whether a generation was announced that nobody can have heard of.
    pub(super) fn unheard(&self) -> bool {
        self.written.barrier().is_some()
    }
}
