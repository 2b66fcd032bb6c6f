//! Where the floats of a tree node lie: in host memory, or on a device.
//!
//! Stands between whoever computed a gradient and the transport that sums it. Knows no device:
//! an address is a number, and its owner brings the floats down to the host where that is wanted.

use std::fmt;
use std::sync::Arc;

/// One node's floats. Only read by an exchange, so an exchange can be repeated.
#[derive(Clone, Debug)]
pub enum Floats {
    /// In host memory.
    Host(Arc<Vec<f32>>),
    /// On this process's device.
    Device(DeviceFloats),
}

/// Contiguous f32 on a device, complete: whoever made them has synchronised.
#[derive(Clone, Debug)]
pub struct DeviceFloats {
    /// Address of the first float, in the device's primary context.
    pub pointer: u64,
    /// Number of floats.
    pub len: usize,
    /// Keeps the memory alive.
    pub owner: Arc<dyn DeviceOwner>,
}

/// Whose device memory it is.
pub trait DeviceOwner: fmt::Debug + Send + Sync {
    /// The floats, copied to the host.
    ///
    /// # Errors
    /// What the device said.
    fn to_host(&self) -> Result<Vec<f32>, String>;
}

/// A number of floats.
pub trait Length {
    /// How many.
    fn floats(&self) -> usize;
    /// The floats, where they lie in host memory.
    fn values(&self) -> Option<&[f32]>;
}

impl Length for Arc<Vec<f32>> {
    fn floats(&self) -> usize {
        self.len()
    }

    fn values(&self) -> Option<&[f32]> {
        Some(self)
    }
}

impl Length for Floats {
    fn floats(&self) -> usize {
        match self {
            Floats::Host(values) => values.len(),
            Floats::Device(values) => values.len,
        }
    }

    fn values(&self) -> Option<&[f32]> {
        match self {
            Floats::Host(values) => Some(values),
            Floats::Device(_) => None,
        }
    }
}

impl From<Arc<Vec<f32>>> for Floats {
    fn from(values: Arc<Vec<f32>>) -> Self {
        Floats::Host(values)
    }
}

impl Floats {
    /// The floats in host memory, copied there if they lie on a device.
    ///
    /// # Errors
    /// What the device said, or that it brought another number of floats.
    pub fn on_host(&self) -> Result<Arc<Vec<f32>>, String> {
        let device = match self {
            Floats::Host(values) => return Ok(Arc::clone(values)),
            Floats::Device(device) => device,
        };
        let values = device.owner.to_host()?;
        if values.len() == device.len {
            return Ok(Arc::new(values));
        }
        let brought = values.len();
        Err(format!(
            "{brought} floats came from the device, not {}",
            device.len
        ))
    }
}
