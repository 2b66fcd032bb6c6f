//! Local files that others read while they are written.

use std::io::Write as _;
use std::path::Path;

use anyhow::Context as _;

/// Writes `text` to `file` so that a reader sees the old content or the new, never half of it.
pub fn replace(file: &Path, text: &str) -> anyhow::Result<()> {
    let folder = file.parent().filter(|f| !f.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let written = || {
        let mut unfinished = unfinished(folder)?;
        unfinished.write_all(text.as_bytes())?;
        unfinished.persist(file)?;
        Ok::<_, std::io::Error>(())
    };
    written().with_context(|| format!("cannot write {}", file.display()))
}

/// Readable by whom the process's files are, not by its owner alone.
fn unfinished(folder: &Path) -> std::io::Result<tempfile::NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(folder)
}
