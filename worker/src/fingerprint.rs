//! The numeric fingerprint: what the bits depend on besides configuration and data (DESIGN 5).

use std::fs;

use belfry_configs::ValidConfig;
use xxhash_rust::xxh3::xxh3_128;

use crate::device;

/// Binary and its features, processor model, instruction sets and cache sizes (matrix blocking
/// follows them), GPU model and driver, the device batch, the arithmetic of products and the order
/// of sums. Workers of one run must agree on it.
pub fn fingerprint(config: &ValidConfig) -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |key: &str| {
        let line = cpuinfo.lines().find(|l| l.starts_with(key));
        line.and_then(|l| l.split_once(':'))
            .map_or("", |(_, v)| v.trim())
            .to_owned()
    };
    let caches: Vec<String> = (0..4)
        .filter_map(|i| {
            let path = format!("/sys/devices/system/cpu/cpu0/cache/index{i}/size");
            fs::read_to_string(path).ok().map(|s| s.trim().to_owned())
        })
        .collect();
    format!(
        "belfry {} {}{} | {} | {} flags {:08x} | caches {} | {} | device_batch {} | products {} | sums {}",
        env!("CARGO_PKG_VERSION"),
        if cfg!(debug_assertions) {
            "debug"
        } else {
            "release"
        },
        // Other features of the library than the ones the CPU's numbers were made with.
        if cfg!(feature = "cuda") { " cuda" } else { "" },
        std::env::consts::ARCH,
        field("model name"),
        xxh3_128(field("flags").as_bytes()) as u32,
        caches.join("/"),
        device::identity(&config.run.device),
        config.batch.device_batch,
        config.precision.matmul.name(),
        config.collective.order(),
    )
}
