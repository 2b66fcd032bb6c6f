//! Parity with the authors' code (and, for the managers that they did not release, with our reading
//! of the paper): every case of a golden folder, whatever its system, task, sizes and seed.
//!
//! Tolerances are ten times those that an independent implementation reached (golden README). What
//! is reached is printed as a table; a file that is not understood is a failure.

mod arrays;
#[path = "../base/mod.rs"]
mod base;
mod cases;
mod device;
// The optimizer belongs to the worker, which this crate must not import; its file needs no model.
#[allow(dead_code)]
#[path = "../../../src/optimizer.rs"]
mod optimizer;
mod outputs;
mod parameters;
mod runs;
mod towers;
mod updates;
mod ways;

use arrays::{distance, flat};
use belfry_configs::Recompute;
use belfry_model::resize_positions;
use cases::{Case, Found, everything, golden_dirs};
use runs::{Ask, Outcome, run};
use ways::{Way, apart, plain};

/// Largest absolute error of an intermediate tensor.
const OUTPUT_TOLERANCE: f64 = 5e-5;

/// Largest absolute error of a gradient over the largest gradient of the model.
const GRADIENT_TOLERANCE: f64 = 2e-5;

/// Largest absolute error of a loss.
const LOSS_TOLERANCE: f64 = 5e-5;

/// Largest absolute error of a resized position.
const POSITION_TOLERANCE: f64 = 5e-6;

/// What a case reached, and what it missed.
pub struct Reached {
    name: String,
    outputs: usize,
    /// Worst errors; of what the case does not hold there is none.
    output: Option<f64>,
    loss: Option<f64>,
    gradient: Option<f64>,
    update: Option<f64>,
    /// The smallest share of weights that follow the authors' trajectory.
    trajectory: Option<f64>,
    failures: Vec<String>,
}

impl Reached {
    fn new(name: &str) -> Self {
        Reached {
            name: name.to_string(),
            outputs: 0,
            output: None,
            loss: None,
            gradient: None,
            update: None,
            trajectory: None,
            failures: Vec::new(),
        }
    }

    /// Keeps the worst error of a kind, and a failure if it exceeds the tolerance or is no number.
    fn worst(
        worst: &mut Option<f64>,
        failures: &mut Vec<String>,
        what: &str,
        error: f64,
        tolerance: f64,
    ) {
        let old = worst.unwrap_or(0.0);
        *worst = Some(if error > old || error.is_nan() {
            error
        } else {
            old
        });
        if error.is_nan() || error > tolerance {
            failures.push(format!("{what}: error {error:.2e} exceeds {tolerance:.1e}"));
        }
    }

    pub fn loss(&mut self, what: &str, error: f64) {
        Self::worst(
            &mut self.loss,
            &mut self.failures,
            what,
            error,
            LOSS_TOLERANCE,
        );
    }

    pub fn output(&mut self, what: &str, error: f64) {
        self.outputs += 1;
        Self::worst(
            &mut self.output,
            &mut self.failures,
            what,
            error,
            OUTPUT_TOLERANCE,
        );
    }

    fn gradient(&mut self, what: &str, error: f64) {
        Self::worst(
            &mut self.gradient,
            &mut self.failures,
            what,
            error,
            GRADIENT_TOLERANCE,
        );
    }

    fn line(&self) -> String {
        let error = |value: Option<f64>| value.map_or("-".into(), |v| format!("{v:.1e}"));
        let share =
            |value: Option<f64>| value.map_or("-".into(), |v| format!("{:.2} %", 100.0 * v));
        format!(
            "{:<24} {:>7} {:>9} {:>9} {:>9} {:>9} {:>11}  {}",
            self.name,
            self.outputs,
            error(self.output),
            error(self.loss),
            error(self.gradient),
            error(self.update),
            share(self.trajectory),
            if self.failures.is_empty() {
                "ok"
            } else {
                "FAILED"
            }
        )
    }
}

fn print_and_judge(reached: &[Reached]) {
    println!(
        "{:<24} {:>7} {:>9} {:>9} {:>9} {:>9} {:>11}",
        "case", "outputs", "output", "loss", "gradient", "update", "trajectory"
    );
    for one in reached {
        println!("{}", one.line());
    }
    let failures: Vec<String> = reached
        .iter()
        .flat_map(|one| one.failures.iter().map(|f| format!("{}: {f}", one.name)))
        .collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn every_case_is_the_authors() {
    let mut reached = Vec::new();
    for found in everything() {
        match found {
            Found::Training(case) => reached.push(check(&case, plain())),
            Found::Rerank(case) => reached.push(outputs::check_rerank(&case)),
            Found::Tower(case) => reached.push(towers::check(&case)),
            _ => {}
        }
    }
    assert!(!reached.is_empty(), "no case in {:?}", golden_dirs());
    print_and_judge(&reached);
}

/// Losses and gradients that stay on the device, as on a GPU, are the authors' as well.
#[test]
fn every_case_is_the_authors_where_nothing_crosses_to_the_host() {
    let training = everything().into_iter().filter_map(|found| match found {
        Found::Training(case) => Some(check(&case, apart())),
        _ => None,
    });
    print_and_judge(&training.collect::<Vec<Reached>>());
}

#[test]
fn every_file_is_understood() {
    let mut unknown = Vec::new();
    for found in everything() {
        match found {
            Found::Elsewhere(name, room) => println!("{name:<24} another room's: {room}"),
            Found::Unknown(name) => unknown.push(name),
            _ => {}
        }
    }
    assert!(
        unknown.is_empty(),
        "cases that no test understands: {unknown:?}"
    );
}

#[test]
fn resized_position_tables_are_the_authors() {
    for found in everything() {
        let Found::Positions(name, arrays) = found else {
            continue;
        };
        for (key, table) in &arrays {
            let Some(sizes) = key.strip_suffix("/in") else {
                continue;
            };
            let theirs = &arrays[&format!("{sizes}/out")];
            let grid = (theirs.shape[0] - 1).isqrt();
            let ours = resize_positions(&table.f32(), table.shape[1], grid).unwrap();
            let error = distance(&ours, &theirs.values);
            println!("{name:<24} {sizes}: {error:.1e}");
            assert!(error <= POSITION_TOLERANCE, "{name} {sizes}: {error:.2e}");
        }
    }
}

fn check(case: &Case, way: Way) -> Reached {
    let mut reached = Reached::new(&case.name);
    let tower = case.tower();
    parameters::check_table(case, tower.table(), &mut reached.failures);
    if !reached.failures.is_empty() {
        return reached;
    }
    let params = flat(tower.table(), &case.model, "param");
    let traced = run(case, &tower, &params, Ask::Trace, way);
    outputs::check(case, &traced, &mut reached);
    // What training computes is cut down to what the losses need; the losses must not notice.
    let trained = run(case, &tower, &params, Ask::Gradient, way);
    outputs::check_losses(case, &trained, &mut reached);
    if !case.has_noise() {
        let evaluated = run(case, &tower, &params, Ask::Evaluate, way);
        outputs::check_losses(case, &evaluated, &mut reached);
    }
    check_gradient(case, tower.table(), &trained, &mut reached);
    let recomputing = tower.clone().recomputing(Recompute::Blocks);
    let again = run(case, &recomputing, &params, Ask::Gradient, way);
    if again.losses != trained.losses || again.gradient != trained.gradient {
        let failure = "recomputation changes losses or gradients".to_owned();
        reached.failures.push(failure);
    }
    updates::check(case, &tower, params, way, &mut reached);
    reached
}

fn check_gradient(
    case: &Case,
    table: &belfry_model::ParamTable,
    ours: &Outcome,
    reached: &mut Reached,
) {
    let values = case.grad.values().flat_map(|a| &a.values);
    let largest = values.fold(0.0f64, |max, g| max.max(g.abs()));
    for entry in table.entries() {
        let ours = &ours.gradient[entry.offset..entry.offset + entry.len];
        let what = format!("gradient of {}", entry.name);
        match case.grad.get(&format!("grad/{}", entry.name)) {
            Some(theirs) => reached.gradient(&what, distance(ours, &theirs.values) / largest),
            None if ours.iter().any(|g| *g != 0.0) => {
                reached.failures.push(format!("{what}: there is none"));
            }
            None => {}
        }
    }
}
