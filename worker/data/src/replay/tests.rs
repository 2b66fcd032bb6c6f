//! Every pair of every epoch is marked once; what is not confirmed is named.

use std::time::Instant;

use belfry_configs::{Dataset, Datasets};
use shard_tools::manifest::{Manifest, SCHEMA_VERSION, ShardEntry, Source};
use shard_tools::pair::Contents;

use super::*;

fn manifest(shards: u32, pairs: u32) -> Manifest {
    let entry = |number| ShardEntry {
        file: format!("{number:06}.tar"),
        index_file: format!("{number:06}.json"),
        bytes: 0,
        sha256: String::new(),
        index_sha256: String::new(),
        samples: pairs,
        pairs,
        source_samples: Vec::new(),
        source_pairs: Vec::new(),
    };
    let all = u64::from(shards) * u64::from(pairs);
    Manifest {
        schema_version: SCHEMA_VERSION,
        dataset: "test".into(),
        contents: Contents::Captions,
        sources: vec![Source {
            name: "s".into(),
            samples: all,
            pairs: all,
        }],
        files: Vec::new(),
        samples: all,
        pairs: all,
        shards: (0..shards).map(entry).collect(),
    }
}

/// Datasets of equal shards, `rounds` rounds, `lanes` lanes of `share` pairs a step.
fn replay(datasets: &[(u32, u32)], rounds: u32, (lanes, share): (u32, u32)) -> Replay {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/tiny.toml");
    let loaded = belfry_configs::load(file.as_ref(), &[]).expect("tiny.toml is valid");
    let mut config = (*loaded).clone();
    config.batch.lanes = lanes;
    config.batch.global_batch = lanes * share;
    config.batch.micro_batch = 1;
    config.data.rounds = rounds;
    config.data.window_shards = 4;
    config.data.pack_from = None;
    let dataset = |number| Dataset {
        path: format!("d{number}"),
        weight: None,
    };
    config.data.train = Datasets((0..datasets.len()).map(dataset).collect());
    let config = config.validate().expect("valid");
    let manifests = datasets
        .iter()
        .map(|(shards, pairs)| manifest(*shards, *pairs));
    let sequence = Sequence::open(&config, manifests.collect()).expect("fits");
    Replay::new(sequence)
}

/// Walks `steps` steps and closes what they complete.
fn walk(
    replay: &mut Replay,
    steps: u64,
    quarantine: impl Fn(u64) -> Quarantine,
    confirms: impl Fn(u64, u32) -> bool + Sync,
) -> Vec<EpochReport> {
    let mut closed = Vec::new();
    for step in 0..steps {
        replay.walk(&[(step, quarantine(step))], |_, lane, _| {
            confirms(step, lane)
        });
        closed.extend(replay.close(step + 1));
    }
    closed
}

#[test]
fn every_pair_of_every_completed_epoch_is_trained_once() {
    let mut replay = replay(&[(5, 7), (3, 10)], 2, (4, 3));
    let closed = walk(&mut replay, 20, |_| Quarantine::new(), |_, _| true);
    let epochs = |dataset| closed.iter().filter(|e| e.dataset == dataset).count() as u64;
    // 240 pairs of 65: both datasets end their epochs together.
    assert_eq!((epochs(0), epochs(1)), (3, 3));
    assert!(closed.iter().all(|e| e.exact() && e.trained == e.pairs));
    assert!(replay.open.len() <= 4, "closed epochs are forgotten");
    assert!(replay.unfinished().all(|e| e.trained < e.pairs));
}

#[test]
fn pairs_of_a_lane_that_nobody_confirms_are_named() {
    let mut replay = replay(&[(5, 8)], 1, (4, 2));
    let wrong = |step, lane| (step, lane) != (2, 3);
    let closed = walk(&mut replay, 11, |_| Quarantine::new(), wrong);
    let lacking = replay.sequence().pairs(2, 3, &Quarantine::new());
    let mut lacking: Vec<u64> = lacking.iter().map(|pair| pair.id).collect();
    lacking.sort_unstable();
    assert_eq!(closed[0].missing_named, lacking);
    assert_eq!((closed[0].missing, closed[0].trained), (2, 38));
    assert!(closed[1].exact());
    // A step that is walked twice was trained twice.
    let again = replay.sequence().pairs(10, 0, &Quarantine::new());
    replay.walk(&[(10, Quarantine::new())], |_, lane, _| lane == 0);
    let open = replay.unfinished().next().expect("an epoch is open");
    assert_eq!(open.repeated, 2);
    assert!(open.repeated_named.contains(&again[0].id));
}

#[test]
fn pairs_under_quarantine_are_counted_where_others_stand_for_them() {
    let lost = ShardRef {
        dataset: 0,
        shard: 2,
    };
    let mut replay = replay(&[(5, 8)], 1, (4, 2));
    let from = |step| {
        if step < 5 {
            Quarantine::new()
        } else {
            [lost].into()
        }
    };
    let closed = walk(&mut replay, 10, from, |_, _| true);
    assert!(closed[0].exact() && closed[0].substituted == 0);
    assert!(closed[1].exact());
    assert_eq!((closed[1].trained, closed[1].substituted), (32, 8));
    assert_eq!(replay.replaced(), &BTreeMap::from([(lost, 8)]));
}

/// The paper's pre-training: 9 million pairs in 4,000 shards, 128 lanes of 32.
#[test]
fn a_large_run_is_walked_quickly_with_a_bit_per_pair() {
    const STEPS: u64 = 64;
    let mut replay = replay(&[(4000, 2250)], 4, (128, 32));
    let steps: Vec<_> = (0..STEPS).map(|step| (step, Quarantine::new())).collect();
    let begun = Instant::now();
    replay.walk(&steps, |_, _, _| true);
    let each = begun.elapsed().as_secs_f64() / STEPS as f64;
    let marked: usize = replay.open.values().map(|m| m.seen.len() * 8).sum();
    println!(
        "a step of 4096 pairs is walked in {:.2} ms: 100,000 steps in {:.0} s; {:.1} MB of marks",
        each * 1e3,
        each * 1e5,
        marked as f64 / 1e6
    );
    assert!(marked < 2_000_000, "{marked}");
}
