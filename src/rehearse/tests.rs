//! What every rehearsal must satisfy, on the small run of this repository.

use std::path::Path;

use super::*;

fn scenario(settings: &[&str], mtbf_seconds: Option<f64>, hours: f64) -> Scenario {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/quickstart.toml");
    let settings: Vec<String> = settings.iter().map(|s| (*s).to_owned()).collect();
    let config = belfry_configs::load(&file, &settings).expect("is valid");
    let footprint = Footprint::of(&config).expect("is counted");
    let cluster = Cluster {
        workers: 4,
        coordinators: 1,
        // Two lanes a worker: a second and a half a step, and the exchange.
        lane_seconds: 0.75,
        bandwidth: 10.0,
        store_bandwidth: 5.0,
        restart: Time(5.0),
    };
    let per_process = mtbf_seconds.map_or(0, |s| (s * 4e3) as u64);
    let mtbf = Mtbf {
        worker_ms: per_process,
        coordinator_ms: per_process,
    };
    Scenario::new(&config, &footprint, cluster, mtbf, Time(hours * 3600.0))
}

fn run(scenario: &Scenario, seed: u64) -> Outcome {
    Outcome::of(scenario, seed, |_| {}).expect("the rehearsed run goes on")
}

#[test]
fn without_failures_all_time_is_steps() {
    let scenario = scenario(&[], None, 2.0);
    let outcome = run(&scenario, 1);
    let goodput = outcome.goodput();
    let expected = scenario.millis as f64 / scenario.step_ms;
    assert!(
        (0.998..=1.002).contains(&goodput),
        "{goodput}: {:?}",
        outcome.losses
    );
    let steps = outcome.counts.steps;
    assert!(
        (steps as f64 - expected).abs() <= 0.002 * expected,
        "{steps} of {expected}"
    );
    let needed = steps * 8 + outcome.counts.audits;
    assert_eq!(outcome.lanes_again(8), outcome.counts.lanes - needed);
    assert!(outcome.lanes_again(8) <= 8, "the open step's only");
    assert_eq!(
        (outcome.counts.steps_again, outcome.counts.generations),
        (0, 1)
    );
    assert!(outcome.stalls.is_empty(), "{:?}", outcome.stalls);
}

#[test]
fn time_adds_up() {
    let outcome = run(&scenario(&[], Some(120.0), 2.0), 3);
    let lost: f64 = outcome.losses.ranked().iter().map(|(_, time)| time).sum();
    let used = outcome.counts.steps as f64 * outcome.step_ms;
    let sum = (lost + used) / outcome.millis as f64;
    assert!(
        (0.9999..=1.0001).contains(&sum),
        "{sum}: {:?}",
        outcome.losses
    );
    let deaths: u64 = outcome.counts.faults.values().sum();
    assert!(
        (30..150).contains(&deaths),
        "about 75 in two hours: {deaths}"
    );
    assert!(
        outcome.counts.generations > deaths,
        "each death and each return opens one"
    );
}

#[test]
fn more_failures_are_not_more_goodput() {
    let mean = |mtbf| {
        let scenario = scenario(&[], mtbf, 1.0);
        (0..4)
            .map(|seed| run(&scenario, seed).goodput())
            .sum::<f64>()
            / 4.0
    };
    let goodputs = [None, Some(3600.0), Some(300.0), Some(60.0), Some(20.0)].map(mean);
    println!("goodput without failures, then more and more: {goodputs:?}");
    let falls = goodputs.windows(2).all(|pair| pair[1] <= pair[0] + 0.01);
    assert!(falls, "{goodputs:?}");
    assert!(goodputs[4] < goodputs[0] - 0.05, "{goodputs:?}");
}

#[test]
fn twice_the_interval_is_half_the_traffic() {
    let bytes = |every: &str| {
        run(&scenario(&[every], None, 2.0), 5)
            .counts
            .checkpoint_bytes as f64
    };
    let ratio = bytes("checkpoint.every_steps=50") / bytes("checkpoint.every_steps=100");
    assert!((1.9..2.15).contains(&ratio), "{ratio}");
}

#[test]
fn a_rehearsal_repeats_itself() {
    let scenario = scenario(&[], Some(60.0), 0.5);
    let once = run_all(&scenario, 7, 2, "").expect("goes on");
    let twice = run_all(&scenario, 7, 2, "").expect("goes on");
    assert_eq!(once, twice);
    assert_ne!(once[0], once[1], "seeds differ");
}

#[test]
fn the_curve_is_a_figure_with_its_axes() {
    let scenario = scenario(&[], None, 0.1);
    let outcome = run(&scenario, 0);
    assert!(outcome.goodput() > 0.5, "{:?}", outcome.losses);
    let figure = curve::svg("a title", &[]).expect("is drawn");
    for words in ["a title", "goodput", "mean time between", "</svg>"] {
        assert!(figure.contains(words), "{words}");
    }
}
