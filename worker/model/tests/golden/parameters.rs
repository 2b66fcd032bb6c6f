//! Names, shapes, trained set and optimizer groups of all parameters against the authors'.

use std::collections::BTreeMap;

use belfry_configs::{Head, Manager, Model, System, Task};
use belfry_model::{ManagerTower, ParamTable};
use serde_json::Value;

use crate::base::base;
use crate::cases::{Case, Found, everything};
use crate::optimizer::{ParamGroup, RateGroup};

/// A buffer of the authors' checkpoints: no parameter, and a constant.
const BUFFER: &str = "position_ids";

/// The case's parameters are the table's, and the same ones are trained.
pub fn check_table(case: &Case, table: &ParamTable, failures: &mut Vec<String>) {
    let named = case.model.iter().filter_map(|(name, array)| {
        let name = name.strip_prefix("param/")?;
        (!name.ends_with(BUFFER)).then(|| (name.to_string(), array.shape.clone()))
    });
    same_names(table, &named.collect(), failures);
    let listed = case.json["params_without_gradient"].as_array();
    for entry in table.entries() {
        let theirs = case.grad.contains_key(&format!("grad/{}", entry.name));
        if entry.trained != theirs {
            failures.push(format!("{}: trained is {}", entry.name, entry.trained));
        }
        if let Some(listed) = listed
            && entry.trained == listed.iter().any(|name| name == entry.name.as_str())
        {
            failures.push(format!("{}: the list of untrained disagrees", entry.name));
        }
    }
    if let Some(groups) = case.json["param_groups"].as_object() {
        for group in groups.values() {
            check_group(case, group, failures);
        }
    }
}

fn same_names(
    table: &ParamTable,
    theirs: &BTreeMap<String, Vec<usize>>,
    failures: &mut Vec<String>,
) {
    let entries = table.entries().iter();
    let ours: BTreeMap<_, _> = entries.map(|e| (e.name.clone(), e.shape.clone())).collect();
    for (name, shape) in theirs {
        match ours.get(name) {
            None => failures.push(format!("{name} is missing")),
            Some(ours) if ours != shape => {
                failures.push(format!("{name} has shape {ours:?} instead of {shape:?}"));
            }
            Some(_) => {}
        }
    }
    let surplus = ours.keys().filter(|name| !theirs.contains_key(*name));
    failures.extend(surplus.map(|name| format!("{name} is not theirs")));
}

fn check_group(case: &Case, group: &Value, failures: &mut Vec<String>) {
    let config = |key: &str| case.json["config"][key].as_f64().unwrap();
    let base = config("learning_rate");
    for name in group["names"].as_array().into_iter().flatten() {
        let ours = ParamGroup::of(name.as_str().unwrap(), 0, 1, true);
        if ours.decay != (group["weight_decay"].as_f64().unwrap() > 0.0) {
            failures.push(format!("{name}: decay is {}", ours.decay));
        }
        let mult = match ours.rate {
            RateGroup::Base => 1.0,
            RateGroup::Head => config("lr_mult_head"),
            RateGroup::CrossModal => config("lr_mult_cross_modal"),
        };
        let rate = group["initial_lr"].as_f64().unwrap();
        if (rate / base - mult).abs() > 1e-9 {
            failures.push(format!("{name}: rate is {:?}", ours.rate));
        }
    }
}

/// The lists of the BASE models: every name, shape and group of every configuration in them.
#[test]
fn parameters_of_the_base_models_are_the_authors() {
    for found in everything() {
        let Found::Parameters(file, configurations) = found else {
            continue;
        };
        let whole = configurations.as_object().unwrap();
        let first = whole.values().find(|c| c["tensors"].is_array());
        let first = tensors(&first.expect("one configuration in full")["tensors"]);
        for (name, configuration) in whole {
            let theirs = resolve(&first, configuration);
            let tower = ManagerTower::new(&base_model(configuration, &theirs), 50)
                .unwrap_or_else(|e| panic!("{file} {name}: {e}"));
            let mut failures = Vec::new();
            let shapes = theirs
                .iter()
                .map(|(name, tensor)| (name.clone(), tensor.shape.clone()));
            same_names(tower.table(), &shapes.collect(), &mut failures);
            for (name, tensor) in &theirs {
                let ours = ParamGroup::of(name, 0, 1, true);
                let rate = match ours.rate {
                    RateGroup::Base => "base",
                    RateGroup::Head => "head",
                    RateGroup::CrossModal => "cross_modal",
                };
                let group = format!("{rate}/{}", if ours.decay { "decay" } else { "no_decay" });
                if group != tensor.group {
                    failures.push(format!("{name} is in {group}, not in {}", tensor.group));
                }
            }
            let elements = configuration["total_parameters"].as_u64().unwrap();
            assert!(
                failures.is_empty(),
                "{file} {name}:\n{}",
                failures.join("\n")
            );
            assert_eq!(tower.table().elements() as u64, elements, "{file} {name}");
            println!(
                "{file} {name}: {} tensors, {elements} parameters",
                theirs.len()
            );
        }
    }
}

/// A tensor of a parameter list.
struct Listed {
    shape: Vec<usize>,
    group: String,
}

fn tensors(list: &Value) -> BTreeMap<String, Listed> {
    let tensor = |t: &Value| {
        let shape = t["shape"].as_array()?.iter();
        let listed = Listed {
            shape: shape.map(|n| n.as_u64().unwrap() as usize).collect(),
            group: t["group"].as_str()?.to_string(),
        };
        Some((t["name"].as_str()?.to_string(), listed))
    };
    // Buffers have no group.
    list.as_array()
        .into_iter()
        .flatten()
        .filter_map(tensor)
        .collect()
}

/// A configuration in full: its own list, or its differences from the first one.
fn resolve(first: &BTreeMap<String, Listed>, configuration: &Value) -> BTreeMap<String, Listed> {
    if configuration["tensors"].is_array() {
        return tensors(&configuration["tensors"]);
    }
    let mut keys = configuration.as_object().into_iter().flatten();
    let differences = keys.find(|(key, _)| key.starts_with("differences_to_"));
    let (_, differences) = differences.expect("a list, or differences from one");
    let copy = |(name, t): (&String, &Listed)| {
        let listed = Listed {
            shape: t.shape.clone(),
            group: t.group.clone(),
        };
        (name.clone(), listed)
    };
    let mut resolved: BTreeMap<_, _> = first.iter().map(copy).collect();
    for removed in differences["removed"].as_array().into_iter().flatten() {
        resolved.remove(removed.as_str().unwrap());
    }
    resolved.extend(tensors(&differences["added"]));
    resolved.extend(tensors(&differences["changed"]));
    resolved
}

/// The BASE sizes (model_spec 1) in the configuration that a list is of.
fn base_model(configuration: &Value, theirs: &BTreeMap<String, Listed>) -> Model {
    let overrides = &configuration["overrides"];
    let task = match configuration["task"].as_str().unwrap() {
        "pretrain" => Task::Pretrain,
        "vqa" => Task::Vqa,
        "snli" => Task::SnliVe,
        "nlvr2" => Task::Nlvr2,
        "irtr" => Task::Retrieval,
        other => panic!("task `{other}`"),
    };
    let classifiers = theirs
        .iter()
        .find(|(name, _)| name.ends_with("_classifier.0.weight"));
    let hidden_scale = classifiers.map_or(1, |(_, t)| t.shape[0] / 1536) as u32;
    let truth = |key: &str| overrides[key].as_bool().unwrap_or(false);
    let image_size = configuration["image_size"].as_u64().unwrap() as u32;
    let mut base = base(image_size);
    if truth("vit_remove_last") {
        base.image.layers -= 1;
    }
    Model {
        system: match overrides["model_type"].as_str() {
            None | Some("MT") => System::ManagerTower,
            Some("BT") => System::BridgeTower,
            Some("METER") => System::Meter,
            Some(other) => panic!("model type `{other}`"),
        },
        task,
        manager: match overrides["manager_type"].as_str() {
            None | Some("AAUE") => Manager::Aaue,
            Some("SAUE") => Manager::Saue,
            Some(other) => panic!("manager type `{other}`"),
        },
        meter_fusion: truth("meter_fusion"),
        head: Head {
            hidden_scale,
            ..Head::default()
        },
        ..base
    }
}
