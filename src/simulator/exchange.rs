//! The exchange between workers: one for each generation and step, begun when its first member
//! joins. What can fail in it fails as the collective tells it: a dead peer is named at once, a
//! silent one after the silence, and whoever only gave up is not blamed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use belfry_proto::LaneRange;
use belfry_proto::lanes::root;
use belfry_worker::core as work;

use super::arithmetic::{digest, state_digest, tree_sum};
use super::faults::Process;
use super::invariants::{LANES_ONCE, MEMBERS_AGREE, hold};
use super::setup::{Span, millis};
use super::workers::{is_apart, lane_report, parse_address};
use super::world::{Happening, World};

/// Generation and step of an exchange, and what it is for.
pub(super) type Id = (u64, u64, Purpose);

/// What members exchange: one after the other in each step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Purpose {
    /// Every lane's features to everybody.
    Gather,
    /// The sum of gradients.
    Sum,
}

/// Until one member knows of what happened to all.
const NOTICED: Span = Span::new(1, 40);

/// An exchange that somebody waits in.
#[derive(Default)]
pub(super) struct Exchange {
    members: Vec<(String, Vec<LaneRange>)>,
    /// Worker and life of each rank.
    processes: Vec<(usize, u64)>,
    joined: BTreeSet<usize>,
    parts: BTreeMap<LaneRange, Arc<Vec<f32>>>,
    features: work::Features,
    failed: bool,
    links: Option<ExchangeLinks>,
}

/// What the first member of an exchange said of its links.
struct ExchangeLinks {
    groups: Option<Vec<Vec<usize>>>,
    /// By a group's first rank.
    ids: BTreeMap<usize, Vec<u8>>,
}

/// All members of an exchange are linked alike, each group under one id of this generation.
fn check_links(seen: &mut Option<ExchangeLinks>, request: &work::Exchange) {
    let groups = request.links.as_ref().map(|l| l.groups.clone());
    let seen = seen.get_or_insert_with(|| ExchangeLinks {
        groups: groups.clone(),
        ids: BTreeMap::new(),
    });
    hold(seen.groups == groups, MEMBERS_AGREE, || {
        "on their links".into()
    });
    let Some(links) = &request.links else { return };
    let own = links.groups.iter().find(|g| g.contains(&request.rank));
    let own = own.expect("a member is in a group");
    let id = seen.ids.entry(own[0]).or_insert_with(|| links.id.clone());
    hold(*id == links.id, MEMBERS_AGREE, || {
        "a group shares its id".into()
    });
    if own.len() == 1 && links.groups.len() > 1 {
        assert!(id.is_empty(), "alone on its host");
    } else {
        let made = String::from_utf8(id.clone()).expect("made here");
        let leader = &request.members[own[0]].0;
        let expected = format!("{} of {leader}", request.generation);
        hold(made == expected, MEMBERS_AGREE, || {
            format!("{made}, not {expected}")
        });
    }
}

impl World {
    pub(super) fn join(&mut self, worker: usize, request: work::Exchange) {
        let id = (request.generation, request.step, Purpose::Sum);
        let exchange = self.enter(worker, id, &request.members);
        check_links(&mut exchange.links, &request);
        exchange.joined.insert(request.rank);
        for (node, sum) in request.partials {
            let sum = sum.read().expect("simulated gradients are on the host");
            exchange.parts.insert(node, sum);
        }
        let moved = self.costs.exchange_ms(request.members.len());
        self.joined(id, moved);
    }

    pub(super) fn join_gathering(&mut self, worker: usize, request: work::Gathering) {
        let id = (request.generation, request.step, Purpose::Gather);
        let exchange = self.enter(worker, id, &request.members);
        exchange.joined.insert(request.rank);
        for (lane, features) in request.features {
            let known = exchange.features.insert(lane, features.clone());
            let same = known.is_none_or(|known| known == features);
            hold(same, MEMBERS_AGREE, || {
                format!("on the features of lane {lane}")
            });
        }
        self.joined(id, 1);
    }

    /// The exchange that a worker joins; it begins with its first member.
    fn enter(
        &mut self,
        worker: usize,
        id: Id,
        members: &[(String, Vec<LaneRange>)],
    ) -> &mut Exchange {
        self.leave_exchanges(worker);
        let silence = millis(self.setup.timeouts.start);
        let first = !self.exchanges.contains_key(&id);
        if first {
            // Whoever never comes is waited for so long, and no longer.
            self.after(silence, Happening::ExchangeSilent(id));
        }
        let exchange = self.exchanges.entry(id).or_default();
        if first {
            exchange.members = members.to_vec();
            exchange.processes = members.iter().map(|(a, _)| parse_address(a)).collect();
        }
        hold(exchange.members == members, MEMBERS_AGREE, || {
            format!("on generation {} and step {}", id.0, id.1)
        });
        exchange
    }

    /// A member has joined: all are there, some never will be, or others are waited for.
    fn joined(&mut self, id: Id, moved: u64) {
        let exchange = &self.exchanges[&id];
        let all = exchange.joined.len() == exchange.members.len();
        let failed = exchange.failed;
        let dead = self.dead_ranks(id);
        if failed || !dead.is_empty() {
            self.fail_exchange(id, &|_| dead.clone(), false);
        } else if all {
            let moved = moved * self.slowest(id);
            let way = self.draw(self.costs.network);
            self.after(moved + way, Happening::ExchangeDue(id));
        }
    }

    fn dead_ranks(&self, id: Id) -> Vec<u32> {
        let processes = self.exchanges[&id].processes.iter().enumerate();
        let dead = processes.filter(|(_, (worker, life))| !self.alive(*worker, *life));
        dead.map(|(rank, _)| rank as u32).collect()
    }

    /// How many times slower the slowest member's link is.
    fn slowest(&self, id: Id) -> u64 {
        let workers = self.exchanges[&id]
            .processes
            .iter()
            .map(|(worker, _)| *worker);
        let slow = workers.map(|w| self.network.slowness(self.now, w));
        slow.max().unwrap_or(1)
    }

    /// Peers that this rank does not hear of: they are frozen, or their link is cut.
    fn unheard(&self, id: Id, rank: usize) -> Vec<u32> {
        let processes = &self.exchanges[&id].processes;
        let own = Process::Worker(processes[rank].0);
        let peers = processes.iter().enumerate().filter(|(peer, (worker, _))| {
            let frozen = self.workers[*worker].paused_until > self.now;
            let parted = self.network.parted(self.now, own, Process::Worker(*worker));
            *peer != rank && (frozen || parted)
        });
        peers.map(|(peer, _)| peer as u32).collect()
    }

    fn is_obstructed(&self, id: Id) -> bool {
        let ranks = 0..self.exchanges[&id].processes.len();
        let away = |w: usize| self.workers[w].paused_until > self.now;
        let frozen = self.exchanges[&id].processes.iter().any(|(w, _)| away(*w));
        frozen
            || (self.network.is_cut(self.now)
                && ranks
                    .into_iter()
                    .any(|rank| !self.unheard(id, rank).is_empty()))
    }

    /// All have begun and everything has been sent, unless something does not pass.
    pub(super) fn exchange_due(&mut self, id: Id) {
        let Some(exchange) = self.exchanges.get(&id).filter(|e| !e.failed) else {
            return;
        };
        if exchange.joined.len() < exchange.members.len() {
            return;
        }
        if self.is_obstructed(id) {
            let silence = self.setup.silence_ms();
            self.after(silence, Happening::ExchangeSilent(id));
            return;
        }
        for rank in 0..self.exchanges[&id].members.len() {
            self.complete(id, rank);
        }
        self.exchanges.remove(&id);
    }

    /// Somebody was not heard of for too long, or never came.
    pub(super) fn exchange_silent(&mut self, id: Id) {
        let Some(exchange) = self.exchanges.get(&id).filter(|e| !e.failed) else {
            return;
        };
        let all = exchange.joined.len() == exchange.members.len();
        let absent: Vec<u32> = (0..exchange.members.len())
            .filter(|rank| !exchange.joined.contains(rank))
            .map(|rank| rank as u32)
            .collect();
        if all && !self.is_obstructed(id) {
            self.exchange_due(id);
            return;
        }
        let ranks = 0..self.exchanges[&id].members.len();
        let blamed: Vec<Vec<u32>> = ranks
            .map(|rank| match all {
                true => self.unheard(id, rank),
                false => absent.clone(),
            })
            .collect();
        // Whoever has everything already has its sum, though others have not.
        self.fail_exchange(id, &|rank| blamed[rank].clone(), all);
    }

    /// One member has what the exchange is for.
    fn complete(&mut self, id: Id, rank: usize) {
        match id.2 {
            Purpose::Gather => self.complete_gathering(id, rank),
            Purpose::Sum => self.complete_sum(id, rank),
        }
    }

    fn complete_gathering(&mut self, id: Id, rank: usize) {
        let exchange = &self.exchanges[&id];
        let features = exchange.features.clone();
        let all = features.keys().copied().eq(0..self.setup.lanes);
        hold(all, LANES_ONCE, || {
            format!("{id:?}: features of lanes {:?}", features.keys())
        });
        let (worker, life) = exchange.processes[rank];
        let event = work::Event::Gathered {
            generation: id.0,
            step: id.1,
            features,
        };
        self.tell_outcome(worker, life, event);
    }

    fn complete_sum(&mut self, id: Id, rank: usize) {
        let exchange = &self.exchanges[&id];
        let sum = tree_sum(root(self.setup.lanes), &exchange.parts);
        hold(sum.is_some(), LANES_ONCE, || {
            format!("{id:?}: nodes do not tile")
        });
        let sum = sum.unwrap_or_default();
        let (worker, life) = exchange.processes[rank];
        let shards_read = &self.workers[worker].shards_read;
        let lanes = exchange.members[rank].1.iter().flat_map(|n| n.start..n.end);
        let late = match is_apart(worker) {
            true => work::LateReports {
                reports: lanes
                    .filter_map(|lane| Some(lane_report(id.1, lane, *shards_read.get(&lane)?)))
                    .collect(),
                seconds: 0.01,
            },
            false => work::LateReports::default(),
        };
        let own = exchange.members[rank].1.iter();
        let state = self.workers[worker].state.filter(|s| s.step == id.1);
        let digests = work::Digests {
            nodes: own
                .map(|n| (*n, digest(&exchange.parts[n]).0 as u64))
                .collect(),
            sum_parts: Vec::new(),
            state: state.map(state_digest),
        };
        let event = work::Event::Reduced {
            generation: id.0,
            step: id.1,
            digest: digest(&sum),
            sum,
            finite: true,
            late,
            digests,
        };
        self.tell_outcome(worker, life, event);
    }

    fn tell_outcome(&mut self, worker: usize, life: u64, event: work::Event) {
        let late = std::mem::take(&mut self.workers[worker].outcome_late);
        let delay = self.draw(NOTICED) + late;
        self.after(delay, Happening::Worker(worker, life, event));
    }

    /// Everybody in an exchange hears that it failed, and whom to blame; where all had begun, some
    /// have their sums nevertheless.
    fn fail_exchange(&mut self, id: Id, blamed: &dyn Fn(usize) -> Vec<u32>, begun: bool) {
        let Some(exchange) = self.exchanges.get_mut(&id) else {
            return;
        };
        exchange.failed = true;
        let joined = std::mem::take(&mut exchange.joined);
        for rank in joined {
            if begun && self.below(3) == 0 {
                self.complete(id, rank);
                continue;
            }
            let (worker, life) = self.exchanges[&id].processes[rank];
            let event = work::Event::ReduceFailed {
                generation: id.0,
                step: id.1,
                ranks: blamed(rank),
                detail: "simulated".into(),
            };
            self.tell_outcome(worker, life, event);
        }
    }

    fn exchange_of(&self, worker: usize) -> Vec<(Id, usize)> {
        let mut found = Vec::new();
        for (id, exchange) in &self.exchanges {
            let processes = exchange.processes.iter();
            let rank = processes.enumerate().find_map(|(rank, (w, life))| {
                let own = *w == worker && *life == self.workers[worker].life;
                (own && exchange.joined.contains(&rank)).then_some(rank)
            });
            found.extend(rank.map(|rank| (*id, rank)));
        }
        found
    }

    /// A worker is out of what it had joined; the others hear of it. A dead one is named.
    pub(super) fn leave_exchanges(&mut self, worker: usize) {
        for (id, rank) in self.exchange_of(worker) {
            let dead = self.workers[worker].core.is_none();
            let blamed = if dead { vec![rank as u32] } else { Vec::new() };
            if let Some(exchange) = self.exchanges.get_mut(&id) {
                exchange.joined.remove(&rank);
            }
            self.fail_exchange(id, &|_| blamed.clone(), false);
        }
        let newest = self.exchanges.keys().next_back().copied();
        if let Some((generation, ..)) = newest {
            // What nobody waits in is remembered for the generation only.
            self.exchanges
                .retain(|(g, ..), e| *g >= generation || !e.joined.is_empty());
        }
    }

    /// A running exchange breaks; a flipped bit is blamed on its sender by one receiver.
    pub(super) fn break_exchange(&mut self, worker: usize, flipped: bool) -> bool {
        let Some((id, sender)) = self.exchange_of(worker).first().copied() else {
            return false;
        };
        let members = self.exchanges[&id].members.len();
        let all = self.exchanges[&id].joined.len() == members;
        let receiver = (sender + 1) % members;
        let blamed = |rank: usize| match flipped && rank == receiver && rank != sender {
            true => vec![sender as u32],
            false => Vec::new(),
        };
        self.fail_exchange(id, &blamed, all);
        true
    }
}
