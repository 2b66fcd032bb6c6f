//! The ways in which a case can be computed: on which device, with losses and gradients on the host
//! or not, in which arithmetic.
//!
//! `BELFRY_GOLDEN_MATMUL=tf32` asks parity of the library's own products: on a GPU those of tensor
//! cores, which miss the tolerances; on CubeCL's processor runtime plain f32 ones, which are much
//! faster there than exact ones.

use belfry_configs::Matmul;
use belfry_model::{ManagerTower, Weights};

use crate::arrays::flat;
use crate::cases::{Case, Found, everything};
use crate::device::device;
use crate::runs::{Ask, Outcome, run};

/// The largest relative error of a loss that bf16 products may cause; cases of this folder reach
/// 4e-3 at most.
const BF16_LOSS_TOLERANCE: f64 = 2e-2;

/// The largest relative error of a gradient, as the length of the difference over the length; cases
/// of this folder reach 4e-2 at most.
const BF16_GRADIENT_TOLERANCE: f64 = 1e-1;

/// How a case is computed.
#[derive(Clone, Copy)]
pub struct Way {
    pub matmul: Matmul,
    /// As on a device with a memory of its own, whatever the device is.
    pub apart: bool,
}

/// What parity is asked of.
pub fn plain() -> Way {
    let matmul = match std::env::var("BELFRY_GOLDEN_MATMUL").as_deref() {
        Err(_) | Ok("f32") => Matmul::F32,
        Ok("tf32") => Matmul::Tf32,
        Ok(other) => panic!("BELFRY_GOLDEN_MATMUL={other} is neither f32 nor tf32"),
    };
    Way {
        matmul,
        apart: false,
    }
}

/// The way of GPUs.
pub fn apart() -> Way {
    Way {
        apart: true,
        ..plain()
    }
}

impl Way {
    /// Every thread has its own: see [`Weights`].
    pub fn weights(self, tower: &ManagerTower, params: &[f32], gradients: bool) -> Weights {
        let device = if gradients {
            device().autodiff()
        } else {
            device()
        };
        let weights = Weights::load(tower.table(), params, &device).unwrap();
        let weights = weights.multiplied_in(self.matmul);
        if self.apart {
            weights.apart_from_host()
        } else {
            weights
        }
    }
}

/// Loss and gradient of every case with bf16 products beside those with f32 products.
#[test]
fn bf16_stays_near_f32() {
    println!(
        "{:<24} {:>12} {:>12} {:>12} {:>12}",
        "case, bf16 against f32", "f32 loss", "loss error", "gradient", "largest"
    );
    let mut failures = Vec::new();
    let mut cases = 0;
    for found in everything() {
        let Found::Training(case) = found else {
            continue;
        };
        cases += 1;
        let [exact, rounded] = [Matmul::F32, Matmul::Bf16].map(|matmul| compute(&case, matmul));
        let loss = (rounded.total() / exact.total() - 1.0).abs();
        let (gradient, largest) = difference(&rounded.gradient, &exact.gradient);
        println!(
            "{:<24} {:>12.6} {loss:>12.1e} {gradient:>12.1e} {largest:>12.1e}",
            case.name,
            exact.total()
        );
        assert!(gradient > 0.0, "{}: bf16 changed nothing", case.name);
        if loss > BF16_LOSS_TOLERANCE || gradient > BF16_GRADIENT_TOLERANCE {
            failures.push(case.name.clone());
        }
    }
    assert!(cases > 0, "no case to compare");
    assert!(failures.is_empty(), "too far from f32: {failures:?}");
}

fn compute(case: &Case, matmul: Matmul) -> Outcome {
    let tower = case.tower();
    let params = flat(tower.table(), &case.model, "param");
    let way = Way {
        matmul,
        apart: false,
    };
    run(case, &tower, &params, Ask::Gradient, way)
}

/// Length of the difference over the length, and largest difference over the largest element.
fn difference(ours: &[f32], exact: &[f32]) -> (f64, f64) {
    let (mut difference, mut length, mut worst, mut largest) = (0.0f64, 0.0f64, 0.0f64, 0.0f64);
    for (a, b) in ours.iter().zip(exact) {
        let (a, b) = (f64::from(*a), f64::from(*b));
        difference += (a - b).powi(2);
        length += b.powi(2);
        worst = worst.max((a - b).abs());
        largest = largest.max(b.abs());
    }
    ((difference / length).sqrt(), worst / largest)
}
