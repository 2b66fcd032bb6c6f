//! The optimizer against the authors': one update, three steps end to end, the schedule.

use belfry_configs::{Decay, Optim};
use belfry_model::ManagerTower;

use crate::Reached;
use crate::arrays::{distance, flat};
use crate::cases::{Case, Found, everything};
use crate::optimizer::{AdamW, RateGroup, State};
use crate::runs::{Ask, run};
use crate::ways::Way;

/// Largest absolute error of weights after one update with the authors' gradient.
const UPDATE_TOLERANCE: f64 = 1.2e-6;

/// Trajectories: this share of the weights is within `TRAJECTORY_TOLERANCE` (golden README).
const TRAJECTORY_SHARE: f64 = 0.995;

const TRAJECTORY_TOLERANCE: f64 = 1e-5;

/// Largest relative error of a total loss along a trajectory.
const TRAJECTORY_LOSS_TOLERANCE: f64 = 1e-3;

/// Steps that the authors' files follow.
const STEPS: u64 = 3;

/// Where attention ignores the key bias, the true gradient is zero and Adam amplifies rounding.
fn is_key_bias(name: &str, element: usize, len: usize) -> bool {
    name.ends_with("key.bias")
        || name.ends_with("k_proj.bias")
        || ((name.ends_with("in_proj_bias") || name.ends_with("qkv.bias"))
            && (len / 3..2 * len / 3).contains(&element))
}

/// One update with the authors' gradient, then the whole trajectory on our own.
pub fn check(case: &Case, tower: &ManagerTower, params: Vec<f32>, way: Way, reached: &mut Reached) {
    if let Some(step) = &case.step
        && step.keys().any(|key| key.starts_with("after1/"))
    {
        one_update(case, tower, params.clone(), reached);
    }
    if case.total_at(1).is_some() || case.step.is_some() {
        trajectory(case, tower, params, way, reached);
    }
}

fn one_update(case: &Case, tower: &ManagerTower, mut params: Vec<f32>, reached: &mut Reached) {
    let table = tower.table();
    let step = case.step.as_ref().expect("asked for by the caller");
    let gradient = flat(table, &case.grad, "grad");
    let (mut m, mut v) = (vec![0.0; params.len()], vec![0.0; params.len()]);
    let state = State {
        params: &mut params,
        m: &mut m,
        v: &mut v,
    };
    case.adam(table).apply(0, state, &gradient);
    for entry in table.entries() {
        let theirs = &step[&format!("after1/{}", entry.name)];
        let ours = &params[entry.offset..entry.offset + entry.len];
        let error = distance(ours, &theirs.values);
        let what = format!("update of {}", entry.name);
        let (worst, failures) = (&mut reached.update, &mut reached.failures);
        Reached::worst(worst, failures, &what, error, UPDATE_TOLERANCE);
    }
}

fn trajectory(
    case: &Case,
    tower: &ManagerTower,
    mut params: Vec<f32>,
    way: Way,
    reached: &mut Reached,
) {
    let table = tower.table();
    let adam = case.adam(table);
    let (mut m, mut v) = (vec![0.0; params.len()], vec![0.0; params.len()]);
    for number in 0..=STEPS {
        let ours = run(case, tower, &params, Ask::Gradient, way);
        if let Some(theirs) = case.total_at(number) {
            let error = (ours.total() - theirs).abs() / theirs;
            if error.is_nan() || error > TRAJECTORY_LOSS_TOLERANCE {
                reached
                    .failures
                    .push(format!("total loss at step {number} is off by {error:.1e}"));
            }
        }
        if number == STEPS {
            break;
        }
        let state = State {
            params: &mut params,
            m: &mut m,
            v: &mut v,
        };
        adam.apply(number, state, &ours.gradient);
        tower.clamp_temperature(&mut params);
        if let Some(share) = share(case, table, number + 1, &params) {
            reached.trajectory = Some(reached.trajectory.map_or(share, |old| old.min(share)));
            if share < TRAJECTORY_SHARE {
                reached
                    .failures
                    .push(format!("after {} steps only {share} agree", number + 1));
            }
        }
    }
}

/// The share of the weights that are where the authors' are after `steps`, if they say so.
fn share(case: &Case, table: &belfry_model::ParamTable, steps: u64, params: &[f32]) -> Option<f64> {
    let step = case.step.as_ref()?;
    let after = format!("after{steps}/");
    step.keys().find(|key| key.starts_with(&after))?;
    let (mut near, mut all) = (0u64, 0u64);
    for entry in table.entries() {
        let theirs = &step[&format!("{after}{}", entry.name)].values;
        for (i, theirs) in theirs.iter().enumerate() {
            if !is_key_bias(&entry.name, i, entry.len) {
                let error = (f64::from(params[entry.offset + i]) - theirs).abs();
                all += 1;
                near += u64::from(error <= TRAJECTORY_TOLERANCE);
            }
        }
    }
    Some(near as f64 / all as f64)
}

#[test]
fn learning_rates_are_the_authors() {
    let mut checked = 0;
    for found in everything() {
        let Found::Schedules(schedules) = found else {
            continue;
        };
        for schedule in schedules.as_array().unwrap() {
            let (decay, power) = match (schedule["power"].as_f64(), schedule["power"].as_str()) {
                (Some(power), _) => (Decay::Polynomial, power),
                (_, Some("cosine")) => (Decay::Cosine, 1.0),
                _ => panic!("schedule `{}`", schedule["power"]),
            };
            let number = |key: &str| schedule[key].as_f64().unwrap();
            let optim = Optim {
                learning_rate: number("base_lr"),
                lr_mult_head: number("lr_mult_head"),
                lr_mult_cross_modal: number("lr_mult_cross_modal"),
                weight_decay: 0.01,
                warmup: number("warmup"),
                end_learning_rate: number("end_lr"),
                decay,
                decay_power: power,
                betas: [0.9, 0.98],
                epsilon: 1e-8,
                non_finite: belfry_configs::NonFinite::Fail,
            };
            let (steps, warmup) = (number("max_steps") as u64, number("warmup") as u64);
            let adam = AdamW::new(optim, steps, warmup, Vec::new());
            let groups = [RateGroup::Base, RateGroup::Head, RateGroup::CrossModal];
            for row in schedule["rows"].as_array().unwrap() {
                let row = row.as_array().unwrap().iter();
                let row: Vec<f64> = row.map(|v| v.as_f64().unwrap()).collect();
                for (i, group) in groups.into_iter().enumerate() {
                    let ours = adam.learning_rate(row[0] as u64, group);
                    for theirs in [row[1 + 2 * i], row[2 + 2 * i]] {
                        let off = (ours - theirs).abs();
                        let close = off <= 1e-12 * theirs.abs();
                        assert!(close, "step {}: {ours} {theirs}", row[0]);
                    }
                }
                checked += 1;
            }
        }
    }
    println!("{checked} rows of learning rates checked");
}
