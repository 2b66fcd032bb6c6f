//! The checker bites: bugs planted into the cores, one at a time, and how many seeds find each.

use std::collections::BTreeMap;

use belfry_coordinator::core::Planted as Lead;
use belfry_simulator::Plants;
use belfry_worker::core::Planted as Work;

use crate::cases::{Case, on_all_cores};

/// Seeds that each bug is given.
const SEEDS: u64 = 1_000;

/// Bugs, each with the seeds within which it must be found.
const BUGS: [(Plants, u64); 11] = [
    lead(Lead::CommitsEarly, 10),
    lead(Lead::OldReady, 200),
    lead(Lead::AnnouncesFirst, 10),
    lead(Lead::IgnoresHorizon, 200),
    lead(Lead::LanesTwice, 50),
    lead(Lead::ManifestEarly, 10),
    lead(Lead::ForgetsReceipts, 200),
    work(Work::KeepsPartials, 10),
    work(Work::KeepsFeatures, 10),
    work(Work::TakesOldSums, SEEDS),
    work(Work::KeepsLostShards, SEEDS),
];

const fn lead(bug: Lead, within: u64) -> (Plants, u64) {
    let (lead, worker) = (Some(bug), None);
    (Plants { lead, worker }, within)
}

const fn work(bug: Work, within: u64) -> (Plants, u64) {
    let (lead, worker) = (None, Some(bug));
    (Plants { lead, worker }, within)
}

/// What found a bug: an invariant of the simulation, or a check of the core itself.
fn finder(why: &str) -> String {
    let quoted = why.split('`').nth(1);
    match quoted.filter(|_| why.starts_with("invariant")) {
        Some(invariant) => invariant.to_owned(),
        None => {
            let text = why.lines().next().unwrap_or_default();
            let text = text.rsplit_once("Err(").map_or(text, |(_, error)| error);
            let text = text.replace(|c: char| c.is_ascii_digit(), "");
            format!("the core itself: {text}")
        }
    }
}

#[test]
fn planted_bugs_are_found() {
    println!("{:<18} {:>6} {:>12}  found by", "bug", "first", "of 1,000");
    let mut missed = Vec::new();
    for (planted, within) in BUGS {
        let name = match planted {
            Plants {
                lead: Some(bug), ..
            } => format!("{bug:?}"),
            Plants { worker, .. } => format!("{:?}", worker.expect("a bug")),
        };
        let found: Vec<BTreeMap<u64, String>> =
            on_all_cores(0..SEEDS, |seed, found: &mut BTreeMap<u64, String>| {
                let mut case = Case::of(seed);
                case.setup.planted = planted;
                if let Err(failure) = case.run() {
                    found.insert(seed, finder(&failure.why));
                }
            });
        let found: BTreeMap<u64, String> = found.into_iter().flatten().collect();
        let first = found
            .first_key_value()
            .map(|(seed, why)| (*seed + 1, why.clone()));
        let (seeds, why) = first.unwrap_or((u64::MAX, "nothing".into()));
        let mut by: BTreeMap<&str, usize> = BTreeMap::new();
        found
            .values()
            .for_each(|why| *by.entry(why.as_str()).or_default() += 1);
        println!("{name:<18} {seeds:>6} {:>12}  {why}", found.len());
        by.iter()
            .filter(|(other, _)| **other != why)
            .for_each(|(other, n)| {
                println!("{:>40}  {n} by {other}", "");
            });
        if seeds > within {
            missed.push(format!(
                "{name} is found after {seeds} seeds, not within {within}"
            ));
        }
    }
    assert!(missed.is_empty(), "{missed:#?}");
}
