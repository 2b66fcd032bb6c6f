//! Recomputation by block changes no bit: losses and gradients of every system and task, with
//! dropout and noise on, against those of passes that keep everything.

use belfry_configs::{ImageKind, Manager, Matmul, Model, Recompute, System, Task, TextKind};
use belfry_model::{Alone, Company, Device, Draws, ManagerTower, Negatives, Weights};

mod tiny;
use tiny::{
    TEXT_LEN, classify_batch, enlarge, keys, micro_batch, retrieval_batch, uneven, vqa, wide,
};

/// Losses and gradient of one step of the model's task, as bits.
fn step(tower: &ManagerTower, task: Task, params: &[f32], matmul: Matmul) -> (String, Vec<u32>) {
    let weights = Weights::load(tower.table(), params, &Device::flex().autodiff()).unwrap();
    let weights = weights.multiplied_in(matmul);
    let mut gradient = vec![0.0; tower.table().elements()];
    let flat = &mut gradient;
    let keys = keys(&[10, 11]);
    let reports = match task {
        Task::Pretrain => {
            let draws = Draws::Keys(&keys[..1]);
            let reports = tower.pretrain_gradient(&weights, &micro_batch(1), draws, flat);
            format!("{:?}", reports.unwrap())
        }
        Task::Retrieval | Task::PretrainItc => {
            let batch = retrieval_batch(0, 3, task == Task::PretrainItc);
            let company = Company {
                group: &mut Alone::new(vec![1, 2, 1]),
                negatives: Negatives::Drawn(keys[1]),
            };
            let draws = Draws::Keys(&keys[..1]);
            let report = tower.retrieve_gradient(&weights, &batch, draws, company, flat);
            format!("{:?}", report.unwrap())
        }
        task => {
            let batch = classify_batch(task, 1, 2);
            let reports = tower.classify_gradient(&weights, &batch, Draws::Keys(&keys), flat);
            format!("{:?}", reports.unwrap())
        }
    };
    (reports, gradient.iter().map(|g| g.to_bits()).collect())
}

fn check(what: &str, model: &Model) {
    check_in(what, model, Matmul::F32);
}

fn check_in(what: &str, model: &Model, matmul: Matmul) {
    let tower = ManagerTower::new(model, TEXT_LEN).unwrap_or_else(|e| panic!("{what}: {e}"));
    let mut params = tower.table().init(3);
    enlarge(&mut params);
    let kept = step(&tower, model.task, &params, matmul);
    let moved = kept.1.iter().filter(|bits| **bits << 1 != 0).count();
    assert!(
        4 * moved > kept.1.len(),
        "{what}: {moved} gradients are not zero"
    );
    let tower = tower.recomputing(Recompute::Blocks);
    let again = step(&tower, model.task, &params, matmul);
    assert_eq!(kept.0, again.0, "{what}: losses");
    let other = kept.1.iter().zip(&again.1).filter(|(a, b)| a != b).count();
    assert_eq!(
        other,
        0,
        "{what}: gradients that differ, of {}",
        kept.1.len()
    );
}

#[test]
fn every_task_of_every_system_keeps_its_bits() {
    let systems = [
        (System::ManagerTower, false),
        (System::BridgeTower, false),
        (System::Meter, false),
        (System::Meter, true),
    ];
    for task in Task::ALL {
        for (system, meter_fusion) in systems {
            let mut model = uneven(Model {
                system,
                task,
                meter_fusion,
                ..vqa()
            });
            model.head.nlvr2_dropout = 0.2;
            if system == System::BridgeTower {
                (model.text.layers, model.image.layers) = (3, 3);
            }
            check(&format!("{system:?} {task:?} {meter_fusion}"), &model);
        }
    }
}

#[test]
fn every_manager_and_backbone_keeps_its_bits() {
    for manager in Manager::ALL {
        let model = Model {
            task: Task::Pretrain,
            manager,
            cross_layers: 4,
            ..vqa()
        };
        check(&format!("{manager:?}"), &model);
    }
    let mut model = vqa();
    model.text.kind = TextKind::Bert;
    model.image.kind = ImageKind::Vit;
    check("BERT and ViT", &model);
}

/// Every product and reduction is cut up for threads.
#[test]
fn wide_layers_keep_their_bits() {
    let model = Model {
        task: Task::Pretrain,
        ..vqa()
    };
    let model = wide(model);
    check("wide", &model);
    check_in("wide bf16", &model, Matmul::Bf16);
}
