//! Seeded simulation: the cores that run in production, under faults at random moments. A run must
//! end with the reference's bits and a receipt for every step, whatever happens on the way.
//!
//! A failure prints its seed; `BELFRY_SEED=…` runs that one alone with its log, `BELFRY_SEEDS=…`
//! runs so many.

use belfry_coordinator::core::LinkPolicy;
use belfry_simulator::{Fault, SHARDS, Sizes, World};

/// Seeds of an ordinary test run: seconds.
const SEEDS: u64 = 1500;
/// Faults end before this time.
const FAULTS_UNTIL_MS: u64 = 3_000;
/// After the last fault a run must end within this time: many timeouts, and no more.
const PATIENCE_MS: u64 = 300_000;

fn environment(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn world(seed: u64) -> World {
    let mut world = World::new(
        seed,
        Sizes {
            workers: 1,
            lanes: 1,
            steps: 1,
            checkpoint_every: 1,
            parts: 1,
            stall_ms: 3_400,
            links: LinkPolicy::Tcp,
            lacks_links: false,
            quarantine_shards_max: 0,
            horizon_steps: 64,
            audit_every: 0,
        },
    );
    let sizes = Sizes {
        workers: 1 + world.below(5) as usize,
        lanes: [3, 4, 7, 8][world.below(4) as usize],
        steps: 4 + world.below(20),
        checkpoint_every: 2 + world.below(6),
        parts: 1 + world.below(4) as u32,
        stall_ms: 3_400,
        links: [
            LinkPolicy::Tcp,
            LinkPolicy::Device {
                hierarchical: false,
            },
            LinkPolicy::Device { hierarchical: true },
        ][world.below(3) as usize],
        lacks_links: world.below(4) == 0,
        quarantine_shards_max: world.below(4) as u32,
        horizon_steps: 1 + world.below(6),
        audit_every: world.below(4),
    };
    let mut world = World::new(seed.wrapping_mul(31) + 7, sizes);
    for _ in 0..world.below(9) {
        let at = world.below(FAULTS_UNTIL_MS);
        let worker = world.below(sizes.workers as u64) as usize;
        let time = world.below(4_000);
        let shard = world.below(SHARDS.into()) as u32;
        let fault = match world.below(11) {
            0 | 1 => Fault::KillWorker(worker),
            2 | 3 => Fault::KillCoordinator,
            4 => Fault::PauseWorker(worker, time),
            5 => Fault::PauseCoordinator(time),
            6 => Fault::CutSession(worker),
            7 => Fault::BreakExchange(worker),
            8 => Fault::Terminate(worker),
            9 => Fault::LoseShard(Some(worker), shard),
            _ => Fault::LoseShard(None, shard),
        };
        world.schedule(at, fault);
    }
    world
}

fn check(seed: u64) -> World {
    let mut world = world(seed);
    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let ended = world.run(FAULTS_UNTIL_MS + PATIENCE_MS);
        assert!(ended, "the run did not end");
        world.check_end();
        // The cure for a member that does nothing must not be needed.
        let idle = world.log.iter().find(|line| line.contains("it is idle"));
        assert_eq!(idle, None, "a member was idle");
    }));
    if let Err(panic) = ended {
        for line in &world.log {
            eprintln!("{line}");
        }
        eprintln!(
            "seed {seed}, {:?}: BELFRY_SEED={seed} repeats it",
            world.sizes
        );
        std::panic::resume_unwind(panic);
    }
    world
}

#[test]
fn faults_at_any_moment_change_no_bit_and_stop_no_run() {
    if let Some(seed) = environment("BELFRY_SEED") {
        let world = check(seed);
        world.log.iter().for_each(|line| println!("{line}"));
        return;
    }
    let seeds = environment("BELFRY_SEEDS").unwrap_or(SEEDS);
    let (mut repeated, mut faults) = (0u64, 0usize);
    let (mut quarantines, mut restored) = (0, 0);
    for seed in 0..seeds {
        let world = check(seed);
        repeated += world.commits.values().filter(|n| **n > 1).count() as u64;
        quarantines += world.quarantines;
        restored += world.restored;
        faults += world
            .log
            .iter()
            .filter(|line| line.contains("FAULT"))
            .count();
    }
    println!(
        "{seeds} runs, {faults} faults, {repeated} steps committed again to the same bits, \
         {quarantines} quarantines, {restored} stops until a shard was back"
    );
    assert!(
        faults > 0 && quarantines > 0 && restored > 0,
        "faults fired"
    );
}

/// Without faults a run computes every lane of every step once and opens one generation.
#[test]
fn an_undisturbed_run_does_nothing_twice() {
    for workers in 1..=5 {
        let sizes = Sizes {
            workers,
            lanes: 8,
            steps: 6,
            checkpoint_every: 3,
            parts: 4,
            stall_ms: 3_400,
            links: LinkPolicy::Tcp,
            lacks_links: false,
            quarantine_shards_max: 0,
            horizon_steps: 64,
            audit_every: 0,
        };
        let mut world = World::new(workers as u64, sizes);
        assert!(world.run(PATIENCE_MS), "the run did not end");
        world.check_end();
        assert_eq!(world.lanes_computed, 8 * 6, "{workers} workers");
        assert!(world.commits.values().all(|n| *n == 1));
        let generations = world
            .log
            .iter()
            .filter(|l| l.contains("] generation"))
            .count();
        assert_eq!(generations, 1, "{:#?}", world.log);
    }
}
