//! `[collective]`: how workers sum their gradients.

use serde::{Deserialize, Serialize};

use crate::layers::ConfigError;

/// `[collective]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Collective {
    /// What carries and adds gradients.
    pub transport: Transport,
    /// What a float is on the wire; below 32 bits the sum depends on who holds what.
    pub wire: Wire,
    /// With `nccl`: NCCL within a host, the deterministic TCP tree between hosts, one flow per host.
    pub hierarchical: bool,
}

/// What carries and adds gradients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// Raw TCP between hosts; sums along the lane tree on the CPU.
    #[default]
    Tcp,
    /// NCCL between devices; sums along the lane tree on the devices: the bits of `tcp`.
    Nccl,
    /// NCCL's own sum, the fastest; bits hold per number of workers only.
    NcclRing,
}

/// What a float is on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wire {
    /// 32 bits.
    #[default]
    F32,
    /// 16 bits, half the traffic.
    Bf16,
}

impl Collective {
    /// Whether the sum's bits are the same for every number of workers (promise 2).
    pub fn same_bits(&self) -> bool {
        self.transport != Transport::NcclRing
    }

    /// What decides the sum's bits, for the numeric fingerprint.
    pub fn order(&self) -> &'static str {
        match (self.transport, self.wire) {
            (Transport::Tcp | Transport::Nccl, _) => "tree",
            (Transport::NcclRing, Wire::F32) => "ring f32",
            (Transport::NcclRing, Wire::Bf16) => "ring bf16",
        }
    }

    /// # Errors
    /// [`ConfigError::Invalid`] naming the key.
    pub(crate) fn check(&self, device: &str) -> Result<(), ConfigError> {
        let refuse = |key: &str, reason: &str| {
            Err(ConfigError::Invalid {
                key: key.into(),
                reason: reason.into(),
            })
        };
        if self.wire == Wire::Bf16 && self.same_bits() {
            return refuse(
                "collective.wire",
                "bf16 rounds every message, so the sum would depend on who holds which lanes: use \
                 \"f32\", or collective.transport = \"nccl_ring\", whose bits hold per number of \
                 workers only",
            );
        }
        if self.hierarchical && self.transport != Transport::Nccl {
            return refuse(
                "collective.hierarchical",
                "needs collective.transport = \"nccl\"",
            );
        }
        if self.transport != Transport::Tcp && !device.starts_with("cuda:") {
            return refuse(
                "collective.transport",
                "NCCL links GPUs: use \"tcp\", or run.device = \"cuda:N\"",
            );
        }
        Ok(())
    }
}
