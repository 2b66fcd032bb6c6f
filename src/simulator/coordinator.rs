//! The coordinators' shells in the simulation: leases, the order in which effects leave, and what
//! becomes of them.

use std::collections::VecDeque;

use belfry_coordinator::core as lead;
use belfry_coordinator::lease::Lease;
use belfry_coordinator::outgoing::Outgoing;
use belfry_proto::v1;

use super::counts::Request;
use super::faults::Process;
use super::setup::{Span, millis};
use super::store::{Entry, Write};
use super::world::{Answer, Happening, World};

/// Ticks per longest tolerated silence.
const TICKS_PER_SILENCE: u64 = 20;
/// Between two tries of a write.
const BACK_OFF: Span = Span::new(50, 1_000);

/// One coordinator process.
#[derive(Default)]
pub(super) struct Lead {
    /// Of its present process; no other process of any coordinator has this number.
    pub(super) life: u64,
    pub(super) up: bool,
    pub(super) paused_until: u64,
    /// The process is killed after so many more effects.
    pub(super) dies_after: Option<u32>,
    started_at: u64,
    lease: Option<Lease>,
    core: Option<Box<lead::Core>>,
    outgoing: Outgoing,
    /// The entry that stands, or that this process writes next after.
    last: Option<Entry>,
    /// What the journal's writer and the archive have to do; each does one thing at a time.
    journal: VecDeque<Write>,
    archive: VecDeque<Write>,
    away: bool,
}

impl Lead {
    pub(super) fn is_leading(&self) -> bool {
        self.up && self.core.is_some()
    }
}

impl World {
    pub(super) fn lead_lives(&self, lead: usize, life: u64) -> bool {
        self.leads[lead].up && self.leads[lead].life == life
    }

    pub(super) fn start_lead(&mut self, lead: usize) {
        if self.leads[lead].up {
            return;
        }
        self.lives += 1;
        let lease = Lease::new(millis(self.setup.timeouts.lease));
        self.leads[lead] = Lead {
            life: self.lives,
            up: true,
            started_at: self.now,
            lease: Some(lease),
            ..Lead::default()
        };
        self.after(0, Happening::Watch(lead, self.lives));
    }

    /// A standby looks at the journal, and leads when the lease has run out. A leader that is
    /// started again at its address knows that it is dead.
    pub(super) fn watch(&mut self, lead: usize, life: u64) {
        if !self.lead_lives(lead, life) || self.leads[lead].core.is_some() {
            return;
        }
        let own_clock = self.now - self.leads[lead].started_at;
        let pause = Lease::pause(millis(self.setup.timeouts.lease));
        let mut free = false;
        if self.store.answers(self.now) && self.store.hears(self.now, lead) {
            self.counts.request(Request::JournalList, 1);
            let newest = self.store.newest();
            let own = newest.is_none_or(|e| e.lead == lead);
            let seq = newest.map_or(0, |e| e.seq);
            let lease = self.leads[lead].lease.as_mut();
            free = lease.is_some_and(|l| l.saw(own_clock, seq)) || own;
        }
        if !free {
            self.after(pause, Happening::Watch(lead, life));
            return;
        }
        let before = self.store.newest().cloned();
        let entry = Entry {
            seq: before.as_ref().map_or(1, |e| e.seq + 1),
            term: before.as_ref().map_or(1, |e| e.term + 1),
            nonce: life,
            lead,
            generation: before.as_ref().map_or(0, |e| e.generation),
            committed: before.as_ref().map_or(0, |e| e.committed),
            horizon: before.as_ref().map_or(0, |e| e.horizon),
            members: before.as_ref().map_or(Vec::new(), |e| e.members.clone()),
            quarantine: before.map(|e| e.quarantine).unwrap_or_default(),
        };
        self.write(lead, Write::Entry(entry, true));
    }

    /// The first entry of a term stands: its leader reads what is durable and begins.
    fn begin_term(&mut self, lead: usize, entry: Entry) {
        let settings = lead::Settings {
            run_id: "run".into(),
            lanes: self.setup.lanes,
            micro_batches: self.setup.lanes,
            pairs_per_lane: 1,
            steps_total: self.setup.steps,
            min_workers: self.setup.min_workers,
            max_workers: 0,
            spares: 2,
            skip_non_finite: false,
            expected_workers: self.setup.workers,
            timeouts: self.setup.timeouts,
            checkpoint: belfry_configs::Checkpoint {
                every_steps: self.setup.checkpoint_every,
                parts: self.setup.parts,
                ..Default::default()
            },
            nodes_max: self.setup.nodes_max,
            audit_every: self.setup.audit_every,
            evaluates: self.setup.evaluates,
            rhythm: self.setup.rhythm(),
            links: self.setup.links,
            quarantine_shards_max: self.setup.quarantine_shards_max,
            horizon_steps: self.setup.horizon_steps,
            term: entry.term,
        };
        self.counts.terms += 1;
        self.counts.request(Request::StartGet, 4);
        let durable = self.store.durable(&entry);
        self.say(|| format!("coordinator {lead} leads term {}", entry.term));
        let own_clock = self.now - self.leads[lead].started_at;
        let planted = self.setup.planted.lead;
        let leader = &mut self.leads[lead];
        let core = lead::Core::new(own_clock, settings, durable);
        leader.core = Some(Box::new(match planted {
            Some(bug) => core.planted(bug),
            None => core,
        }));
        leader.last = Some(entry);
        let life = leader.life;
        self.after(0, Happening::Tick(lead, life));
    }

    pub(super) fn tick(&mut self, lead: usize, life: u64) {
        if self.lead_lives(lead, life) {
            self.tell_lead(lead, lead::Event::Tick);
            let pause = self.setup.silence_ms() / TICKS_PER_SILENCE;
            self.after(pause.max(1), Happening::Tick(lead, life));
        }
    }

    pub(super) fn kill_lead(&mut self, lead: usize) -> bool {
        if !self.leads[lead].up {
            return false;
        }
        let life = self.leads[lead].life;
        self.leads[lead] = Lead {
            life,
            ..Lead::default()
        };
        self.close_all(lead, life);
        let delay = self.draw(self.costs.coordinator_restart);
        self.after(delay, Happening::StartLead(lead));
        true
    }

    pub(super) fn pause_lead(&mut self, lead: usize, time: u64) -> bool {
        self.leads[lead].paused_until = self.now + time;
        self.doubt_lead(lead);
        self.leads[lead].up
    }

    pub(super) fn tell_lead(&mut self, lead: usize, event: lead::Event) {
        let own_clock = self.now - self.leads[lead].started_at;
        let Some(core) = self.leads[lead].core.as_mut() else {
            return;
        };
        let effects = core.apply(own_clock, event);
        let leaving = self.leads[lead].outgoing.push(effects);
        self.execute_all(lead, leaving);
    }

    fn execute_all(&mut self, lead: usize, effects: Vec<lead::Effect>) {
        let life = self.leads[lead].life;
        for effect in effects.into_iter().flat_map(one_by_one) {
            if !self.lead_lives(lead, life) || self.outcome.is_some() {
                return;
            }
            self.execute(lead, effect);
            if let Some(left) = self.leads[lead].dies_after.as_mut() {
                if *left == 0 {
                    self.say(|| format!("coordinator {lead} dies between two effects"));
                    self.kill_lead(lead);
                    return;
                }
                *left -= 1;
            }
        }
    }

    fn execute(&mut self, lead: usize, effect: lead::Effect) {
        use lead::Effect as E;
        match effect {
            E::Journal {
                generation,
                committed,
                horizon,
                members,
                quarantine,
                ahead,
            } => {
                let Some(last) = self.leads[lead].last.clone() else {
                    return;
                };
                let queued = self.leads[lead].journal.iter();
                let before = queued.filter(|w| matches!(w, Write::Entry(..))).count() as u64;
                let entry = Entry {
                    seq: last.seq + before + 1,
                    generation,
                    committed,
                    horizon,
                    members,
                    quarantine: quarantine.into_iter().collect(),
                    ..last
                };
                self.write(lead, Write::Entry(entry, !ahead));
            }
            E::StoreData(data) => self.write(lead, Write::Data(data)),
            E::StoreReceipts(receipts) => self.write(lead, Write::Receipts(receipts)),
            E::StoreCheckpoint {
                step,
                receipts,
                parts,
            } => self.write(
                lead,
                Write::Checkpoint {
                    step,
                    receipts,
                    parts,
                    leads: false,
                },
            ),
            E::Prune(steps) => self.write(lead, Write::Prune(steps)),
            E::StoreCost(..) => {}
            E::StoreEvaluation(evaluated) => self.write(lead, Write::Evaluation(evaluated)),
            E::StoreResult {
                exported,
                last,
                evaluations,
            } => {
                self.check_result(last, &evaluations);
                self.write(lead, Write::Result(exported));
            }
            E::Send(session, body) => {
                self.check_said(lead, &body);
                self.send_down(session, body);
            }
            // Said one by one.
            E::SendAll(..) => {}
            E::Close(session) => self.close(session),
            E::Emit(event) => self.watched(*event),
            E::ReadReceipts(steps) => panic!("all receipts are known, also of {steps:?}"),
            E::StepDown { term } => {
                self.say(|| format!("coordinator {lead} heard of term {term}"));
                self.kill_lead(lead);
            }
            E::Finish { success, reason } => {
                self.say(|| format!("END success {success}: {reason}"));
                self.outcome = Some((success, reason));
            }
        }
    }

    fn watched(&mut self, event: v1::RunEvent) {
        if !event.notice.is_empty() {
            self.say(|| format!("[step {}] {}", event.step, event.notice));
        }
        if let Some(record) = event.committed {
            self.check_commit(&record);
        }
    }

    /// Queues a write behind those of its kind.
    fn write(&mut self, lead: usize, write: Write) {
        let life = self.leads[lead].life;
        let leader = &mut self.leads[lead];
        let queue = match write.is_of_journal() {
            true => &mut leader.journal,
            false => &mut leader.archive,
        };
        queue.push_back(write.clone());
        if queue.len() == 1 {
            self.try_write(lead, life, Box::new(write));
        }
    }

    pub(super) fn answered(&mut self, lead: usize, life: u64, write: Box<Write>, answer: Answer) {
        if !self.lead_lives(lead, life) {
            return;
        }
        let process = Process::Coordinator(lead);
        match answer {
            Answer::Others => {
                self.say(|| format!("{process:?} is superseded"));
                self.kill_lead(lead);
            }
            Answer::Error => {
                if !std::mem::replace(&mut self.leads[lead].away, true) {
                    let what = write.what().to_owned();
                    let error = "simulated".to_owned();
                    self.tell_lead(lead, lead::Event::StoreAway { what, error });
                }
                if self.lead_lives(lead, life) {
                    let delay = self.draw(BACK_OFF);
                    self.after(delay, Happening::Retry(lead, life, write));
                }
            }
            Answer::Done => self.durable(lead, life, *write),
        }
    }

    fn durable(&mut self, lead: usize, life: u64, write: Write) {
        if std::mem::take(&mut self.leads[lead].away) {
            let what = write.what().to_owned();
            self.tell_lead(lead, lead::Event::StoreBack { what });
            if !self.lead_lives(lead, life) {
                return;
            }
        }
        // That it leads was asked first; now the manifest is put.
        if let Write::Checkpoint { step, .. } = &write
            && !self.store.manifests.contains(step)
        {
            self.try_write(lead, life, Box::new(write));
            return;
        }
        let leader = &mut self.leads[lead];
        let queue = match write.is_of_journal() {
            true => &mut leader.journal,
            false => &mut leader.archive,
        };
        queue.pop_front();
        if let Some(next) = queue.front().cloned() {
            self.try_write(lead, life, Box::new(next));
        }
        match write {
            Write::Entry(entry, _) if self.leads[lead].core.is_none() => {
                self.begin_term(lead, entry);
            }
            Write::Entry(entry, holds_back) => {
                let seq = entry.seq;
                self.leads[lead].last = Some(entry);
                if holds_back {
                    self.settled(lead);
                }
                self.tell_lead(lead, lead::Event::Journaled { seq });
            }
            Write::Data(_) | Write::Evaluation(_) | Write::Result(_) => self.settled(lead),
            Write::Receipts(receipts) => {
                let below = receipts.last().map_or(0, |r| r.step + 1);
                self.tell_lead(lead, lead::Event::ReceiptsDurable { below });
            }
            Write::Checkpoint { step, .. } => {
                self.tell_lead(lead, lead::Event::CheckpointDurable { step });
            }
            Write::Prune(_) => {}
        }
    }

    fn settled(&mut self, lead: usize) {
        let leaving = self.leads[lead].outgoing.settled();
        self.execute_all(lead, leaving);
    }
}

/// What is said to several is said to one after the other: a process may die between them.
fn one_by_one(effect: lead::Effect) -> Vec<lead::Effect> {
    match effect {
        lead::Effect::SendAll(sessions, body) => sessions
            .into_iter()
            .map(|session| lead::Effect::Send(session, (*body).clone()))
            .collect(),
        other => vec![other],
    }
}
