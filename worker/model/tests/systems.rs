//! Every system, manager, task and backbone that a configuration can name, at sizes that no golden
//! file has: gradients are slopes, groups and device batches change nothing, refusals name the key.

use belfry_configs::rng::{Key, Purpose};
use belfry_configs::{
    Head, ImageKind, Manager, ManagerQuery, ManagerWeight, Model, System, Task, TextKind,
};
use belfry_model::{
    Alone, ClassifyBatch, ClassifyReport, Company, Device, Draws, Group, GroupError, Labels,
    ManagerTower, ModelError, Negatives, RetrievalBatch, RetrievalReport, Weights, add_rows,
};

mod tiny;
use tiny::{PAIRS, TEXT_LEN, check_slope, enlarge, images, keys, model, relative, texts};

const ANSWERS: u32 = 5;

fn head() -> Head {
    Head {
        answers: ANSWERS,
        contrastive_hidden: 6,
        temperature: 0.2,
        ..Head::default()
    }
}

/// A model for a classifier task.
fn vqa() -> Model {
    Model {
        task: Task::Vqa,
        head: head(),
        ..model()
    }
}

/// Micro-batches number `seed`, `seed + 1`, … for the model's task.
fn classify_batch(task: Task, seed: u64, micro_batches: usize) -> ClassifyBatch {
    let mut batch = ClassifyBatch {
        micro_batches,
        pairs: PAIRS,
        text_len: TEXT_LEN,
        ids: Vec::new(),
        text_mask: Vec::new(),
        images: vec![Vec::new(); if task == Task::Nlvr2 { 2 } else { 1 }],
        labels: Labels::Classes(Vec::new()),
    };
    let (mut classes, mut scores) = (Vec::new(), Vec::new());
    for micro in 0..micro_batches as u64 {
        let key = Key::new(seed + micro, Purpose::Pack);
        let (ids, mask) = texts(key, PAIRS);
        batch.ids.extend(ids);
        batch.text_mask.extend(mask);
        for (k, all) in batch.images.iter_mut().enumerate() {
            all.extend(images(key.with(k as u64), PAIRS));
        }
        classes.extend((0..PAIRS as u64).map(|i| key.with(9).below(i, 2) as i32));
        let soft = |i| [0.0, 0.3, 1.0][key.with(8).below(i, 3) as usize];
        scores.extend((0..PAIRS as u64 * u64::from(ANSWERS)).map(soft));
    }
    batch.labels = match task {
        Task::Vqa => Labels::Scores(scores),
        _ => Labels::Classes(classes),
    };
    batch
}

fn classify(
    tower: &ManagerTower,
    params: &[f32],
    batch: &ClassifyBatch,
    draws: Draws,
) -> (Vec<f32>, Vec<ClassifyReport>) {
    let weights = Weights::load(tower.table(), params, &Device::flex().autodiff()).unwrap();
    let mut gradient = vec![0.0; tower.table().elements()];
    let reports = tower.classify_gradient(&weights, batch, draws, &mut gradient);
    (gradient, reports.unwrap())
}

/// Along the gradient of all parameters and of each of `parts`, with dropout and noise on.
fn check_classifier(what: &str, model: &Model, parts: &[&str]) {
    let tower = ManagerTower::new(model, TEXT_LEN).unwrap_or_else(|e| panic!("{what}: {e}"));
    let mut params = tower.table().init(3);
    enlarge(&mut params);
    let batch = classify_batch(model.task, 1, 2);
    let keys = keys(&[10, 11]);
    let draws = Draws::Keys(&keys);
    let (slope, _) = classify(&tower, &params, &batch, draws);
    for entry in tower.table().entries().iter().filter(|e| !e.trained) {
        let gradient = &slope[entry.offset..entry.offset + entry.len];
        assert!(gradient.iter().all(|g| *g == 0.0), "{what}: {}", entry.name);
    }
    for part in [&[""], parts].concat() {
        let loss = |params: &[f32]| {
            let (_, reports) = classify(&tower, params, &batch, draws);
            reports.iter().map(|r| r.loss).sum()
        };
        check_slope(what, tower.table(), &params, &slope, part, loss);
    }
}

#[test]
fn every_manager_has_the_slope_of_its_loss() {
    use Manager::*;
    for manager in [
        SaeJoint,
        SaeSplit,
        Saue,
        Aaue,
        ConcatAttention,
        CrossAttention,
    ] {
        let adaptive = matches!(manager, Aaue | ConcatAttention | CrossAttention);
        let queries = match adaptive {
            true => &[ManagerQuery::Visual, ManagerQuery::Fused][..],
            false => &[ManagerQuery::Fused][..],
        };
        for query in queries {
            for weight in [ManagerWeight::Scalar, ManagerWeight::Vector] {
                if manager == ConcatAttention && weight == ManagerWeight::Scalar {
                    continue;
                }
                let model = Model {
                    manager,
                    manager_query: *query,
                    manager_weight: weight,
                    cross_layers: 3,
                    ..vqa()
                };
                let what = format!("{manager:?} {query:?} {weight:?}");
                check_classifier(&what, &model, &["manager_tower.2", "temperature"]);
            }
        }
    }
}

#[test]
fn any_depth_and_any_number_of_experts() {
    for (cross_layers, text, image) in [(1, 1, 2), (2, 3, 1), (4, 1, 1), (8, 3, 2)] {
        for manager in [Manager::SaeJoint, Manager::SaeSplit, Manager::Aaue] {
            let mut model = Model {
                manager,
                cross_layers,
                ..vqa()
            };
            (model.text.managed, model.image.managed) = (text, image);
            let tower = ManagerTower::new(&model, TEXT_LEN).unwrap();
            let params = tower.table().init(3);
            let batch = classify_batch(Task::Vqa, 1, 2);
            let (gradient, reports) =
                classify(&tower, &params, &batch, Draws::Keys(&keys(&[1, 2])));
            let what = format!("{manager:?}, {cross_layers} layers, {text} and {image} experts");
            assert!(gradient.iter().all(|g| g.is_finite()), "{what}");
            assert!(reports.iter().all(|r| r.loss > 0.0), "{what}");
            let last = format!("cross_modal_image_layers.{}.", cross_layers - 1);
            let entries = tower.table().entries().iter();
            let mut of_last = entries.filter(|e| e.name.starts_with(&last)).peekable();
            assert!(of_last.peek().is_some(), "{what}");
            let reached = of_last.any(|e| {
                gradient[e.offset..e.offset + e.len]
                    .iter()
                    .any(|g| *g != 0.0)
            });
            assert!(reached, "{what}: no gradient in the last layer");
        }
    }
}

#[test]
fn baselines_have_the_slope_of_their_loss() {
    let mut bridge = Model {
        system: System::BridgeTower,
        cross_layers: 2,
        ..vqa()
    };
    bridge.text.layers = bridge.image.layers;
    check_classifier("BridgeTower", &bridge, &["link_tower", "layernorm"]);
    for meter_fusion in [false, true] {
        let mut meter = Model {
            system: System::Meter,
            meter_fusion,
            cross_layers: 3,
            ..vqa()
        };
        // The gate weighs the layers below the last; of a single one there is nothing to learn.
        meter.image.layers = 3;
        let parts: &[&str] = if meter_fusion {
            &["text_gate.weight", "image_gate.weight"]
        } else {
            &[]
        };
        check_classifier(&format!("METER, fusion {meter_fusion}"), &meter, parts);
    }
}

#[test]
fn backbones_have_the_slope_of_their_loss() {
    let mut model = vqa();
    model.text.kind = TextKind::Bert;
    model.text.positions = TEXT_LEN as u32;
    model.image.kind = ImageKind::Vit;
    let parts = [
        "text_transformer.embeddings",
        "vit_model.blocks",
        "vit_model.patch_embed",
    ];
    check_classifier("BERT and ViT", &model, &parts);
    let names = ManagerTower::new(&model, TEXT_LEN).unwrap();
    for (name, shape) in [
        ("vit_model.cls_token", &[1, 1, 16][..]),
        ("vit_model.pos_embed", &[1, 10, 16]),
        ("vit_model.patch_embed.proj.bias", &[16]),
        ("vit_model.blocks.1.attn.qkv.weight", &[48, 16]),
        ("vit_model.norm.weight", &[16]),
        (
            "text_transformer.embeddings.token_type_embeddings.weight",
            &[2, 16],
        ),
    ] {
        let entry = names
            .table()
            .get(name)
            .unwrap_or_else(|| panic!("no {name}"));
        assert_eq!(entry.shape, shape, "{name}");
    }
}

#[test]
fn classifiers_have_the_slope_of_their_loss() {
    let mut model = Model {
        task: Task::Nlvr2,
        ..vqa()
    };
    model.head.nlvr2_dropout = 0.3;
    model.head.hidden_scale = 2;
    check_classifier(
        "NLVR2",
        &model,
        &["nlvr2_classifier", "token_type_embeddings"],
    );
    model.task = Task::SnliVe;
    model.head.layers = 1;
    check_classifier("SNLI-VE, one layer", &model, &["snli_classifier"]);
}

#[test]
fn a_device_batch_of_two_is_two_of_one_up_to_rounding() {
    for task in [Task::Vqa, Task::Nlvr2] {
        let tower = ManagerTower::new(&Model { task, ..vqa() }, TEXT_LEN).unwrap();
        let params = tower.table().init(3);
        let keys = keys(&[10, 11]);
        let (together, reports) = classify(
            &tower,
            &params,
            &classify_batch(task, 1, 2),
            Draws::Keys(&keys),
        );
        let mut apart = vec![0.0; params.len()];
        for (i, report) in reports.iter().enumerate() {
            let batch = classify_batch(task, 1 + i as u64, 1);
            let (one, alone) = classify(&tower, &params, &batch, Draws::Keys(&keys[i..=i]));
            apart.iter_mut().zip(one).for_each(|(sum, g)| *sum += g);
            assert!((alone[0].loss - report.loss).abs() < 1e-5, "{task:?}");
            assert_eq!(
                (alone[0].score, alone[0].pairs),
                (report.score, report.pairs)
            );
        }
        let error = relative(&together, &apart);
        assert!(error < 1e-5, "{task:?}: gradients differ by {error}");
    }
}

fn retrieval(task: Task) -> ManagerTower {
    let model = Model { task, ..vqa() };
    ManagerTower::new(&model, TEXT_LEN).unwrap()
}

/// Rows `first..first + pairs` of an endless batch; with words for `pretrain_itc`.
fn retrieval_batch(first: usize, pairs: usize, words: bool) -> RetrievalBatch {
    let mut batch = RetrievalBatch {
        pairs,
        text_len: TEXT_LEN,
        ..RetrievalBatch::default()
    };
    for row in first..first + pairs {
        let key = Key::new(row as u64, Purpose::Pack);
        let (ids, mask) = texts(key, 1);
        if words {
            batch
                .masked_ids
                .extend(ids.iter().map(|id| if *id == ids[2] { 39 } else { *id }));
            batch
                .mlm_labels
                .extend(ids.iter().map(|id| if *id == ids[2] { *id } else { -100 }));
        }
        batch.ids.extend(ids);
        batch.text_mask.extend(mask);
        batch.images.extend(images(key.with(1), 1));
    }
    batch
}

fn retrieve(
    tower: &ManagerTower,
    params: &[f32],
    batch: &RetrievalBatch,
    draws: Draws,
    company: Company,
) -> (Vec<f32>, RetrievalReport) {
    let weights = Weights::load(tower.table(), params, &Device::flex().autodiff()).unwrap();
    let mut gradient = vec![0.0; tower.table().elements()];
    let report = tower.retrieve_gradient(&weights, batch, draws, company, &mut gradient);
    (gradient, report.unwrap())
}

#[test]
fn contrastive_tasks_have_the_slope_of_their_loss() {
    for task in [Task::Retrieval, Task::PretrainItc] {
        let tower = retrieval(task);
        let mut params = tower.table().init(3);
        enlarge(&mut params);
        let batch = retrieval_batch(0, 3, task == Task::PretrainItc);
        let keys = keys(&[10]);
        let step = |params: &[f32]| {
            let company = Company {
                group: &mut Alone::new(vec![1, 2, 1]),
                negatives: Negatives::Given {
                    images: &[1, 0, 1],
                    texts: &[1, 2, 1],
                },
            };
            retrieve(&tower, params, &batch, Draws::Keys(&keys), company)
        };
        let (slope, report) = step(&params);
        assert_eq!(report.mlm_masked > 0, task == Task::PretrainItc);
        let loss = |params: &[f32]| {
            let (_, report) = step(params);
            report.itc_loss + report.itm_loss + report.mlm_loss
        };
        for part in [
            "",
            "itc_",
            "temperature",
            "text_transformer",
            "vit_model",
            "manager_tower",
        ] {
            let what = format!("{task:?}");
            check_slope(&what, tower.table(), &params, &slope, part, loss);
        }
    }
}

#[test]
fn threads_change_no_bit_of_any_task() {
    let with_threads = |threads, run: &(dyn Fn() -> Vec<f32> + Sync)| -> Vec<u32> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        let gradient = pool.build().unwrap().install(run);
        gradient.iter().map(|g| g.to_bits()).collect()
    };
    let wide = |task, manager| {
        let mut model = Model {
            task,
            manager,
            hidden: 256,
            ..vqa()
        };
        (model.text.hidden, model.image.hidden) = (256, 256);
        model.image.patch = 1;
        model
    };
    let keys = keys(&[10, 11]);
    for manager in [Manager::SaeSplit, Manager::ConcatAttention] {
        let model = wide(Task::Nlvr2, manager);
        let tower = ManagerTower::new(&model, TEXT_LEN).unwrap();
        let params = tower.table().init(3);
        let batch = classify_batch(model.task, 1, 2);
        let run = || classify(&tower, &params, &batch, Draws::Keys(&keys)).0;
        assert!(
            with_threads(1, &run) == with_threads(3, &run),
            "{manager:?}"
        );
    }
    let tower = ManagerTower::new(&wide(Task::Retrieval, Manager::Aaue), TEXT_LEN).unwrap();
    let params = tower.table().init(3);
    let batch = retrieval_batch(0, 3, false);
    let run = || {
        let company = Company {
            group: &mut Alone::new(vec![1, 2, 3]),
            negatives: Negatives::Drawn(keys[0]),
        };
        retrieve(&tower, &params, &batch, Draws::Keys(&keys[..1]), company).0
    };
    assert!(with_threads(1, &run) == with_threads(3, &run), "retrieval");
}

/// A part of a group whose other rows are known beforehand: what a lane sees of gathered features.
struct Part {
    images: Vec<u64>,
    first: usize,
    pairs: usize,
    /// Every call's matrix of the whole group, in call order.
    known: std::vec::IntoIter<Vec<f32>>,
}

/// Alone, but remembers what was fetched from it.
struct Recorder {
    alone: Alone,
    fetched: Vec<Vec<f32>>,
}

impl Group for Recorder {
    fn images(&self) -> &[u64] {
        self.alone.images()
    }
    fn first(&self) -> usize {
        0
    }
    fn fetch(
        &mut self,
        own: &[f32],
        width: usize,
        wanted: &[usize],
    ) -> Result<Vec<f32>, GroupError> {
        self.fetched.push(own.to_vec());
        self.alone.fetch(own, width, wanted)
    }
    fn give_back(
        &mut self,
        rows: &[f32],
        width: usize,
        wanted: &[usize],
    ) -> Result<Vec<f32>, GroupError> {
        self.alone.give_back(rows, width, wanted)
    }
}

impl Group for Part {
    fn images(&self) -> &[u64] {
        &self.images
    }
    fn first(&self) -> usize {
        self.first
    }
    fn fetch(
        &mut self,
        own: &[f32],
        width: usize,
        wanted: &[usize],
    ) -> Result<Vec<f32>, GroupError> {
        let all = self
            .known
            .next()
            .ok_or("a call more than the whole group made")?;
        let ours = &all[self.first * width..][..self.pairs * width];
        assert!(
            own.iter().zip(ours).all(|(a, b)| (a - b).abs() < 1e-5),
            "own rows differ"
        );
        Ok(wanted
            .iter()
            .flat_map(|place| all[place * width..][..width].to_vec())
            .collect())
    }
    fn give_back(
        &mut self,
        rows: &[f32],
        width: usize,
        wanted: &[usize],
    ) -> Result<Vec<f32>, GroupError> {
        let mut sum = vec![0.0; self.images.len() * width];
        add_rows(&mut sum, rows, width, wanted);
        Ok(sum[self.first * width..][..self.pairs * width].to_vec())
    }
}

#[test]
fn losses_against_a_group_are_those_of_the_whole() {
    let tower = retrieval(Task::Retrieval);
    let params = tower.table().init(3);
    let weights = Weights::load(tower.table(), &params, &Device::flex()).unwrap();
    let (group, negatives) = ([1, 2, 1, 3], ([3, 0, 1, 0], [1, 2, 3, 2]));
    let mut whole = Recorder {
        alone: Alone::new(group.to_vec()),
        fetched: Vec::new(),
    };
    let company = Company {
        group: &mut whole,
        negatives: Negatives::Given {
            images: &negatives.0,
            texts: &negatives.1,
        },
    };
    let all = tower
        .retrieve_evaluate(&weights, &retrieval_batch(0, 4, false), company)
        .unwrap();
    let (mut itc, mut itm) = (0.0, 0.0);
    for first in [0, 2] {
        let mut part = Part {
            images: group.to_vec(),
            first,
            pairs: 2,
            known: whole.fetched.clone().into_iter(),
        };
        let company = Company {
            group: &mut part,
            negatives: Negatives::Given {
                images: &negatives.0[first..first + 2],
                texts: &negatives.1[first..first + 2],
            },
        };
        let batch = retrieval_batch(first, 2, false);
        let report = tower.retrieve_evaluate(&weights, &batch, company).unwrap();
        itc += report.itc_loss / 2.0;
        itm += report.itm_loss / 2.0;
    }
    assert!((itc - all.itc_loss).abs() < 1e-6, "{itc} {}", all.itc_loss);
    assert!((itm - all.itm_loss).abs() < 1e-6, "{itm} {}", all.itm_loss);
}

#[test]
fn drawn_negatives_follow_the_key_and_the_candidates() {
    let step = |global_negatives, key| {
        let mut model = Model {
            task: Task::Retrieval,
            ..vqa()
        };
        model.head.global_negatives = global_negatives;
        let tower = ManagerTower::new(&model, TEXT_LEN).unwrap();
        let params = tower.table().init(3);
        let weights = Weights::load(tower.table(), &params, &Device::flex()).unwrap();
        let company = Company {
            group: &mut Alone::new((0..6).collect()),
            negatives: Negatives::Drawn(Key::new(key, Purpose::Negatives)),
        };
        let batch = retrieval_batch(0, 6, false);
        tower.retrieve_evaluate(&weights, &batch, company).unwrap()
    };
    assert_eq!(step(true, 1), step(true, 1));
    assert_ne!(step(true, 1).itm_loss, step(true, 2).itm_loss);
    assert_eq!(step(true, 1).itc_loss, step(true, 2).itc_loss);
    // Alone the whole group is the micro-batch.
    assert_eq!(step(true, 3), step(false, 3));
}

#[test]
fn a_temperature_out_of_bounds_is_brought_back() {
    let tower = retrieval(Task::Retrieval);
    let mut params = tower.table().init(3);
    let place = tower.table().get("temperature").unwrap().offset;
    for (value, kept) in [(-0.3, 0.001), (0.7, 0.5), (0.2, 0.2)] {
        params[place] = value;
        tower.clamp_temperature(&mut params);
        assert_eq!(params[place], kept);
    }
    let other = ManagerTower::new(&vqa(), TEXT_LEN).unwrap();
    let mut params = other.table().init(3);
    let before = params.clone();
    other.clamp_temperature(&mut params);
    assert_eq!(params, before);
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let tower = ManagerTower::new(&vqa(), TEXT_LEN).unwrap();
    let params = tower.table().init(3);
    let weights = Weights::load(tower.table(), &params, &Device::flex()).unwrap();
    let mut batch = classify_batch(Task::Nlvr2, 1, 1);
    let told = tower
        .classify_evaluate(&weights, &batch)
        .unwrap_err()
        .to_string();
    assert!(told.contains("batch.images per text"), "{told}");
    batch.images.pop();
    batch.labels = Labels::Classes(vec![0, ANSWERS as i32]);
    let error = tower.classify_evaluate(&weights, &batch).unwrap_err();
    assert!(
        matches!(
            error,
            ModelError::Range {
                what: "batch.labels",
                index: 1,
                ..
            }
        ),
        "{error}"
    );
    let company = Company {
        group: &mut Alone::new(vec![1, 2]),
        negatives: Negatives::Drawn(keys(&[1])[0]),
    };
    let pairs = retrieval_batch(0, 2, false);
    let error = tower
        .retrieve_evaluate(&weights, &pairs, company)
        .unwrap_err();
    assert!(
        matches!(
            error,
            ModelError::Task {
                task: Task::Vqa,
                ..
            }
        ),
        "{error}"
    );

    let tower = retrieval(Task::Retrieval);
    let params = tower.table().init(3);
    let weights = Weights::load(tower.table(), &params, &Device::flex()).unwrap();
    let company = Company {
        group: &mut Alone::new(vec![1, 2]),
        negatives: Negatives::Given {
            images: &[1, 2],
            texts: &[0, 0],
        },
    };
    let error = tower
        .retrieve_evaluate(&weights, &pairs, company)
        .unwrap_err();
    assert!(
        matches!(
            error,
            ModelError::Range {
                what: "hard negatives",
                value: 2,
                ..
            }
        ),
        "{error}"
    );

    let mut bridge = Model {
        system: System::BridgeTower,
        ..vqa()
    };
    bridge.text.layers = bridge.image.layers;
    bridge.cross_layers = 1;
    let error = ManagerTower::new(&bridge, TEXT_LEN).unwrap_err();
    let key = "model.text.managed";
    assert!(
        matches!(error, ModelError::Sizes { key: k, .. } if k == key),
        "{error}"
    );
}

/// A group that loses its connection.
struct Broken;

impl Group for Broken {
    fn images(&self) -> &[u64] {
        &[1, 2]
    }
    fn first(&self) -> usize {
        0
    }
    fn fetch(&mut self, _: &[f32], _: usize, _: &[usize]) -> Result<Vec<f32>, GroupError> {
        Err("connection reset".into())
    }
    fn give_back(&mut self, _: &[f32], _: usize, _: &[usize]) -> Result<Vec<f32>, GroupError> {
        Err("connection reset".into())
    }
}

#[test]
fn a_broken_group_is_an_error_with_its_cause() {
    let tower = retrieval(Task::Retrieval);
    let params = tower.table().init(3);
    let weights = Weights::load(tower.table(), &params, &Device::flex()).unwrap();
    let company = Company {
        group: &mut Broken,
        negatives: Negatives::Drawn(keys(&[1])[0]),
    };
    let batch = retrieval_batch(0, 2, false);
    let error = tower
        .retrieve_evaluate(&weights, &batch, company)
        .unwrap_err();
    let ModelError::Group { source, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(source.to_string(), "connection reset");
}
