//! Shards that stay unreadable: whether the run may do without them, and from which step on.
//!
//! Such a choice cannot be derived from configuration and data. It holds from the open step on, is
//! journaled with the generation that opens on it, before any commit that uses it, and the open step
//! is computed again by all, as if the shard had been known to be lost when it began.
//!
//! A step that was committed before is never decided again: its recomputation needs the same pairs,
//! so there an unreadable shard stops the run. A term knows what it committed itself. Of earlier terms
//! it knows the journal's horizon, which no commit passes without another entry; and a commit needs
//! the ready of every member, so what one of the last members holds tells how far they can have come.

use super::*;

impl Core {
    pub(super) fn take_unreadable(
        &mut self,
        now: Millis,
        id: u64,
        report: v1::Unreadable,
        fx: &mut Vec<Effect>,
    ) {
        let fenced = report.term == self.s.term
            && report.generation == self.generation
            && report.step == self.committed;
        if !fenced || self.phase != Phase::Training || !self.is_member(id) {
            return;
        }
        if let Some(why) = self.indispensable(&report) {
            let (step, detail) = (self.committed, report.detail);
            self.fail(format!("step {step}: worker {id}: {detail}; {why}"), fx);
            return;
        }
        let names: Vec<String> = report.shards.iter().map(|s| self.shard_name(s)).collect();
        for mut shard in report.shards {
            shard.from_step = self.committed;
            self.durable.quarantine.add(shard);
        }
        let text = format!(
            "{} under quarantine from step {} on ({} of {} allowed): {}",
            names.join(", "),
            self.committed,
            self.durable.quarantine.len(),
            self.s.quarantine_shards_max,
            report.detail
        );
        self.notice(Reason::ShardQuarantined, text, fx);
        // Nobody keeps partials of the open step: lanes are handed out as at a step's begin.
        self.nodes_now.clear();
        self.evidence = Evidence::default();
        for worker in self.workers.values_mut() {
            worker.nodes.clear();
            if worker.applied == Some(self.committed) {
                worker.pending_digest = None;
            }
        }
        self.open_generation(now, fx);
    }

    /// Why the run cannot go on without these shards, and what to do.
    fn indispensable(&self, report: &v1::Unreadable) -> Option<String> {
        let (step, max) = (self.committed, self.s.quarantine_shards_max);
        let known = &self.durable.quarantine;
        let out = |shard: &&v1::Shard| known.find(shard).is_some_and(|s| s.from_step <= step);
        if report.shards.is_empty() {
            return Some("no shard is named".into());
        }
        if let Some(shard) = report.shards.iter().find(out) {
            let name = self.shard_name(shard);
            return Some(format!("{name} is under quarantine and must not be read"));
        }
        if step < self.decided_below() {
            return Some(format!(
                "steps up to {} were committed before or may have been, and are computed again from the \
                 same pairs only: restore the shard and go on with --resume",
                self.decided_below() - 1
            ));
        }
        if known.len() + report.shards.len() <= max as usize {
            return None;
        }
        if max == 0 {
            return Some(
                "data.quarantine_shards_max = 0 allows no run without it: restore the shard and go on \
                 with --resume, or begin another run that allows a quarantine"
                    .into(),
            );
        }
        let lost: Vec<String> = known.all().map(|s| self.shard_name(s)).collect();
        Some(format!(
            "data.quarantine_shards_max = {max} is used up by {}: restore a shard and go on with \
             --resume",
            lost.join(", ")
        ))
    }

    /// Steps below this one were committed, or may have been.
    pub(super) fn decided_below(&self) -> u64 {
        self.decided.max(self.unsure_below)
    }

    /// What a worker holds proves that steps were committed, and a last member's that no others were.
    pub(super) fn learn_decided(&mut self, hello: &v1::Hello) {
        let received = hello.receipts.last().map_or(0, |r| r.step + 1);
        self.decided = self.decided.max(received);
        if !hello.has_state {
            return;
        }
        self.decided = self.decided.max(hello.applied);
        // Since it loaded its state it was a member: it applied a step, or reported a gradient.
        let (applied, ready) = (&hello.applied_digest, !hello.pending_digest.is_empty());
        let took_part = ready || !applied.is_empty();
        let was_member = self.durable.members.contains(&hello.worker_id);
        if took_part && was_member && hello.term < self.s.term {
            let bound = hello.applied + u64::from(ready);
            self.unsure_below = self.unsure_below.min(bound);
        }
    }

    fn shard_name(&self, shard: &v1::Shard) -> String {
        let data = self.durable.data.iter().flatten();
        let mut train = data.filter(|d| d.key == "data.train");
        match train.nth(shard.dataset as usize) {
            Some(dataset) => format!("{}/{}", dataset.path, shard.file),
            None => format!("{} of data.train {}", shard.file, shard.dataset),
        }
    }

    /// Why a worker that sees these datasets cannot train this run.
    pub(super) fn data_refusal(&self, found: &[v1::Dataset]) -> Option<String> {
        let first = self.durable.data.as_ref()?;
        let differs = |(a, b): &(&v1::Dataset, &v1::Dataset)| a != b;
        if let Some((then, now)) = first.iter().zip(found).find(differs) {
            return Some(format!(
                "{} is another dataset now: {} has a manifest with sha256 {} ({} pairs), the run \
                 began with {} ({} pairs): bring back what was there, or begin another run",
                then.key,
                now.path,
                now.manifest_sha256,
                now.pairs,
                then.manifest_sha256,
                then.pairs
            ));
        }
        (first.len() != found.len()).then(|| {
            let (then, now) = (first.len(), found.len());
            format!("it sees {now} datasets, the run began with {then}: begin another run")
        })
    }
}
