//! Local files that others read while they are written.

use std::io::Write as _;
use std::path::Path;

use anyhow::Context as _;

/// Writes `text` to `file` so that a reader sees the old content or the new, never half of it.
pub fn replace(file: &Path, text: &str) -> anyhow::Result<()> {
    let folder = file.parent().filter(|f| !f.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let written = || {
        let mut unfinished = tempfile::NamedTempFile::new_in(folder)?;
        unfinished.write_all(text.as_bytes())?;
        unfinished.persist(file)?;
        Ok::<_, std::io::Error>(())
    };
    written().with_context(|| format!("cannot write {}", file.display()))
}
