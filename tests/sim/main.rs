//! Seeded simulation: the cores that run in production, under faults of processes, network and
//! store at random moments. A run must end with the reference's bits and a receipt for every step,
//! whatever happens on the way.
//!
//! A failure prints its seed; `BELFRY_SEED=…` runs that one alone with its log, `BELFRY_SEEDS=…`
//! runs so many, from `BELFRY_FIRST_SEED=…` on.

mod cases;
mod planted;
mod regressions;

use std::time::{Duration, Instant};

use belfry_simulator::{Costs, Counts, Mtbf, Setup, Span, World};

use cases::{Case, Failure, on_all_cores};

/// Seeds of an ordinary test run.
const SEEDS: u64 = 10_000;

fn environment(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Says what a case needs to fail, and fails.
fn report(case: &Case, failure: &Failure) -> ! {
    let least = case.shrunk();
    let (why, log) = match least.run() {
        Err(failure) => (failure.why, failure.log),
        Ok(_) => (failure.why.clone(), failure.log.clone()),
    };
    for line in log {
        eprintln!("{line}");
    }
    eprintln!("{:#?}", least.setup);
    eprintln!(
        "of {} faults it needs {:?}",
        case.faults.len(),
        least.faults
    );
    let seed = case.seed;
    panic!(
        "seed {seed}: {why}\nreplay: BELFRY_SEED={seed} cargo test --release --workspace --test sim \
         -- faults_at_any_moment --nocapture"
    );
}

#[derive(Default)]
struct Tally {
    counts: Counts,
    failures: Vec<(u64, String)>,
}

#[test]
fn faults_at_any_moment_change_no_bit_and_stop_no_run() {
    if let Some(seed) = environment("BELFRY_SEED") {
        let case = Case::of(seed);
        match case.run() {
            Ok(world) => world.log.iter().for_each(|line| println!("{line}")),
            Err(failure) => report(&case, &failure),
        }
        return;
    }
    let seeds = environment("BELFRY_SEEDS").unwrap_or(SEEDS);
    let first = environment("BELFRY_FIRST_SEED").unwrap_or(0);
    let begun = Instant::now();
    let tallies: Vec<Tally> =
        on_all_cores(
            first..first + seeds,
            |seed, tally: &mut Tally| match Case::of(seed).run() {
                Ok(world) => tally.counts.add(&world.counts),
                Err(failure) => tally.failures.push((seed, failure.why)),
            },
        );
    let seconds = begun.elapsed().as_secs_f64();
    let mut total = Counts::default();
    tallies.iter().for_each(|tally| total.add(&tally.counts));
    let mut failures: Vec<_> = tallies.into_iter().flat_map(|t| t.failures).collect();
    failures.sort();
    for (seed, why) in failures.iter().take(20) {
        eprintln!("seed {seed}: {why}");
    }
    if let Some((seed, _)) = failures.first() {
        eprintln!("{} of {seeds} seeds fail", failures.len());
        let case = Case::of(*seed);
        let failure = case.run().err();
        report(&case, &failure.expect("a seed fails always or never"));
    }
    let faults: u64 = total.faults.values().sum();
    println!(
        "{seeds} runs in {seconds:.1} s ({:.0} a second), {faults} faults, {} steps, {} of them \
         committed again to the same bits, {} generations, {} terms, {} quarantines, {} stops until \
         a shard was back",
        seeds as f64 / seconds,
        total.steps,
        total.steps_again,
        total.generations,
        total.terms,
        total.quarantines,
        total.restored
    );
    for (fault, n) in &total.faults {
        println!("{n:>9} {fault}");
    }
    if seeds >= SEEDS {
        assert!(total.faults.len() >= 20, "every kind of fault fired");
        assert!(total.quarantines > 0 && total.restored > 0);
    }
}

/// Without faults a run computes every lane of every step once and opens one generation.
#[test]
fn an_undisturbed_run_does_nothing_twice() {
    for workers in 1..=5 {
        let mut setup = Setup::new(workers, 8, 6, Duration::from_secs(1));
        setup.checkpoint_every = 3;
        setup.parts = 4;
        let mut world = World::new(workers as u64, setup, Costs::default());
        assert!(world.run(60_000), "the run did not end");
        world.check_end();
        assert_eq!(world.counts.lanes, 8 * 6, "{workers} workers");
        assert_eq!(world.counts.generations, 1, "{:#?}", world.log);
        assert!(world.commits().all(|(_, n)| n == 1));
        assert_eq!(world.counts.steps_again, 0);
    }
}

/// Where gradients need all lanes' features, too.
#[test]
fn an_undisturbed_run_that_gathers_does_nothing_twice() {
    for workers in 1..=5 {
        let mut setup = Setup::new(workers, 8, 6, Duration::from_secs(1));
        setup.gathers = true;
        let mut world = World::new(workers as u64, setup, Costs::default());
        assert!(world.run(60_000), "the run did not end");
        world.check_end();
        assert_eq!(world.counts.lanes, 8 * 6, "{workers} workers");
        assert_eq!(world.counts.features, 8 * 6, "{workers} workers");
        assert_eq!(world.counts.generations, 1, "{:#?}", world.log);
    }
}

/// A rehearsal's size: the same seed gives the same run, and a day takes seconds.
#[test]
fn a_day_of_64_workers_that_fail_is_simulated_in_seconds() {
    const DAY_MS: u64 = 24 * 3_600_000;
    let mut setup = Setup::new(64, 64, 1_000_000, Duration::from_secs(10));
    setup.checkpoint_every = 100;
    setup.parts = 16;
    setup.coordinators = 2;
    let costs = Costs {
        lane: Span::new(8_500, 9_500),
        apply: Span::new(50, 100),
        gradient_bytes: 1_400_000_000,
        state_bytes: 4_200_000_000,
        peer_bytes_per_ms: 12_500_000,
        store_bytes_per_ms: 1_000_000,
        store: Span::new(20, 80),
        network: Span::new(1, 2),
        worker_restart: Span::new(20_000, 60_000),
        coordinator_restart: Span::new(1_000, 3_000),
        heartbeats_apart: 4,
        ..Costs::default()
    };
    let begun = Instant::now();
    let mut world = World::new(1, setup, costs);
    world.silent = true;
    world.fail_at_random(Mtbf {
        worker_ms: 64 * 600_000,
        coordinator_ms: 2 * 3_600_000,
    });
    let day = environment("BELFRY_DAY_MS").unwrap_or(DAY_MS);
    assert!(!world.run(day), "a day is not enough: {:?}", world.outcome);
    let seconds = begun.elapsed().as_secs_f64();
    println!("a day in {seconds:.1} s: {:?}", world.counts);
    assert!(world.counts.steps > 6_000, "{}", world.counts.steps);
    assert!(world.counts.faults["worker killed"] > 100);
    assert_eq!(world.counts.steps_again, 0, "no step is lost");
}
