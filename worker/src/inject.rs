//! Broken memory and arithmetic to order: one bit flipped once, where a test says, so that it can be
//! seen to be found. It refuses to know who finds it.

use std::str::FromStr;
use std::sync::Arc;

use belfry_model::Gradient;
use belfry_proto::Digest;
use xxhash_rust::xxh3::Xxh3;

use crate::core::Event;
use crate::held::HeldState;

/// A bit of the mantissa: the value stays finite and near, as the worst faults do.
const BIT: u32 = 1 << 20;

/// Where a bit flips.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// A lane's gradient, before it is summed with others.
    Lane,
    /// This worker's copy of the reduced gradient, before its digest.
    Sum,
    /// The parameters, behind the update of the step.
    State,
}

/// A fault that happens once: `flip-lane@step=N`, `flip-sum@step=N` or `flip-state@step=N`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Injection {
    place: Place,
    step: u64,
}

impl FromStr for Injection {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = [
            ("flip-lane", Place::Lane),
            ("flip-sum", Place::Sum),
            ("flip-state", Place::State),
        ];
        let parsed = text.split_once("@step=").and_then(|(name, step)| {
            let (_, place) = known.into_iter().find(|(known, _)| *known == name)?;
            let step = step.parse().ok()?;
            Some(Injection { place, step })
        });
        parsed.ok_or_else(|| {
            format!("`{text}` is none of flip-lane@step=N, flip-sum@step=N, flip-state@step=N")
        })
    }
}

/// What is still to happen.
#[derive(Debug, Default)]
pub(crate) struct Inject(Option<Injection>);

impl Inject {
    pub(crate) fn new(injection: Option<Injection>) -> Self {
        Inject(injection)
    }

    fn due(&mut self, place: Place, step: u64) -> bool {
        let due = self.0 == Some(Injection { place, step });
        if due {
            self.0 = None;
            tracing::warn!(step, ?place, "injected: one bit is flipped");
        }
        due
    }

    /// What the core is about to hear.
    pub(crate) fn event(&mut self, event: &mut Event) {
        match event {
            Event::LaneDone {
                step,
                gradient: Gradient::Host(values),
                ..
            } if self.due(Place::Lane, *step) => {
                flip(Arc::make_mut(values).as_mut_slice());
            }
            Event::Reduced {
                step, sum, digest, ..
            } if self.due(Place::Sum, *step) => {
                flip(sum);
                let mut hash = Xxh3::new();
                sum.iter().for_each(|x| hash.update(&x.to_le_bytes()));
                *digest = Digest(hash.digest128());
            }
            _ => {}
        }
    }

    /// The state behind the update of `step`; nobody else holds it yet.
    pub(crate) fn state(&mut self, step: u64, state: &mut Arc<HeldState>) {
        if let Some(HeldState::Host(state)) = Arc::get_mut(state)
            && self.due(Place::State, step)
        {
            flip(&mut state.parameters);
        }
    }
}

/// Flips a bit of the middle value that is not zero.
fn flip(values: &mut [f32]) {
    let middle = values.len() / 2;
    let behind = &mut values[middle..];
    if let Some(value) = behind.iter_mut().find(|x| **x != 0.0) {
        *value = f32::from_bits(value.to_bits() ^ BIT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_flips_once_at_its_step() {
        let injection = "flip-sum@step=4".parse().expect("is one");
        let mut inject = Inject::new(Some(injection));
        let reduced = |step| Event::Reduced {
            generation: 1,
            step,
            sum: vec![0.0, 1.0, 0.0, 2.0],
            digest: Digest(0),
            finite: true,
            late: Default::default(),
            digests: Default::default(),
        };
        let mut flipped = Vec::new();
        for step in [3, 4, 4] {
            let mut event = reduced(step);
            inject.event(&mut event);
            let Event::Reduced { sum, digest, .. } = event else {
                unreachable!("stays what it is")
            };
            flipped.push((sum != [0.0, 1.0, 0.0, 2.0], digest != Digest(0)));
        }
        assert_eq!(flipped, [(false, false), (true, true), (false, false)]);
        let refused = "flip-sum@4".parse::<Injection>().expect_err("is none");
        assert!(refused.contains("flip-state@step=N"), "{refused}");
    }
}
