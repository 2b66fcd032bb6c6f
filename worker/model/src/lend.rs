//! Where a flat tensor lies in a GPU's memory, for libraries that move it themselves.
//!
//! It refuses to know those libraries. What has run of it is what the library below promises: no GPU
//! has confirmed the address yet.

use std::fmt;

use burn::backend::Cube;
use burn::tensor::Tensor;
use cubecl::cuda::CudaRuntime;
use cubecl_runtime::runtime::Runtime;

use crate::error::ModelError;
use crate::gradient::Gradient;

type Server = <CudaRuntime as Runtime>::Server;

/// Floats in a GPU's memory that nobody writes as long as this lives.
pub struct Lent {
    /// Address of the first float, in the device's primary context.
    pub pointer: u64,
    /// Floats, one behind the other.
    pub len: usize,
    /// Keeps the memory.
    tensor: Tensor<1>,
}

impl fmt::Debug for Lent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} floats at {:#x}", self.len, self.pointer)
    }
}

impl Lent {
    /// The floats, copied to the host.
    ///
    /// # Errors
    /// [`ModelError::Device`] if the device does not give them back.
    pub fn to_host(&self) -> Result<Vec<f32>, ModelError> {
        crate::weights::read(self.tensor.clone(), "gradient")
    }
}

impl Gradient {
    /// Lends the floats of a GPU, after everything that was queued for it; `None` if they lie
    /// elsewhere.
    ///
    /// # Errors
    /// [`ModelError::Device`] if the device fails or does not tell where they are.
    pub fn lend(&self) -> Result<Option<Lent>, ModelError> {
        let failed = |reason: String| ModelError::Device {
            what: "address of a gradient",
            reason,
        };
        let Gradient::Device(tensor) = self else {
            return Ok(None);
        };
        let tensor = (**tensor).clone();
        let Ok(cube) = tensor.clone().try_into_primitive::<Cube>() else {
            return Ok(None);
        };
        if !cube.is_contiguous() {
            return Err(failed("its floats do not lie one behind the other".into()));
        }
        tensor.device().sync().map_err(|e| failed(e.to_string()))?;
        let resource = cube.client.get_resource::<Server>(cube.handle.clone());
        // Another runtime of the same backend, such as the processor's.
        let Ok(resource) = resource else {
            return Ok(None);
        };
        Ok(Some(Lent {
            pointer: resource.resource().ptr,
            len: tensor.dims()[0],
            tensor,
        }))
    }
}
