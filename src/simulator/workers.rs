//! The workers' shells in the simulation: processes, devices, states.

use belfry_proto::v1::{self, coordinator_message as down, worker_message as up};
use belfry_proto::{Digest, objective};
use belfry_worker::core as work;

use super::arithmetic::{
    State, digest, features, first_choice, gradient, lane_digest, seen, shard_read, state_digest,
    updated,
};
use super::counts::Request;
use super::invariants::{FENCED, NOBODY_EXITS, STATE_OF_STEP, hold};
use super::setup::{Setup, Span, millis};
use super::world::{Happening, World};

/// An id for device links takes so long.
const ID_MADE: Span = Span::new(0, 300);
/// The digest of a gradient or of a state takes so long.
const HASHED: Span = Span::new(1, 20);
/// A worker that is asked to leave is gone after so long at the latest.
const LEAVES_WITHIN_MS: u64 = 3_000;

/// Every other worker has a device that tells its losses only when it is waited for.
pub(super) fn is_apart(worker: usize) -> bool {
    worker % 2 == 1
}

pub(super) fn address(worker: usize, life: u64) -> String {
    format!("{worker}:{life}")
}

/// Worker and life of an address; nobody's for another's.
pub(super) fn parse_address(address: &str) -> (usize, u64) {
    let parts = address.split_once(':');
    let parsed = parts.and_then(|(w, l)| Some((w.parse().ok()?, l.parse().ok()?)));
    parsed.unwrap_or((0, 0))
}

/// What of a lane is computed.
enum Of {
    Features,
    /// From what it sees of all lanes' features.
    Gradient(u64),
}

/// Two devices to a host; now and then one without links.
fn device(worker: usize, life: u64, setup: &Setup) -> v1::Device {
    let lacks = setup.lacks_links && (worker as u64 + life).is_multiple_of(3);
    v1::Device {
        host: (worker / 2).to_string(),
        unit: worker.to_string(),
        links_missing: if lacks { "no library" } else { "" }.into(),
    }
}

/// Of a lane that read this shard at this step.
pub(super) fn lane_report(step: u64, lane: u32, shard: u32) -> v1::LaneReport {
    v1::LaneReport {
        lane,
        pairs: 1,
        objectives: vec![objective::sum_of("mlm", f64::from(lane) * 0.1)],
        pairs_digest: lane_digest(lane, shard).to_bytes(),
        substituted: u64::from(shard != first_choice(step, lane)),
    }
}

impl World {
    pub(super) fn start_worker(&mut self, worker: usize) {
        if self.workers[worker].core.is_some() {
            return;
        }
        let w = &mut self.workers[worker];
        w.life += 1;
        w.state = None;
        w.session = None;
        w.paused_until = 0;
        w.dies_after = None;
        w.outcome_late = 0;
        w.leaving = false;
        w.device_free_at = self.now;
        let life = w.life;
        let device = device(worker, life, &self.setup);
        let core = work::Core::new(work::Identity {
            run_id: "run".into(),
            worker_id: worker as u64,
            incarnation: life,
            fingerprint: "simulated".into(),
            data_address: address(worker, life),
            lanes: self.setup.lanes,
            gathers: self.setup.gathers,
            device,
            data: Vec::new(),
        });
        self.workers[worker].core = Some(match self.setup.planted.worker {
            Some(bug) => core.planted(bug),
            None => core,
        });
        self.after(1, Happening::Connect(worker, life));
        self.after(1, Happening::Heartbeat(worker, life));
    }

    pub(super) fn kill_worker(&mut self, worker: usize) -> bool {
        if self.workers[worker].core.is_none() {
            return false;
        }
        self.workers[worker].core = None;
        self.workers[worker].state = None;
        self.leave_exchanges(worker);
        self.end_session(worker);
        let delay = self.draw(self.costs.worker_restart);
        self.after(delay, Happening::StartWorker(worker));
        true
    }

    /// SIGTERM: it drains and ends; a restart follows.
    pub(super) fn terminate(&mut self, worker: usize) -> bool {
        let life = self.workers[worker].life;
        if !self.alive(worker, life) {
            return false;
        }
        self.workers[worker].leaving = true;
        self.tell_worker(worker, work::Event::Shutdown);
        let goodbye = down::Body::Finished(v1::Finished {
            success: true,
            reason: "left".into(),
        });
        let event = work::Event::Message(goodbye);
        self.after(LEAVES_WITHIN_MS, Happening::Worker(worker, life, event));
        true
    }

    pub(super) fn heartbeat(&mut self, worker: usize, life: u64) {
        if !self.alive(worker, life) {
            return;
        }
        self.beat(worker);
        let pause = millis(self.setup.timeouts.heartbeat) * self.costs.heartbeats_apart;
        self.after(pause, Happening::Heartbeat(worker, life));
    }

    pub(super) fn beat(&mut self, worker: usize) {
        if let Some(core) = self.workers[worker].core.as_mut() {
            let beat = up::Body::Heartbeat(core.heartbeat());
            self.send_up(worker, beat);
        }
    }

    /// A word of a coordinator; one of a lower term than the worker has heard of does nothing.
    pub(super) fn hear(&mut self, worker: usize, body: down::Body) {
        let stale = self.is_stale(worker, &body);
        let Some(core) = self.workers[worker].core.as_mut() else {
            return;
        };
        let before = stale.then(|| format!("{core:?}"));
        let effects = core.apply(work::Event::Message(body));
        if let Some(before) = before {
            // One that waits for an update to be applied is refused then.
            let same = *before == format!("{core:?}") || before.contains("phase: Applying");
            hold(effects.is_empty() && same, FENCED, || {
                format!("worker {worker} did {effects:?}")
            });
        }
        self.work_all(worker, effects);
    }

    pub(super) fn tell_worker(&mut self, worker: usize, event: work::Event) {
        if let Some(core) = self.workers[worker].core.as_mut() {
            let effects = core.apply(event);
            self.work_all(worker, effects);
        }
    }

    fn work_all(&mut self, worker: usize, effects: Vec<work::Effect>) {
        let life = self.workers[worker].life;
        for effect in effects {
            if !self.alive(worker, life) {
                return;
            }
            self.work(worker, effect);
            if let Some(left) = self.workers[worker].dies_after.as_mut() {
                if *left == 0 {
                    self.say(|| format!("worker {worker} dies between two effects"));
                    self.kill_worker(worker);
                    return;
                }
                *left -= 1;
            }
        }
    }

    fn held(&self, worker: usize, step: u64) -> State {
        let state = self.workers[worker].state;
        let held = state.is_some_and(|s| s.step == step);
        hold(held, STATE_OF_STEP, || {
            format!("worker {worker} was asked for step {step}, it holds {state:?}")
        });
        state.unwrap_or(State { step, value: 0 })
    }

    fn work(&mut self, worker: usize, effect: work::Effect) {
        use work::Effect as E;
        let life = self.workers[worker].life;
        match effect {
            E::Send(body) => {
                if let up::Body::Ready(ready) = &body {
                    self.saw_ready(worker, ready);
                }
                self.send_up(worker, body);
            }
            E::Reconnect => {
                self.end_session(worker);
            }
            E::Compute {
                step,
                lane,
                quarantine,
                features,
            } => {
                let shard = shard_read(step, lane, &quarantine);
                let seen = seen(features.iter().flat_map(|all| all.values()));
                self.compute(worker, (step, lane, shard), Of::Gradient(seen));
            }
            E::ComputeFeatures {
                step,
                lane,
                quarantine,
            } => {
                let shard = shard_read(step, lane, &quarantine);
                self.compute(worker, (step, lane, shard), Of::Features);
            }
            E::Gather(gathering) => self.join_gathering(worker, gathering),
            E::DigestLane {
                attempt,
                gradient,
                seconds,
            } => {
                self.counts.audits += u64::from(attempt.number > 0);
                let gradient = gradient
                    .read()
                    .expect("simulated gradients are on the host");
                let event = work::Event::LaneDigest {
                    attempt,
                    digest: Ok(digest(&gradient)),
                    seconds,
                };
                let delay = self.draw(HASHED);
                self.after(delay, Happening::Worker(worker, life, event));
            }
            E::DigestState { step } => {
                let event = work::Event::StateDigest {
                    step,
                    digest: Some(state_digest(self.held(worker, step))),
                    seconds: 0.001,
                };
                let delay = self.draw(HASHED);
                self.after(delay, Happening::Worker(worker, life, event));
            }
            E::Prefetch { .. } | E::Stage { .. } | E::Unstage | E::Measured { .. } => {}
            E::MakeId { generation } => self.make_id(worker, generation),
            E::Reduce(exchange) => self.join(worker, exchange),
            E::AbortReduce => self.leave_exchanges(worker),
            E::Apply {
                step,
                sum,
                snapshot_parts,
                skip: _,
            } => {
                let state = updated(self.held(worker, step), &sum);
                self.hold_state(worker, state);
                for part in snapshot_parts {
                    self.upload(worker, life, state, part);
                }
                let delay = self.draw(self.costs.apply);
                let event = work::Event::Applied { step };
                self.after(delay, Happening::Worker(worker, life, event));
            }
            E::Load { step, manifest } => {
                let there = self.store.manifests.contains(&step);
                hold(there != manifest.is_empty(), STATE_OF_STEP, || {
                    format!("worker {worker} is to load `{manifest}` for step {step}")
                });
                self.acquire(worker, step, None);
            }
            E::Copy { step, sources } => self.acquire(worker, step, Some(sources)),
            E::StoreParts { step, parts } => {
                let state = self.held(worker, step);
                for part in parts {
                    self.upload(worker, life, state, part);
                }
            }
            E::Evaluate(ask) => {
                let v1::Evaluate {
                    step,
                    shares,
                    share,
                } = ask;
                let _ = self.held(worker, step);
                let told = match share {
                    Some(share) => up::Body::ShareEvaluated(v1::ShareEvaluated {
                        step,
                        shares,
                        share,
                        error: String::new(),
                    }),
                    None => up::Body::Evaluated(v1::Evaluated {
                        step,
                        ..Default::default()
                    }),
                };
                self.report_later(worker, told);
            }
            E::Export { step } => {
                let exported = v1::Exported {
                    step,
                    parameters_sha256: self.held(worker, step).value.to_string(),
                    ..Default::default()
                };
                self.report_later(worker, up::Body::Exported(exported));
            }
            E::Exit { success, reason } => {
                // Told that the run ended for a lost shard, by a coordinator that died saying so.
                let told = reason.contains("restore");
                hold(success || told, NOBODY_EXITS, || {
                    format!("worker {worker} gave up: {reason}")
                });
                self.kill_worker(worker);
            }
        }
    }

    fn compute(&mut self, worker: usize, (step, lane, shard): (u64, u32, u32), of: Of) {
        let state = self.held(worker, step);
        let life = self.workers[worker].life;
        let (factor, until) = self.workers[worker].slow;
        let factor = if until > self.now { factor } else { 1 };
        let cost = self.draw(self.costs.lane) * factor;
        let done = self.workers[worker].device_free_at.max(self.now) + cost;
        self.workers[worker].device_free_at = done;
        let wait = done - self.now;
        if self.is_lost(worker, shard) {
            let event = work::Event::Unreadable {
                step,
                lane,
                shards: vec![v1::Shard {
                    shard,
                    file: format!("{shard}.tar"),
                    ..Default::default()
                }],
                detail: "simulated".into(),
            };
            self.after(wait, Happening::Worker(worker, life, event));
            return;
        }
        let seconds = cost as f64 / 1000.0;
        let Of::Gradient(seen) = of else {
            self.counts.features += 1;
            let event = work::Event::FeaturesDone {
                step,
                lane,
                features: features(state, lane, shard),
                seconds,
            };
            self.after(wait, Happening::Worker(worker, life, event));
            return;
        };
        self.counts.lanes += 1;
        self.workers[worker].shards_read.insert(lane, shard);
        let report = match is_apart(worker) {
            true => v1::LaneReport {
                lane,
                ..Default::default()
            },
            false => lane_report(step, lane, shard),
        };
        let event = work::Event::LaneDone {
            step,
            report,
            gradient: gradient(state, lane, shard, seen).into(),
            seconds,
        };
        self.after(wait, Happening::Worker(worker, life, event));
    }

    fn hold_state(&mut self, worker: usize, state: State) {
        let expected = self.reference.state(state.step);
        hold(state == expected, STATE_OF_STEP, || {
            format!("worker {worker} holds {state:?}, not {expected:?}")
        });
        self.workers[worker].state = Some(state);
    }

    pub(super) fn report(&mut self, worker: usize, body: up::Body) {
        let life = self.workers[worker].life;
        let event = work::Event::Report(body);
        self.after(0, Happening::Worker(worker, life, event));
    }

    fn report_later(&mut self, worker: usize, body: up::Body) {
        let life = self.workers[worker].life;
        let delay = self.draw(self.costs.evaluate);
        let event = work::Event::Report(body);
        self.after(delay, Happening::Worker(worker, life, event));
    }

    fn acquire(&mut self, worker: usize, step: u64, sources: Option<Vec<String>>) {
        self.leave_exchanges(worker);
        let way = self.draw(Span::new(5, 150));
        let time = match &sources {
            Some(_) => {
                self.counts.copy_bytes += self.costs.state_bytes;
                self.costs.copy_ms() * self.network.slowness(self.now, worker)
            }
            None if step == 0 => 0,
            None => {
                let parts = u64::from(self.setup.parts);
                self.counts.request(Request::PartGet, parts);
                self.costs.load_ms()
            }
        };
        let w = &mut self.workers[worker];
        w.state = None;
        w.acquisition += 1;
        let (life, acquisition) = (w.life, w.acquisition);
        self.after(
            way + time,
            Happening::Arrived(worker, life, acquisition, step, sources),
        );
    }

    pub(super) fn arrive(&mut self, worker: usize, step: u64, sources: Option<Vec<String>>) {
        let own = super::Process::Worker(worker);
        let gives = |address: &String| {
            let (peer, life) = parse_address(address);
            let there = self.alive(peer, life) && self.workers[peer].paused_until <= self.now;
            let holds = self.workers[peer].state.is_some_and(|s| s.step == step);
            let parted = self
                .network
                .parted(self.now, own, super::Process::Worker(peer));
            there && holds && !parted
        };
        let found = match &sources {
            Some(sources) => sources.iter().any(gives),
            None => step == 0 || self.store.answers(self.now),
        };
        if !found {
            if sources.is_none() {
                // The store is away: the load goes on when it is back.
                let (life, acquisition) =
                    (self.workers[worker].life, self.workers[worker].acquisition);
                let wait = Happening::Arrived(worker, life, acquisition, step, None);
                self.after(500, wait);
                return;
            }
            let error = "no source left".to_owned();
            let copied = work::Copied::default();
            let failed = work::Event::StateFailed {
                step,
                error,
                copied,
            };
            self.tell_worker(worker, failed);
            return;
        }
        let state = self.reference.state(step);
        self.workers[worker].state = Some(state);
        let digest: Digest = state_digest(state);
        let copied = work::Copied::default();
        let arrived = work::Event::StateArrived {
            step,
            digest,
            copied,
        };
        self.tell_worker(worker, arrived);
    }

    /// Ids take their time, fail, or are lost with the process that makes them.
    fn make_id(&mut self, worker: usize, generation: u64) {
        let life = self.workers[worker].life;
        let id = match self.below(40) {
            0 => return,
            1 => Err("the library failed".to_owned()),
            _ => Ok(format!("{generation} of {}", address(worker, life)).into_bytes()),
        };
        let delay = self.draw(ID_MADE);
        let event = work::Event::IdMade { generation, id };
        self.after(delay, Happening::Worker(worker, life, event));
    }
}
