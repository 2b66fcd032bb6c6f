//! What a device can do at best, measured on the device itself: matrix products, memory, the way
//! between host and device. The floors that benchmarks stand beside.
//!
//! It knows the tensor library and refuses to know models and who prints what.

use std::time::Instant;

use belfry_configs::Matmul;
use belfry_configs::rng::{Key, Purpose};
use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::error::ModelError;
use crate::normal::fill_normal;
use crate::weights::{on_host, read};

/// Bytes of an f32.
const F32: usize = 4;

/// Large square matrices, multiplied again and again: each product needs the one before it.
pub struct MatrixProducts {
    left: Tensor<2>,
    right: Tensor<2>,
    side: usize,
    repeats: usize,
}

impl MatrixProducts {
    /// Two random matrices: numbers that are all alike would let a chip run faster than it does on
    /// real ones. 1024 rows on the host, 4096 elsewhere, where smaller ones do not fill the chip.
    ///
    /// # Errors
    /// [`ModelError::Device`] if the device has no such numbers.
    pub fn new(device: &Device, matmul: Matmul) -> Result<Self, ModelError> {
        let (side, repeats) = if on_host(device) {
            (1024, 2)
        } else {
            (4096, 20)
        };
        let inner = device.clone().without_autodiff();
        let matrix = |name: &str, std: f32| {
            let matrix = Tensor::<2>::from_data(normals(name, std, [side, side]), &inner);
            match matmul {
                Matmul::F32 | Matmul::Tf32 => matrix,
                Matmul::Bf16 => matrix.cast(DType::BF16),
            }
        };
        // The product of a row of normals with a column of this spread has their own spread.
        let spread = (side as f32).sqrt().recip();
        Ok(MatrixProducts {
            left: matrix("left", 1.0),
            right: matrix("right", spread),
            side,
            repeats,
        })
    }

    /// Multiply-accumulates per second.
    ///
    /// # Errors
    /// [`ModelError::Device`] if the product cannot be read.
    pub fn rate(&self) -> Result<f64, ModelError> {
        finish(&self.left)?;
        let begun = Instant::now();
        let mut product = self.left.clone();
        for _ in 0..self.repeats {
            product = product.matmul(self.right.clone());
        }
        finish(&product)?;
        let seconds = begun.elapsed().as_secs_f64();
        Ok(self.repeats as f64 * (self.side as f64).powi(3) / seconds)
    }

    /// Rows and columns of the matrices.
    pub fn side(&self) -> usize {
        self.side
    }
}

/// A large vector in the device's memory.
pub struct Memory {
    vector: Tensor<1>,
}

/// Additions between two waits for the device, which cost some microseconds each.
const ADDITIONS: usize = 4;

impl Memory {
    /// 64 MiB on the host, 512 MiB elsewhere: far more than any cache.
    pub fn new(device: &Device) -> Self {
        let len = if on_host(device) { 16 << 20 } else { 128 << 20 };
        let inner = device.clone().without_autodiff();
        Memory {
            vector: Tensor::zeros([len], &inner),
        }
    }

    /// Bytes per second, read and written, of adding a number to every element.
    ///
    /// # Errors
    /// [`ModelError::Device`] if the additions fail.
    pub fn rate(&self) -> Result<f64, ModelError> {
        let len = self.vector.dims()[0];
        finish(&self.vector)?;
        let begun = Instant::now();
        // All from the same vector, and kept until they are through: no two become one.
        let add = |number: usize| self.vector.clone().add_scalar(number as f32);
        let sums: Vec<Tensor<1>> = (0..ADDITIONS).map(add).collect();
        finish(&self.vector)?;
        let seconds = begun.elapsed().as_secs_f64();
        drop(sums);
        Ok((ADDITIONS * 2 * F32 * len) as f64 / seconds)
    }
}

/// Bytes per second between host and device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Staging {
    /// From host memory to the device.
    pub to_device: f64,
    /// From the device to host memory.
    pub to_host: f64,
}

/// Moves `len` floats to the device and back.
///
/// # Errors
/// [`ModelError::Device`] if they do not come back.
pub fn staging(device: &Device, values: &[f32]) -> Result<Staging, ModelError> {
    let inner = device.clone().without_autodiff();
    let bytes = (F32 * values.len()) as f64;
    let data = TensorData::new(values.to_vec(), [values.len()]);
    let begun = Instant::now();
    let there = Tensor::<1>::from_data(data, &inner);
    finish(&there)?;
    let to_device = bytes / begun.elapsed().as_secs_f64();
    let begun = Instant::now();
    let back = read(there, "values that were moved to the device")?;
    let to_host = bytes / begun.elapsed().as_secs_f64();
    if back.first() != values.first() || back.last() != values.last() {
        return Err(ModelError::Device {
            what: "values that were moved to the device",
            reason: "came back changed".into(),
        });
    }
    Ok(Staging { to_device, to_host })
}

/// What the device's allocator holds, pages kept for reuse included, so after some steps about its
/// peak; `None` where it does not tell (the host).
pub fn reserved_bytes(device: &Device) -> Option<u64> {
    let usage = device.clone().without_autodiff().memory_pool_usage()?;
    Some(usage.bytes_reserved)
}

/// Waits for all that was asked of the device, and for this tensor in particular.
fn finish<const D: usize>(tensor: &Tensor<D>) -> Result<(), ModelError> {
    tensor.device().sync().map_err(|error| ModelError::Device {
        what: "a measurement",
        reason: error.to_string(),
    })
}

fn normals(name: &str, std: f32, shape: [usize; 2]) -> TensorData {
    let mut values = vec![0.0; shape[0] * shape[1]];
    fill_normal(
        Key::new(1, Purpose::Pack).with_name(name),
        0,
        std,
        &mut values,
    );
    TensorData::new(values, shape)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_has_rates_and_no_pool() {
        let device = Device::flex().autodiff();
        let products = MatrixProducts::new(&device, Matmul::F32).unwrap();
        assert!(products.rate().unwrap() > 1e6);
        assert!(Memory::new(&device).rate().unwrap() > 1e6);
        let staging = staging(&device, &[1.0, 2.0, 3.0]).unwrap();
        assert!(staging.to_device > 0.0 && staging.to_host > 0.0);
        assert_eq!(reserved_bytes(&device), None);
    }
}
