//! Digests that find corruption: whether the members agree on the open step's bits and on the state
//! before it, and who is wrong where they do not.
//!
//! A majority names whoever disagrees with it. Without one the exchange is repeated, and whoever
//! gives other bits than before is wrong; a state that nobody can vouch for is loaded again, as after
//! the loss of every worker. What no repetition settles stops the run and names everybody in doubt. A
//! worker that is removed may come back as another process. Knows nothing of how digests are made.

use super::*;

/// States that nobody vouches for may be loaded again so often in a term: memory that goes on
/// changing must not keep the run busy for ever.
const RELOADS_MAX: u32 = 3;
/// All lanes of a step are computed again so often.
const AGAIN_MAX: u32 = 4;
/// What to do about a host that gave wrong bits.
const ADVICE: &str = "test that host's memory and processor before it is used again";

/// What is known of the open step's bits from all generations that tried it.
#[derive(Debug, Default)]
pub(super) struct Evidence {
    /// Digests of tree nodes, by who brought them.
    nodes: BTreeMap<(u64, LaneRange), u64>,
    /// Digests of the sum in earlier generations, by who reported them.
    sums: BTreeMap<u64, Digest>,
    /// Who contradicts itself, and how.
    contradictions: BTreeMap<u64, String>,
    /// The exchange is repeated because no majority told who is right.
    disputed: bool,
    /// Digests of the sum before the lanes were all computed again.
    candidates: BTreeSet<Digest>,
    /// How often they were.
    again: u32,
    /// All agree in this generation.
    agreed: Option<u64>,
}

/// Who is not believed, for the length of a term.
#[derive(Debug, Default)]
pub(super) struct Distrust {
    /// Processes that were removed, by worker.
    expelled: BTreeMap<u64, u64>,
    reloads: u32,
}

/// What a vote says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Vote {
    Unanimous,
    /// These differ from the majority.
    Minority(Vec<u64>),
    /// No value has more than half of the votes.
    Split,
}

pub(super) fn vote<T: Ord>(votes: impl Iterator<Item = (u64, T)>) -> Vote {
    let mut camps: BTreeMap<T, Vec<u64>> = BTreeMap::new();
    let mut all = 0;
    for (id, value) in votes {
        camps.entry(value).or_default().push(id);
        all += 1;
    }
    if camps.len() <= 1 {
        return Vote::Unanimous;
    }
    let small = camps.values().filter(|ids| 2 * ids.len() <= all);
    let mut minority: Vec<u64> = small.flatten().copied().collect();
    minority.sort_unstable();
    if minority.len() == all {
        Vote::Split
    } else {
        Vote::Minority(minority)
    }
}

impl Evidence {
    /// Another generation tries the step: what was reported stays for comparison.
    fn keep(&mut self, id: u64, digest: Digest) {
        self.sums.insert(id, digest);
    }

    /// Everything that was computed is computed again.
    pub(super) fn restart(&mut self) {
        let again = self.again;
        *self = Evidence {
            again,
            ..Evidence::default()
        };
    }

    fn forget(&mut self, id: u64) {
        self.sums.remove(&id);
        self.contradictions.remove(&id);
        self.nodes.retain(|(who, _), _| *who != id);
    }

    /// Takes the digests of the nodes that `id` brought.
    fn take_nodes(&mut self, id: u64, nodes: &[v1::NodeDigest]) {
        for brought in nodes {
            let node: LaneRange = brought.node.unwrap_or_default().into();
            let known = self.nodes.entry((id, node)).or_insert(brought.digest);
            if *known != brought.digest {
                let text = format!(
                    "the gradient of lanes {node} that it computed has other bits than it had in an \
                     earlier generation"
                );
                self.contradictions.insert(id, text);
            }
        }
    }

    /// Of the ready workers those whose sum is another than before.
    fn changed(&self, ready: &BTreeMap<u64, v1::Ready>) -> Vec<u64> {
        let differs = |(id, r): (&u64, &v1::Ready)| {
            let before = self.sums.get(id)?;
            (Digest::from_bytes(&r.sum_digest) != Some(*before)).then_some(*id)
        };
        ready.iter().filter_map(differs).collect()
    }
}

impl Distrust {
    /// Why this process is not let in.
    pub(super) fn refusal(&self, hello: &v1::Hello) -> Option<String> {
        let same = self.expelled.get(&hello.worker_id) == Some(&hello.incarnation);
        same.then(|| {
            let id = hello.worker_id;
            format!("this process of worker {id} was removed for wrong bits: {ADVICE}")
        })
    }
}

impl Core {
    pub(super) fn take_ready(&mut self, id: u64, ready: v1::Ready) {
        let fenced = ready.term == self.s.term
            && (ready.generation == self.generation || self.has(Planted::OldReady))
            && ready.step == self.committed;
        if fenced && self.phase == Phase::Training && self.is_member(id) {
            if let Some(worker) = self.workers.get_mut(&id) {
                worker.speed.add(ready.lanes.len(), ready.compute_seconds);
                worker.pending_digest = Digest::from_bytes(&ready.sum_digest);
            }
            self.heard_ready = true;
            self.evidence.take_nodes(id, &ready.nodes);
            self.ready.insert(id, ready);
        }
    }

    /// Before another generation of the same step: what was said of its sum is kept. A ring's sums
    /// follow the membership, so only a repetition can be compared.
    pub(super) fn keep_evidence(&mut self) {
        if !self.same_bits() && !self.evidence.disputed {
            return;
        }
        for (id, worker) in &self.workers {
            if let Some(digest) = worker.pending_digest
                && worker.applied == Some(self.committed)
            {
                self.evidence.keep(*id, digest);
            }
        }
    }

    /// Sums that were made with a lane which is known to be wrong prove nothing.
    pub(super) fn doubt_sums(&mut self) {
        self.evidence.sums.clear();
        self.evidence.candidates.clear();
        self.evidence.disputed = false;
        let here = self.workers.values_mut();
        let here = here.filter(|w| w.applied == Some(self.committed));
        here.for_each(|w| w.pending_digest = None);
    }

    /// All are ready: whether their digests agree. Where they do not, somebody is removed, or the
    /// step or the state is repeated, or the run stops.
    pub(super) fn digests_agree(&mut self, now: Millis, fx: &mut Vec<Effect>) -> bool {
        if self.evidence.agreed == Some(self.generation) {
            return true;
        }
        let contradictions = std::mem::take(&mut self.evidence.contradictions);
        if !contradictions.is_empty() && contradictions.len() == self.ready.len() {
            let text = contradictions.into_values().next().unwrap_or_default();
            self.evidence.restart();
            self.compute_again(now, text, fx);
            return false;
        }
        if !contradictions.is_empty() {
            self.expel(now, contradictions, fx);
            return false;
        }
        let states = self.ready.iter().map(|(id, r)| (*id, &r.state_digest));
        match vote(states) {
            Vote::Unanimous => {
                let agreed = self.sums_agree(now, fx);
                self.evidence.agreed = agreed.then_some(self.generation);
                agreed
            }
            Vote::Minority(ids) => {
                let others = self.ready.len() - ids.len();
                let why = format!(
                    "its state differs from that of {others} others; if it differed before, the \
                     lanes that it computed since step {} may have been wrong",
                    self.committed.saturating_sub(STATE_SLICES - 1)
                );
                self.expel(
                    now,
                    ids.into_iter().map(|id| (id, why.clone())).collect(),
                    fx,
                );
                false
            }
            Vote::Split => {
                let ids: Vec<u64> = self.ready.keys().copied().collect();
                self.load_again(now, &ids, fx);
                false
            }
        }
    }

    fn sums_agree(&mut self, now: Millis, fx: &mut Vec<Effect>) -> bool {
        let sums = self
            .ready
            .iter()
            .map(|(id, r)| (*id, (&r.sum_digest, &r.sum_parts)));
        let changed = self.evidence.changed(&self.ready);
        match vote(sums) {
            Vote::Minority(ids) => {
                let odd = ids
                    .iter()
                    .map(|id| (*id, self.odd_copy(*id, &ids)))
                    .collect();
                self.expel(now, odd, fx);
            }
            Vote::Split if !self.evidence.disputed => {
                let ids: Vec<u64> = self.ready.keys().copied().collect();
                let text = format!(
                    "step {}: workers {ids:?} reduced other bits and no majority tells who is right; \
                     the exchange is repeated",
                    self.committed
                );
                self.notice(Reason::DigestsDiffer, text, fx);
                self.evidence.disputed = true;
                self.open_generation(now, fx);
            }
            Vote::Unanimous if changed.is_empty() => return self.one_of_the_candidates(fx),
            Vote::Unanimous if !self.evidence.disputed && self.evidence.candidates.is_empty() => {
                let sums = self.evidence.sums.values().copied();
                let now_is = self
                    .ready
                    .values()
                    .filter_map(|r| Digest::from_bytes(&r.sum_digest));
                self.evidence.candidates = sums.chain(now_is).collect();
                let text = "its sum has other bits than in an earlier generation".to_owned();
                self.compute_again(now, text, fx);
                // Any of the candidates may come out; none is a change.
                self.evidence.sums.clear();
            }
            Vote::Unanimous | Vote::Split if self.rest_agrees(&changed) => {
                let why = "its copy of the sum changed when the exchange was repeated";
                let odd = changed.into_iter().map(|id| (id, why.to_owned()));
                self.expel(now, odd.collect(), fx);
            }
            Vote::Unanimous | Vote::Split => {
                let ids: Vec<u64> = self.ready.keys().copied().collect();
                self.fail(self.no_majority(&ids, "reduced other bits"), fx);
            }
        }
        false
    }

    /// A step whose lanes were all computed again came out in one of the ways it had before.
    fn one_of_the_candidates(&mut self, fx: &mut Vec<Effect>) -> bool {
        let candidates = &self.evidence.candidates;
        let mut sums = self
            .ready
            .values()
            .map(|r| Digest::from_bytes(&r.sum_digest));
        if candidates.is_empty() || sums.all(|s| s.is_some_and(|s| candidates.contains(&s))) {
            return true;
        }
        let ids: Vec<u64> = self.ready.keys().copied().collect();
        self.fail(self.no_majority(&ids, "computed a step in three ways"), fx);
        false
    }

    /// Whether all but the `changed` have the same sum, and somebody is left.
    fn rest_agrees(&self, changed: &[u64]) -> bool {
        let rest = self.ready.iter().filter(|(id, _)| !changed.contains(id));
        let sums: BTreeSet<&Vec<u8>> = rest.map(|(_, r)| &r.sum_digest).collect();
        sums.len() == 1 && !changed.is_empty()
    }

    /// How a worker's sum differs from the majority's.
    fn odd_copy(&self, id: u64, odd: &[u64]) -> String {
        let mine = self.ready.get(&id).map_or(&[][..], |r| &r.sum_parts);
        let right = self.ready.iter().find(|(other, _)| !odd.contains(other));
        let right = right.map_or(&[][..], |(_, r)| &r.sum_parts);
        let differ = mine.iter().zip(right).enumerate();
        let ranks: Vec<usize> = differ
            .filter(|(_, (a, b))| a != b)
            .map(|(i, _)| i)
            .collect();
        let others = self.ready.len() - odd.len();
        if ranks.is_empty() {
            return format!("its copy of the sum differs from that of {others} others");
        }
        format!(
            "its copy of the sum differs from that of {others} others in the buckets of ranks {ranks:?}"
        )
    }

    fn no_majority(&self, ids: &[u64], what: &str) -> String {
        format!(
            "step {}: workers {ids:?} {what}, and no majority tells who is right: {ADVICE}, then go \
             on with --resume and three workers or more",
            self.committed
        )
    }

    /// Whoever disagrees leaves: its process must end, and its lanes are computed by the others.
    pub(super) fn expel(&mut self, now: Millis, odd: BTreeMap<u64, String>, fx: &mut Vec<Effect>) {
        let step = self.committed;
        for (id, why) in odd {
            let rank = self.members.iter().position(|m| *m == id);
            let rank = rank.map_or(String::new(), |rank| format!(" (rank {rank})"));
            let text = format!("step {step}: worker {id}{rank} is removed: {why}");
            let reason = format!("{text}; {ADVICE}");
            self.send(id, down::Body::Refused(v1::Refused { reason }), fx);
            if let Some(worker) = self.workers.get(&id) {
                self.distrust.expelled.insert(id, worker.incarnation);
                fx.push(Effect::Close(worker.session));
            }
            self.forget(id, fx);
            self.members.retain(|member| *member != id);
            self.evidence.forget(id);
            self.about(id, Reason::WorkerExpelled, text, fx);
        }
        self.open_generation(now, fx);
    }

    /// Nobody's partials of the open step are kept.
    pub(super) fn compute_again(&mut self, now: Millis, why: String, fx: &mut Vec<Effect>) {
        self.evidence.again += 1;
        if self.evidence.again > AGAIN_MAX {
            let ids: Vec<u64> = self.members.clone();
            let text = self.no_majority(&ids, "give a step other bits each time");
            self.fail(text, fx);
            return;
        }
        let text = format!(
            "step {}: {why}; all lanes are computed again",
            self.committed
        );
        self.notice(Reason::DigestsDiffer, text, fx);
        self.recompute = true;
        self.open_generation(now, fx);
    }

    /// Nobody knows whose state is right: all load the newest checkpoint and compute the steps since
    /// then again, to the bits of their receipts.
    pub(super) fn load_again(&mut self, now: Millis, ids: &[u64], fx: &mut Vec<Effect>) {
        self.distrust.reloads += 1;
        if self.distrust.reloads > RELOADS_MAX {
            self.fail(self.no_majority(ids, "hold different states"), fx);
            return;
        }
        let newest = self.durable.manifests.last();
        let from = newest.map_or("the initial state".into(), |s| {
            format!("the checkpoint of {s}")
        });
        let text = format!(
            "step {}: workers {ids:?} hold different states and no majority tells who is right: all \
             go back to {from}",
            self.committed
        );
        self.notice(Reason::StateDiffers, text, fx);
        for worker in self.workers.values_mut() {
            worker.applied = None;
            worker.pending_digest = None;
            worker.nodes.clear();
        }
        self.gather(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_majority_is_more_than_half() {
        let of = |votes: &[u8]| vote(votes.iter().enumerate().map(|(i, v)| (i as u64, *v)));
        assert_eq!(of(&[]), Vote::Unanimous);
        assert_eq!(of(&[1]), Vote::Unanimous);
        assert_eq!(of(&[1, 2]), Vote::Split);
        assert_eq!(of(&[1, 1, 2, 2]), Vote::Split);
        assert_eq!(of(&[1, 2, 1]), Vote::Minority(vec![1]));
        assert_eq!(of(&[3, 1, 2, 1, 1]), Vote::Minority(vec![0, 2]));
    }
}
