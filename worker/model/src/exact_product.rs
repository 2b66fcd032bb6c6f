//! Products of f32 matrices that stay f32.
//!
//! On a GPU the library hands f32 products to tensor cores, which read their operands as TF32: ten
//! bits of mantissa instead of 23. This product keeps all of them, forward and backward, and takes
//! the speed of the ordinary cores for it; a run that wants the other trade calls `Tensor::matmul`.
//! On the host, and for other types than f32, it is `Tensor::matmul`, to the bit. It refuses to
//! know who multiplies what.

use burn::tensor::Tensor;

/// `a b` in f32 throughout, differentiable: the gradients `g b^T` and `a^T g` are such products too.
///
/// # Shapes
/// `[.., rows, inner]`, `[.., inner, columns]` → `[.., rows, columns]`; leading axes are the same
/// on both sides.
///
/// # Panics
/// If leading axes or the inner axis differ.
// Until layers choose by precision, only tests call it.
#[allow(dead_code)]
pub(crate) fn matmul<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> Tensor<D> {
    #[cfg(feature = "cubecl")]
    if on_device::applies(&a, &b) {
        return on_device::matmul(a, b);
    }
    a.matmul(b)
}

#[cfg(feature = "cubecl")]
mod on_device {
    use burn::backend::autodiff::checkpoint::base::Checkpointer;
    use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
    use burn::backend::autodiff::grads::Gradients;
    use burn::backend::autodiff::ops::{Backward, Ops, OpsKind, binary};
    use burn::backend::autodiff::{Autodiff, NodeId};
    use burn::backend::cubecl::dtype_to_storage_type;
    use burn::backend::tensor::FloatTensor;
    use burn::backend::{Backend, Cube, Dispatch, Flex, backend_extension};
    use burn::tensor::{DType, Tensor};
    use burn_cubecl::kernel::matmul::init_matmul_output;
    use cubek::matmul::definition::{MatmulElems, MatmulGlobalElems};
    use cubek::matmul::launch::launch_ref;
    use cubek::matmul::multi_level::Strategy;
    use cubek::std::InputBinding;

    use crate::weights::on_host;

    pub fn applies<const D: usize>(a: &Tensor<D>, b: &Tensor<D>) -> bool {
        a.dtype() == DType::F32 && b.dtype() == DType::F32 && !on_host(&a.device())
    }

    pub fn matmul<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> Tensor<D> {
        let (left, right) = (a.dims(), b.dims());
        assert!(
            left[..D - 2] == right[..D - 2] && left[D - 1] == right[D - 2],
            "no product of {left:?} and {right:?}"
        );
        let product = Dispatch::exact_product(a.into_dispatch(), b.into_dispatch());
        Tensor::from_dispatch(product)
    }

    /// The operation that Burn's backends lack.
    #[backend_extension(Cube, Flex, Autodiff)]
    pub trait ExactProduct: Backend {
        fn exact_product(a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self>;
    }

    impl ExactProduct for Flex {
        fn exact_product(a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self> {
            <Flex as burn::backend::ops::FloatTensorOps<Flex>>::float_matmul(a, b)
        }
    }

    impl ExactProduct for Cube {
        fn exact_product(a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self> {
            let out = init_matmul_output(&a, &b, DType::F32);
            let elem = dtype_to_storage_type(DType::F32);
            let mut elems = MatmulElems::from_globals(&MatmulGlobalElems {
                lhs: elem,
                rhs: elem,
                out: elem,
            });
            // Tiles in registers of ordinary units: the strategy that the library falls back to
            // where there are no tensor cores. Each output is summed by one unit in the order of
            // the inner axis, so bits do not depend on timing.
            let strategy = Strategy::SimpleUnit(Default::default()).into();
            let shapes = format!("{:?} and {:?}", a.meta.shape(), b.meta.shape());
            let (a, b) = (a.binding(), b.binding());
            launch_ref(
                &strategy,
                &out.client,
                InputBinding::new(a, elem),
                InputBinding::new(b, elem),
                out.clone().binding(),
                &mut elems,
            )
            .unwrap_or_else(|error| panic!("no f32 product of {shapes}: {error:?}"));
            out
        }
    }

    impl<B: ExactProduct, C: CheckpointStrategy> ExactProduct for Autodiff<B, C> {
        fn exact_product(a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self> {
            let (a_tracked, b_tracked) = (a.is_tracked(), b.is_tracked());
            let prepared = Product
                .prepare::<C>([a.node(), b.node()])
                .compute_bound()
                .stateful();
            match prepared {
                OpsKind::Tracked(mut prepared) => {
                    // Either factor is kept only for the other one's gradient.
                    let kept_a = b_tracked.then(|| prepared.checkpoint(&a));
                    let kept_b = a_tracked.then(|| prepared.checkpoint(&b));
                    let product = B::exact_product(a.primitive, b.primitive);
                    prepared.finish((kept_a, kept_b), product)
                }
                OpsKind::UnTracked(prepared) => {
                    prepared.finish(B::exact_product(a.primitive, b.primitive))
                }
            }
        }
    }

    #[derive(Debug)]
    struct Product;

    impl<B: ExactProduct> Backward<B, 2> for Product {
        type State = (Option<NodeId>, Option<NodeId>);

        fn backward(
            self,
            ops: Ops<Self::State, 2>,
            gradients: &mut Gradients,
            checkpointer: &mut Checkpointer,
        ) {
            let (a, b) = ops.state;
            let a = a.map(|node| checkpointer.retrieve_node_output::<FloatTensor<B>>(node));
            let b = b.map(|node| checkpointer.retrieve_node_output::<FloatTensor<B>>(node));
            binary::<B, _, _>(
                ops.parents,
                ops.node,
                gradients,
                |gradient| {
                    let b = b.expect("the right factor is kept for the left one's gradient");
                    B::exact_product(gradient, B::float_transpose(b))
                },
                |gradient| {
                    let a = a.expect("the left factor is kept for the right one's gradient");
                    B::exact_product(B::float_transpose(a), gradient)
                },
            );
        }
    }
}
