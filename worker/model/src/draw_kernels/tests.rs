//! Kernels against the host, bit for bit; and what a GPU is told, read as text.

use belfry_configs::rng::Purpose;

use super::*;
use crate::draws;
use crate::exact_product::tests::devices;

fn keys(purpose: Purpose) -> Vec<Key> {
    (0..3).map(|i| Key::new(5, purpose).with(i)).collect()
}

fn bits<const D: usize>(tensor: Tensor<D>) -> Vec<u32> {
    let values = tensor.try_into_vec_as::<f32>().expect("can be read");
    values.into_iter().map(f32::to_bits).collect()
}

fn host_bits(values: Vec<f32>) -> Vec<u32> {
    values.into_iter().map(f32::to_bits).collect()
}

/// The first place at which two draws differ.
fn difference(device: &[u32], host: &[u32]) -> Option<(usize, u32, u32)> {
    assert_eq!(device.len(), host.len());
    let differs = |i: &usize| device[*i] != host[*i];
    let place = (0..host.len()).find(differs)?;
    Some((place, device[place], host[place]))
}

#[test]
fn dropout_masks_are_the_hosts() {
    let keys = keys(Purpose::Dropout);
    for device in devices() {
        for rate in [0.1, 0.5, 1.0 / 3.0] {
            let shape = [6, 5, 7_001];
            let drawn = dropout_mask(&device, &keys, rate, shape).expect("has kernels");
            let host = draws::dropout_mask(&keys, rate, shape.iter().product());
            let (drawn, host) = (bits(drawn), host_bits(host));
            assert_eq!(difference(&drawn, &host), None, "rate {rate}");
        }
    }
}

#[test]
fn normals_are_the_hosts() {
    let keys = keys(Purpose::ManagerNoise);
    for device in devices() {
        // Blocks of an odd length too: their last pair is half a pair.
        for shape in [[3, 1, 1_200_000], [3, 11, 13], [3, 1, 1]] {
            let drawn = normals(&device, &keys, 0.25, shape).expect("has kernels");
            let host = draws::normals(&keys, 0.25, shape.iter().product());
            let (drawn, host) = (bits(drawn), host_bits(host));
            assert_eq!(difference(&drawn, &host), None, "shape {shape:?}");
        }
    }
}

#[test]
fn a_host_has_no_kernels_and_a_training_device_gets_constants() {
    let keys = keys(Purpose::Dropout);
    assert!(dropout_mask(&Device::flex(), &keys, 0.1, [3, 4]).is_none());
    for device in devices() {
        let mask = dropout_mask(&device.autodiff(), &keys, 0.1, [3, 4]).expect("has kernels");
        assert!(mask.device().is_autodiff() && !mask.is_require_grad());
    }
}

#[cfg(feature = "cuda")]
pub(crate) mod ptx {
    use std::collections::BTreeMap;
    use std::ffi::CStr;
    use std::sync::Arc;

    use cubecl::ir::nvidia::SmArch;
    use cubecl::ir::{
        AddressType, DeviceIdentity, HardwareProperties, MemoryDeviceProperties, features::Features,
    };
    use cubecl::profile::TimingMethod;
    use cubecl::{Compiler, CubeKernel};
    use cubecl_llvm::nvptx::ptx_version::PtxVersion;
    use cubecl_llvm::{LlvmTarget, PlironArtifact, PlironCompiler, PlironOptions};

    use super::*;

    /// A GPU as far as a compiler asks.
    pub(crate) fn properties() -> Arc<DeviceProperties> {
        let hardware = HardwareProperties {
            load_width: 128,
            vector_register_count: None,
            plane_size_min: 32,
            plane_size_max: 32,
            max_bindings: 32,
            max_shared_memory_size: 65_536,
            max_cube_count: (u32::MAX, 65_535, 65_535),
            max_units_per_cube: 1_024,
            max_cube_dim: (1_024, 1_024, 64),
            num_streaming_multiprocessors: None,
            num_tensor_cores: None,
            min_tensor_cores_dim: None,
            num_cpu_cores: None,
            last_level_cache_size: None,
            max_vector_size: VectorSize::MAX,
            cube_mma_reserved_shared_memory: 0,
        };
        let identity = DeviceIdentity {
            name: "none".into(),
            fingerprint: "none".into(),
            physical: None,
        };
        Arc::new(DeviceProperties::new(
            Features::default(),
            MemoryDeviceProperties::new(u64::MAX, 256),
            hardware,
            TimingMethod::Device,
            identity,
        ))
    }

    /// What the driver would get for compute capability `arch`.
    pub(crate) fn ptx(kernel: impl CubeKernel, arch: u32) -> String {
        let mut compiler = PlironCompiler {
            target: LlvmTarget::Nvptx,
        };
        let options = PlironOptions {
            sm_arch: Some(SmArch::new(arch, true)),
            ptx_version: PtxVersion::for_driver(12_080),
            grid_constants: true,
            ..PlironOptions::default()
        };
        let artifact = compiler.compile(kernel.define(), &options);
        let Ok(PlironArtifact::NvptxCode(module)) = artifact else {
            panic!("no PTX for sm_{arch}");
        };
        // SAFETY: the compiler ends its text with a zero.
        let text = unsafe { CStr::from_ptr(module.ptx.as_ptr()) };
        text.to_string_lossy().into_owned()
    }

    fn kernels(arch: u32) -> [String; 2] {
        let settings = || {
            KernelSettings::new(
                *CubeDim::new_1d(256),
                ExecutionMode::Unchecked,
                AddressType::U32,
            )
        };
        let target = Arc::new(TargetProperties::default());
        let buffer = || BufferCompilationArg { inplace: None };
        let dropout = dropout_kernel::DropoutKernel::new(
            settings(),
            properties(),
            Arc::clone(&target),
            buffer(),
            buffer(),
            (),
            (),
            (),
        );
        let normal = normal_kernel::NormalKernel::new(
            settings(),
            properties(),
            target,
            buffer(),
            buffer(),
            (),
            (),
            (),
            (),
        );
        [ptx(dropout, arch), ptx(normal, arch)]
    }

    /// Opcode and operands of an instruction that writes a register.
    fn instruction(line: &str) -> Option<(&str, Vec<&str>)> {
        let line = line.trim().strip_suffix(';')?;
        let (opcode, operands) = line.split_once(char::is_whitespace)?;
        Some((opcode, operands.split(',').map(str::trim).collect()))
    }

    /// No product meets a sum directly, so neither this compiler nor the driver's can make one
    /// operation with one rounding of them; and every operation rounds as IEEE 754 says.
    #[test]
    fn a_gpu_is_told_to_round_as_the_host_does() {
        for arch in [80, 86, 90] {
            for text in kernels(arch) {
                for inexact in ["fma.", "mad.f", ".approx", ".ftz", ".full", "call"] {
                    let line = text.lines().find(|l| {
                        let code = l.trim_start();
                        !code.starts_with("//") && code.contains(inexact)
                    });
                    assert_eq!(line, None, "sm_{arch}:\n{text}");
                }
                let mut made_by = BTreeMap::new();
                let instructions = text.lines().filter_map(instruction);
                for (opcode, operands) in instructions.clone() {
                    if let Some(register) = operands.first() {
                        made_by.insert(*register, opcode);
                    }
                }
                for (opcode, operands) in instructions {
                    let sums = ["add.", "sub."].iter().any(|sum| opcode.starts_with(sum));
                    if !sums || !opcode.ends_with("f32") {
                        continue;
                    }
                    for operand in &operands[1..] {
                        let origin = made_by.get(operand).copied().unwrap_or("a constant");
                        assert!(
                            !origin.starts_with("mul."),
                            "sm_{arch}: {opcode} {operands:?} reads a bare product:\n{text}"
                        );
                    }
                }
            }
            let [_, normal] = kernels(arch);
            for exact in ["sqrt.rn.f32", "div.rn.f32", "xor.b32"] {
                assert!(normal.contains(exact), "sm_{arch}: no {exact}:\n{normal}");
            }
        }
    }
}
