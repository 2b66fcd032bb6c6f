//! The network between workers and coordinators: sessions with two ends that may disagree, cuts
//! that hold back what passes, links that are slow. In one session everything keeps its order;
//! between sessions nothing does.

use std::collections::BTreeMap;

use belfry_coordinator::core as lead;
use belfry_proto::v1::{coordinator_message as down, worker_message as up};
use belfry_worker::core as work;

use super::faults::Process;
use super::world::{Happening, World};

/// One connection between a worker and a coordinator.
pub(super) struct Session {
    pub(super) worker: usize,
    pub(super) worker_life: u64,
    pub(super) lead: usize,
    pub(super) lead_life: u64,
    /// When the last message of each way arrives.
    up_at: u64,
    down_at: u64,
    /// Whether the coordinator's end is open; the worker's is if it is the worker's session.
    open: bool,
}

/// What is wrong with it.
#[derive(Default)]
pub(super) struct Network {
    cuts: Vec<Cut>,
    /// Workers whose links are slow: by so much, until then.
    pub(super) slow: BTreeMap<usize, (u64, u64)>,
}

struct Cut {
    from: Vec<Process>,
    to: Vec<Process>,
    until: u64,
}

impl Network {
    /// Until when nothing passes from one process to another; 0 if everything does.
    pub(super) fn cut_until(&self, now: u64, from: Process, to: Process) -> u64 {
        let cuts = self.cuts.iter();
        let cuts = cuts.filter(|c| c.until > now && c.from.contains(&from) && c.to.contains(&to));
        cuts.map(|c| c.until).max().unwrap_or(0)
    }

    /// Whether a connection between two processes is of no use: it needs both ways.
    pub(super) fn parted(&self, now: u64, a: Process, b: Process) -> bool {
        !self.cuts.is_empty() && (self.cut_until(now, a, b) > 0 || self.cut_until(now, b, a) > 0)
    }

    /// Whether anything is cut.
    pub(super) fn is_cut(&self, now: u64) -> bool {
        self.cuts.iter().any(|c| c.until > now)
    }

    /// How many times slower a worker's link is.
    pub(super) fn slowness(&self, now: u64, worker: usize) -> u64 {
        let slow = self.slow.get(&worker).filter(|(_, until)| *until > now);
        slow.map_or(1, |(factor, _)| *factor)
    }
}

impl World {
    /// Nothing passes from these to those; connections notice by their keepalive.
    pub(super) fn cut(&mut self, from: Vec<Process>, to: Vec<Process>, time: u64) -> bool {
        let now = self.now;
        self.network.cuts.retain(|c| c.until > now);
        let until = now + time;
        self.network.cuts.push(Cut { from, to, until });
        let parted: Vec<u64> = self
            .sessions
            .iter()
            .filter(|(_, s)| {
                let (worker, lead) = (Process::Worker(s.worker), Process::Coordinator(s.lead));
                self.network.parted(now, worker, lead)
            })
            .map(|(number, _)| *number)
            .collect();
        self.doubt(&parted);
        true
    }

    /// Sessions that may be dead without anybody knowing are looked at after the silence.
    pub(super) fn doubt(&mut self, sessions: &[u64]) {
        for session in sessions {
            let delay = self.setup.silence_ms() + self.below(200);
            self.after(delay, Happening::Keepalive(*session));
        }
    }

    /// A keepalive that was not answered ends both ends, each on its own; one that was keeps them.
    pub(super) fn keepalive(&mut self, number: u64) {
        let Some(session) = self.sessions.get(&number) else {
            return;
        };
        let (worker, lead, open) = (session.worker, session.lead, session.open);
        let (w, c) = (Process::Worker(worker), Process::Coordinator(lead));
        let worker_away = self.workers[worker].paused_until > self.now;
        let lead_away =
            self.leads[lead].paused_until > self.now || !self.lead_lives(lead, session.lead_life);
        let parted = self.network.parted(self.now, w, c);
        let worker_has = self.workers[worker].session == Some(number);
        let frozen = worker_away || self.leads[lead].paused_until > self.now;
        if frozen {
            // Whoever is frozen notices when it goes on.
            self.doubt(&[number]);
        }
        if !worker_away && worker_has && (parted || lead_away || !open) {
            self.drop_worker_end(worker);
        }
        if !lead_away && (parted || worker_away || !worker_has) {
            self.gone(number);
        }
        self.forget_session(number);
    }

    pub(super) fn connect(&mut self, worker: usize, life: u64) {
        if !self.alive(worker, life) || self.workers[worker].session.is_some() {
            return;
        }
        let Some(lead) = self.reachable_leader(worker) else {
            let delay = self.draw(self.costs.reconnect) + 10;
            self.after(delay, Happening::Connect(worker, life));
            return;
        };
        self.sessions_begun += 1;
        let number = self.sessions_begun;
        let session = Session {
            worker,
            worker_life: life,
            lead,
            lead_life: self.leads[lead].life,
            up_at: self.now,
            down_at: self.now,
            open: true,
        };
        self.sessions.insert(number, session);
        self.workers[worker].session = Some(number);
        self.tell_worker(worker, work::Event::LinkUp);
    }

    /// A coordinator that leads and answers: the one that the journal names, or, where what a worker
    /// has read is old, one before it that does not know yet that it leads no more.
    fn reachable_leader(&mut self, worker: usize) -> Option<usize> {
        let named = self.store.newest()?.lead;
        let w = Process::Worker(worker);
        let reachable = |lead: &usize| {
            let there =
                self.leads[*lead].is_leading() && self.leads[*lead].paused_until <= self.now;
            there
                && !self
                    .network
                    .parted(self.now, w, Process::Coordinator(*lead))
        };
        let mut old = (0..self.leads.len()).filter(|lead| *lead != named);
        let old = old.find(reachable);
        let named = Some(named).filter(reachable);
        match old {
            Some(_) if self.below(2) == 0 => old,
            _ => named,
        }
    }

    /// The worker's end of its session ends; the coordinator hears of it when it hears of it.
    pub(super) fn end_session(&mut self, worker: usize) -> bool {
        let Some(number) = self.workers[worker].session else {
            return false;
        };
        let delay = self.below(60);
        if let Some(session) = self.sessions.get_mut(&number) {
            session.up_at = (session.up_at + 1).max(self.now + delay);
            let delay = session.up_at - self.now;
            self.after(delay, Happening::Gone(number));
        }
        self.drop_worker_end(worker);
        true
    }

    fn drop_worker_end(&mut self, worker: usize) {
        let Some(number) = self.workers[worker].session.take() else {
            return;
        };
        let life = self.workers[worker].life;
        let same = self.sessions.get(&number).map(|s| s.worker_life) == Some(life);
        self.forget_session(number);
        if same && self.alive(worker, life) {
            self.tell_worker(worker, work::Event::LinkDown);
            let delay = self.draw(self.costs.reconnect);
            self.after(delay, Happening::Connect(worker, life));
        }
    }

    /// A session is forgotten when neither end has it.
    fn forget_session(&mut self, number: u64) {
        let ended = self.sessions.get(&number).is_some_and(|s| {
            let lead_has = s.open && self.lead_lives(s.lead, s.lead_life);
            !lead_has && self.workers[s.worker].session != Some(number)
        });
        if ended {
            self.sessions.remove(&number);
        }
    }

    /// The worker dials anew while the coordinator holds its old connection, in which messages are
    /// still under way.
    pub(super) fn double_session(&mut self, worker: usize, late: u64) -> bool {
        let Some(number) = self.workers[worker].session else {
            return false;
        };
        let time = self.below(late);
        self.put_off(number, time);
        self.drop_worker_end(worker);
        self.doubt(&[number]);
        true
    }

    /// The coordinator's end is gone; the worker believes in it until its keepalive.
    pub(super) fn half_open(&mut self, worker: usize) -> bool {
        let Some(number) = self.workers[worker].session else {
            return false;
        };
        self.gone(number);
        self.doubt(&[number]);
        true
    }

    pub(super) fn gone(&mut self, number: u64) {
        let Some(session) = self.sessions.get_mut(&number) else {
            return;
        };
        let (was_open, lead, life) = (session.open, session.lead, session.lead_life);
        session.open = false;
        if was_open && self.lead_lives(lead, life) {
            self.tell_lead(lead, lead::Event::Gone(number));
        }
        self.forget_session(number);
    }

    pub(super) fn closed(&mut self, number: u64) {
        let Some(session) = self.sessions.get(&number) else {
            return;
        };
        let worker = session.worker;
        if self.workers[worker].session == Some(number) {
            self.drop_worker_end(worker);
        }
    }

    pub(super) fn send_up(&mut self, worker: usize, body: up::Body) {
        let delay = self.draw(self.costs.network) * self.network.slowness(self.now, worker);
        let Some(number) = self.workers[worker].session else {
            return;
        };
        match body {
            up::Body::Heartbeat(_) => self.counts.heartbeats += self.costs.heartbeats_apart,
            _ => self.counts.messages += 1,
        }
        let Some(session) = self.sessions.get_mut(&number) else {
            return;
        };
        session.up_at = (session.up_at + 1).max(self.now + delay);
        let delay = session.up_at - self.now;
        self.after(delay, Happening::Up(number, body));
    }

    pub(super) fn up(&mut self, number: u64, body: up::Body) {
        let Some(session) = self.sessions.get(&number).filter(|s| s.open) else {
            return;
        };
        let (lead, life) = (session.lead, session.lead_life);
        if !self.lead_lives(lead, life) {
            return;
        }
        let event = match body {
            up::Body::Hello(hello) => lead::Event::Hello(number, hello),
            body => lead::Event::Message(number, body),
        };
        self.tell_lead(lead, event);
    }

    pub(super) fn send_down(&mut self, number: u64, body: down::Body) {
        self.counts.messages += 1;
        let Some(worker) = self.sessions.get(&number).map(|s| s.worker) else {
            return;
        };
        let delay = self.draw(self.costs.network) * self.network.slowness(self.now, worker);
        let Some(session) = self.sessions.get_mut(&number).filter(|s| s.open) else {
            return;
        };
        session.down_at = (session.down_at + 1).max(self.now + delay);
        let delay = session.down_at - self.now;
        self.after(delay, Happening::Down(number, body));
    }

    pub(super) fn down(&mut self, number: u64, body: down::Body) {
        let Some(worker) = self.sessions.get(&number).map(|s| s.worker) else {
            return;
        };
        if self.workers[worker].session == Some(number) {
            self.hear(worker, body);
        }
    }

    /// The coordinator ends a session.
    pub(super) fn close(&mut self, number: u64) {
        let Some(session) = self.sessions.get_mut(&number) else {
            return;
        };
        session.open = false;
        session.down_at = (session.down_at + 1).max(self.now);
        let delay = session.down_at - self.now;
        self.after(delay, Happening::Closed(number));
    }

    /// A coordinator's process ended: its kernel tells the workers.
    pub(super) fn close_all(&mut self, lead: usize, life: u64) {
        let of = |s: &Session| (s.lead, s.lead_life) == (lead, life);
        let all: Vec<u64> = self
            .sessions
            .iter()
            .filter(|(_, s)| of(s))
            .map(|(number, _)| *number)
            .collect();
        for number in &all {
            let delay = self.below(30);
            if let Some(session) = self.sessions.get_mut(number) {
                session.open = false;
                session.down_at = (session.down_at + 1).max(self.now + delay);
                let delay = session.down_at - self.now;
                self.after(delay, Happening::Closed(*number));
            }
        }
        // Where even that does not arrive, the keepalive tells.
        self.doubt(&all);
    }

    /// A frozen coordinator does not answer keepalives.
    pub(super) fn doubt_lead(&mut self, lead: usize) {
        let of = |s: &Session| s.lead == lead;
        let all: Vec<u64> = self
            .sessions
            .iter()
            .filter(|(_, s)| of(s))
            .map(|(number, _)| *number)
            .collect();
        self.doubt(&all);
    }
}
