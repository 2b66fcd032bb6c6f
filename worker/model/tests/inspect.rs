//! What managers are seen to do: weights that sum to one, known softmaxes, padding that counts for
//! nothing.

use belfry_configs::rng::{Key, Purpose};
use belfry_configs::{Manager, ManagerQuery, Model, System};
use belfry_model::{
    Device, Inspection, ManagerTower, Modality, ModelError, Part, Source, WeightRow, Weights,
};

mod tiny;
use tiny::{PAIRS, TEXT_LEN, enlarge, images, model, texts};

/// Captions with their mask, and images.
type Batch = (Vec<i32>, Vec<f32>, Vec<f32>);

fn batch(seed: u64) -> Batch {
    let key = Key::new(seed, Purpose::Pack);
    let (ids, mask) = texts(key, PAIRS);
    (ids, mask, images(key.with(1), PAIRS))
}

fn inspect(model: &Model, params: &[f32], batches: &[Batch]) -> Inspection {
    let tower = ManagerTower::new(model, TEXT_LEN).unwrap();
    let weights = Weights::load(tower.table(), params, &Device::flex()).unwrap();
    let mut inspection = Inspection::new(model).unwrap();
    for (ids, mask, images) in batches {
        let seen = tower.inspect(&weights, (ids, mask), images, &mut inspection);
        seen.unwrap();
    }
    inspection
}

fn fresh(model: &Model) -> Vec<f32> {
    ManagerTower::new(model, TEXT_LEN).unwrap().table().init(3)
}

fn sum(rows: &[WeightRow], side: Modality, layer: u32, experts: bool) -> f64 {
    let own = rows
        .iter()
        .filter(|r| (r.modality, r.layer) == (side, layer));
    let own = own.filter(|r| matches!(r.source, Source::Expert(_)) == experts);
    own.map(|row| row.mean).sum()
}

#[test]
fn the_weights_under_one_softmax_sum_to_one() {
    for manager in Manager::ALL {
        let model = Model {
            manager,
            cross_layers: 3,
            ..model()
        };
        let mut params = fresh(&model);
        enlarge(&mut params);
        let rows = inspect(&model, &params, &[batch(1)]).weights();
        for side in [Modality::Text, Modality::Image] {
            for layer in 1..=3 {
                let (experts, cross) = (
                    sum(&rows, side, layer, true),
                    sum(&rows, side, layer, false),
                );
                let whole = match manager {
                    Manager::SaeJoint => experts + cross,
                    _ => experts,
                };
                assert!(
                    (whole - 1.0).abs() < 1e-5,
                    "{manager:?} {side:?} {layer}: {whole}"
                );
                if manager == Manager::SaeSplit && layer > 1 {
                    assert!((cross - 1.0).abs() < 1e-5, "{side:?} {layer}: {cross}");
                }
            }
        }
        let seen: Vec<Source> = rows
            .iter()
            .filter(|r| r.modality == Modality::Text && r.layer == 3)
            .map(|r| r.source)
            .collect();
        let every = matches!(manager, Manager::SaeJoint | Manager::SaeSplit);
        let below: &[Source] = if every {
            &[Source::Cross(1), Source::Cross(2)]
        } else {
            &[Source::Cross(2)]
        };
        // The text tower has three layers and the managers see two.
        let experts = [Source::Expert(2), Source::Expert(3)];
        assert_eq!(seen, [&experts, below].concat(), "{manager:?}");
    }
}

#[test]
fn learned_weights_are_the_softmax_of_their_rows_by_temperature() {
    let model = Model {
        manager: Manager::Saue,
        ..model()
    };
    let tower = ManagerTower::new(&model, TEXT_LEN).unwrap();
    let mut params = fresh(&model);
    let prefix = "cross_modal_text_manager_tower.1.manager_layer";
    let mut set = |name: &str, values: &dyn Fn(usize) -> f32| {
        let entry = tower.table().get(&format!("{prefix}.{name}")).unwrap();
        for (i, value) in params[entry.offset..entry.offset + entry.len]
            .iter_mut()
            .enumerate()
        {
            *value = values(i);
        }
    };
    // Experts 0.2 and 0.8, the cross output 0.3.
    set("layer_scores", &|i| [0.2, 0.8, 0.3][i / 16]);
    set("softmax_temperature", &|_| 0.5);
    let rows = inspect(&model, &params, &[batch(1), batch(2)]).weights();
    let row = |source| {
        let is = |r: &&WeightRow| (r.modality, r.layer, r.source) == (Modality::Text, 2, source);
        *rows.iter().find(is).unwrap()
    };
    let ratio = (0.6f64 / 0.5).exp();
    assert!((row(Source::Expert(2)).mean - 1.0 / (1.0 + ratio)).abs() < 1e-6);
    assert!((row(Source::Expert(3)).mean - ratio / (1.0 + ratio)).abs() < 1e-6);
    assert!((row(Source::Cross(1)).mean - 0.3).abs() < 1e-6);
    assert!(row(Source::Expert(2)).deviation < 1e-6);
}

#[test]
fn fresh_static_managers_are_alike_and_adaptive_ones_differ() {
    let uni = |inspection: &Inspection| {
        let rows = inspection.similarities();
        let row = rows
            .iter()
            .find(|r| (r.layer, r.part) == (2, Part::Experts));
        row.unwrap().mean
    };
    let still = Model {
        manager: Manager::Saue,
        ..model()
    };
    let alike = inspect(&still, &fresh(&still), &[batch(1)]);
    assert!((uni(&alike) - 1.0).abs() < 1e-6, "{}", uni(&alike));
    assert!(alike.similarities().iter().all(|r| r.part == Part::Experts));
    let mut params = fresh(&model());
    enlarge(&mut params);
    let inspection = inspect(&model(), &params, &[batch(1)]);
    assert!(uni(&inspection) < 0.999, "{}", uni(&inspection));
    let deviates = |r: &WeightRow| r.layer == 2 && r.deviation > 1e-4;
    assert!(inspection.weights().iter().any(deviates));
}

#[test]
fn cross_parts_are_compared_from_the_third_layer_on() {
    let deep = Model {
        cross_layers: 4,
        ..model()
    };
    let rows = inspect(&deep, &fresh(&deep), &[batch(1)]).similarities();
    let of = |part| {
        let own = rows
            .iter()
            .filter(|r| r.modality == Modality::Image && r.part == part);
        own.map(|r| r.layer).collect::<Vec<u32>>()
    };
    assert_eq!(of(Part::Experts), [2, 3, 4]);
    assert_eq!(of(Part::Cross), [3, 4]);
    assert!(
        rows.iter()
            .all(|r| (-1.000001..=1.000001).contains(&r.mean))
    );
}

#[test]
fn padding_counts_for_nothing_and_batches_add_up() {
    // The fused query attends to padding too (model_spec 5.2), so it changes what is seen.
    let model = Model {
        manager_query: ManagerQuery::Visual,
        ..model()
    };
    let mut params = fresh(&model);
    enlarge(&mut params);
    let (one, two) = (batch(1), batch(2));
    let mut other = one.clone();
    // Another word behind the end of the first caption.
    let pad = TEXT_LEN - 1;
    assert_eq!(one.1[pad], 0.0);
    other.0[pad] = 7;
    let close = |a: &Inspection, b: &Inspection| {
        let pairs = a.weights().into_iter().zip(b.weights());
        pairs
            .map(|(a, b)| (a.mean - b.mean).abs())
            .fold(0.0, f64::max)
            < 1e-6
    };
    assert!(close(
        &inspect(&model, &params, std::slice::from_ref(&one)),
        &inspect(&model, &params, &[other])
    ));
    let (a, b) = (
        inspect(&model, &params, std::slice::from_ref(&one)),
        inspect(&model, &params, std::slice::from_ref(&two)),
    );
    let both = inspect(&model, &params, &[one, two]);
    assert_eq!(both.pairs(), 2 * PAIRS as u64);
    for ((a, b), both) in a.weights().iter().zip(b.weights()).zip(both.weights()) {
        assert!(((a.mean + b.mean) / 2.0 - both.mean).abs() < 1e-6);
    }
}

#[test]
fn a_system_without_managers_is_refused_by_name() {
    let bridge = Model {
        system: System::BridgeTower,
        ..model()
    };
    let error = Inspection::new(&bridge).unwrap_err();
    assert!(matches!(error, ModelError::NoManagers { .. }));
    assert!(error.to_string().contains("model.system"), "{error}");
}
