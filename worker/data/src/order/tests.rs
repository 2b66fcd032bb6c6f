//! Every epoch of every dataset is exact, whatever the worker count, the point of a resume and the
//! shape of the data.

use std::collections::{BTreeMap, BTreeSet};

use belfry_configs::{Dataset as Configured, Datasets, FalseImage, Task, ValidConfig};
use proptest::prelude::*;
use shard_tools::manifest::{DataFile, Manifest, SCHEMA_VERSION, ShardEntry, Source};
use shard_tools::pair::Contents;

use super::*;

/// Pairs of each source in each shard.
type Shards = Vec<Vec<u32>>;

fn manifest(shards: &Shards) -> Manifest {
    let sources = shards[0].len();
    let total = |source: usize| shards.iter().map(|s| u64::from(s[source])).sum();
    let source = |number: usize| Source {
        name: format!("s{number}"),
        samples: total(number),
        pairs: total(number),
    };
    let entry = |(number, pairs): (usize, &Vec<u32>)| ShardEntry {
        file: format!("{number:06}.tar"),
        index_file: format!("{number:06}.json"),
        bytes: 0,
        sha256: String::new(),
        index_sha256: String::new(),
        samples: pairs.iter().sum(),
        pairs: pairs.iter().sum(),
        source_samples: pairs.clone(),
        source_pairs: pairs.clone(),
    };
    Manifest {
        schema_version: SCHEMA_VERSION,
        dataset: "test".into(),
        contents: Contents::Captions,
        sources: (0..sources).map(source).collect(),
        files: Vec::new(),
        samples: (0..sources).map(total).sum(),
        pairs: (0..sources).map(total).sum(),
        shards: shards.iter().enumerate().map(entry).collect(),
    }
}

#[derive(Clone, Debug)]
struct Case {
    seed: u64,
    lanes: u32,
    lane_pairs: u32,
    rounds: u32,
    window: u32,
    weights: Option<Vec<f64>>,
    data: Vec<Shards>,
}

impl Case {
    fn config(&self) -> ValidConfig {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/tiny.toml");
        let loaded = belfry_configs::load(file.as_ref(), &[]).expect("tiny.toml is valid");
        let mut config = (*loaded).clone();
        config.run.seed = self.seed;
        config.batch.lanes = self.lanes;
        config.batch.global_batch = self.lanes * self.lane_pairs;
        config.batch.micro_batch = 1;
        config.data.rounds = self.rounds;
        config.data.window_shards = self.window;
        let dataset = |number: usize| Configured {
            path: format!("d{number}"),
            weight: self.weights.as_ref().map(|w| w[number]),
        };
        config.data.train = Datasets((0..self.data.len()).map(dataset).collect());
        config.data.pack_from = None;
        config.validate().expect("valid")
    }

    fn open(&self) -> Sequence {
        let manifests = self.data.iter().map(manifest).collect();
        Sequence::open(&self.config(), manifests).expect("fits")
    }
}

fn cases() -> impl Strategy<Value = Case> {
    let shards = prop::collection::vec(prop::collection::vec(0u32..12, 2), 3..9);
    let data = prop::collection::vec(shards, 1..4);
    let weights = prop::option::of(prop::collection::vec(0.1f64..9.0, 3));
    (
        0u64..1000,
        1u32..9,
        1u32..7,
        1u32..5,
        1u32..5,
        weights,
        data,
    )
        .prop_map(
            |(seed, lanes, lane_pairs, rounds, window, weights, data)| Case {
                seed,
                lanes,
                lane_pairs,
                rounds,
                window,
                weights: weights.map(|w| w[..data.len()].to_vec()),
                data,
            },
        )
        .prop_filter("enough pairs", |case| {
            let pairs = |shards: &Shards| shards.iter().flatten().sum::<u32>();
            case.data
                .iter()
                .all(|shards| pairs(shards) >= case.lanes * case.rounds)
        })
}

/// Pairs per (lane, step), as `workers` workers compute them, each from a sequence of its own that
/// it opens again at `resume`.
fn trained(
    case: &Case,
    workers: u32,
    steps: u64,
    resume: u64,
) -> BTreeMap<(u32, u64), Vec<PairRef>> {
    let mut all = BTreeMap::new();
    for worker in 0..workers {
        let lanes = case.lanes * worker / workers..case.lanes * (worker + 1) / workers;
        for part in [0..resume, resume..steps] {
            let sequence = case.open();
            for step in part {
                for lane in lanes.clone() {
                    all.insert((lane, step), sequence.pairs(step, lane, &Quarantine::new()));
                }
            }
        }
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn lanes_are_the_same_for_every_worker_count_and_resume(
        case in cases(), workers in 1u32..10, resume in 0u64..12,
    ) {
        let one = trained(&case, 1, 12, 0);
        prop_assert_eq!(&trained(&case, workers, 12, resume), &one);
        // Asked for in any order, a step is what it is.
        let sequence = case.open();
        for ((lane, step), pairs) in one.iter().rev() {
            prop_assert_eq!(&sequence.pairs(*step, *lane, &Quarantine::new()), pairs);
        }
    }

    #[test]
    fn every_epoch_of_every_dataset_holds_every_pair_once(case in cases()) {
        let sequence = case.open();
        let longest = (0..case.lanes).map(|l| sequence.epoch_pairs(l).iter().sum::<u64>()).max();
        let steps = 3 * longest.unwrap_or(0).div_ceil(u64::from(case.lane_pairs)) + 1;
        let completed = sequence.completed(steps);
        let mut seen: BTreeMap<(u32, u64), BTreeSet<u64>> = BTreeMap::new();
        let mut rounds = BTreeMap::new();
        for step in 0..steps {
            for lane in 0..case.lanes {
                for pair in sequence.pairs(step, lane, &Quarantine::new()) {
                    let epoch = seen.entry((pair.dataset, pair.epoch)).or_default();
                    prop_assert!(epoch.insert(pair.id), "{pair:?} stands there twice");
                    prop_assert!(sequence.ids(pair.dataset).contains(&pair.id));
                    let shard = ShardRef { dataset: pair.dataset, shard: pair.shard };
                    prop_assert_eq!(sequence.describe(pair.id), Some((shard, pair.pair)));
                    rounds.insert((pair.id, pair.epoch), pair.round);
                }
            }
        }
        if case.weights.is_none() {
            prop_assert!(completed.iter().all(|epochs| *epochs >= 3), "{completed:?}");
            for lane in 0..case.lanes {
                let pairs = sequence.epoch_pairs(lane);
                let ends = 2 * pairs.iter().sum::<u64>();
                let twice: Vec<u64> = pairs.iter().map(|pairs| 2 * pairs).collect();
                // Without weights all datasets end their epochs together.
                prop_assert_eq!(sequence.mixture.counts(lane, ends, &pairs), twice);
            }
        }
        for tail in sequence.tails(steps) {
            for position in tail.positions {
                let pair = sequence.pair(tail.dataset, tail.lane, position);
                let epoch = seen.entry((pair.dataset, pair.epoch)).or_default();
                prop_assert!(epoch.insert(pair.id), "{pair:?} was trained and is in the tail");
            }
        }
        for (number, dataset) in sequence.datasets().iter().enumerate() {
            let begun = seen.keys().filter(|(d, _)| *d == number as u32).count() as u64;
            prop_assert!(begun >= completed[number]);
            for epoch in 0..begun {
                let found = seen[&(number as u32, epoch)].len() as u64;
                prop_assert_eq!(found, dataset.pairs(), "dataset {}, epoch {}", number, epoch);
            }
        }
        // Neighbours of a shard, as an image's captions are, come apart.
        for ((id, epoch), round) in &rounds {
            let next = sequence.describe(*id).zip(sequence.describe(id + 1));
            if let (Some((a, b)), Some(other)) = (next, rounds.get(&(id + 1, *epoch)))
                && a.0 == b.0
            {
                prop_assert_eq!(*other, (round + 1) % case.rounds);
            }
        }
    }

    #[test]
    fn a_quarantine_touches_its_own_pairs_only(
        case in cases(),
        lost in prop::collection::vec((0u32..3, 0u32..9), 1..4),
    ) {
        let sequence = case.open();
        let place = |(dataset, shard): &(u32, u32)| ShardRef {
            dataset: dataset % case.data.len() as u32,
            shard: *shard,
        };
        let quarantine: Quarantine = lost.iter().map(place).collect();
        let lost = |pair: &PairRef| quarantine.contains(&pair.shard_ref());
        let left = |dataset: u32| {
            let shards = sequence.datasets()[dataset as usize].before().windows(2).zip(0..);
            let mut full = shards.filter(|(sums, _)| sums[0] < sums[1]);
            full.any(|(_, shard)| !quarantine.contains(&ShardRef { dataset, shard }))
        };
        for (step, lane) in (0..8).flat_map(|step| (0..case.lanes).map(move |l| (step, l))) {
            let whole = sequence.pairs(step, lane, &Quarantine::new());
            let replaced = sequence.pairs(step, lane, &quarantine);
            prop_assert_eq!(&replaced, &sequence.pairs(step, lane, &quarantine));
            for (pair, now) in whole.iter().zip(&replaced) {
                if !lost(pair) || !left(pair.dataset) {
                    prop_assert_eq!(pair, now);
                    continue;
                }
                prop_assert!(!lost(now), "the substitute lies outside");
                prop_assert_eq!(now.replaces, Some(pair.id));
                prop_assert_eq!((now.dataset, now.position), (pair.dataset, pair.position));
                prop_assert_eq!(sequence.describe(now.id), Some((now.shard_ref(), now.pair)));
            }
        }
    }
}

#[test]
fn one_dataset_in_one_round_is_the_stream_it_always_was() {
    // Drawn before datasets could be several; a change here changes the bits of every run.
    let case = Case {
        seed: 5,
        lanes: 4,
        lane_pairs: 6,
        rounds: 1,
        window: 2,
        weights: None,
        data: vec![vec![vec![7], vec![0], vec![11], vec![5], vec![9], vec![4]]],
    };
    let sequence = case.open();
    let stream = |lane| -> Vec<u64> {
        let steps = (0..3).flat_map(|step| sequence.pairs(step, lane, &Quarantine::new()));
        steps.map(|pair| pair.id).collect()
    };
    let first = [
        7, 8, 11, 12, 9, 13, 14, 10, 15, 9, 20, 8, 21, 19, 22, 7, 18, 10,
    ];
    let last = [
        32, 6, 34, 5, 35, 33, 4, 2, 3, 29, 23, 28, 26, 27, 31, 24, 25, 30,
    ];
    assert_eq!(stream(0), first);
    assert_eq!(stream(3), last);
}

#[test]
fn false_images_are_uniform_over_the_pairs_source() {
    let case = Case {
        seed: 1,
        lanes: 2,
        lane_pairs: 4,
        rounds: 2,
        window: 2,
        weights: None,
        data: vec![vec![vec![3, 9], vec![0, 4], vec![5, 0], vec![2, 7]]],
    };
    let sequence = case.open();
    let none = Quarantine::new();
    let lost = ShardRef {
        dataset: 0,
        shard: 3,
    };
    let quarantine = Quarantine::from([lost]);
    for source in [0, 1] {
        let mut drawn = BTreeMap::<(u32, u32), u32>::new();
        for position in 0..6000 {
            let pair = sequence.pair(0, 0, position);
            let found = sequence.false_pair(0, &pair, source, (FalseImage::Dataset, &none));
            let Nth::OfSource { source: of, nth } = found.pair else {
                panic!("there are two sources");
            };
            assert_eq!(of, source);
            *drawn.entry((found.shard.shard, nth)).or_default() += 1;
            let again = sequence.false_pair(0, &pair, source, (FalseImage::Dataset, &quarantine));
            match found.shard == lost {
                true => assert_ne!(again.shard, lost),
                false => assert_eq!(again, found, "others stay"),
            }
        }
        let pairs = [10, 20][source as usize];
        assert_eq!(drawn.len(), pairs, "every pair of the source");
        let mean = 6000 / pairs as u32;
        for count in drawn.values() {
            assert!(
                count.abs_diff(mean) < mean / 3,
                "{count} of {mean}: {drawn:?}"
            );
        }
    }
    for position in 0..50 {
        let pair = sequence.pair(0, 1, position);
        let found = sequence.false_pair(1, &pair, 0, (FalseImage::Window, &none));
        let Nth::OfAll(nth) = found.pair else {
            panic!("a window has no sources");
        };
        let id = sequence.id(0, found.shard.shard, nth);
        let window = (0..40)
            .map(|p| sequence.pair(0, 1, p))
            .filter(|p| (p.epoch, p.round, p.window) == (pair.epoch, pair.round, pair.window));
        let ids: BTreeSet<u64> = window.map(|p| p.id).collect();
        assert!(pair.epoch > 0 || ids.contains(&id), "inside the window");
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let case = |data: Vec<Shards>| Case {
        seed: 0,
        lanes: 4,
        lane_pairs: 2,
        rounds: 2,
        window: 1,
        weights: None,
        data,
    };
    let refused = |config: &ValidConfig, manifests| {
        let error = Sequence::open(config, manifests).err().expect("refused");
        error.to_string()
    };
    let few = case(vec![vec![vec![50]], vec![vec![7]]]);
    let manifests = || few.data.iter().map(manifest).collect::<Vec<_>>();
    let said = refused(&few.config(), manifests());
    assert!(
        said.contains("d1 holds 7 pairs, fewer than 4 lanes x 2 rounds"),
        "{said}"
    );

    let mut other = manifests();
    other[1].contents = Contents::SnliVe;
    let said = refused(&few.config(), other);
    assert!(said.contains("d1 holds SnliVe"), "{said}");

    let mut config = (*case(vec![vec![vec![50]], vec![vec![70]]]).config()).clone();
    config.model.task = Task::Vqa;
    let config = config.validate().expect("valid");
    let answered = |sha256: &str| {
        let mut manifest = manifest(&vec![vec![50]]);
        manifest.contents = Contents::Vqa;
        manifest.files.push(DataFile {
            file: ANSWERS_FILE.into(),
            bytes: 1,
            sha256: sha256.into(),
        });
        manifest
    };
    assert!(Sequence::open(&config, vec![answered("a"), answered("a")]).is_ok());
    let said = refused(&config, vec![answered("a"), answered("b")]);
    assert!(said.contains("different answers.json"), "{said}");
    let said = refused(&config, vec![manifest(&vec![vec![50]]), answered("b")]);
    assert!(said.contains("d0 holds Captions"), "{said}");
}
