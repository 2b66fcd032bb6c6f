//! What a GPU is told, where there is none: every form of a row's kernel compiles for it, and its
//! units meet at barriers over shared memory.

use std::path::Path;
use std::sync::Arc;

use cubecl::CubeKernel;
use cubecl::prelude::*;
use half::bf16;

use super::{activation, attention, norm};
use crate::draw_kernels::tests::ptx::{properties, ptx};

/// Units of a row's cube on a GPU.
const UNITS: u32 = 64;

fn settings(units: u32) -> KernelSettings {
    let dim = *CubeDim::new_1d(units);
    KernelSettings::new(dim, ExecutionMode::Unchecked, AddressType::U32)
}

fn buffer() -> BufferCompilationArg {
    BufferCompilationArg { inplace: None }
}

fn target() -> Arc<TargetProperties> {
    Arc::new(TargetProperties::default())
}

fn check<K: CubeKernel>(name: &str, barriers: bool, kernel: impl Fn() -> K) {
    for arch in [80, 86, 90] {
        let text = ptx(kernel(), arch);
        assert_eq!(text.contains("bar.sync"), barriers, "{name}, sm_{arch}");
    }
}

/// Arguments of so many buffers and scalars, then constants.
macro_rules! kernel {
    ($kernel:ty, $units:expr, [$($buffer:tt)*], [$($scalar:tt)*], $($constant:expr),*) => {
        <$kernel>::new(
            settings($units),
            properties(),
            target(),
            $(kernel!(@buffer $buffer),)*
            $(kernel!(@scalar $scalar),)*
            $($constant),*
        )
    };
    (@buffer $any:tt) => { buffer() };
    (@scalar $any:tt) => { () };
}

/// Exponentials come from the CUDA toolkit, where compilers look for it.
fn has_mathematics() -> bool {
    let named = std::env::var("CUDA_PATH").ok();
    let usual = ["/usr/local/cuda", "/opt/cuda", "/usr/lib/cuda", "/usr"];
    let folders = match &named {
        Some(folder) => vec![folder.as_str()],
        None => usual.to_vec(),
    };
    let library = |folder: &&str| Path::new(folder).join("nvvm/libdevice/libdevice.10.bc");
    let found = folders.iter().any(|folder| library(folder).is_file());
    if !found {
        println!("SKIPPED: no libdevice.10.bc of the CUDA toolkit in {folders:?}");
    }
    found
}

#[test]
fn norms_compile_for_gpus() {
    use norm::backward_kernel::BackwardKernel;
    use norm::forward_kernel::ForwardKernel;
    for [affine, summed, dropout] in [
        [true, false, false],
        [false, false, false],
        [true, true, false],
        [true, true, true],
    ] {
        check("norm", true, || {
            kernel!(
                ForwardKernel,
                UNITS,
                [x x x x x x x x],
                [x x x x x x x],
                affine,
                summed,
                dropout,
                UNITS
            )
        });
        check("norm's backward", true, || {
            kernel!(
                BackwardKernel,
                UNITS,
                [x x x x x x x],
                [x x x x x x],
                affine,
                dropout,
                UNITS
            )
        });
    }
    check(
        "columns",
        false,
        || kernel!(norm::columns_kernel::ColumnsKernel, 256, [x x x x x], [x x x x],),
    );
    check(
        "fold",
        false,
        || kernel!(norm::fold_kernel::FoldKernel, 256, [x x], [x x],),
    );
}

fn check_attention<S: Float>() {
    use attention::backward_kernel::BackwardKernel;
    use attention::forward_kernel::ForwardKernel;
    for [masked, dropout] in [[false, false], [true, false], [false, true], [true, true]] {
        check("softmax", true, || {
            kernel!(
                ForwardKernel<S>,
                UNITS,
                [x x x x x],
                [x x x x x x x x],
                masked,
                dropout,
                UNITS
            )
        });
        check(
            "softmax's backward",
            true,
            || kernel!(BackwardKernel<S>, UNITS, [x x x x], [x x x x x x], dropout, UNITS),
        );
    }
}

#[test]
fn softmaxes_compile_for_gpus() {
    if has_mathematics() {
        check_attention::<f32>();
        check_attention::<bf16>();
    }
}

#[test]
fn activations_compile_for_gpus() {
    use activation::backward_kernel::BackwardKernel;
    use activation::forward_kernel::ForwardKernel;
    if !has_mathematics() {
        return;
    }
    for quick in [false, true] {
        check(
            "gelu",
            false,
            || kernel!(ForwardKernel, 256, [x x], [], quick),
        );
        check(
            "gelu's backward",
            false,
            || kernel!(BackwardKernel, 256, [x x x], [], quick),
        );
    }
}
