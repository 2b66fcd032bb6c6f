//! `[precision]`: the arithmetic of matrix products. Master weights, layer norms, softmax, losses
//! and every sum of gradients are f32 whatever is chosen.

use serde::{Deserialize, Serialize};

/// `[precision]`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Precision {
    /// What the operands of matrix products are rounded to. Part of what fixes a run's bits.
    pub matmul: Matmul,
}

/// Arithmetic of matrix products.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Matmul {
    /// f32 throughout: what parity with the authors' code is checked with.
    #[default]
    F32,
    /// f32 operands rounded to 10 bits of mantissa by the tensor cores, f32 sums. GPUs only.
    Tf32,
    /// Operands and results bf16 (7 bits of mantissa), f32 sums inside a product.
    Bf16,
}

impl Matmul {
    /// The word in run files.
    pub fn name(self) -> &'static str {
        match self {
            Matmul::F32 => "f32",
            Matmul::Tf32 => "tf32",
            Matmul::Bf16 => "bf16",
        }
    }
}
