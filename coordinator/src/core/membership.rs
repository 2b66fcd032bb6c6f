//! Who is here: sessions that begin and end, states that are loaded or copied, and the way from
//! nobody to a first generation.

use super::*;

/// Heartbeats in a row in which a member does nothing for the open generation. There are thirty in
/// the time after which it is stuck; counted besides the time, because this process may be stopped
/// for a while itself.
const IDLE_BEATS_MAX: u32 = 20;

impl Core {
    pub(super) fn by_session(&self, session: u64) -> Option<u64> {
        self.sessions.get(&session).copied()
    }

    pub(super) fn hello(
        &mut self,
        now: Millis,
        session: u64,
        hello: v1::Hello,
        fx: &mut Vec<Effect>,
    ) {
        let id = hello.worker_id;
        if let Some(reason) = self.refusal(&hello) {
            let text = format!("worker {id} is refused: {reason}");
            self.about(id, Reason::WorkerRefused, text, fx);
            let refused = v1::Refused { reason };
            fx.push(Effect::Send(session, down::Body::Refused(refused)));
            return;
        }
        if hello.term > self.s.term {
            // Another leads since; nothing more is said by this one, not even good-bye.
            self.phase = Phase::Over;
            fx.push(Effect::StepDown { term: hello.term });
            return;
        }
        if self.durable.data.is_none() {
            fx.push(Effect::StoreData(hello.data.clone()));
            self.durable.data = Some(hello.data.clone());
        }
        let mut holds_state = hello.has_state;
        if let Some(text) = self.merge_receipts(&hello.receipts) {
            if self.same_bits() {
                self.fail(format!("worker {id}: {text}"), fx);
                return;
            }
            // A ring's bits follow the membership, so another past is possible; not two presents.
            let text = format!("worker {id} has another past and copies the state: {text}");
            self.about(id, Reason::StateCopy, text, fx);
            holds_state = false;
        }
        self.learn_decided(&hello);
        // A checkpoint whose parts are all stored may have waited for these receipts.
        self.close_checkpoint(fx);
        let known = self.workers.get(&id).map(|w| (w.session, w.incarnation));
        if known.is_some_and(|(newer, _)| newer > session) {
            // A hello that was overtaken by a later one.
            fx.push(Effect::Close(session));
            return;
        }
        let returns = known.is_some_and(|(_, incarnation)| incarnation == hello.incarnation);
        if let Some((old_session, _)) = known {
            if !returns {
                let reason = format!("another process has taken worker id {id}");
                let refused = v1::Refused { reason };
                fx.push(Effect::Send(old_session, down::Body::Refused(refused)));
            }
            fx.push(Effect::Close(old_session));
            if !returns {
                self.lose(now, id, Loss::Replaced, fx);
            }
        }
        let before = self.workers.get(&id);
        let speed = before.map(|w| w.speed.clone()).unwrap_or_default();
        let worker = Worker {
            session,
            incarnation: hello.incarnation,
            address: hello.data_address,
            fingerprint: hello.fingerprint,
            device: hello.device.unwrap_or_default(),
            last_seen: now,
            last_said: "hello",
            beat: v1::Heartbeat::default(),
            round_trips: RoundTrips::default(),
            speed,
            waits_for: String::new(),
            applied: holds_state.then_some(hello.applied),
            applied_digest: Digest::from_bytes(&hello.applied_digest),
            pending_digest: Digest::from_bytes(&hello.pending_digest),
            nodes: hello.nodes.iter().map(|n| (*n).into()).collect(),
            copying: None,
            copies_failed: 0,
            copy_needs: 0,
            copy_after: now,
            idle: None,
            leaving: false,
        };
        self.insert_worker(id, worker);
        self.send(id, down::Body::Welcome(self.welcome()), fx);
        if returns {
            self.returned(now, id, fx);
        } else {
            let text = format!("worker {id} is here");
            self.about(id, Reason::WorkerJoined, text, fx);
        }
    }

    /// The same process in a new session: what was said in the old one may be lost, what it holds
    /// is not.
    fn returned(&mut self, now: Millis, id: u64, fx: &mut Vec<Effect>) {
        let text = format!("worker {id} is connected again");
        self.about(id, Reason::WorkerReturned, text, fx);
        self.take_back(id);
        self.forget_storing(id);
        if self.is_member(id) && matches!(self.phase, Phase::Training | Phase::Finishing) {
            self.open_generation(now, fx);
        }
    }

    fn refusal(&self, hello: &v1::Hello) -> Option<String> {
        if hello.run_id != self.s.run_id {
            return Some("it belongs to another run: configuration or root differ".into());
        }
        if let Some(reason) = self.distrust.refusal(hello) {
            return Some(reason);
        }
        if let Some(reason) = self.data_refusal(&hello.data) {
            return Some(reason);
        }
        let others = self
            .workers
            .iter()
            .filter(|(id, _)| **id != hello.worker_id);
        // All that are here have the same one.
        let mut fingerprints = others.map(|(_, w)| &w.fingerprint);
        let Some(other) = fingerprints.next().filter(|f| **f != hello.fingerprint) else {
            return self.ring_refusal(hello);
        };
        Some(format!(
            "its numeric fingerprint `{}` is not the run's `{other}`: bits would differ",
            hello.fingerprint
        ))
    }

    /// Whoever has not been heard of for too long is gone.
    pub(super) fn silence(&mut self, now: Millis, fx: &mut Vec<Effect>) {
        let limit = millis(self.timeouts().silence);
        let away = now.saturating_sub(self.last_tick);
        self.last_tick = now;
        if away > limit / 2 {
            // This process was away itself; what was said meanwhile still waits to be heard.
            for worker in self.workers.values_mut() {
                worker.last_seen += away;
            }
        }
        let quiet = |w: &Worker| now.saturating_sub(w.last_seen) > limit;
        let silent: Vec<u64> = self
            .workers
            .iter()
            .filter(|(_, w)| quiet(w))
            .map(|(id, _)| *id)
            .collect();
        for id in silent {
            let heard = self.workers.get(&id).map_or(now, |w| w.last_seen);
            self.remove(now, id, Loss::Silent(now.saturating_sub(heard)), fx);
        }
    }

    /// A member that lives but does nothing for the open generation is as good as dead; in a new
    /// session it says what it holds.
    pub(super) fn follow(
        &mut self,
        now: Millis,
        id: u64,
        beat: &v1::Heartbeat,
        fx: &mut Vec<Effect>,
    ) {
        let heard = self.phase == Phase::Training && !self.unheard();
        let member = heard && self.is_member(id);
        if beat.number > 0 {
            let number = beat.number;
            self.send(id, down::Body::Echo(v1::Echo { number }), fx);
        }
        let idle = member && (beat.generation != self.generation || beat.phase == "idle");
        let stuck = millis(self.timeouts().stuck);
        let Some(worker) = self.workers.get_mut(&id) else {
            return;
        };
        worker.round_trips.add(beat.round_trip_us);
        worker.beat.clone_from(beat);
        if !idle {
            worker.idle = None;
            return;
        }
        let (since, beats) = worker.idle.get_or_insert((now, 0));
        *beats += 1;
        if now.saturating_sub(*since) > stuck && *beats > IDLE_BEATS_MAX {
            let why = format!(
                "it is {} in generation {}, the run is in {}",
                beat.phase, beat.generation, self.generation
            );
            self.remove(now, id, Loss::Stuck(why), fx);
        }
    }

    /// Ends a worker's session from this side.
    pub(super) fn remove(&mut self, now: Millis, id: u64, why: Loss, fx: &mut Vec<Effect>) {
        if let Some(worker) = self.workers.get(&id) {
            fx.push(Effect::Close(worker.session));
            self.lose(now, id, why, fx);
        }
    }

    pub(super) fn lose(&mut self, now: Millis, id: u64, why: Loss, fx: &mut Vec<Effect>) {
        let leaving = self.workers.get(&id).is_some_and(|w| w.leaving);
        if leaving && why == Loss::Closed {
            let text = format!("worker {id} has left before its step was done");
            self.about(id, Reason::WorkerLeft, text, fx);
        } else {
            let text = format!("worker {id} is lost: {why}");
            self.about(id, why.reason(), text, fx);
            self.count_departure(id, fx);
        }
        self.forget(id, fx);
        let Ok(place) = self.members.binary_search(&id) else {
            return;
        };
        self.members.remove(place);
        match self.phase {
            Phase::Training | Phase::Finishing if self.members.is_empty() => self.gather(now),
            Phase::Training => self.open_generation(now, fx),
            _ => {}
        }
    }

    /// A worker that is gone: nothing is expected of it any more.
    pub(super) fn forget(&mut self, id: u64, fx: &mut Vec<Effect>) {
        self.remove_worker(id);
        self.take_back(id);
        self.lose_parts_of(id, fx);
    }

    /// What was asked of a worker is asked of it no more.
    pub(super) fn take_back(&mut self, id: u64) {
        self.evaluation.forget(id);
        self.exporter.take_if(|exporter| *exporter == id);
        self.held.forget(id);
        if let Phase::Loading { asked, digests, .. } = &mut self.phase {
            asked.remove(&id);
            digests.remove(&id);
        }
    }

    /// Back to the beginning: nobody who is a member is left.
    pub(super) fn gather(&mut self, now: Millis) {
        self.phase = Phase::Gathering { since: now };
        self.members.clear();
        self.nodes_now.clear();
        self.ready.clear();
        self.evidence = Evidence::default();
        self.recompute = false;
        self.troubles = Troubles::default();
        self.failures.clear();
        self.open_links = OpenLinks::default();
        self.checkpoint = None;
        for worker in self.workers.values_mut() {
            worker.copying = None;
        }
    }

    pub(super) fn advance_gathering(&mut self, since: Millis, now: Millis, fx: &mut Vec<Effect>) {
        let starters = self.starters();
        let here = starters.len();
        let expected = self.s.expected_workers.min(self.members_max());
        let late = now.saturating_sub(since) > millis(self.s.timeouts.gather);
        if here < self.s.min_workers || (here < expected && !late) {
            let wanted = expected.max(self.s.min_workers);
            self.wait_for(format!("{here} of {wanted} workers are here"), fx);
            return;
        }
        let newest = self.workers.values().filter_map(|w| w.applied).max();
        let begin = newest.or(self.durable.manifests.last().copied());
        if !self.knows_receipts(begin.unwrap_or(0), fx) {
            return;
        }
        self.wait_for(String::new(), fx);
        if let Some(step) = newest {
            // Whoever applied it proves that it was committed.
            self.committed = step;
            let mut holders = self.workers.values().filter(|w| w.applied == Some(step));
            self.committed_digest = holders.find_map(|w| w.applied_digest);
            self.open_generation(now, fx);
            return;
        }
        let newest = self.durable.manifests.last().copied();
        if newest.is_none() && !self.durable.corrupt.is_empty() {
            // Starting over silently would be worse than stopping.
            let text = format!(
                "every checkpoint of this run is corrupt (of steps {:?}); bring one back and verify it, \
                 or delete their folders to start over from the initial state",
                self.durable.corrupt
            );
            self.fail(text, fx);
            return;
        }
        let step = newest.unwrap_or(0);
        self.requests += 1;
        let request = self.requests;
        let load = v1::LoadState {
            term: self.s.term,
            step,
            manifest: newest.map(crate::stored::manifest_file).unwrap_or_default(),
            request,
        };
        self.send_all(&starters, down::Body::LoadState(load), fx);
        self.phase = Phase::Loading {
            step,
            request,
            asked: starters.into_iter().collect(),
            digests: BTreeMap::new(),
        };
        let what = if newest.is_none() {
            "the initial state".into()
        } else {
            format!("the checkpoint of step {step}")
        };
        let text = format!("loading {what} on {here} workers");
        self.notice(Reason::StateLoading, text, fx);
    }

    pub(super) fn advance_loading(&mut self, now: Millis, fx: &mut Vec<Effect>) {
        let Phase::Loading {
            step,
            asked,
            digests,
            ..
        } = &self.phase
        else {
            return;
        };
        if asked.is_empty() {
            self.gather(now);
            return;
        }
        if digests.len() < asked.len() {
            return;
        }
        let distinct: BTreeSet<Digest> = digests.values().copied().collect();
        if distinct.len() > 1 {
            let told: Vec<String> = digests.iter().map(|(w, d)| format!("{w}: {d}")).collect();
            let text = format!(
                "step {step}: workers loaded different bits ({})",
                told.join(", ")
            );
            self.fail(text, fx);
            return;
        }
        self.committed = *step;
        self.committed_digest = None;
        self.open_generation(now, fx);
    }

    pub(super) fn state_ready(
        &mut self,
        now: Millis,
        id: u64,
        ready: v1::StateReady,
        fx: &mut Vec<Effect>,
    ) {
        let digest = Digest::from_bytes(&ready.digest);
        let Some(worker) = self.workers.get_mut(&id) else {
            return;
        };
        if let Phase::Loading {
            step,
            request,
            asked,
            digests,
        } = &mut self.phase
        {
            if !asked.contains(&id) || ready.request != *request {
                return;
            }
            match digest {
                Some(digest) if ready.error.is_empty() && ready.step == *step => {
                    worker.applied = Some(ready.step);
                    digests.insert(id, digest);
                }
                _ => self.load_failed(now, id, ready, fx),
            }
            return;
        }
        self.copied(now, id, digest, ready, fx);
    }

    /// A checkpoint that one worker cannot load is given up for an older one, loudly.
    fn load_failed(&mut self, now: Millis, id: u64, ready: v1::StateReady, fx: &mut Vec<Effect>) {
        let error = format!(
            "worker {id} cannot load step {}: {}",
            ready.step, ready.error
        );
        let older = self.durable.manifests.range(..ready.step).next_back();
        if older.is_none() {
            // Starting over silently would be worse than stopping.
            self.fail(error, fx);
            return;
        }
        self.durable.manifests.remove(&ready.step);
        let text = format!("{error}; falling back to the checkpoint before it");
        self.notice(Reason::CheckpointFallback, text, fx);
        self.gather(now);
    }
}
