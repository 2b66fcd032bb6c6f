//! Cases by seed: a small run and the faults that strike it; how one is run, and how a failing one
//! is cut down to the faults that matter.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use belfry_coordinator::core::LinkPolicy;
use belfry_simulator::{Costs, Fault, Process, SHARDS, Setup, World};

/// Faults begin before this time and last no longer than as long again.
const FAULTS_UNTIL_MS: u64 = 3_000;
/// After the last fault a run must end within this time: many timeouts, and no more.
const PATIENCE_MS: u64 = 300_000;

/// One simulated run.
#[derive(Clone, Debug)]
pub struct Case {
    pub seed: u64,
    pub setup: Setup,
    pub faults: Vec<(u64, Fault)>,
}

/// Why a case failed, and what happened before.
#[derive(Debug)]
pub struct Failure {
    pub why: String,
    pub log: Vec<String>,
}

/// A source of numbers for what a seed means.
fn dice(seed: u64) -> World {
    let none = Setup::new(0, 1, 1, Duration::from_secs(1));
    World::new(seed, none, Costs::default())
}

impl Case {
    /// The case of a seed.
    pub fn of(seed: u64) -> Self {
        let mut dice = dice(seed);
        let device = |hierarchical| LinkPolicy::Device { hierarchical };
        let mut setup = Setup::new(1 + dice.below(5) as usize, 1, 1, Duration::from_secs(1));
        setup.lanes = [3, 4, 7, 8][dice.below(4) as usize];
        setup.steps = 4 + dice.below(20);
        setup.checkpoint_every = 2 + dice.below(6);
        setup.parts = 1 + dice.below(4) as u32;
        setup.coordinators = 1 + dice.below(2) as usize;
        setup.links = [LinkPolicy::Tcp, device(false), device(true)][dice.below(3) as usize];
        setup.lacks_links = dice.below(4) == 0;
        setup.quarantine_shards_max = dice.below(4) as u32;
        setup.horizon_steps = 1 + dice.below(6);
        setup.audit_every = dice.below(4);
        let mut faults = Vec::new();
        for _ in 0..dice.below(10) {
            let at = dice.below(FAULTS_UNTIL_MS);
            faults.push((at, fault(&mut dice, &setup)));
        }
        if setup.coordinators > 1 && dice.below(4) == 0 {
            faults.extend(overslept(&mut dice, &setup));
        }
        // Drawn last: what a seed meant before features were gathered it means still.
        setup.gathers = dice.below(3) == 0;
        setup.evaluate_every = dice.below(5);
        Case {
            seed,
            setup,
            faults,
        }
    }

    pub fn world(&self) -> World {
        let seed = self.seed.wrapping_mul(31) + 7;
        let mut world = World::new(seed, self.setup.clone(), Costs::default());
        for (at, fault) in &self.faults {
            world.schedule(*at, fault.clone());
        }
        world
    }

    /// Runs it to its end.
    pub fn run(&self) -> Result<World, Failure> {
        let mut world = self.world();
        match quietly(|| finish(&mut world)) {
            Ok(()) => Ok(world),
            Err(why) => Err(Failure {
                why,
                log: world.log.into(),
            }),
        }
    }

    /// The same with no fault that the failure does not need.
    pub fn shrunk(&self) -> Case {
        let mut least = self.clone();
        let mut at = 0;
        while at < least.faults.len() {
            let mut less = least.clone();
            less.faults.remove(at);
            match less.run() {
                Err(_) => least = less,
                Ok(_) => at += 1,
            }
        }
        least
    }
}

fn finish(world: &mut World) {
    let ended = world.run(2 * FAULTS_UNTIL_MS + PATIENCE_MS);
    assert!(ended, "invariant `progress once faults stop` is violated");
    world.check_end();
}

/// A leader sleeps, or loses the store, until another leads, and does not know it yet; meanwhile
/// workers look for a leader, now and again.
fn overslept(dice: &mut World, setup: &Setup) -> Vec<(u64, Fault)> {
    let at = 300 + dice.below(FAULTS_UNTIL_MS - 1_500);
    let mut faults = match dice.below(3) {
        0 => vec![
            (at, Fault::Pause(Process::Coordinator(0), 700)),
            (at + 700, Fault::StoreSlow(20, 1_500)),
        ],
        _ => vec![(at, Fault::StoreCut(0, 2_500))],
    };
    for _ in 0..2 + dice.below(8) {
        let worker = dice.below(setup.workers as u64) as usize;
        let cut = at + 600 + dice.below(1_600);
        faults.push((cut, Fault::CutSession(worker)));
    }
    faults
}

fn processes(dice: &mut World, workers: usize) -> Vec<Process> {
    let all = (0..workers).map(Process::Worker);
    let some = all.filter(|_| dice.below(3) == 0);
    some.collect()
}

fn fault(dice: &mut World, setup: &Setup) -> Fault {
    let worker = dice.below(setup.workers as u64) as usize;
    let other = dice.below(setup.workers as u64) as usize;
    let lead = dice.below(setup.coordinators as u64) as usize;
    let time = dice.below(FAULTS_UNTIL_MS);
    let (one, leader) = (Process::Worker(worker), Process::Coordinator(lead));
    match dice.below(29) {
        0 | 1 => Fault::Kill(one),
        2 | 3 => Fault::Kill(leader),
        4 => Fault::KillMidway(one, dice.below(4) as u32),
        5 => Fault::KillMidway(leader, dice.below(12) as u32),
        6 | 7 => Fault::Pause(one, time),
        8 | 9 => Fault::Pause(leader, time),
        10 => Fault::Slow(worker, 2 + dice.below(30), time),
        11 => Fault::Terminate(worker),
        12 => Fault::CutSession(worker),
        13 => Fault::DuplicateSession(worker, 1 + dice.below(800)),
        14 => Fault::HalfOpen(worker),
        15 => Fault::Cut(vec![one], vec![Process::Worker(other), leader], time),
        16 => Fault::Cut(vec![leader], vec![one], time),
        17 => Fault::Partition(vec![one], vec![Process::Worker(other)], time),
        18 => {
            let some = processes(dice, setup.workers);
            let rest = (0..setup.workers).map(Process::Worker);
            let rest = rest.chain([leader]).filter(|p| !some.contains(p)).collect();
            Fault::Partition(some, rest, time)
        }
        19 => {
            let all = (0..setup.workers).map(Process::Worker).collect();
            Fault::Partition(vec![leader], all, time)
        }
        20 => Fault::SlowLink(worker, 2 + dice.below(20), time),
        21 => Fault::BreakExchange(worker),
        22 => Fault::FlipFrame(worker),
        23 => Fault::LateOutcome(worker, time),
        24 => Fault::LoseShard([None, Some(worker)][dice.below(2) as usize], {
            dice.below(SHARDS.into()) as u32
        }),
        25 => Fault::StoreOutage(time),
        27 => Fault::StoreCut(lead, time),
        26 => Fault::StoreSlow(2 + dice.below(20), time),
        _ => match dice.below(2) {
            0 => Fault::StoreErrors(1 + dice.below(6) as u32),
            _ => Fault::StoreLostAnswers(1 + dice.below(6) as u32),
        },
    }
}

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Runs something that may panic, without a word; gives what the panic said.
pub fn quietly<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                usual(info);
            }
        }));
    });
    QUIET.set(true);
    let ended = catch_unwind(AssertUnwindSafe(run));
    QUIET.set(false);
    ended.map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
        text.unwrap_or_else(|| "a panic without words".into())
    })
}

/// Runs something for every seed, on every processor; gives the results of each thread.
pub fn on_all_cores<T>(seeds: std::ops::Range<u64>, run: impl Fn(u64, &mut T) + Sync) -> Vec<T>
where
    T: Default + Send,
{
    let next = AtomicU64::new(seeds.start);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let work = || {
        let mut result = T::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return result;
            }
            run(seed, &mut result);
        }
    };
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let joined = handles.into_iter().map(|h| h.join().expect("a thread"));
        joined.collect()
    })
}
