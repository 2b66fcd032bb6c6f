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
                    let product = B::exact_product(a.into_primitive(), b.into_primitive());
                    prepared.finish((kept_a, kept_b), product)
                }
                OpsKind::UnTracked(prepared) => {
                    prepared.finish(B::exact_product(a.into_primitive(), b.into_primitive()))
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

#[cfg(test)]
pub(crate) mod tests {
    use belfry_configs::rng::{Key, Purpose};
    use burn::tensor::{Device, Tensor, TensorData};

    use super::*;
    use crate::normal::fill_normal;

    fn normal<const D: usize>(stream: u64, shape: [usize; D], device: &Device) -> Tensor<D> {
        let mut values = vec![0.0; shape.iter().product()];
        fill_normal(Key::new(stream, Purpose::Init), 0, 1.0, &mut values);
        Tensor::from_data(TensorData::new(values, shape), device)
    }

    fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
        tensor.try_into_vec_as().expect("can be read")
    }

    /// A product and its gradients under fixed cotangents, by `product`.
    fn with_gradients<const D: usize>(
        [left, right, out]: [[usize; D]; 3],
        device: &Device,
        product: impl Fn(Tensor<D>, Tensor<D>) -> Tensor<D>,
    ) -> [Vec<f32>; 3] {
        let device = device.clone().autodiff();
        let a = normal(1, left, &device).require_grad();
        let b = normal(2, right, &device).require_grad();
        let made = product(a.clone(), b.clone());
        let loss = (made.clone() * normal(3, out, &device)).sum();
        let mut gradients = loss.backward();
        let [a, b] = [a, b].map(|leaf| {
            let gradient = leaf.grad_remove(&mut gradients);
            values(gradient.expect("was asked for"))
        });
        [values(made), a, b]
    }

    #[test]
    fn on_the_host_it_is_the_librarys_to_the_bit() {
        let shapes = [[5, 7, 33], [5, 33, 9], [5, 7, 9]];
        let host = Device::flex();
        let ours = with_gradients(shapes, &host, matmul);
        let theirs = with_gradients(shapes, &host, Tensor::matmul);
        assert_eq!(ours, theirs);
    }

    /// Devices of this machine that are not the host.
    pub(crate) fn devices() -> Vec<Device> {
        #[allow(unused_mut)]
        let mut found = Vec::<Device>::new();
        #[cfg(feature = "cubecl-cpu")]
        found.push(Device::cpu());
        #[cfg(feature = "cuda")]
        found.extend(Device::enumerate(burn::tensor::DeviceType::Cuda).into_vec());
        if found.is_empty() {
            println!("SKIPPED: no GPU, and built without the feature `cubecl-cpu`");
        }
        found
    }

    /// Largest error of a product over the largest product.
    fn distance(ours: &[f32], exact: &[f32]) -> f32 {
        let largest = exact.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let errors = ours.iter().zip(exact).map(|(a, b)| (a - b).abs());
        errors.fold(0.0, f32::max) / largest
    }

    /// TF32 keeps ten bits of a factor: over such sums its error is about 2^-12; f32's is under
    /// 2^-20.
    const F32_TOLERANCE: f32 = 2e-6;

    #[test]
    fn on_other_devices_products_and_gradients_keep_f32() {
        for device in devices() {
            // Small: the units of a cube meet in busy waits where they are threads of a processor.
            check([[35, 33], [33, 20], [35, 20]], &device);
            check([[1, 2, 9, 17], [1, 2, 17, 10], [1, 2, 9, 10]], &device);
        }
    }

    fn check<const D: usize>(shapes: [[usize; D]; 3], device: &Device) {
        let host = with_gradients(shapes, &Device::flex(), Tensor::matmul);
        let ours = with_gradients(shapes, device, matmul);
        let again = with_gradients(shapes, device, matmul);
        assert_eq!(ours, again, "the same bits again");
        for (number, (ours, host)) in ours.iter().zip(&host).enumerate() {
            let error = distance(ours, host);
            assert!(
                error < F32_TOLERANCE,
                "{shapes:?}, tensor {number}: {error}"
            );
        }
    }

    /// A linear layer's weight is the view of a transposed matrix.
    #[test]
    fn on_other_devices_views_are_read_as_what_they_show() {
        for device in devices() {
            let (a, b) = ([48, 96], [80, 96]);
            let ours = matmul(normal(1, a, &device), normal(2, b, &device).transpose());
            let host = Device::flex();
            let host = normal(1, a, &host).matmul(normal(2, b, &host).transpose());
            let error = distance(&values(ours), &values(host));
            assert!(error < F32_TOLERANCE, "{error}");
        }
    }

    #[test]
    fn on_other_devices_what_needs_no_gradient_gets_none() {
        for device in devices() {
            let device = device.autodiff();
            let a = normal(1, [8, 8], &device);
            let b = normal(2, [8, 8], &device).require_grad();
            let mut gradients = matmul(a.clone(), b.clone()).sum().backward();
            assert!(a.grad_remove(&mut gradients).is_none());
            assert!(b.grad_remove(&mut gradients).is_some());
            let free = matmul(a.clone(), a);
            assert!(!free.is_require_grad());
        }
    }
}
