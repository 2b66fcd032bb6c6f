//! Evaluations: when a state is judged, and by whom.
//!
//! The data is cut into as many shares as there are members; each finds what its share says and
//! stores it under the run's root, and one makes figures of everything. What a share says is the same
//! whoever computes it, so a share that died with its worker is asked of another, and figures are the
//! same for any number of members. This room refuses to know what is judged.

use super::*;

/// An evaluation that is under way.
#[derive(Debug, Default)]
pub(super) struct Evaluation {
    step: u64,
    of: u32,
    /// Shares that are not found yet, and with whom they are.
    open: BTreeMap<u32, Option<u64>>,
    /// Who makes the figures.
    concludes: Option<u64>,
}

impl Evaluation {
    /// Nobody shares with itself: a single member judges the whole when it makes the figures.
    fn new(step: u64, members: usize) -> Self {
        let of = members as u32;
        let shares = if of > 1 { 0..of } else { 0..0 };
        Evaluation {
            step,
            of,
            open: shares.map(|share| (share, None)).collect(),
            concludes: None,
        }
    }

    /// Whoever computes for it.
    pub fn workers(&self) -> impl Iterator<Item = u64> {
        let sharers = self.open.values().flatten();
        sharers.chain(&self.concludes).copied()
    }

    /// Nothing is expected of this worker any more.
    pub fn forget(&mut self, id: u64) {
        for with in self.open.values_mut() {
            with.take_if(|with| *with == id);
        }
        self.concludes.take_if(|with| *with == id);
    }

    /// What this worker is to do next, if it is free and there is something.
    fn next_for(&mut self, id: u64) -> Option<v1::Evaluate> {
        if self.workers().any(|busy| busy == id) {
            return None;
        }
        let ask = |share| v1::Evaluate {
            step: self.step,
            shares: self.of,
            share,
        };
        if self.open.is_empty() {
            let asked = self.concludes.is_none().then(|| ask(None));
            self.concludes.get_or_insert(id);
            return asked;
        }
        let free = self.open.iter().find(|(_, with)| with.is_none());
        let share = *free?.0;
        let asked = ask(Some(share));
        self.open.insert(share, Some(id));
        Some(asked)
    }
}

impl Core {
    /// A state that is to be judged is judged before it is gone: no step is committed on it before.
    /// An evaluation that dies with this leader is begun again. Returns whether training may go on.
    pub(super) fn evaluate_due(&mut self, fx: &mut Vec<Effect>) -> bool {
        let step = self.committed;
        let due = self.s.evaluates && (step == 0 || self.s.rhythm.is_due(step));
        if !due || self.durable.evaluations.contains_key(&step) {
            return true;
        }
        self.evaluate(fx);
        false
    }

    /// Asks of every member that is free what is left of the present state's evaluation.
    pub(super) fn evaluate(&mut self, fx: &mut Vec<Effect>) {
        let step = self.committed;
        if self.evaluation.step != step || self.evaluation.of == 0 {
            self.evaluation = Evaluation::new(step, self.members.len());
        }
        for id in self.members.clone() {
            if let Some(ask) = self.evaluation.next_for(id) {
                self.send(id, down::Body::Evaluate(ask), fx);
            }
        }
    }

    pub(super) fn take_share(&mut self, told: v1::ShareEvaluated, fx: &mut Vec<Effect>) {
        let evaluation = &mut self.evaluation;
        if (evaluation.step, evaluation.of) != (told.step, told.shares) {
            return;
        }
        if told.error.is_empty() {
            evaluation.open.remove(&told.share);
        } else {
            self.fail(format!("evaluation failed: {}", told.error), fx);
        }
    }

    pub(super) fn take_evaluated(
        &mut self,
        now: Millis,
        id: u64,
        evaluated: v1::Evaluated,
        fx: &mut Vec<Effect>,
    ) {
        let step = evaluated.step;
        if self.evaluation.step != step || self.evaluation.concludes != Some(id) {
            return;
        }
        self.evaluation = Evaluation::default();
        if !evaluated.error.is_empty() {
            self.fail(format!("evaluation failed: {}", evaluated.error), fx);
            return;
        }
        self.durable.evaluations.insert(step, evaluated.clone());
        fx.push(Effect::StoreEvaluation(evaluated.clone()));
        self.measured.came_between();
        if self.phase == Phase::Training {
            // The state is soon gone. Whoever leads after this entry has read its evaluation; who led
            // no more when it was kept commits nothing behind it.
            self.write_down(now, false, fx);
        }
        self.emit(|e| e.evaluated = Some(evaluated), fx);
    }
}
