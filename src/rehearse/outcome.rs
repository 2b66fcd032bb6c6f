//! One rehearsal: a seed's run through simulated failures, and where its time went.

use anyhow::bail;
use belfry_simulator::{Counts, Request, World};
use serde::Serialize;

use super::scenario::Scenario;

/// Looks at the world per undisturbed step: how exactly a commit's time is known.
const LOOKS_PER_STEP: f64 = 400.0;
/// Where the time that no step used went, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Losses {
    /// Until the first commit.
    pub start: f64,
    /// Commits of steps that had been committed before.
    pub again: f64,
    /// Steps during which a coordinator took over.
    pub coordinator: f64,
    /// Steps during which a membership changed: repair, copies, connections.
    pub generations: f64,
    /// Steps in which fewer workers had more lanes each.
    pub slower: f64,
    /// After the last commit.
    pub end: f64,
}

impl Losses {
    /// Names and times, the largest first.
    pub fn ranked(&self) -> Vec<(&'static str, f64)> {
        let mut all = vec![
            ("start until the first commit", self.start),
            ("steps computed again", self.again),
            ("changes of the coordinator", self.coordinator),
            ("changes of the membership", self.generations),
            ("more lanes for fewer workers", self.slower),
            ("the unfinished last step", self.end),
        ];
        all.sort_by(|(_, a), (_, b)| b.total_cmp(a));
        all
    }

    fn add(&mut self, other: Losses) {
        self.start += other.start;
        self.again += other.again;
        self.coordinator += other.coordinator;
        self.generations += other.generations;
        self.slower += other.slower;
        self.end += other.end;
    }
}

/// See the module.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    pub counts: Counts,
    pub losses: Losses,
    /// Time beyond an undisturbed step of each step that a change of membership or of coordinator
    /// stalled, in milliseconds, ascending.
    pub stalls: Vec<u64>,
    /// Milliseconds that were simulated.
    pub millis: u64,
    /// Milliseconds of an undisturbed step.
    pub step_ms: f64,
}

/// What was known at a commit.
#[derive(Clone, Copy, Default)]
struct Seen {
    at: u64,
    steps: u64,
    again: u64,
    terms: u64,
    generations: u64,
}

impl Seen {
    fn of(world: &World, at: u64) -> Self {
        let counts = &world.counts;
        Seen {
            at,
            steps: counts.steps,
            again: counts.steps_again,
            terms: counts.terms,
            generations: counts.generations,
        }
    }
}

impl Outcome {
    /// Runs the scenario with this seed; `progress` is told simulated milliseconds.
    ///
    /// # Errors
    /// The run failed, and why.
    pub fn of(scenario: &Scenario, seed: u64, progress: impl Fn(u64)) -> anyhow::Result<Self> {
        let mut world = World::new(seed, scenario.setup.clone(), scenario.costs.clone());
        world.silent = true;
        world.fail_at_random(scenario.mtbf);
        let step_ms = scenario.step_ms;
        let slice = ((step_ms / LOOKS_PER_STEP) as u64).max(1);
        let mut outcome = Outcome {
            counts: Counts::default(),
            losses: Losses::default(),
            stalls: Vec::new(),
            millis: scenario.millis,
            step_ms,
        };
        let mut before = Seen::default();
        let mut now = 0;
        while now < scenario.millis {
            now = (now + slice).min(scenario.millis);
            if world.run(now) {
                let (_, reason) = world.outcome.clone().unwrap_or_default();
                let hours = now as f64 / 3.6e6;
                bail!("seed {seed}: the rehearsed run ended after {hours:.1} hours: {reason}");
            }
            let seen = Seen::of(&world, now);
            if seen.steps > before.steps || seen.again > before.again {
                outcome.account(before, seen);
                before = seen;
                progress(now);
            }
        }
        outcome.losses.end = (now - before.at) as f64;
        outcome.counts = world.counts.clone();
        Ok(outcome)
    }

    /// The time since the last commit: a step, and what was lost.
    fn account(&mut self, before: Seen, seen: Seen) {
        let new = seen.steps - before.steps;
        // Where fewer lanes were to be computed again a step is shorter: sums may fall.
        let excess = (seen.at - before.at) as f64 - new as f64 * self.step_ms;
        let losses = &mut self.losses;
        match before {
            Seen {
                steps: 0, again: 0, ..
            } => losses.start += excess,
            _ if seen.again > before.again => losses.again += excess,
            _ if seen.terms > before.terms => losses.coordinator += excess,
            _ if seen.generations > before.generations => losses.generations += excess,
            _ => {
                losses.slower += excess;
                return;
            }
        }
        let began = before.steps > 0 || before.again > 0;
        if began && excess >= 1.0 {
            let excess = excess as u64;
            let place = self.stalls.partition_point(|stall| *stall < excess);
            self.stalls.insert(place, excess);
        }
    }

    /// Time of undisturbed steps over all time.
    pub fn goodput(&self) -> f64 {
        self.counts.steps as f64 * self.step_ms / self.millis as f64
    }

    /// Lanes computed that no step needed.
    pub fn lanes_again(&self, lanes: u32) -> u64 {
        self.counts
            .lanes
            .saturating_sub(self.counts.steps * u64::from(lanes) + self.counts.audits)
    }

    /// The stall that so large a share of them does not exceed, in milliseconds.
    pub fn stall(&self, share: f64) -> u64 {
        let place = (share * self.stalls.len() as f64).ceil() as usize;
        let place = place.clamp(1, self.stalls.len().max(1)) - 1;
        self.stalls.get(place).copied().unwrap_or(0)
    }

    /// Requests that are paid as writes, and as reads.
    pub fn requests(&self) -> [u64; 2] {
        let sum = |reads: bool| {
            let all = self.counts.requests.iter();
            all.filter(|(kind, _)| is_read(**kind) == reads)
                .map(|(_, n)| n)
                .sum()
        };
        [sum(false), sum(true)]
    }

    /// All runs as one, for shares and distributions.
    pub fn merged(all: &[Outcome]) -> Option<Outcome> {
        let (first, others) = all.split_first()?;
        let mut sum = first.clone();
        for other in others {
            sum.counts.add(&other.counts);
            sum.losses.add(other.losses);
            sum.stalls.extend(&other.stalls);
            sum.millis += other.millis;
        }
        sum.stalls.sort_unstable();
        Some(sum)
    }
}

/// Listing is paid like a write.
fn is_read(request: Request) -> bool {
    matches!(
        request,
        Request::JournalGet | Request::PartGet | Request::StartGet
    )
}
