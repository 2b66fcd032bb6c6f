//! One tower alone, for backbones that no golden model of the authors has: made with `transformers`
//! and `timm` by `make_backbones.py` beside the golden files.

use belfry_configs::{
    Head, ImageKind, ImageTower, Manager, ManagerQuery, ManagerWeight, Model, System, Task,
    TextKind, TextTower,
};
use belfry_model::{ClassifyBatch, Labels, ManagerTower, Weights};

use crate::Reached;
use crate::arrays::{distance, flat};
use crate::cases::Case;
use crate::device::device;

/// Sizes of the tower that a case says nothing about.
const OTHER: u32 = 8;

/// Hidden states of every layer.
pub fn check(case: &Case) -> Reached {
    let mut reached = Reached::new(&case.name);
    let model = model(case);
    let text_len = match case.io.get("in/text_ids") {
        Some(ids) => ids.shape[1],
        None => 1,
    };
    let tower = ManagerTower::new(&model, text_len).unwrap();
    let table = tower.table();
    for name in case.model.keys() {
        let ours = name.strip_prefix("param/").and_then(|name| table.get(name));
        if ours.is_none() {
            reached.failures.push(format!("{name} is not ours"));
        }
    }
    let weights = flat(table, &case.model, "param");
    let weights = Weights::load(table, &weights, &device()).unwrap();
    let batch = batch(case, &model, text_len);
    let (_, trace) = tower
        .classify_trace(&weights, &batch, belfry_model::Draws::Off)
        .unwrap();
    for (name, theirs) in &case.io {
        let Some(wanted) = name.strip_prefix("out/") else {
            continue;
        };
        let full = format!("pass0/{wanted}");
        match trace
            .records
            .iter()
            .find(|r| r.name == full && r.shape == theirs.shape)
        {
            Some(ours) => reached.output(wanted, distance(&ours.values, &theirs.values)),
            None => reached.failures.push(format!("{name}: not understood")),
        }
    }
    if reached.outputs == 0 {
        reached.failures.push("no output was compared".into());
    }
    reached
}

fn batch(case: &Case, model: &Model, text_len: usize) -> ClassifyBatch {
    let rows = case
        .io
        .values()
        .find(|a| a.shape.len() > 1)
        .expect("inputs")
        .shape[0];
    let pixels = 3 * (model.image.size * model.image.size) as usize;
    let given = |name: &str| case.io.get(name);
    ClassifyBatch {
        micro_batches: 1,
        pairs: rows,
        text_len,
        ids: given("in/text_ids").map_or(vec![2; rows * text_len], |a| a.i32()),
        text_mask: given("in/text_masks").map_or(vec![1.0; rows * text_len], |a| a.f32()),
        images: vec![given("in/image").map_or(vec![0.0; rows * pixels], |a| a.f32())],
        labels: Labels::Classes(vec![0; rows]),
    }
}

fn model(case: &Case) -> Model {
    let size = |key: &str| case.json["sizes"][key].as_u64().map(|n| n as u32);
    let of = |tower: &str, key: &str, other: u32| match case.json["tower"].as_str() {
        Some(ours) if ours == tower => size(key).unwrap_or_else(|| panic!("no size `{key}`")),
        _ => other,
    };
    let text = |key, other| of("text", key, other);
    let image = |key, other| of("image", key, other);
    Model {
        system: System::ManagerTower,
        task: Task::SnliVe,
        manager: Manager::Saue,
        manager_query: ManagerQuery::Fused,
        manager_weight: ManagerWeight::Vector,
        manager_noise: false,
        meter_fusion: false,
        hidden: OTHER,
        heads: 1,
        cross_layers: 1,
        mlp_ratio: 1,
        dropout: 0.0,
        text: TextTower {
            kind: match case.json["kind"].as_str() {
                Some("bert") => TextKind::Bert,
                _ => TextKind::Roberta,
            },
            layers: text("layers", 1),
            managed: 1,
            hidden: text("hidden", OTHER),
            heads: text("heads", 1),
            intermediate: text("intermediate", OTHER),
            vocab: text("vocab", OTHER),
            positions: text("positions", OTHER),
        },
        image: ImageTower {
            kind: match case.json["kind"].as_str() {
                Some("vit") => ImageKind::Vit,
                _ => ImageKind::Clip,
            },
            layers: image("layers", 1),
            managed: 1,
            hidden: image("hidden", OTHER),
            heads: image("heads", 1),
            size: image("size", OTHER),
            patch: image("patch", OTHER),
        },
        head: Head::default(),
    }
}
