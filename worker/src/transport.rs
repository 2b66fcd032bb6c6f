//! The transport that `[collective]` names, opened; and what this worker says of its device.
//!
//! Where device links cannot be had the reason goes to the coordinator, which opens generations
//! with TCP instead, or refuses this worker where a ring was asked for. It knows no generation.

use std::fs;
use std::sync::Arc;

use belfry_collective::{DeviceLinks, Endpoint, SumOrder, Transport, Wire};
use belfry_configs::{ValidConfig, Wire as Carried};
use belfry_proto::v1;

use crate::core::Linked;

/// Differs between machines and their starts, and is the same in all containers of one.
const HOST_FILE: &str = "/proc/sys/kernel/random/boot_id";

/// The way to sum, and what the coordinator is told of it.
pub(crate) struct Opened {
    pub transport: Arc<dyn Transport>,
    pub device: v1::Device,
    /// The library whose order of additions a ring takes, for the numeric fingerprint.
    pub orders: String,
}

/// A device that can be linked.
struct Linkable {
    transport: Arc<dyn Transport>,
    unit: String,
    version: String,
}

/// Opens what the configuration asks for; TCP where that cannot be had.
pub(crate) fn open(config: &ValidConfig, tcp: &Arc<Endpoint>) -> Opened {
    let host = fs::read_to_string(HOST_FILE).unwrap_or_default();
    let mut device = v1::Device {
        host: host.trim().to_owned(),
        ..Default::default()
    };
    if config.collective.transport == belfry_configs::Transport::Tcp {
        return Opened {
            transport: Arc::clone(tcp) as Arc<dyn Transport>,
            device,
            orders: String::new(),
        };
    }
    match linked(&config.run.device, tcp) {
        Ok(Linkable {
            transport,
            unit,
            version,
        }) => {
            device.unit = unit;
            let ring = !config.collective.same_bits();
            Opened {
                transport,
                device,
                orders: if ring { version } else { String::new() },
            }
        }
        Err(reason) => {
            tracing::warn!(reason, "no device links");
            device.links_missing = reason;
            Opened {
                transport: Arc::clone(tcp) as Arc<dyn Transport>,
                device,
                orders: String::new(),
            }
        }
    }
}

#[cfg(not(feature = "cuda"))]
fn linked(_device: &str, _tcp: &Arc<Endpoint>) -> Result<Linkable, String> {
    Err("this binary was built without NCCL; build it with `--features cuda`".into())
}

#[cfg(feature = "cuda")]
fn linked(device: &str, tcp: &Arc<Endpoint>) -> Result<Linkable, String> {
    use belfry_collective::nccl::{CudaLinks, DeviceEndpoint};
    let index = device.strip_prefix("cuda:").and_then(|n| n.parse().ok());
    let index = index.ok_or_else(|| format!("run.device = \"{device}\" is no GPU"))?;
    let links = CudaLinks::open(index).map_err(|e| e.to_string())?;
    Ok(Linkable {
        unit: links.unit().to_owned(),
        version: format!(" | NCCL {}", links.version()),
        transport: DeviceEndpoint::new(Arc::clone(tcp), links),
    })
}

/// A generation's links in the collective's terms.
pub(crate) fn links(config: &ValidConfig, linked: Linked) -> DeviceLinks {
    let wire = match config.collective.wire {
        Carried::F32 => Wire::F32,
        Carried::Bf16 => Wire::Bf16,
    };
    DeviceLinks {
        groups: linked.groups,
        id: linked.id,
        order: if linked.ring {
            SumOrder::Ring(wire)
        } else {
            SumOrder::Tree
        },
    }
}
