//! The numbers of the paper's tables, against the run files that say they have them.

use std::path::{Path, PathBuf};

use belfry_configs::{
    ImageKind, Manager, ManagerQuery, ManagerWeight, System, Task, TextKind, Transform,
    ValidConfig, load,
};

fn house() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn loaded(name: &str, settings: &[&str]) -> ValidConfig {
    let settings: Vec<String> = settings.iter().map(|s| (*s).to_owned()).collect();
    let file = house().join(format!("{name}.toml"));
    load(&file, &settings).unwrap_or_else(|e| panic!("{name} {settings:?}: {e}"))
}

/// A run without pre-training with an overlay of `ablations/` over it.
fn ablated(name: &str, overlay: &str) -> ValidConfig {
    let file = house().join(format!("ablations/{overlay}.toml"));
    loaded(name, &[&format!("@{}", file.display())])
}

#[test]
fn pre_training_is_table_8() {
    let config = loaded("pretrain-4m", &[]);
    let optim = &config.optim;
    assert_eq!(
        (config.run.steps, config.batch.global_batch),
        (100_000, 4096)
    );
    assert_eq!((optim.learning_rate, optim.weight_decay), (1e-5, 0.01));
    assert_eq!((optim.lr_mult_head, optim.lr_mult_cross_modal), (5.0, 5.0));
    assert_eq!(config.warmup_steps(), 10_000);
    assert_eq!((optim.epsilon, optim.betas), (1e-8, [0.9, 0.98]));
    let model = &config.model;
    assert_eq!(
        (model.cross_layers, model.hidden, model.heads),
        (6, 768, 12)
    );
    assert_eq!((model.hidden * model.mlp_ratio, model.dropout), (3072, 0.1));
    assert_eq!((model.image.size, model.image.patch), (288, 16));
    assert_eq!(
        config.data.train_transform,
        Transform::Clip,
        "no random augmentation"
    );
    assert_eq!(config.data.text_len, 50);
}

/// One column of Table 9.
struct Column {
    file: &'static str,
    task: Task,
    epochs: f64,
    batch: u32,
    rate: f64,
    decay: f64,
    warmup: f64,
    size: u32,
    /// No flip where an answer may be about left and right.
    transform: Transform,
    /// Pairs of the training data and the steps that follow, worked out by hand.
    steps: (u64, u64),
    warmup_steps: u64,
    /// The scripts' head: multiplier of its rate, hidden scale (model_spec 12).
    head: (f64, u32),
    lanes: u32,
}

/// Pairs: VQAv2's questions of train and val with an answer, 435,174 + 210,207; SNLI-VE's 529,527
/// training hypotheses; NLVR2's 86,373 training statements; five captions of each of Flickr30K's
/// 30,014 images.
const TABLE_9: [Column; 4] = [
    Column {
        file: "vqav2",
        task: Task::Vqa,
        epochs: 10.0,
        batch: 576,
        rate: 9e-6,
        decay: 0.06,
        warmup: 0.06,
        size: 576,
        transform: Transform::AlbefRandaugWohf,
        steps: (645_381, 11_204),
        warmup_steps: 672,
        head: (50.0, 2),
        lanes: 72,
    },
    Column {
        file: "snli-ve",
        task: Task::SnliVe,
        epochs: 4.0,
        batch: 64,
        rate: 3e-6,
        decay: 0.01,
        warmup: 0.06,
        size: 384,
        transform: Transform::AlbefRandaugWc,
        steps: (529_527, 33_095),
        warmup_steps: 1_985,
        head: (10.0, 2),
        lanes: 8,
    },
    Column {
        file: "nlvr2",
        task: Task::Nlvr2,
        epochs: 5.0,
        batch: 256,
        rate: 1.4e-5,
        decay: 0.01,
        warmup: 0.1,
        size: 384,
        transform: Transform::AlbefRandaugWc,
        steps: (86_373, 1_686),
        warmup_steps: 168,
        head: (10.0, 1),
        lanes: 64,
    },
    Column {
        file: "flickr30k",
        task: Task::Retrieval,
        epochs: 20.0,
        batch: 512,
        rate: 6e-6,
        decay: 0.01,
        warmup: 0.1,
        size: 384,
        transform: Transform::AlbefRandaugWc,
        steps: (150_070, 5_862),
        warmup_steps: 586,
        head: (5.0, 1),
        lanes: 64,
    },
];

#[test]
fn fine_tuning_is_table_9() {
    for column in TABLE_9 {
        let config = loaded(column.file, &[]);
        let (optim, name) = (&config.optim, column.file);
        assert_eq!(config.model.task, column.task, "{name}");
        assert_eq!(config.run.epochs, Some(column.epochs), "{name}");
        assert_eq!(config.batch.global_batch, column.batch, "{name}");
        assert_eq!(
            (optim.learning_rate, optim.weight_decay),
            (column.rate, column.decay),
            "{name}"
        );
        assert_eq!(
            (optim.warmup, optim.decay_power),
            (column.warmup, 1.0),
            "{name}"
        );
        assert_eq!((optim.epsilon, optim.betas), (1e-8, [0.9, 0.98]), "{name}");
        assert_eq!(
            (config.model.image.size, config.model.image.patch),
            (column.size, 16),
            "{name}"
        );
        assert_eq!(config.data.train_transform, column.transform, "{name}");
        assert_eq!(config.data.eval_transform, Transform::Albef, "{name}");
        assert_eq!(config.data.text_len, 50, "{name}");
        assert_eq!(
            config.init.run.as_deref(),
            Some("runs/pretrain-4m"),
            "{name}"
        );
        let head = (optim.lr_mult_head, config.model.head.hidden_scale);
        assert_eq!(
            (head, optim.lr_mult_cross_modal),
            (column.head, 5.0),
            "{name}"
        );
        assert_eq!(config.batch.lanes, column.lanes, "{name}");
        let (pairs, steps) = column.steps;
        let counted = config.with_epoch_pairs(pairs).expect("has pairs");
        assert_eq!(counted.run.steps, steps, "{name}");
        assert_eq!(counted.warmup_steps(), column.warmup_steps, "{name}");
    }
}

#[test]
fn without_pre_training_it_is_section_4() {
    for (name, with, batch) in [
        ("vqav2-no-vlp", "vqav2", 512),
        ("flickr30k-no-vlp", "flickr30k", 512),
    ] {
        let (config, with) = (loaded(name, &[]), loaded(with, &[]));
        let optim = &config.optim;
        assert_eq!((optim.learning_rate, optim.warmup), (2e-5, 0.1), "{name}");
        assert_eq!(optim.weight_decay, 0.01, "{name}");
        assert_eq!(config.batch.global_batch, batch, "{name}");
        assert_eq!(config.model.head.hidden_scale, 1, "{name}");
        assert_eq!(
            (config.init.run.as_deref(), config.init.from.len()),
            (None, 2),
            "{name}"
        );
        assert_eq!(config.model.image, with.model.image, "{name}");
        assert_eq!(config.data, with.data, "{name}");
        assert_eq!(config.run.epochs, with.run.epochs, "{name}");
    }
}

#[test]
fn the_scripts_values_can_be_set() {
    let script = loaded(
        "vqav2",
        &[
            "batch.global_batch=504",
            "batch.lanes=126",
            "optim.warmup=0.1",
        ],
    );
    assert_eq!(script.micro_batches_per_lane(), 1);
    let script = loaded("flickr30k", &["data.text_len=40"]);
    assert_eq!(script.data.text_len, 40);
}

/// Every file of `ablations/` over both runs, which stay what they are but for it.
#[test]
fn every_ablation_lies_over_both_runs() {
    let mut files: Vec<PathBuf> = std::fs::read_dir(house().join("ablations"))
        .expect("is there")
        .map(|entry| entry.expect("is readable").path())
        .collect();
    files.sort();
    assert_eq!(
        files.len(),
        11 + 2 * 5 + 7 + 2 * 6,
        "Tables 1, 2, Figure 5, Table 5"
    );
    for file in files {
        let text = std::fs::read_to_string(&file).expect("is text");
        let place = text.starts_with("# Table ") || text.starts_with("# Figure 5");
        assert!(place, "{} does not say which row it is", file.display());
        let name = file.file_stem().expect("has a name").to_string_lossy();
        for run in ["vqav2-no-vlp", "flickr30k-no-vlp"] {
            let (plain, config) = (loaded(run, &[]), ablated(run, &name));
            assert_eq!(config.optim, plain.optim, "{name}");
            assert_eq!(
                (&config.run, &config.batch),
                (&plain.run, &plain.batch),
                "{name}"
            );
            assert_eq!(config.data.train, plain.data.train, "{name}");
        }
    }
}

#[test]
fn rows_of_table_1_are_managers() {
    use Manager as M;
    use ManagerQuery::{Fused, Visual};
    use ManagerWeight::{Scalar, Vector};
    let of = |row: &str| {
        let model = ablated("vqav2-no-vlp", &format!("table1-{row}"))
            .model
            .clone();
        (model.manager, model.manager_query, model.manager_weight)
    };
    assert_eq!(of("sae-scalar"), (M::SaeJoint, Fused, Scalar));
    assert_eq!(of("sae-vector"), (M::SaeJoint, Fused, Vector));
    assert_eq!(of("saue-scalar"), (M::Saue, Fused, Scalar));
    assert_eq!(of("saue-vector"), (M::Saue, Fused, Vector));
    assert_eq!(of("aaue-visual"), (M::Aaue, Visual, Vector));
    assert_eq!(of("aaue-fused"), (M::Aaue, Fused, Vector));
    assert_eq!(
        of("concat-attention-visual"),
        (M::ConcatAttention, Visual, Vector)
    );
    assert_eq!(
        of("concat-attention-fused"),
        (M::ConcatAttention, Fused, Vector)
    );
    assert_eq!(
        of("cross-attention-visual"),
        (M::CrossAttention, Visual, Vector)
    );
    assert_eq!(
        of("cross-attention-fused"),
        (M::CrossAttention, Fused, Vector)
    );
    let bridge = ablated("flickr30k-no-vlp", "table1-bridgetower");
    assert_eq!(bridge.model.system, System::BridgeTower);
}

#[test]
fn rows_of_table_2_and_figure_5_are_depths() {
    let of = |overlay: String| {
        let model = ablated("vqav2-no-vlp", &overlay).model.clone();
        let managed = (model.text.managed, model.image.managed);
        (model.system, model.cross_layers, managed)
    };
    for layers in [2, 3, 4, 6, 8] {
        let ours = of(format!("table2-managertower-{layers}"));
        assert_eq!(ours, (System::ManagerTower, layers, (6, 6)));
        let theirs = of(format!("table2-bridgetower-{layers}"));
        assert_eq!(theirs, (System::BridgeTower, layers, (layers, layers)));
    }
    for experts in 2..=8 {
        let found = of(format!("figure5-experts-{experts}"));
        assert_eq!(found, (System::ManagerTower, 3, (experts, experts)));
    }
}

#[test]
fn rows_of_table_5_are_backbones() {
    let rows = [
        ("deit-b-16-224", ImageKind::Vit, 16, TextKind::Roberta),
        ("vit-b-16-224", ImageKind::Vit, 16, TextKind::Roberta),
        ("vit-b-16-384", ImageKind::Vit, 16, TextKind::Roberta),
        ("clip-vit-b-32", ImageKind::Clip, 32, TextKind::Roberta),
        ("bert", ImageKind::Clip, 16, TextKind::Bert),
        ("roberta", ImageKind::Clip, 16, TextKind::Roberta),
    ];
    let mut begins = std::collections::BTreeSet::new();
    for (row, kind, patch, text) in rows {
        for (system, name) in [
            (System::ManagerTower, "managertower"),
            (System::BridgeTower, "bridgetower"),
        ] {
            let config = ablated("flickr30k-no-vlp", &format!("table5-{name}-{row}"));
            let model = &config.model;
            let image = (model.image.kind, model.image.patch, model.image.size);
            assert_eq!(
                (model.system, image, model.text.kind),
                (system, (kind, patch, 384), text)
            );
            let bert = text == TextKind::Bert;
            assert_eq!(config.data.tokenizer.contains("bert-base-uncased"), bert);
            assert_eq!(model.text.vocab, if bert { 30_522 } else { 50_265 });
            begins.insert(config.init.from.clone());
        }
    }
    assert_eq!(
        begins.len(),
        rows.len(),
        "every row begins with weights of its own"
    );
}
