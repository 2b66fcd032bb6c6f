//! A generation's device links as one member sees them: its group, and the id they open under.
//!
//! The group's first rank makes the id, the coordinator passes it on, and no exchange begins
//! without it. An id of another generation is not this one's.

use belfry_proto::v1::{self, worker_message as up};

use super::{Core, Effect};

/// The device links of one exchange.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Linked {
    /// Ranks by group, ascending.
    pub groups: Vec<Vec<usize>>,
    /// Of the own group; empty for a group of one beside others.
    pub id: Vec<u8>,
    /// Whether the library chooses the order of additions.
    pub ring: bool,
}

/// How the members of a generation are linked.
#[derive(Debug)]
pub(super) struct Links {
    kind: v1::Links,
    rank: usize,
    groups: Vec<Vec<usize>>,
    /// Number of the own group.
    group: u32,
    id: Vec<u8>,
}

impl Links {
    pub(super) fn new(kind: v1::Links, members: &[v1::Member], rank: usize) -> Self {
        let mut numbers: Vec<u32> = members.iter().map(|m| m.group).collect();
        numbers.sort_unstable();
        numbers.dedup();
        let of = |number: &u32| {
            let ranks = members.iter().enumerate();
            let ranks = ranks.filter(|(_, m)| m.group == *number);
            ranks.map(|(rank, _)| rank).collect()
        };
        Links {
            kind,
            rank,
            groups: numbers.iter().map(of).collect(),
            group: members[rank].group,
            id: Vec::new(),
        }
    }

    fn own(&self) -> &[usize] {
        let own = self.groups.iter().find(|g| g.contains(&self.rank));
        own.map_or(&[], Vec::as_slice)
    }

    /// A group alone beside others has nobody to link with.
    fn needs_id(&self) -> bool {
        self.kind != v1::Links::Tcp && (self.groups.len() == 1 || self.own().len() > 1)
    }

    /// Whether this member makes its group's id.
    pub(super) fn makes_id(&self) -> bool {
        self.needs_id() && self.own().first() == Some(&self.rank)
    }

    /// What the exchange is told: nothing for TCP; not yet (`None`) while the id is missing.
    pub(super) fn ready(&self) -> Option<Option<Linked>> {
        if self.kind == v1::Links::Tcp {
            return Some(None);
        }
        if self.needs_id() && self.id.is_empty() {
            return None;
        }
        Some(Some(Linked {
            groups: self.groups.clone(),
            id: self.id.clone(),
            ring: self.kind == v1::Links::Ring,
        }))
    }
}

impl Core {
    /// The shell has made an id, or could not: the coordinator decides what follows.
    pub(super) fn id_made(
        &mut self,
        generation: u64,
        id: Result<Vec<u8>, String>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(m) = &self.membership else { return };
        if generation != self.generation || m.generation != generation {
            return;
        }
        let (id, error) = match id {
            Ok(id) => (id, String::new()),
            Err(error) => (Vec::new(), error),
        };
        effects.push(Effect::Send(up::Body::LinkId(v1::LinkId {
            term: self.term,
            generation,
            group: m.links.group,
            id,
            error,
        })));
    }

    /// An id arrives; the first of its generation counts.
    pub(super) fn link_id(&mut self, link_id: v1::LinkId, effects: &mut Vec<Effect>) {
        if !self.accepts(link_id.term) || link_id.generation != self.generation {
            return;
        }
        let Some(m) = &mut self.membership else {
            return;
        };
        if m.links.group == link_id.group && m.links.needs_id() && m.links.id.is_empty() {
            m.links.id = link_id.id;
            self.proceed(effects);
        }
    }
}
