//! The plan's figures of this repository's run files beside counts by hand.

use super::*;
use std::path::Path;

fn plan(file: &str, set: impl FnOnce(&mut PlanArguments)) -> Plan {
    let config = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("configs")
        .join(file);
    let mut arguments = PlanArguments {
        config,
        workers: Vec::new(),
        lane: LaneTimeArguments::default(),
        bandwidth: 25.0,
        store_bandwidth: 5.0,
        price_worker: None,
        synthetic: None,
        settings: Vec::new(),
        json: false,
    };
    set(&mut arguments);
    let config = belfry_configs::load(&arguments.config, &arguments.settings).expect("is valid");
    let runtime = tokio::runtime::Runtime::new().expect("threads");
    let plan = runtime.block_on(Plan::of(config, &arguments));
    plan.expect("can be planned")
}

/// 128 lanes of 32 pairs; one node per worker where the workers are a power of two.
#[test]
fn pre_training_by_hand() {
    let plan = plan("pretrain-4m.toml", |a| {
        a.workers = vec![1, 7, 64, 200];
        a.lane.step_seconds = Some("128".parse().expect("a time"));
        a.synthetic = Some("4000000,9000000,4000".parse().expect("sizes"));
        a.settings = vec![
            "data.cache_bytes_max=200000000000".into(),
            "cluster.min_workers=1".into(),
        ];
    });
    let parameters = plan.footprint.parameters;
    let gradient = 4 * parameters;
    // Table 6 counts 338.64 M at 384 pixels without heads; 288 pixels have fewer positions, the
    // heads add two dense layers, the vocabulary's bias and its table a second time.
    assert!(
        (338_000_000..420_000_000).contains(&parameters),
        "{parameters}"
    );
    assert_eq!(plan.footprint.gradient_bytes, gradient);
    assert_eq!(plan.footprint.state_bytes, 3 * gradient);
    // 1000, 2000 ... 100,000.
    assert_eq!(plan.footprint.checkpoints, 100);

    let [one, seven, sixty_four, spare] = &plan.crews[..] else {
        panic!("four numbers of workers")
    };
    assert_eq!((one.lanes, one.nodes, one.exchange_all), ([128, 128], 1, 0));
    assert_eq!(one.utilisation, 1.0);
    // 128 / 7 = 18.3: the cut may move an edge to keep nodes few, so at least 19 for somebody.
    assert!(
        seven.lanes[0] <= 18 && seven.lanes[1] >= 19,
        "{:?}",
        seven.lanes
    );
    assert!(seven.nodes <= 4, "cluster.nodes_per_worker_max");
    let used = 128.0 / (7.0 * f64::from(seven.lanes[1]));
    assert!((seven.utilisation - used).abs() < 1e-12);
    // Each sends its one node to 63 owners, 1/64 each, and 1/64 of the sum to 63 others.
    assert_eq!((sixty_four.lanes, sixty_four.nodes), ([2, 2], 1));
    let each = 2 * (gradient * 63 / 64);
    assert_eq!(sixty_four.exchange, [each, each]);
    assert_eq!(sixty_four.exchange_all, 64 * each);
    let at_ten = sixty_four.exchange_seconds(10.0);
    assert!((at_ten - 8.0 * each as f64 / 1e10).abs() < 1e-9);
    assert_eq!((spare.spares, spare.lanes), (72, [1, 1]));
    assert_eq!(spare.utilisation, 128.0 / 200.0);

    // One worker takes 128 s for 128 lanes: a lane takes one, 64 workers two seconds.
    assert!((plan.lane.seconds - 1.0).abs() < 1e-12);
    let step = plan.step_seconds(sixty_four);
    assert!((step - 2.0 - sixty_four.exchange_seconds(25.0)).abs() < 1e-9);
    assert!((plan.run_seconds(sixty_four) - 100_000.0 * step).abs() < 1e-3);
    // 16 parts twice over 64 workers: one each, a sixteenth of the state at 5 Gbit/s.
    assert_eq!(plan.parts_each(sixty_four), 1);
    let stored = 8.0 * (3 * gradient) as f64 / 16.0 / 5e9;
    assert!((plan.store_seconds(sixty_four) - stored).abs() < 1e-9);

    let data = plan.data.as_ref().expect("made up");
    // 4096 x 100,000 / 9,000,000 = 45.51 epochs, so 46 are begun.
    assert!((data.datasets[0].epochs - 409_600_000.0 / 9_000_000.0).abs() < 1e-6);
    assert_eq!(data.unused_tail_pairs, 46 * 9_000_000 - 409_600_000);
    let disk = data.disk.as_ref().expect("s3:// is cached");
    // Windows of 4 shards in each of 128 lanes; 17 steps of 32 pairs reach at most one further
    // window, for a shard has 2250 / 4 pairs in a round.
    assert!(
        (128 * 3..=128 * 8).contains(&disk.shards),
        "{}",
        disk.shards
    );
    assert_eq!(disk.bytes, disk.shards * (100 << 20));
    assert!(plan.refusals().is_empty());
}

/// 200 photographs with a caption each, 32 held out of 232; packed or not.
#[test]
fn quickstart_by_hand() {
    let plan = plan("quickstart.toml", |a| {
        a.workers = vec![2, 3];
        a.settings = vec![
            "data.train=not/packed/yet".into(),
            concat!(
                "data.pack_from=",
                env!("CARGO_MANIFEST_DIR"),
                "/data/stamps"
            )
            .into(),
        ];
    });
    let data = plan.data.as_ref().expect("counted in the folder");
    // 32 x 100 / 200 = 16 epochs and no tail; a folder needs no cache.
    assert_eq!((data.datasets[0].pairs, data.datasets[0].shards), (200, 7));
    assert_eq!(data.datasets[0].epochs, 16.0);
    assert_eq!(data.unused_tail_pairs, 0);
    assert!(data.disk.is_none());
    // Steps 50 and 100.
    assert_eq!(plan.footprint.checkpoints, 2);
    let [two, three] = &plan.crews[..] else {
        panic!("two numbers of workers")
    };
    assert_eq!((two.lanes, two.nodes), ([4, 4], 1));
    // Two workers: half of the own node out, half of the sum out, and as much in.
    let gradient = plan.footprint.gradient_bytes;
    assert_eq!(two.exchange, [gradient / 2 * 2, gradient / 2 * 2]);
    // 3 + 2 + 3 or 3 + 3 + 2 lanes: eight thirds, rounded.
    assert_eq!(three.lanes, [2, 3]);
    assert!((three.utilisation - 8.0 / 9.0).abs() < 1e-12);
    // The default setting of ten seconds: ten heartbeats in the longest silence.
    let timeouts = plan.timeouts();
    assert_eq!(timeouts.silence, timeouts.heartbeat * 10);
    assert_eq!(timeouts.silence, Duration::from_secs(3));
}

#[test]
fn a_cache_that_is_too_small_is_refused_with_what_fits() {
    let plan = plan("pretrain-4m.toml", |a| {
        a.workers = vec![64];
        a.settings = vec!["cluster.min_workers=1".into()];
        a.synthetic = Some("4000000,9000000,4000".parse().expect("sizes"));
    });
    let [refusal] = plan.refusals() else {
        panic!("20 GiB hold no windows of 128 lanes")
    };
    for choice in ["data.cache_bytes_max = ", "cluster.min_workers = "] {
        assert!(refusal.contains(choice), "{refusal}");
    }
    let workers = refusal
        .split("cluster.min_workers = ")
        .nth(1)
        .expect("is named");
    let workers = workers.split_whitespace().next().expect("a number");
    let workers = workers.trim_end_matches(',');
    let set = format!("cluster.min_workers={workers}");
    let again = self::plan("pretrain-4m.toml", |a| {
        a.synthetic = Some("4000000,9000000,4000".parse().expect("sizes"));
        a.settings = vec![set];
    });
    assert!(again.refusals().is_empty(), "{:?}", again.refusals());
}

#[test]
fn the_report_is_narrow_and_says_what_is_unknown() {
    let plan = plan("pretrain-4m.toml", |a| {
        a.settings = vec![
            "data.train=no/such/folder".into(),
            "cluster.min_workers=1".into(),
        ];
        a.price_worker = Some(2.5);
    });
    let text = plan.text();
    for line in text.lines() {
        assert!(
            line.chars().count() <= 100,
            "{} columns: {line}",
            line.chars().count()
        );
    }
    for words in [
        "4,096 pairs = 128 lanes x 4 micro-batches x 8 pairs",
        "1 2 4 8 16 32 64 128",
        "unknown, and so is the disk",
        "a guess",
        "dollars",
        "max_stall 30 s",
    ] {
        assert!(text.contains(words), "`{words}` is not in:\n{text}");
    }
    let json = plan.json();
    assert_eq!(json["workers"].as_array().map(Vec::len), Some(8));
    assert_eq!(json["data"], Value::Null);
}
