//! A file system of a few mebibytes that can be filled: for what a full disk does. Mounting needs root.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Mounted until it is dropped.
pub struct SmallDisk(pub PathBuf);

impl SmallDisk {
    /// At `folder`, which is made; what `mount` said where it does not.
    pub fn mount(folder: &Path, mebibytes: u32) -> Result<Self, String> {
        fs::create_dir_all(folder).expect("is made");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={mebibytes}m"), "tmpfs"])
            .arg(folder)
            .output()
            .map_err(|e| e.to_string())?;
        match mounted.status.success() {
            true => Ok(SmallDisk(folder.to_owned())),
            false => Err(String::from_utf8_lossy(&mounted.stderr).into_owned()),
        }
    }

    /// Takes all room but `spare` bytes.
    pub fn fill(&self, spare: u64) {
        let mut ballast = File::create(self.ballast()).expect("is made");
        let block = vec![0; 64 << 10];
        while ballast.write_all(&block).is_ok() {}
        let length = ballast.metadata().expect("is there").len();
        assert!(length > spare, "the disk has no {spare} bytes");
        ballast.set_len(length - spare).expect("is cut");
    }

    /// Gives the room back.
    #[allow(dead_code, reason = "one of the two suites leaves it full")]
    pub fn relieve(&self) {
        fs::remove_file(self.ballast()).expect("is removed");
    }

    fn ballast(&self) -> PathBuf {
        self.0.join("ballast")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}
