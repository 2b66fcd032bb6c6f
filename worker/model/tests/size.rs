//! Counts of sizes against the paper's Table 6, the parameter table and the hand.

use belfry_configs::{ImageKind, Manager, ManagerQuery, ManagerWeight, Model, System, TextKind};
use belfry_model::ManagerTower;
use belfry_model::size::{modules, total};

mod base;
use base::base;

/// What one element of a layer norm counts for, as Table 6 was counted (model_spec 16).
const NORM_MACS: u64 = 5;

/// Paper Table 6 in its units, and the exact counts behind it (model_spec 16).
#[test]
fn table_6_is_reproduced() {
    use ManagerQuery::{Fused, Visual};
    let managers = |manager, manager_query| Model {
        manager,
        manager_query,
        ..base(384)
    };
    let bridge = Model {
        system: System::BridgeTower,
        ..base(384)
    };
    let rows = [
        (
            "BridgeTower",
            bridge,
            326_580_993,
            101_253_526_272,
            ["326.58", "101.25"],
        ),
        (
            "SAUE",
            managers(Manager::Saue, Fused),
            326_769_945,
            101_337_795_072,
            ["326.77", "101.34"],
        ),
        (
            "AAUE visual",
            managers(Manager::Aaue, Visual),
            326_769_995,
            101_352_241_152,
            ["326.77", "101.35"],
        ),
        (
            "AAUE fused",
            managers(Manager::Aaue, Fused),
            338_643_285,
            105_520_058_112,
            ["338.64", "105.52"],
        ),
    ];
    for (name, model, parameters, macs, paper) in rows {
        let whole = total(&modules(&model, 50));
        let millions = format!("{:.2}", whole.parameters as f64 / 1e6);
        let billions = format!("{:.2}", whole.macs as f64 / 1e9);
        println!("{name:<12} {millions} M parameters  {billions} G FLOPs");
        assert_eq!((whole.parameters, whole.macs), (parameters, macs), "{name}");
        assert_eq!([millions.as_str(), billions.as_str()], paper, "{name}");
    }
}

/// Model_spec 16's breakdown.
#[test]
fn modules_have_their_share() {
    let modules = modules(&base(384), 50);
    let share = |name: &str| {
        let found = modules.iter().find(|m| m.name == name);
        found.expect("is a row").share
    };
    assert_eq!(share("text tower").parameters, 39_000_576 + 85_054_464);
    assert_eq!(
        share("image tower").parameters,
        85_054_464 + 589_824 + 443_136 + 768 + 3_072
    );
    assert_eq!(share("text cross layers").parameters, 56_710_656);
    assert_eq!(share("image managers").parameters, 6_031_146);
    assert_eq!(share("text transform").parameters, 590_592);
    assert_eq!(share("embeddings").parameters, 2 * 9_216 + 1_536);
    assert_eq!(share("unused").parameters, 39_424 + 1_024 + 590_592 + 1);
    let giga = |name: &str| (share(name).macs as f64 / 1e7).round() / 100.0;
    assert_eq!(giga("image tower"), 55.55);
    assert_eq!(giga("text tower"), 4.30);
    assert_eq!(giga("image cross layers"), 32.32);
    assert_eq!(giga("text cross layers"), 6.85);
}

/// Every system, manager and backbone: the count is the table's, less the heads'.
#[test]
fn the_counted_parameters_are_those_of_the_model() {
    let mut models = vec![
        base(384),
        Model {
            system: System::BridgeTower,
            ..base(384)
        },
        Model {
            system: System::Meter,
            ..base(384)
        },
        Model {
            system: System::Meter,
            meter_fusion: true,
            ..base(384)
        },
    ];
    for manager in Manager::ALL {
        for manager_query in [ManagerQuery::Visual, ManagerQuery::Fused] {
            for manager_weight in [ManagerWeight::Scalar, ManagerWeight::Vector] {
                models.push(Model {
                    manager,
                    manager_query,
                    manager_weight,
                    ..base(384)
                });
            }
        }
    }
    for (layers, text, image) in [(2, 3, 12), (8, 12, 1)] {
        let mut model = Model {
            cross_layers: layers,
            ..base(384)
        };
        (model.text.managed, model.image.managed) = (text, image);
        models.push(model);
    }
    let mut other = base(384);
    other.text.kind = TextKind::Bert;
    (other.text.vocab, other.text.positions) = (30522, 512);
    other.image.kind = ImageKind::Vit;
    models.push(other);
    for model in models {
        let tower = ManagerTower::new(&model, 50).expect("its sizes fit");
        let vocab = u64::from(model.text.vocab);
        // MLM: a layer, a norm, the vocabulary with its bias. ITM: two classes of both streams.
        let heads = 768 * 768 + 768 + 2 * 768 + vocab * 768 + vocab + 1536 * 2 + 2;
        let counted = total(&modules(&model, 50)).parameters;
        assert_eq!(
            counted + heads,
            tower.table().elements() as u64,
            "{model:?}"
        );
    }
}

/// By hand, of the systems that Table 6 has no row for: what they do beyond SAUE or BridgeTower.
#[test]
fn macs_of_the_other_systems_are_counted_by_hand() {
    let macs = |model: &Model| total(&modules(model, 50)).macs;
    let of = |manager, manager_query| {
        macs(&Model {
            manager,
            manager_query,
            ..base(384)
        })
    };
    let saue = of(Manager::Saue, ManagerQuery::Fused);
    let (tokens, width) = (50 + 577, 768u64);
    // Layer i normalises i earlier outputs where SAUE normalises one.
    let norms = NORM_MACS * tokens * width * (1 + 2 + 3 + 4);
    assert_eq!(of(Manager::SaeJoint, ManagerQuery::Fused), saue + norms);
    let concat = 5 * 6 * tokens * 2 * width * width;
    assert_eq!(
        of(Manager::ConcatAttention, ManagerQuery::Visual),
        saue + concat
    );
    let cross = 5 * (tokens * width * width + 2 * 6 * width * width + tokens * 6 * width);
    assert_eq!(
        of(Manager::CrossAttention, ManagerQuery::Visual),
        saue + cross
    );
    let bridge = macs(&Model {
        system: System::BridgeTower,
        ..base(384)
    });
    let meter = macs(&Model {
        system: System::Meter,
        ..base(384)
    });
    // One layer instead of six behind the towers, no link towers.
    let spared = 5 * (tokens * width * width + NORM_MACS * 577 * width);
    assert_eq!(meter + spared + 6 * NORM_MACS * tokens * width, bridge);
}
