//! Matrix products, in the arithmetic that the run file chooses (`[precision] matmul`).
//!
//! Operands come in as f32 and results leave as f32: layer norms, softmax, residuals and losses
//! never see anything else. With bf16 both operands are rounded before the product and its result
//! after it, in both directions; the gradient of a weight returns to f32 before it is added to
//! anything. An operand that several products share is rounded once. It refuses to know layers.

use burn::tensor::{FloatDType, Tensor, module};

use belfry_configs::Matmul;

use crate::exact_product;
use crate::weights::on_host;

/// How products are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Products {
    pub matmul: Matmul,
}

/// A tensor as products take it.
#[derive(Clone, Debug)]
pub(crate) struct Operand<const D: usize>(Tensor<D>);

impl Products {
    /// Ready for any number of products.
    pub fn operand<const D: usize>(self, x: Tensor<D>) -> Operand<D> {
        Operand(match self.matmul {
            Matmul::Bf16 => x.cast(FloatDType::BF16),
            Matmul::F32 | Matmul::Tf32 => x,
        })
    }

    /// `a b`, f32.
    ///
    /// # Shapes
    /// `[.., m, k]`, `[.., k, n]` → `[.., m, n]`
    pub fn multiply<const D: usize>(self, a: Operand<D>, b: Operand<D>) -> Tensor<D> {
        match self.matmul {
            Matmul::F32 => exact_product::matmul(a.0, b.0),
            Matmul::Tf32 => a.0.matmul(b.0),
            Matmul::Bf16 => a.0.matmul(b.0).cast(FloatDType::F32),
        }
    }

    /// `x W + b` of all rows as one matrix: with more axes the library copies the weight each time.
    ///
    /// # Shapes
    /// x `[.., in]`, weight `[in, out]`, bias `[out]` → `[.., out]`
    pub fn linear<const D: usize>(
        self,
        x: Operand<D>,
        weight: Tensor<2>,
        bias: Option<Tensor<1>>,
    ) -> Tensor<D> {
        let mut shape = x.0.dims();
        let [inputs, outputs] = weight.dims();
        let rows = shape.iter().product::<usize>() / inputs;
        shape[D - 1] = outputs;
        let x = x.0.reshape([rows, inputs]);
        if self.matmul == Matmul::F32 && on_host(&x.device()) {
            return module::linear(x, weight, bias).reshape(shape);
        }
        let y = self.multiply(Operand(x), self.operand(weight));
        let y = match bias {
            Some(bias) => y + bias.reshape([1, outputs]),
            None => y,
        };
        y.reshape(shape)
    }
}

impl<const D: usize> Operand<D> {
    /// The same numbers in another shape or order of axes.
    pub fn seen<const E: usize>(self, view: impl FnOnce(Tensor<D>) -> Tensor<E>) -> Operand<E> {
        Operand(view(self.0))
    }
}
