//! The device of `run.device`: opened, or refused with what is missing and where it was looked for.
//!
//! What is asked of the machine is gathered first and judged by a function of values, because the
//! library below panics where a driver is missing. It knows no model and no data.

use belfry_model::Device;

use crate::error::WorkerError;

/// Opens the device, ready for gradients.
///
/// # Errors
/// [`WorkerError::Device`], before anything is computed.
pub fn open(name: &str) -> Result<Device, WorkerError> {
    let opened = match name.strip_prefix("cuda:") {
        None => Ok(Device::flex()),
        Some(index) => match index.parse() {
            Ok(index) => open_cuda(index),
            Err(error) => Err(format!("`{index}` is no index: {error}")),
        },
    };
    match opened {
        Ok(device) => Ok(device.autodiff()),
        Err(reason) => Err(WorkerError::Device {
            device: name.to_owned(),
            reason,
        }),
    }
}

/// What bits depend on besides the processor: of a GPU its model, capability and driver. The index
/// is left out: a worker may use any of several equal GPUs.
pub(crate) fn identity(name: &str) -> String {
    match name.strip_prefix("cuda:") {
        None => name.to_owned(),
        Some(index) => cuda_identity(index.parse().unwrap_or_default()),
    }
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(_index: usize) -> Result<Device, String> {
    Err("this binary was built without GPUs; build it with `--features cuda`".into())
}

#[cfg(not(feature = "cuda"))]
fn cuda_identity(_index: usize) -> String {
    "cuda, not built in".into()
}

#[cfg(feature = "cuda")]
use cuda::{identity as cuda_identity, open as open_cuda};

/// What a machine has for CUDA, as far as it could be asked: each part only if those before it are
/// there.
#[cfg(any(feature = "cuda", test))]
#[derive(Debug, Default)]
struct Machine {
    /// The driver's library, libcuda, can be loaded.
    driver: bool,
    /// The variable that adds folders to the loader's search.
    library_path: Option<String>,
    /// How many devices the driver shows, or why it does not say.
    devices: Option<Result<usize, String>>,
    /// `CUDA_VISIBLE_DEVICES`, which hides devices and numbers the rest anew.
    visible: Option<String>,
    /// The folders in which a CUDA toolkit was looked for.
    toolkit_folders: Vec<std::path::PathBuf>,
    /// One of them has the toolkit's mathematics.
    mathematics: bool,
}

/// The toolkit's `exp`, `log`, `erf` and the like as bitcode, linked into kernels when they are
/// compiled. Nothing else of the toolkit is needed: no compiler, no headers.
#[cfg(any(feature = "cuda", test))]
const MATHEMATICS: &str = "nvvm/libdevice/libdevice.10.bc";

/// Whether device `index` of this machine can be opened, and if not, why and what to do.
#[cfg(any(feature = "cuda", test))]
fn judge(index: usize, machine: &Machine) -> Result<(), String> {
    if !machine.driver {
        let path = match &machine.library_path {
            Some(path) => format!(" and in LD_LIBRARY_PATH={path}"),
            None => "; LD_LIBRARY_PATH is not set".into(),
        };
        return Err(format!(
            "no NVIDIA driver: libcuda.so, libcuda.so.1 not found in the system's library \
             folders{path}; install the driver, or give the container its GPUs"
        ));
    }
    let hidden = match &machine.visible {
        Some(visible) => format!(" (CUDA_VISIBLE_DEVICES={visible})"),
        None => String::new(),
    };
    match &machine.devices {
        Some(Ok(0)) | None => {
            return Err(format!("the NVIDIA driver shows no GPU{hidden}"));
        }
        Some(Ok(count)) if index >= *count => {
            return Err(format!(
                "there is no GPU {index}: this machine has {count}, numbered from 0{hidden}"
            ));
        }
        Some(Ok(_)) => {}
        Some(Err(reason)) => {
            return Err(format!(
                "the NVIDIA driver does not start: {reason}{hidden}"
            ));
        }
    }
    if !machine.mathematics {
        let folders = machine.toolkit_folders.iter();
        let folders: Vec<String> = folders.map(|f| f.display().to_string()).collect();
        return Err(format!(
            "{MATHEMATICS} of the CUDA toolkit not found in {}; install it (package cuda-nvcc, or \
             nvidia-cuda-nvcc for pip) and set CUDA_PATH to the folder that has nvvm",
            folders.join(", ")
        ));
    }
    Ok(())
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::env;
    use std::path::PathBuf;

    use belfry_model::Device;
    use cudarc::driver::{result, sys};

    use super::{MATHEMATICS, Machine, judge};

    /// Where the library below looks for a toolkit when `CUDA_PATH` is not set.
    const TOOLKIT_FOLDERS: [&str; 4] = ["/usr/local/cuda", "/opt/cuda", "/usr/lib/cuda", "/usr"];

    pub fn open(index: usize) -> Result<Device, String> {
        judge(index, &look())?;
        Ok(Device::cuda(index))
    }

    pub fn identity(index: usize) -> String {
        let Machine { devices, .. } = look();
        if !matches!(devices, Some(Ok(count)) if index < count) {
            return "cuda, no such GPU".into();
        }
        describe(index).unwrap_or_else(|error| format!("cuda, unknown: {error}"))
    }

    fn look() -> Machine {
        let toolkit_folders: Vec<PathBuf> = match env::var_os("CUDA_PATH") {
            Some(path) => vec![path.into()],
            None => TOOLKIT_FOLDERS.map(PathBuf::from).into(),
        };
        // SAFETY: loads the driver's library, which runs its initialisers.
        let driver = unsafe { sys::is_culib_present() };
        let count = || {
            result::init().map_err(|e| e.to_string())?;
            let count = result::device::get_count().map_err(|e| e.to_string())?;
            usize::try_from(count).map_err(|e| e.to_string())
        };
        Machine {
            driver,
            library_path: env::var("LD_LIBRARY_PATH").ok(),
            devices: driver.then(count),
            visible: env::var("CUDA_VISIBLE_DEVICES").ok(),
            mathematics: toolkit_folders
                .iter()
                .any(|f| f.join(MATHEMATICS).is_file()),
            toolkit_folders,
        }
    }

    /// Model, compute capability and driver of a device that is there.
    fn describe(index: usize) -> Result<String, result::DriverError> {
        use sys::CUdevice_attribute as Attribute;
        let index = i32::try_from(index).unwrap_or(i32::MAX);
        let device = result::device::get(index)?;
        let name = result::device::get_name(device)?;
        let mut driver = 0;
        // SAFETY: `device` came from the driver, and the number outlives the call.
        let (major, minor) = unsafe {
            sys::cuDriverGetVersion(&mut driver).result()?;
            let get = |which| result::device::get_attribute(device, which);
            (
                get(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                get(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            )
        };
        Ok(format!("cuda {name} sm_{major}{minor} driver {driver}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine on which device 0 and 1 can be opened.
    fn two_gpus() -> Machine {
        Machine {
            driver: true,
            devices: Some(Ok(2)),
            toolkit_folders: vec!["/opt/cuda".into()],
            mathematics: true,
            ..Machine::default()
        }
    }

    fn refusal(index: usize, machine: &Machine) -> String {
        judge(index, machine).expect_err("is refused")
    }

    #[test]
    fn every_lack_has_its_own_words() {
        assert_eq!(judge(1, &two_gpus()), Ok(()));
        let said = refusal(0, &Machine::default());
        assert!(said.starts_with("no NVIDIA driver: libcuda.so"), "{said}");
        assert!(said.contains("LD_LIBRARY_PATH is not set"), "{said}");
        let visible = Machine {
            visible: Some("3".into()),
            ..two_gpus()
        };
        let said = refusal(2, &visible);
        assert!(said.contains("no GPU 2: this machine has 2"), "{said}");
        assert!(said.contains("CUDA_VISIBLE_DEVICES=3"), "{said}");
        let empty = Machine {
            devices: Some(Ok(0)),
            ..two_gpus()
        };
        assert_eq!(refusal(0, &empty), "the NVIDIA driver shows no GPU");
        let broken = Machine {
            devices: Some(Err("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH".into())),
            ..two_gpus()
        };
        assert!(refusal(0, &broken).contains("does not start: CUDA_ERROR_SYSTEM"));
        let bare = Machine {
            mathematics: false,
            ..two_gpus()
        };
        let said = refusal(0, &bare);
        assert!(
            said.contains("libdevice.10.bc") && said.contains("/opt/cuda"),
            "{said}"
        );
    }

    #[test]
    fn the_host_is_always_there() {
        let device = open("cpu").expect("is there");
        assert!(device.is_autodiff() && belfry_model::on_host(&device));
        assert_eq!(identity("cpu"), "cpu");
        let error = open("cuda:x").expect_err("is no index").to_string();
        assert!(error.contains("run.device = \"cuda:x\""), "{error}");
    }

    #[test]
    fn a_gpu_that_is_not_there_is_one_clear_error() {
        // No machine has that many.
        let error = open("cuda:999").expect_err("is refused").to_string();
        assert!(error.starts_with("run.device = \"cuda:999\": "), "{error}");
        if cfg!(feature = "cuda") {
            let ways = [
                "no NVIDIA driver: libcuda.so, libcuda.so.1 not found",
                "the NVIDIA driver does not start",
                "the NVIDIA driver shows no GPU",
                "there is no GPU 999",
            ];
            assert!(ways.iter().any(|way| error.contains(way)), "{error}");
            assert!(identity("cuda:999").starts_with("cuda, "));
        } else {
            assert!(
                error.ends_with("build it with `--features cuda`"),
                "{error}"
            );
        }
    }
}
