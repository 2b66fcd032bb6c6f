//! The order in which a coordinator's effects leave it: what must be durable first holds back what
//! follows, while events are still taken in.
//!
//! Pure, so that the simulator obeys it too. It refuses to know how anything is written or sent: it
//! is told when the write that holds the others back is settled.

use std::collections::VecDeque;

use belfry_proto::v1::Reason;

use crate::core::Effect;

/// Effects that may wait for a write: a store that is away for long then holds back events too,
/// because the shell takes in no more of them.
pub const WAITING_MAX: usize = 1 << 16;

/// Effects behind a write that is not settled.
#[derive(Debug, Default)]
pub struct Outgoing {
    waiting: VecDeque<Effect>,
    /// A write is under way that must be durable before anything behind it leaves.
    held: bool,
}

impl Outgoing {
    /// Takes effects in their order; returns those that may leave now, a barrier as the last.
    pub fn push(&mut self, effects: impl IntoIterator<Item = Effect>) -> Vec<Effect> {
        let mut now = Vec::new();
        for effect in effects {
            if self.held && !passes_by(&effect) {
                self.waiting.push_back(effect);
                continue;
            }
            self.held |= is_barrier(&effect);
            now.push(effect);
        }
        now
    }

    /// The barrier that left last is durable; returns what may leave now, up to the next one.
    pub fn settled(&mut self) -> Vec<Effect> {
        let mut now = Vec::new();
        self.held = false;
        while let Some(effect) = self.waiting.pop_front() {
            self.held = is_barrier(&effect);
            now.push(effect);
            if self.held {
                break;
            }
        }
        now
    }

    /// Whether no more events should be taken in.
    pub fn is_full(&self) -> bool {
        self.waiting.len() >= WAITING_MAX
    }
}

/// Whether what follows this effect waits until it is durable.
pub fn is_barrier(effect: &Effect) -> bool {
    match effect {
        Effect::Journal { ahead, .. } => !ahead,
        Effect::StoreData(_) | Effect::StoreResult { .. } => true,
        _ => false,
    }
}

/// That the store is away must be heard while it is; so must what the run waits for. Neither tells
/// of a decision that is not written.
fn passes_by(effect: &Effect) -> bool {
    let event = match effect {
        // Who leads no more waits for no write.
        Effect::StepDown { .. } => return true,
        Effect::Emit(event) => event,
        _ => return false,
    };
    match event.reason() {
        Reason::StoreUnavailable | Reason::StoreBack => true,
        Reason::Unspecified => {
            let status = event.notice.is_empty() && event.checkpoint == 0;
            status && event.committed.is_none() && event.evaluated.is_none()
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use belfry_proto::v1::RunEvent;

    fn entry(generation: u64, ahead: bool) -> Effect {
        Effect::Journal {
            generation,
            committed: 0,
            horizon: 9,
            members: Vec::new(),
            quarantine: Vec::new(),
            ahead,
        }
    }

    fn told(reason: Reason) -> Effect {
        let mut event = RunEvent {
            notice: "told".into(),
            ..Default::default()
        };
        event.set_reason(reason);
        Effect::Emit(Box::new(event))
    }

    /// Their names, so that order can be compared.
    fn names(effects: &[Effect]) -> Vec<String> {
        let name = |e: &Effect| match e {
            Effect::Journal { generation, .. } => format!("entry {generation}"),
            Effect::Close(session) => format!("close {session}"),
            Effect::Emit(event) => event.reason().as_str_name().to_owned(),
            other => format!("{other:?}"),
        };
        effects.iter().map(name).collect()
    }

    #[test]
    fn nothing_overtakes_an_entry_that_is_not_written() {
        let mut outgoing = Outgoing::default();
        let effects = [
            Effect::Close(1),
            entry(1, false),
            Effect::Close(2),
            entry(2, false),
            Effect::Close(3),
        ];
        let now = outgoing.push(effects);
        assert_eq!(names(&now), ["close 1", "entry 1"]);
        assert_eq!(names(&outgoing.push([Effect::Close(4)])), [""; 0]);
        assert_eq!(names(&outgoing.settled()), ["close 2", "entry 2"]);
        assert_eq!(names(&outgoing.settled()), ["close 3", "close 4"]);
        assert_eq!(names(&outgoing.push([Effect::Close(5)])), ["close 5"]);
    }

    #[test]
    fn an_entry_ahead_of_need_holds_nothing_back_and_keeps_its_place() {
        let mut outgoing = Outgoing::default();
        let now = outgoing.push([entry(1, true), Effect::Close(1)]);
        assert_eq!(names(&now), ["entry 1", "close 1"]);
        let now = outgoing.push([entry(2, false), entry(2, true), Effect::Close(2)]);
        assert_eq!(names(&now), ["entry 2"]);
        assert_eq!(names(&outgoing.settled()), ["entry 2", "close 2"]);
    }

    #[test]
    fn that_the_store_is_away_is_heard_while_it_is() {
        let mut outgoing = Outgoing::default();
        outgoing.push([entry(1, false)]);
        let status = Effect::Emit(Box::default());
        let effects = [
            told(Reason::StoreUnavailable),
            told(Reason::GenerationOpened),
            status,
        ];
        let now = outgoing.push(effects);
        let expected = ["REASON_STORE_UNAVAILABLE", "REASON_UNSPECIFIED"];
        assert_eq!(names(&now), expected);
        assert_eq!(names(&outgoing.settled()), ["REASON_GENERATION_OPENED"]);
    }

    #[test]
    fn it_says_when_it_is_full() {
        let mut outgoing = Outgoing::default();
        outgoing.push([entry(1, false)]);
        outgoing.push((0..WAITING_MAX as u64 - 1).map(Effect::Close));
        assert!(!outgoing.is_full());
        outgoing.push([Effect::Close(0)]);
        assert!(outgoing.is_full());
        assert_eq!(outgoing.settled().len(), WAITING_MAX);
        assert!(!outgoing.is_full());
    }
}
