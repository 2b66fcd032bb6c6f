//! The workers' shells in the simulation: sessions, devices, states, and the exchange between them.

use std::collections::BTreeMap;

use belfry_proto::Digest;
use belfry_proto::lanes::root;
use belfry_proto::v1::{self, worker_message as up};
use belfry_worker::core as work;

use super::arithmetic::{
    State, digest, first_choice, gradient, part_hash, shard_read, state_digest, tree_sum, updated,
};
use super::world::{Exchange, ExchangeLinks, Happening, Session, Sizes, Worker, World, address};

/// Longest that a member waits for a peer that lives but does not begin.
const START_TIMEOUT_MS: u64 = 30_000;

/// Every other worker has a device that tells its losses only when it is waited for.
fn is_apart(worker: usize) -> bool {
    worker % 2 == 1
}

/// Two devices to a host; now and then one without links.
fn device(worker: usize, life: u64, sizes: Sizes) -> v1::Device {
    let lacks = sizes.lacks_links && (worker as u64 + life).is_multiple_of(3);
    v1::Device {
        host: (worker / 2).to_string(),
        unit: worker.to_string(),
        links_missing: if lacks { "no library" } else { "" }.into(),
    }
}

/// All members of an exchange are linked alike, each group under one id of this generation.
fn check_links(seen: &mut Option<ExchangeLinks>, request: &work::Exchange) {
    let groups = request.links.as_ref().map(|l| l.groups.clone());
    let seen = seen.get_or_insert_with(|| ExchangeLinks {
        groups: groups.clone(),
        ids: BTreeMap::new(),
    });
    assert_eq!(seen.groups, groups, "members agree on their links");
    let Some(links) = &request.links else { return };
    let own = links.groups.iter().find(|g| g.contains(&request.rank));
    let own = own.expect("a member is in a group");
    let id = seen.ids.entry(own[0]).or_insert_with(|| links.id.clone());
    assert_eq!(*id, links.id, "a group shares its id");
    if own.len() == 1 && links.groups.len() > 1 {
        assert!(id.is_empty(), "alone on its host");
    } else {
        let made = String::from_utf8(id.clone()).expect("made here");
        let leader = &request.members[own[0]].0;
        assert_eq!(made, format!("{} of {leader}", request.generation));
    }
}

/// Of a lane that read this shard at this step.
fn lane_report(step: u64, lane: u32, shard: u32) -> v1::LaneReport {
    v1::LaneReport {
        lane,
        pairs: 1,
        mlm_loss: f64::from(lane) * 0.1,
        pairs_digest: Digest(u128::from(lane) << 32 | u128::from(shard)).to_bytes(),
        substituted: u64::from(shard != first_choice(step, lane)),
        ..Default::default()
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
        w.device_free_at = self.now;
        let life = w.life;
        let device = device(worker, life, self.sizes);
        w.core = Some(work::Core::new(work::Identity {
            run_id: "run".into(),
            worker_id: worker as u64,
            incarnation: life,
            fingerprint: "simulated".into(),
            data_address: address(worker, life),
            lanes: self.sizes.lanes,
            device,
            data: Vec::new(),
        }));
        self.after(1, Happening::Connect(worker, life));
        self.after(1, Happening::Heartbeat(worker, life));
    }

    pub(super) fn connect(&mut self, worker: usize, life: u64) {
        if !self.alive(worker, life) || self.workers[worker].session.is_some() {
            return;
        }
        if self.coordinator.is_none() || self.coordinator_paused_until > self.now {
            let delay = 50 + self.below(950);
            self.after(delay, Happening::Connect(worker, life));
            return;
        }
        let number = self.sessions.len() as u64 + 1;
        let session = Session {
            worker,
            life,
            coordinator_life: self.coordinator_life,
            up_at: self.now,
            down_at: self.now,
            open: true,
        };
        self.sessions.insert(number, session);
        self.workers[worker].session = Some(number);
        self.tell_worker(worker, work::Event::LinkUp);
    }

    /// The worker's side of its session ends; the coordinator hears of it when it hears of it.
    pub(super) fn end_session(&mut self, worker: usize) {
        let Some(number) = self.workers[worker].session.take() else {
            return;
        };
        let delay = self.below(60);
        let session = self.sessions.get_mut(&number).expect("is known");
        let delay = (session.up_at + 1).max(self.now + delay) - self.now;
        let life = session.life;
        self.after(delay, Happening::Gone(number));
        if self.alive(worker, life) {
            self.tell_worker(worker, work::Event::LinkDown);
            let delay = 50 + self.below(200);
            self.after(delay, Happening::Connect(worker, life));
        }
    }

    pub(super) fn send_up(&mut self, worker: usize, body: up::Body) {
        let delay = 1 + self.below(20);
        let Some(number) = self.workers[worker].session else {
            return;
        };
        let session = self.sessions.get_mut(&number).expect("is known");
        session.up_at = (session.up_at + 1).max(self.now + delay);
        let delay = session.up_at - self.now;
        self.after(delay, Happening::Up(number, body));
    }

    pub(super) fn tell_worker(&mut self, worker: usize, event: work::Event) {
        let Some(core) = &mut self.workers[worker].core else {
            return;
        };
        for effect in core.apply(event) {
            let last = matches!(effect, work::Effect::Exit { .. });
            self.work(worker, effect);
            if last {
                break;
            }
        }
    }

    pub(super) fn held(&self, worker: usize, step: u64) -> State {
        let state = self.workers[worker].state;
        let state = state.filter(|s| s.step == step);
        state.unwrap_or_else(|| panic!("worker {worker} was asked for step {step}, which is gone"))
    }

    pub(super) fn work(&mut self, worker: usize, effect: work::Effect) {
        use work::Effect as E;
        let life = self.workers[worker].life;
        match effect {
            E::Send(body) => self.send_up(worker, body),
            E::Reconnect => self.end_session(worker),
            E::Compute {
                step,
                lane,
                quarantine,
            } => {
                let state = self.held(worker, step);
                let shard = shard_read(step, lane, &quarantine);
                let cost = 5 + self.below(20);
                let done = self.workers[worker].device_free_at.max(self.now) + cost;
                self.workers[worker].device_free_at = done;
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
                    self.after(done - self.now, Happening::Worker(worker, life, event));
                    return;
                }
                self.lanes_computed += 1;
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
                    gradient: gradient(state, lane, shard).into(),
                    seconds: cost as f64 / 1000.0,
                };
                self.after(done - self.now, Happening::Worker(worker, life, event));
            }
            E::DigestLane {
                attempt,
                gradient,
                seconds,
            } => {
                let gradient = gradient
                    .read()
                    .expect("simulated gradients are on the host");
                let event = work::Event::LaneDigest {
                    attempt,
                    digest: Ok(digest(&gradient)),
                    seconds,
                };
                let delay = 1 + self.below(5);
                self.after(delay, Happening::Worker(worker, life, event));
            }
            E::DigestState { step } => {
                let event = work::Event::StateDigest {
                    step,
                    digest: Some(state_digest(self.held(worker, step))),
                    seconds: 0.001,
                };
                let delay = 1 + self.below(20);
                self.after(delay, Happening::Worker(worker, life, event));
            }
            E::Prefetch { .. } | E::Stage { .. } | E::Unstage | E::Measured { .. } => {}
            E::MakeId { generation } => self.make_id(worker, generation),
            E::Reduce(exchange) => self.join(worker, exchange),
            E::AbortReduce => self.leave_exchanges(worker, Vec::new()),
            E::Apply {
                step,
                sum,
                snapshot_parts,
            } => {
                let state = updated(self.held(worker, step), &sum);
                let expected = self.reference[step as usize + 1].0;
                assert_eq!(
                    state, expected,
                    "the state after step {step} on worker {worker}"
                );
                self.workers[worker].state = Some(state);
                self.store_parts(worker, state, &snapshot_parts);
                let event = work::Event::Applied { step };
                let delay = self.below(10);
                self.after(delay, Happening::Worker(worker, life, event));
            }
            E::Load { step, manifest } => {
                let there = self.durable.manifests.contains(&step);
                assert_eq!(there, !manifest.is_empty(), "a manifest that stands");
                self.acquire(worker, step, None);
            }
            E::Copy { step, sources } => self.acquire(worker, step, Some(sources)),
            E::StoreParts { step, parts } => {
                let state = self.held(worker, step);
                self.store_parts(worker, state, &parts);
            }
            E::Evaluate { step } => {
                let _ = self.held(worker, step);
                let evaluated = v1::Evaluated {
                    step,
                    ..Default::default()
                };
                self.report(worker, up::Body::Evaluated(evaluated));
            }
            E::Export { step } => {
                let state = self.held(worker, step);
                let exported = v1::Exported {
                    step,
                    parameters_sha256: state.value.to_string(),
                    ..Default::default()
                };
                self.report(worker, up::Body::Exported(exported));
            }
            E::Exit { success, reason } => {
                assert!(success, "worker {worker} gave up: {reason}");
                self.kill_worker(worker);
            }
        }
    }

    pub(super) fn report(&mut self, worker: usize, body: up::Body) {
        let life = self.workers[worker].life;
        let delay = 5 + self.below(100);
        self.after(
            delay,
            Happening::Worker(worker, life, work::Event::Report(body)),
        );
    }

    pub(super) fn store_parts(&mut self, worker: usize, state: State, parts: &[u32]) {
        for part in parts {
            let stored = v1::PartStored {
                step: state.step,
                part: *part,
                sha256: part_hash(state, *part),
                ..Default::default()
            };
            self.report(worker, up::Body::PartStored(stored));
        }
    }

    pub(super) fn acquire(&mut self, worker: usize, step: u64, sources: Option<Vec<String>>) {
        self.leave_exchanges(worker, Vec::new());
        let w = &mut self.workers[worker];
        w.state = None;
        w.acquisition += 1;
        let (life, acquisition) = (w.life, w.acquisition);
        let delay = 5 + self.below(150);
        self.after(
            delay,
            Happening::Arrived(worker, life, acquisition, step, sources),
        );
    }

    pub(super) fn arrive(&mut self, worker: usize, step: u64, sources: Option<Vec<String>>) {
        let source = |address: &String| {
            self.workers.iter().enumerate().any(|(i, w)| {
                let reachable = w.core.is_some() && w.paused_until <= self.now;
                let holds = w.state.is_some_and(|s| s.step == step);
                reachable && holds && *address == self::address(i, w.life)
            })
        };
        if sources.is_some_and(|sources| !sources.iter().any(source)) {
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
        let state = self.reference[step as usize].0;
        self.workers[worker].state = Some(state);
        let digest = state_digest(state);
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
        let delay = self.below(300);
        let event = work::Event::IdMade { generation, id };
        self.after(delay, Happening::Worker(worker, life, event));
    }

    pub(super) fn join(&mut self, worker: usize, request: work::Exchange) {
        self.leave_exchanges(worker, Vec::new());
        let id = (request.generation, request.step);
        let life = self.workers[worker].life;
        let first = !self.exchanges.contains_key(&id);
        let exchange = self.exchanges.entry(id).or_default();
        if exchange.members.is_empty() {
            exchange.members.clone_from(&request.members);
        }
        assert_eq!(exchange.members, request.members, "members agree");
        check_links(&mut exchange.links, &request);
        exchange.joined.insert(request.rank, (worker, life));
        for (node, sum) in request.partials {
            let sum = sum.read().expect("simulated gradients are on the host");
            exchange.parts.insert(node, sum);
        }
        let dead: Vec<u32> = (0..exchange.members.len())
            .filter(|rank| {
                let address = &exchange.members[*rank].0;
                let there = |(i, w): (usize, &Worker)| {
                    w.core.is_some() && *address == self::address(i, w.life)
                };
                !self.workers.iter().enumerate().any(there)
            })
            .map(|rank| rank as u32)
            .collect();
        if exchange.failed || !dead.is_empty() {
            exchange.failed = true;
            self.fail_exchange(id, dead);
            return;
        }
        if exchange.joined.len() == exchange.members.len() {
            let sum = tree_sum(root(self.sizes.lanes), &exchange.parts).expect("nodes tile");
            let joined: Vec<(usize, (usize, u64))> =
                exchange.joined.iter().map(|(r, w)| (*r, *w)).collect();
            let members = exchange.members.clone();
            let parts = exchange.parts.clone();
            for (rank, (worker, life)) in joined {
                let shards_read = &self.workers[worker].shards_read;
                let lanes = members[rank].1.iter().flat_map(|n| n.start..n.end);
                let late = match is_apart(worker) {
                    true => work::LateReports {
                        reports: lanes
                            .map(|lane| lane_report(id.1, lane, shards_read[&lane]))
                            .collect(),
                        seconds: 0.01,
                    },
                    false => work::LateReports::default(),
                };
                let own = members[rank].1.iter();
                let digests = work::Digests {
                    nodes: own.map(|n| (*n, digest(&parts[n]).0 as u64)).collect(),
                    sum_parts: Vec::new(),
                    state: Some(state_digest(self.held(worker, id.1))),
                };
                let event = work::Event::Reduced {
                    generation: id.0,
                    step: id.1,
                    digest: digest(&sum),
                    sum: sum.clone(),
                    finite: true,
                    late,
                    digests,
                };
                let delay = 1 + self.below(40);
                self.after(delay, Happening::Worker(worker, life, event));
            }
            self.exchanges.remove(&id);
        } else if first {
            self.after(START_TIMEOUT_MS, Happening::StartTimeout(id.0, id.1));
        }
    }

    /// Everybody in an exchange hears that it failed.
    pub(super) fn fail_exchange(&mut self, id: (u64, u64), ranks: Vec<u32>) {
        let Some(exchange) = self.exchanges.get_mut(&id) else {
            return;
        };
        exchange.failed = true;
        let joined: Vec<(usize, u64)> =
            std::mem::take(&mut exchange.joined).into_values().collect();
        for (worker, life) in joined {
            let event = work::Event::ReduceFailed {
                generation: id.0,
                step: id.1,
                ranks: ranks.clone(),
                detail: "broken".into(),
            };
            let delay = 1 + self.below(40);
            self.after(delay, Happening::Worker(worker, life, event));
        }
    }

    /// Leaves what `worker` had joined; the others hear of it.
    pub(super) fn leave_exchanges(&mut self, worker: usize, ranks: Vec<u32>) {
        let mine = |e: &Exchange| e.joined.values().any(|(w, _)| *w == worker);
        let ids: Vec<(u64, u64)> = self
            .exchanges
            .iter()
            .filter(|(_, e)| mine(e))
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            let exchange = self.exchanges.get_mut(&id).expect("was found");
            exchange.joined.retain(|_, (w, _)| *w != worker);
            self.fail_exchange(id, ranks.clone());
        }
    }
}
