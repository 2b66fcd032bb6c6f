//! Whether the machine has what device links need, and if not, what is missing and where it was
//! looked for. Asked before anything else: the loader panics where a library is missing.

use super::fabric::FabricError;

/// A shared library that is loaded at run time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Library {
    /// As the loader names it.
    pub file: &'static str,
    /// What brings it.
    pub remedy: &'static str,
}

/// The driver's.
pub(super) const DRIVER: Library = Library {
    file: "libcuda.so",
    remedy: "install the NVIDIA driver, or give the container its GPUs",
};

/// NVIDIA's collectives. Wheels and runtime packages bring `libnccl.so.2` alone.
pub(super) const NCCL: Library = Library {
    file: "libnccl.so",
    remedy: "install NCCL; where only libnccl.so.2 is there, put a link libnccl.so to it into a \
             folder of LD_LIBRARY_PATH",
};

/// The error for a library that could not be loaded; `path` is `LD_LIBRARY_PATH`.
pub(super) fn missing(library: Library, path: Option<&str>) -> FabricError {
    let looked = match path {
        Some(path) => format!("in LD_LIBRARY_PATH={path} and the system's library folders"),
        None => "in the system's library folders; LD_LIBRARY_PATH is not set".into(),
    };
    let Library { file, remedy } = library;
    FabricError::Device(format!("{file} not found {looked}; {remedy}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_where_it_was_looked_for() {
        let told = missing(NCCL, Some("/opt/x")).to_string();
        assert!(told.starts_with("libnccl.so not found in LD_LIBRARY_PATH=/opt/x"));
        assert!(told.contains("libnccl.so.2"), "{told}");
        let told = missing(DRIVER, None).to_string();
        assert!(told.contains("LD_LIBRARY_PATH is not set"), "{told}");
    }
}
