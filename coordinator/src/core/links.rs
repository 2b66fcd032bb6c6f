//! Device links: whether a generation sums over them, in which groups, and the way of the unique
//! ids from those who make them to those who use them.
//!
//! Sums over device links along the lane tree have the bits of TCP, so wherever they cannot be had
//! a generation opens with TCP and says why. A ring has bits of its own: there who lacks the links
//! is refused.

use super::*;

/// Generations that may lack an id, or break without a death, before TCP is used instead.
const LINK_TROUBLES_MAX: u32 = 3;

/// How the configuration wants gradients to be summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkPolicy {
    /// Over TCP.
    Tcp,
    /// Over device links, along the lane tree.
    Device {
        /// Within each host only; TCP between hosts.
        hierarchical: bool,
    },
    /// In the order of the devices' library.
    Ring,
}

/// The open generation's links.
#[derive(Debug, Default)]
pub(super) struct OpenLinks {
    /// Groups that need an id and have none, by number, with the member that makes it.
    waiting: BTreeMap<u32, u64>,
    /// Since when.
    since: Millis,
}

impl OpenLinks {
    /// The generation was heard of only now.
    pub(super) fn rested(&mut self, time: Millis) {
        self.since += time;
    }
}

/// What the links of this term have come to.
#[derive(Debug, Default)]
pub(super) struct LinkRecord {
    troubles: u32,
    /// Why they are not used any more.
    given_up: Option<String>,
    /// What was said last about a generation without them.
    told: String,
}

/// How one generation is linked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Linked {
    pub(super) links: v1::Links,
    /// Each member's group, by its place.
    pub(super) groups: Vec<u32>,
}

/// Why these devices cannot be linked.
fn obstacle<'a>(devices: impl Iterator<Item = (u64, &'a v1::Device)>) -> Option<String> {
    let mut units: BTreeMap<&str, u64> = BTreeMap::new();
    for (id, device) in devices {
        if !device.links_missing.is_empty() {
            return Some(format!(
                "worker {id} on {}: {}",
                device.host, device.links_missing
            ));
        }
        if let Some(other) = units.insert(&device.unit, id) {
            let unit = &device.unit;
            return Some(format!("workers {other} and {id} share the device {unit}"));
        }
    }
    None
}

/// A number for each host, in order of appearance.
fn by_host<'a>(devices: impl Iterator<Item = &'a v1::Device>) -> Vec<u32> {
    let mut hosts: Vec<&str> = Vec::new();
    let mut number = |host: &'a str| match hosts.iter().position(|h| *h == host) {
        Some(number) => number as u32,
        None => {
            hosts.push(host);
            hosts.len() as u32 - 1
        }
    };
    devices.map(|d| number(&d.host)).collect()
}

impl Core {
    /// Whether a sum's bits are the same whoever holds what.
    pub(super) fn same_bits(&self) -> bool {
        self.s.links != LinkPolicy::Ring
    }

    /// Why a worker cannot take part in a ring.
    pub(super) fn ring_refusal(&self, hello: &v1::Hello) -> Option<String> {
        if self.s.links != LinkPolicy::Ring {
            return None;
        }
        let device = hello.device.clone().unwrap_or_default();
        let others = self
            .workers
            .iter()
            .filter(|(id, _)| **id != hello.worker_id);
        let others = others.map(|(id, w)| (*id, &w.device));
        let why = obstacle(others.chain([(hello.worker_id, &device)]))?;
        Some(format!(
            "collective.transport = \"nccl_ring\" needs NCCL on every worker, one per device: {why}"
        ))
    }

    /// The links of the generation that is about to open.
    pub(super) fn choose_links(&mut self, fx: &mut Vec<Effect>) -> Linked {
        let members = self.members.len();
        let plain = Linked {
            links: v1::Links::Tcp,
            groups: vec![0; members],
        };
        let devices = || {
            self.members
                .iter()
                .map(|id| (*id, &self.workers[id].device))
        };
        let why = match self.s.links {
            LinkPolicy::Tcp => return plain,
            LinkPolicy::Ring => {
                // Who lacks the links was refused.
                if self.link_record.told.is_empty() {
                    let text = "sums in NCCL's own order: bits hold per number of workers only \
                                (promise 2 off)";
                    self.notice(Reason::LinksChosen, text.into(), fx);
                    self.link_record.told = text.into();
                }
                let links = v1::Links::Ring;
                return Linked { links, ..plain };
            }
            LinkPolicy::Device { .. } => self.link_record.given_up.clone(),
        };
        if let Some(why) = why.or_else(|| obstacle(devices())) {
            if self.link_record.told != why {
                let text = format!("sums go over TCP, to the same bits: {why}");
                self.notice(Reason::LinksGivenUp, text, fx);
                self.link_record.told = why;
            }
            return plain;
        }
        let hosts = by_host(devices().map(|(_, device)| device));
        let hierarchical = self.s.links == LinkPolicy::Device { hierarchical: true };
        self.link_record.told.clear();
        Linked {
            links: v1::Links::Device,
            groups: if hierarchical { hosts } else { plain.groups },
        }
    }

    /// Waits for the ids of a generation: one for each group that links devices.
    pub(super) fn await_ids(&mut self, now: Millis, linked: &Linked) {
        let mut waiting: BTreeMap<u32, u64> = BTreeMap::new();
        if linked.links != v1::Links::Tcp {
            let several = linked.groups.iter().any(|g| *g > 0);
            for (id, group) in self.members.iter().zip(&linked.groups) {
                let size = linked.groups.iter().filter(|g| *g == group).count();
                if size > 1 || !several {
                    // Members ascend, so the first of a group leads it.
                    waiting.entry(*group).or_insert(*id);
                }
            }
        }
        self.open_links = OpenLinks {
            waiting,
            since: now,
        };
    }

    /// An id goes to its group.
    pub(super) fn take_link_id(
        &mut self,
        now: Millis,
        id: u64,
        link_id: v1::LinkId,
        fx: &mut Vec<Effect>,
    ) {
        let current = self.phase == Phase::Training
            && link_id.term == self.s.term
            && link_id.generation == self.generation
            && self.open_links.waiting.get(&link_id.group) == Some(&id);
        if !current {
            return;
        }
        if link_id.id.is_empty() {
            let why = format!("worker {id} cannot link its device: {}", link_id.error);
            self.do_without(now, id, why, fx);
            return;
        }
        self.open_links.waiting.remove(&link_id.group);
        for (member, group) in self.members.iter().zip(&self.groups) {
            if *group == link_id.group {
                self.send(*member, down::Body::LinkId(link_id.clone()), fx);
            }
        }
    }

    /// A generation whose ids do not come in time is replaced. Returns whether it was.
    pub(super) fn settle_links(&mut self, now: Millis, fx: &mut Vec<Effect>) -> bool {
        let late = now.saturating_sub(self.open_links.since) > millis(self.s.timeouts.max_stall);
        let Some((_, leader)) = self.open_links.waiting.first_key_value() else {
            return false;
        };
        if !late {
            return false;
        }
        let leader = *leader;
        let why = format!("worker {leader} made no id for its device links in time");
        if self.link_trouble() {
            self.do_without(now, leader, why, fx);
        } else {
            self.about(leader, Reason::LinksBroken, why, fx);
            self.open_generation(now, fx);
        }
        true
    }

    /// Counts a generation that its links have cost; returns whether it was one too many.
    pub(super) fn link_trouble(&mut self) -> bool {
        self.link_record.troubles += 1;
        self.link_record.troubles > LINK_TROUBLES_MAX
    }

    /// A step was committed: what was wrong with the links has passed.
    pub(super) fn links_work(&mut self) {
        self.link_record.troubles = 0;
    }

    /// An exchange over device links failed and nobody is to blame. Returns whether TCP is used
    /// from now on.
    pub(super) fn links_broke(&mut self, fx: &mut Vec<Effect>) -> bool {
        let linked = self.links == v1::Links::Device;
        if !linked || !self.link_trouble() {
            return false;
        }
        let troubles = self.link_record.troubles;
        let why = format!("device links broke {troubles} times in a row, and nobody died");
        self.notice(Reason::LinksBroken, why.clone(), fx);
        self.link_record.given_up = Some(why);
        true
    }

    /// Goes on without the links, or without the worker where a ring needs them.
    fn do_without(&mut self, now: Millis, id: u64, why: String, fx: &mut Vec<Effect>) {
        if self.same_bits() {
            self.link_record.given_up = Some(why);
            self.open_generation(now, fx);
            return;
        }
        let reason =
            format!("collective.transport = \"nccl_ring\" needs NCCL on every worker: {why}");
        self.send(id, down::Body::Refused(v1::Refused { reason }), fx);
        self.lose(now, id, &why, fx);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(host: &str, unit: &str, missing: &str) -> v1::Device {
        v1::Device {
            host: host.into(),
            unit: unit.into(),
            links_missing: missing.into(),
        }
    }

    #[test]
    fn what_stands_against_links_is_named() {
        let (a, b) = (device("h", "g0", ""), device("h", "g1", ""));
        assert_eq!(obstacle([(1, &a), (2, &b)].into_iter()), None);
        let told = obstacle([(1, &a), (2, &a)].into_iter()).expect("shared");
        assert!(told.contains("workers 1 and 2 share"), "{told}");
        let lacks = device("far", "g0", "no libnccl.so");
        let told = obstacle([(1, &a), (3, &lacks)].into_iter()).expect("lacks");
        assert_eq!(told, "worker 3 on far: no libnccl.so");
    }

    #[test]
    fn hosts_are_numbered_as_they_appear() {
        let hosts = ["b", "a", "b", "c"].map(|h| device(h, "", ""));
        assert_eq!(by_host(hosts.iter()), [0, 1, 0, 2]);
    }
}
