//! The device on which cases run: the host, or what `BELFRY_GOLDEN_DEVICE` names.

use belfry_model::Device;

/// `cpu` (the default), `cuda:N` with the feature `cuda`, or `cubecl-cpu`, a GPU's kernels on the
/// processor, with the feature of that name.
pub fn device() -> Device {
    let name = std::env::var("BELFRY_GOLDEN_DEVICE").unwrap_or_else(|_| "cpu".into());
    match name.as_str() {
        "cpu" => Device::flex(),
        #[cfg(feature = "cubecl-cpu")]
        "cubecl-cpu" => Device::cpu(),
        name => gpu(name),
    }
}

#[cfg(feature = "cuda")]
fn gpu(name: &str) -> Device {
    let index = name
        .strip_prefix("cuda:")
        .and_then(|n| n.parse::<usize>().ok());
    match index {
        Some(index) => Device::cuda(index),
        None => panic!("BELFRY_GOLDEN_DEVICE={name} is none of cpu, cuda:N, cubecl-cpu"),
    }
}

#[cfg(not(feature = "cuda"))]
fn gpu(name: &str) -> Device {
    panic!("BELFRY_GOLDEN_DEVICE={name}: this test was built without that device's feature")
}
