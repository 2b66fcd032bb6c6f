//! The sampled lane audit: now and then one lane is computed by two workers and the bits compared.
//!
//! A wrong gradient reaches everyone alike, so that no comparison of sums finds it. At an audited
//! step the digest of one lane's gradient is taken before it is folded, and a second worker computes
//! the same lane behind its own, while the network sums. Where both differ a third computation
//! decides, by another worker if there is one; the step is committed with the right bits. What cannot
//! be found out in time is dropped and counted: an audit never stops a run that may be sound. Price:
//! one lane's time in `cluster.audit_every_steps` steps, less what the exchange hides.

use super::*;

/// So many tries of a step whose audit failed may end without a decision.
const UNDECIDED_MAX: u32 = 3;

/// The audit of one step.
#[derive(Clone, Debug, Default)]
pub(super) struct LaneAudit {
    step: u64,
    pub(super) lane: u32,
    pub(super) holder: u64,
    pub(super) auditor: u64,
    /// Digests by worker and attempt.
    found: BTreeMap<(u64, u32), Digest>,
    /// Asked for a third computation.
    asked: BTreeSet<u64>,
    /// Since when everybody else waits for it.
    since: Option<Millis>,
    seconds: f64,
    /// What was found is settled: nothing is asked for any more.
    settled: bool,
    /// Generations in which both differed and nobody decided.
    undecided: u32,
}

/// Audits of this term.
#[derive(Debug, Default)]
pub(super) struct LaneAudits {
    pub(super) open: Option<LaneAudit>,
    pub(super) counts: v1::Audits,
    /// When the first step began.
    since: Option<Millis>,
}

/// What is known of an audited lane.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    Wait,
    Same,
    /// These are asked to compute it once more.
    Ask(Vec<u64>),
    /// This worker computed other bits.
    Wrong(u64),
    /// The only worker computed it wrong once: the first time (`true`), or when it audited.
    Slipped(bool),
    /// No computation settles it.
    Undecided,
}

impl LaneAudit {
    fn digest(&self, worker: u64, attempt: u32) -> Option<Digest> {
        self.found.get(&(worker, attempt)).copied()
    }

    /// Whether both computations are there and differ.
    fn differs(&self) -> bool {
        let first = self.digest(self.holder, 0);
        let second = self.digest(self.auditor, 1);
        first.zip(second).is_some_and(|(a, b)| a != b)
    }

    fn verdict(&self, members: &[u64]) -> Verdict {
        let (holder, auditor) = (self.holder, self.auditor);
        let (Some(first), Some(second)) = (self.digest(holder, 0), self.digest(auditor, 1)) else {
            return Verdict::Wait;
        };
        if first == second {
            return Verdict::Same;
        }
        let other = members.iter().find(|m| **m != holder && **m != auditor);
        let judges: Vec<u64> = match other {
            Some(third) => vec![*third],
            None if holder == auditor => vec![holder],
            None => vec![holder, auditor],
        };
        let missing = |id: &&u64| self.digest(**id, 2).is_none();
        if judges.iter().any(|id| missing(&id)) {
            let new = judges.into_iter().filter(|id| !self.asked.contains(id));
            let new: Vec<u64> = new.collect();
            return if new.is_empty() {
                Verdict::Wait
            } else {
                Verdict::Ask(new)
            };
        }
        let third = |id: u64| self.digest(id, 2);
        if holder == auditor && other.is_none() {
            return match third(holder) {
                Some(d) if d == first => Verdict::Slipped(false),
                Some(d) if d == second => Verdict::Slipped(true),
                _ => Verdict::Undecided,
            };
        }
        if let Some(judge) = other {
            return match third(*judge) {
                Some(d) if d == first => Verdict::Wrong(auditor),
                Some(d) if d == second => Verdict::Wrong(holder),
                _ => Verdict::Undecided,
            };
        }
        // Each of two has computed it again: whoever gives other bits than before is wrong.
        match (third(holder) == Some(first), third(auditor) == Some(second)) {
            (false, true) => Verdict::Wrong(holder),
            (true, false) => Verdict::Wrong(auditor),
            _ => Verdict::Undecided,
        }
    }
}

impl Core {
    /// The audit of `step`, which is the open one or the next, if it is to be audited. Workers take
    /// turns, and each one's lanes.
    pub(super) fn plan_audit(&mut self, now: Millis, step: u64) -> Option<v1::Audit> {
        self.audits.since.get_or_insert(now);
        let every = self.s.audit_every;
        if every == 0 || !(step + 1).is_multiple_of(every) {
            self.audits.open = None;
            return None;
        }
        let before = self.audits.open.take().filter(|a| a.step == step);
        let turn = ((step + 1) / every - 1) as usize;
        let lane = before
            .as_ref()
            .map_or_else(|| self.audited_lane(turn), |a| a.lane);
        let holder = self.holder(step, lane)?;
        let others: Vec<u64> = self
            .members
            .iter()
            .copied()
            .filter(|m| *m != holder)
            .collect();
        let auditor = match &before {
            Some(a) if others.contains(&a.auditor) => a.auditor,
            _ => others
                .get(turn % others.len().max(1))
                .copied()
                .unwrap_or(holder),
        };
        let audit = LaneAudit {
            step,
            lane,
            holder,
            auditor,
            settled: before.as_ref().is_some_and(|a| a.settled),
            undecided: before.as_ref().map_or(0, |a| a.undecided),
            ..LaneAudit::default()
        };
        let settled = audit.settled;
        self.audits.open = Some(audit);
        (!settled).then(|| self.ask_audit(auditor, step, lane))
    }

    fn audited_lane(&self, turn: usize) -> u32 {
        let ranges: Vec<&Range<u32>> = self.lanes_next.values().filter(|r| !r.is_empty()).collect();
        let range = ranges[turn % ranges.len()];
        range.start + ((turn / ranges.len()) % range.len()) as u32
    }

    fn holder(&self, step: u64, lane: u32) -> Option<u64> {
        if step > self.committed {
            let holds = |(_, range): &(&u64, &Range<u32>)| range.contains(&lane);
            return self.lanes_next.iter().find(holds).map(|(id, _)| *id);
        }
        let in_node = |n: &LaneRange| n.start <= lane && lane < n.end;
        let holds = |(_, nodes): &(&u64, &Vec<LaneRange>)| nodes.iter().any(in_node);
        self.nodes_now.iter().find(holds).map(|(id, _)| *id)
    }

    fn ask_audit(&self, worker_id: u64, step: u64, lane: u32) -> v1::Audit {
        v1::Audit {
            term: self.s.term,
            generation: self.generation,
            step,
            lane,
            worker_id,
        }
    }

    /// Whether the open step's lanes are to be computed again: its audit failed, and the generation
    /// ends before somebody was found wrong.
    pub(super) fn audit_is_open_ended(&mut self) -> bool {
        let step = self.committed;
        let open = self.audits.open.as_mut();
        let open = open.filter(|a| a.step == step && !a.settled && a.differs());
        open.is_some_and(|audit| {
            audit.undecided += 1;
            true
        })
    }

    pub(super) fn lane_audited(&mut self, id: u64, told: v1::LaneAudited, fx: &mut Vec<Effect>) {
        let fenced = told.term == self.s.term
            && told.generation == self.generation
            && told.step == self.committed;
        let Some(audit) = &mut self.audits.open else {
            return;
        };
        let expected = match told.attempt {
            0 => id == audit.holder,
            1 => id == audit.auditor,
            _ => audit.asked.contains(&id),
        };
        if !fenced || !expected || audit.settled || told.lane != audit.lane {
            return;
        }
        // The holder computes the lane anyway.
        if told.attempt > 0 {
            audit.seconds += told.seconds;
            self.audits.counts.seconds += told.seconds;
        }
        match Digest::from_bytes(&told.digest) {
            Some(digest) => {
                audit.found.insert((id, told.attempt), digest);
            }
            None => {
                let why = format!("worker {id}: {}", told.error);
                self.drop_audit(why, fx);
            }
        }
    }

    /// All are ready: whether nothing stands against the commit from the step's audit.
    pub(super) fn audit_allows(&mut self, now: Millis, fx: &mut Vec<Effect>) -> bool {
        let step = self.committed;
        let open = self.audits.open.as_ref();
        let Some(audit) = open.filter(|a| a.step == step && !a.settled) else {
            return true;
        };
        let (lane, holder, auditor) = (audit.lane, audit.holder, audit.auditor);
        match audit.verdict(&self.members) {
            Verdict::Wait => self.await_audit(now, fx),
            Verdict::Same => {
                self.audits.counts.agreed += 1;
                self.settle(now, Reason::LaneAudited, "gives the same bits", fx);
                true
            }
            Verdict::Ask(ids) => {
                let text = format!(
                    "step {step}: lane {lane} has other bits on worker {auditor} than on worker \
                     {holder}; {ids:?} compute it once more"
                );
                self.notice(Reason::AuditDiffered, text, fx);
                for id in ids {
                    let ask = self.ask_audit(id, step, lane);
                    self.send(id, down::Body::Audit(ask), fx);
                    if let Some(open) = &mut self.audits.open {
                        open.asked.insert(id);
                        open.since = Some(now);
                    }
                }
                false
            }
            Verdict::Wrong(id) => {
                self.audits.counts.differed += 1;
                let said = format!("was wrong on worker {id}");
                self.settle(now, Reason::AuditDiffered, &said, fx);
                if id == holder {
                    self.doubt_sums();
                }
                let why = format!("it computed lane {lane} to other bits than another worker");
                self.expel(now, [(id, why)].into(), fx);
                false
            }
            Verdict::Slipped(first) => {
                self.audits.counts.differed += 1;
                let said = "came out otherwise once on the only worker: do not trust its host";
                self.settle(now, Reason::AuditDiffered, said, fx);
                if first {
                    self.evidence.restart();
                    self.doubt_sums();
                    let why = format!("lane {lane} was computed wrong");
                    self.compute_again(now, why, fx);
                }
                !first
            }
            Verdict::Undecided => {
                let text = format!(
                    "step {step}: lane {lane} has other bits on worker {auditor} than on worker \
                     {holder}, and a third computation gives others again: test the memory and \
                     processors of their hosts, then go on with --resume on others"
                );
                self.fail(text, fx);
                false
            }
        }
    }

    /// Waits, but not for ever: a worker that computes nothing more is as good as dead where its
    /// word is needed, and an audit that found nothing wrong is dropped.
    fn await_audit(&mut self, now: Millis, fx: &mut Vec<Effect>) -> bool {
        let patience = self.audit_patience();
        let Some(audit) = &mut self.audits.open else {
            return true;
        };
        let since = *audit.since.get_or_insert(now);
        if now.saturating_sub(since) <= patience {
            return false;
        }
        if !audit.differs() {
            self.drop_audit("it did not come in time".into(), fx);
            return true;
        }
        let silent = audit.asked.iter().copied();
        let silent: Vec<u64> = silent.filter(|id| audit.digest(*id, 2).is_none()).collect();
        for id in silent {
            let why = Loss::Stuck("it did not compute the audited lane in time".into());
            self.remove(now, id, why, fx);
        }
        false
    }

    /// No second opinion in this step. Where both differed already the lanes are computed again.
    fn drop_audit(&mut self, why: String, fx: &mut Vec<Effect>) {
        let Some(audit) = &mut self.audits.open else {
            return;
        };
        let (step, lane) = (audit.step, audit.lane);
        if audit.differs() {
            audit.undecided += 1;
            if audit.undecided > UNDECIDED_MAX {
                let text = format!("step {step}: lane {lane} has no sure bits: {why}");
                self.fail(text, fx);
                return;
            }
            self.recompute = true;
            return;
        }
        audit.settled = true;
        self.audits.counts.dropped += 1;
        let text = format!("step {step}: the audit of lane {lane} is dropped: {why}");
        self.notice(Reason::AuditDropped, text, fx);
    }

    fn audit_patience(&self) -> Millis {
        2 * millis(self.timeouts().stuck)
    }

    fn settle(&mut self, now: Millis, reason: Reason, said: &str, fx: &mut Vec<Effect>) {
        let since = self.audits.since.unwrap_or(now);
        let trained = now.saturating_sub(since) as f64 / 1000.0 * self.members.len() as f64;
        let Some(audit) = &mut self.audits.open else {
            return;
        };
        audit.settled = true;
        let share = 100.0 * self.audits.counts.seconds / trained.max(0.001);
        let text = format!(
            "step {}: lane {} of worker {}, computed again by worker {}, {said}; cost {:.3} s, all \
             audits so far {share:.2} % of the workers' time",
            audit.step, audit.lane, audit.holder, audit.auditor, audit.seconds
        );
        self.notice(reason, text, fx);
    }
}
