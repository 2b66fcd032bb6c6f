//! Every system, manager, classifier and backbone that a configuration can name, at sizes that no
//! golden file has: gradients are slopes, device batches and threads change nothing, refusals name
//! the key.

use belfry_configs::{
    ImageKind, Manager, ManagerQuery, ManagerWeight, Model, System, Task, TextKind,
};
use belfry_model::{
    ClassifyBatch, ClassifyReport, Device, Draws, Labels, ManagerTower, ModelError, Weights,
};

mod tiny;
use tiny::{
    ANSWERS, TEXT_LEN, check_slope, classify_batch, enlarge, keys, relative, uneven, vqa, wide,
    with_threads,
};

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
    for manager in Manager::ALL {
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
fn widths_of_towers_and_encoder_are_independent() {
    let mut bridge = Model {
        system: System::BridgeTower,
        ..vqa()
    };
    bridge.text.layers = bridge.image.layers;
    let meter = Model {
        system: System::Meter,
        meter_fusion: true,
        ..vqa()
    };
    for model in [vqa(), bridge, meter] {
        let model = uneven(model);
        let what = format!("{:?}, uneven widths", model.system);
        check_classifier(&what, &model, &["text_transformer", "vit_model"]);
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

#[test]
fn threads_change_no_bit() {
    let keys = keys(&[10, 11]);
    for manager in [Manager::SaeSplit, Manager::ConcatAttention] {
        let model = wide(Model {
            task: Task::Nlvr2,
            manager,
            ..vqa()
        });
        let tower = ManagerTower::new(&model, TEXT_LEN).unwrap();
        let params = tower.table().init(3);
        let batch = classify_batch(model.task, 1, 2);
        let run = || classify(&tower, &params, &batch, Draws::Keys(&keys)).0;
        assert!(
            with_threads(1, &run) == with_threads(3, &run),
            "{manager:?}"
        );
    }
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
