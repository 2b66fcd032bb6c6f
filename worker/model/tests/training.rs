//! What training relies on: lane independence, dropout, empty MLM micro-batches, equal bits.

use std::sync::Arc;

use belfry_configs::{ImageKind, ImageTower, Manager, Model, TextKind, TextTower};
use belfry_model::{
    Device, Draws, ManagerTower, MicroBatchReport, ModelError, PretrainBatch, Weights,
};

mod tiny;
use tiny::{TEXT_LEN, check_slope, enlarge, keys, micro_batch, model, relative};

fn join(batches: &[PretrainBatch]) -> PretrainBatch {
    let mut all = batches[0].clone();
    for batch in &batches[1..] {
        all.micro_batches += batch.micro_batches;
        all.masked_ids.extend(&batch.masked_ids);
        all.ids.extend(&batch.ids);
        all.mlm_labels.extend(&batch.mlm_labels);
        all.text_mask.extend(&batch.text_mask);
        all.images.extend(&batch.images);
        all.itm_images.extend(&batch.itm_images);
        all.itm_labels.extend(&batch.itm_labels);
    }
    all
}

fn gradient(
    tower: &ManagerTower,
    params: &[f32],
    batch: &PretrainBatch,
    draws: Draws,
) -> (Vec<f32>, Vec<MicroBatchReport>) {
    let weights = Weights::load(tower.table(), params, &Device::flex().autodiff()).unwrap();
    let mut gradient = vec![0.0; tower.table().elements()];
    let reports = tower
        .pretrain_gradient(&weights, batch, draws, &mut gradient)
        .unwrap();
    (gradient, reports)
}

#[test]
fn a_device_batch_of_two_is_two_of_one_up_to_rounding() {
    let tower = ManagerTower::new(&model(), TEXT_LEN).unwrap();
    let params = tower.table().init(3);
    let (one, two) = (micro_batch(1), micro_batch(2));
    let keys = keys(&[10, 11]);
    let (mut apart, mut reports) = gradient(&tower, &params, &one, Draws::Keys(&keys[..1]));
    let (second, more) = gradient(&tower, &params, &two, Draws::Keys(&keys[1..]));
    apart
        .iter_mut()
        .zip(&second)
        .for_each(|(sum, term)| *sum += term);
    reports.extend(more);
    let batch = join(&[one.clone(), two.clone()]);
    let (together, joined) = gradient(&tower, &params, &batch, Draws::Keys(&keys));
    let error = relative(&together, &apart);
    assert!(error < 1e-5, "gradients differ by {error}");
    for (a, b) in joined.iter().zip(&reports) {
        assert!((a.mlm_loss - b.mlm_loss).abs() < 1e-5 && (a.itm_loss - b.itm_loss).abs() < 1e-5);
        assert_eq!((a.mlm_masked, a.pairs), (b.mlm_masked, b.pairs));
    }
    // Keys and micro-batches permuted together give the same reports, permuted.
    let swapped_keys = [keys[1], keys[0]];
    let batch = join(&[two, one]);
    let (_, swapped) = gradient(&tower, &params, &batch, Draws::Keys(&swapped_keys));
    assert!((swapped[1].mlm_loss - joined[0].mlm_loss).abs() < 1e-5);
    // Keys permuted alone do not.
    let (_, other) = gradient(&tower, &params, &batch, Draws::Keys(&keys));
    assert!(
        (other[1].mlm_loss - joined[0].mlm_loss).abs() > 1e-4,
        "keys change nothing"
    );
}

#[test]
fn gradients_are_added() {
    let tower = ManagerTower::new(&model(), TEXT_LEN).unwrap();
    let params = tower.table().init(3);
    let batch = micro_batch(1);
    let (once, _) = gradient(&tower, &params, &batch, Draws::Off);
    let weights = Weights::load(tower.table(), &params, &Device::flex().autodiff()).unwrap();
    let mut sum = vec![1.0; once.len()];
    tower
        .pretrain_gradient(&weights, &batch, Draws::Off, &mut sum)
        .unwrap();
    let error = sum
        .iter()
        .zip(&once)
        .fold(0.0f32, |max, (s, g)| max.max((s - 1.0 - g).abs()));
    assert!(error < 1e-5, "{error}");
}

#[test]
fn a_micro_batch_without_masked_tokens_adds_zero() {
    let tower = ManagerTower::new(&model(), TEXT_LEN).unwrap();
    let params = tower.table().init(3);
    let mut empty = micro_batch(2);
    empty.mlm_labels.fill(-100);
    let (alone, report) = gradient(&tower, &params, &empty, Draws::Keys(&keys(&[1])));
    assert!(alone.iter().all(|g| g.is_finite()));
    assert_eq!((report[0].mlm_loss, report[0].mlm_masked), (0.0, 0));
    assert!(report[0].itm_loss > 0.0);
    let full = micro_batch(1);
    let batch = join(&[full.clone(), empty]);
    let (both, reports) = gradient(&tower, &params, &batch, Draws::Keys(&keys(&[0, 1])));
    assert_eq!((reports[1].mlm_loss, reports[1].mlm_masked), (0.0, 0));
    let (mut sum, _) = gradient(&tower, &params, &full, Draws::Keys(&keys(&[0])));
    sum.iter_mut()
        .zip(&alone)
        .for_each(|(sum, term)| *sum += term);
    assert!(relative(&both, &sum) < 1e-5);
}

/// With dropout and noise on, along the gradient of all parameters and of the managers alone.
#[test]
fn the_gradient_is_the_slope_of_the_loss() {
    for manager in [Manager::Saue, Manager::Aaue] {
        let model = Model { manager, ..model() };
        let tower = ManagerTower::new(&model, TEXT_LEN).unwrap();
        let mut params = tower.table().init(3);
        enlarge(&mut params);
        let batch = join(&[micro_batch(1), micro_batch(2)]);
        let keys = keys(&[10, 11]);
        let draws = Draws::Keys(&keys);
        let (slope, _) = gradient(&tower, &params, &batch, draws);
        for part in [
            "",
            "manager_tower",
            "layer_scores",
            "softmax_temperature",
            "text_transformer",
        ] {
            let loss = |params: &[f32]| {
                let (_, reports) = gradient(&tower, params, &batch, draws);
                reports.iter().map(|r| r.mlm_loss + r.itm_loss).sum()
            };
            let what = format!("{manager:?}");
            check_slope(&what, tower.table(), &params, &slope, part, loss);
        }
    }
}

#[test]
fn weights_read_where_they_are_give_the_bits_of_a_copy() {
    let tower = ManagerTower::new(&model(), TEXT_LEN).unwrap();
    let params = Arc::new(tower.table().init(3));
    let (batch, keys) = (micro_batch(1), keys(&[10]));
    let (copied, _) = gradient(&tower, &params, &batch, Draws::Keys(&keys));
    let device = Device::flex().autodiff();
    let held = Held(Arc::clone(&params));
    let weights = Weights::share(tower.table(), held, &device).unwrap();
    let mut shared = vec![0.0; copied.len()];
    let reports = tower.pretrain_gradient(&weights, &batch, Draws::Keys(&keys), &mut shared);
    assert!(reports.is_ok() && shared == copied);
    assert!(Arc::strong_count(&params) > 1, "read where they are");
    drop(weights);
    assert_eq!(Arc::strong_count(&params), 1, "nothing keeps them");
}

#[derive(Clone)]
struct Held(Arc<Vec<f32>>);

impl AsRef<[f32]> for Held {
    fn as_ref(&self) -> &[f32] {
        &self.0
    }
}

/// Once small, once large enough that every product and reduction is cut up for threads.
#[test]
fn the_same_bits_with_one_and_three_threads_and_again() {
    let mut wide = model();
    (wide.hidden, wide.heads, wide.mlp_ratio) = (256, 4, 4);
    (wide.text.hidden, wide.text.intermediate, wide.text.vocab) = (256, 1024, 9000);
    (wide.image.hidden, wide.image.heads, wide.image.patch) = (256, 4, 1);
    for sizes in [model(), wide] {
        let tower = ManagerTower::new(&sizes, TEXT_LEN).unwrap();
        let params = tower.table().init(3);
        let batch = join(&[micro_batch(1), micro_batch(2)]);
        let keys = keys(&[10, 11]);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let (gradient, reports) =
                pool.install(|| gradient(&tower, &params, &batch, Draws::Keys(&keys)));
            let bits: Vec<u32> = gradient.iter().map(|g| g.to_bits()).collect();
            (bits, reports)
        };
        let first = run(1);
        assert!(
            first == run(3),
            "three threads change bits at width {}",
            sizes.hidden
        );
        assert!(
            first == run(1),
            "a second run changes bits at width {}",
            sizes.hidden
        );
    }
}

#[test]
fn evaluation_draws_nothing_and_training_does() {
    let tower = ManagerTower::new(&model(), TEXT_LEN).unwrap();
    let params = tower.table().init(3);
    let batch = micro_batch(1);
    let weights = Weights::load(tower.table(), &params, &Device::flex()).unwrap();
    let evaluated = tower.pretrain_evaluate(&weights, &batch).unwrap();
    let (_, quiet) = gradient(&tower, &params, &batch, Draws::Off);
    assert_eq!(evaluated, quiet);
    let (_, noisy) = gradient(&tower, &params, &batch, Draws::Keys(&keys(&[4])));
    assert_ne!(evaluated, noisy);
}

#[test]
fn fresh_weights_follow_the_seed_and_the_name() {
    let tower = ManagerTower::new(&model(), TEXT_LEN).unwrap();
    let table = tower.table();
    let flat = table.init(3);
    assert_eq!(flat, table.init(3));
    assert_ne!(flat, table.init(4));
    let of = |name: &str| {
        let entry = table.get(name).unwrap();
        &flat[entry.offset..entry.offset + entry.len]
    };
    assert!(
        of("text_transformer.embeddings.word_embeddings.weight")[16..32]
            .iter()
            .all(|w| *w == 0.0)
    );
    assert!(
        of("vit_model.visual.ln_post.weight")
            .iter()
            .all(|w| *w == 1.0)
    );
    let scores = "cross_modal_text_manager_tower.0.manager_layer.layer_scores";
    assert!(of(scores).iter().all(|w| *w == 0.5));
    let dense = of("text_transformer.encoder.layer.0.intermediate.dense.weight");
    let var = dense.iter().map(|w| w * w).sum::<f32>() / dense.len() as f32;
    assert!(
        (var.sqrt() - 0.02).abs() < 2e-3,
        "standard deviation {}",
        var.sqrt()
    );
    assert_eq!(
        table.entries().iter().map(|e| e.len).sum::<usize>(),
        table.elements()
    );
}

#[test]
fn the_base_model_has_the_authors_parameter_count() {
    let mut base = model();
    (base.hidden, base.heads, base.cross_layers, base.mlp_ratio) = (768, 12, 6, 4);
    base.text = TextTower {
        kind: TextKind::Roberta,
        layers: 12,
        managed: 6,
        hidden: 768,
        heads: 12,
        intermediate: 3072,
        vocab: 50_265,
        positions: 514,
    };
    base.image = ImageTower {
        kind: ImageKind::Clip,
        layers: 12,
        managed: 6,
        hidden: 768,
        heads: 12,
        size: 288,
        patch: 16,
    };
    let tower = ManagerTower::new(&base, 50).unwrap();
    // model_spec 16: pre-training model with MLM and ITM heads.
    assert_eq!(tower.table().elements(), 377_698_736);
    assert_eq!(tower.table().entries().len(), 965);
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let tower = ManagerTower::new(&model(), TEXT_LEN).unwrap();
    let params = tower.table().init(3);
    let weights = Weights::load(tower.table(), &params, &Device::flex()).unwrap();
    let mut batch = micro_batch(1);
    batch.ids[3] = 40;
    let error = tower.pretrain_evaluate(&weights, &batch).unwrap_err();
    assert!(matches!(
        error,
        ModelError::Range {
            what: "batch.ids",
            index: 3,
            value: 40,
            ..
        }
    ));
    batch.ids.pop();
    let error = tower.pretrain_evaluate(&weights, &batch).unwrap_err();
    assert!(matches!(
        error,
        ModelError::Length {
            what: "batch.ids",
            ..
        }
    ));
    let mut gradient = vec![0.0; params.len()];
    let batch = micro_batch(1);
    let error = tower
        .pretrain_gradient(&weights, &batch, Draws::Off, &mut gradient)
        .unwrap_err();
    assert!(matches!(error, ModelError::NoAutodiff));
    let mut sizes = model();
    sizes.image.patch = 5;
    let error = ManagerTower::new(&sizes, TEXT_LEN).unwrap_err();
    assert!(
        matches!(
            error,
            ModelError::Sizes {
                key: "model.image.patch",
                ..
            }
        ),
        "{error}"
    );
    let error = ManagerTower::new(&model(), 11).unwrap_err();
    assert!(
        matches!(
            error,
            ModelError::Sizes {
                key: "model.text.positions",
                ..
            }
        ),
        "{error}"
    );
    assert!(Weights::load(tower.table(), &params[1..], &Device::flex()).is_err());
}
