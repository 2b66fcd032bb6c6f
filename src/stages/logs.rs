//! `belfry logs`: what the processes of a stage said on this host.

use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use shard_tools::store::Root;

/// Between two looks at growing files.
const FOLLOW_PAUSE: Duration = Duration::from_millis(300);
/// Bytes from a file's end in which its last lines are looked for.
const TAIL_BYTES: u64 = 1 << 20;

/// Arguments of `belfry logs`.
#[derive(Args)]
pub struct LogsArguments {
    /// The stage; without it the plan's own processes.
    stage: Option<String>,
    /// The plan's root, where it is a folder of this host.
    #[arg(long)]
    root: Option<String>,
    /// The folder of this host's agent, where the root is none.
    #[arg(long)]
    local: Option<PathBuf>,
    /// Lines of each process.
    #[arg(long, default_value_t = 20)]
    lines: usize,
    /// Only the process of this name, for instance worker-0.
    #[arg(long)]
    process: Option<String>,
    /// Go on with what is written from now on.
    #[arg(long)]
    follow: bool,
}

/// Shows the logs of a stage.
pub async fn logs(arguments: LogsArguments) -> anyhow::Result<()> {
    let folder = match (&arguments.local, &arguments.root) {
        (Some(local), _) => local.clone(),
        (None, Some(root)) => Root::existing(root)?.local_folder().with_context(|| {
            format!(
                "{root} is no folder: logs lie on each agent's host, name its folder by --local"
            )
        })?,
        (None, None) => bail!("which plan? name its --root, or an agent's folder by --local"),
    };
    let folder = match &arguments.stage {
        Some(stage) => folder.join("stages").join(stage),
        None => folder,
    };
    let mut files = named(&folder, arguments.process.as_deref())?;
    for (name, file, seen) in &mut files {
        let text = tail(file, arguments.lines)?;
        println!("== {name} ==\n{text}");
        *seen = file.metadata().map_or(0, |m| m.len());
    }
    if !arguments.follow {
        return Ok(());
    }
    loop {
        tokio::time::sleep(FOLLOW_PAUSE).await;
        for (name, file, seen) in &mut files {
            for line in grown(file, seen)?.lines() {
                println!("{name}: {line}");
            }
        }
    }
}

/// The logs of a folder: name, file, bytes that were shown.
fn named(folder: &Path, process: Option<&str>) -> anyhow::Result<Vec<(String, PathBuf, u64)>> {
    let logs = folder.join("logs");
    let entries = std::fs::read_dir(&logs);
    let entries = entries
        .with_context(|| format!("{}: nothing of this stage ran on this host", logs.display()))?;
    let mut files: Vec<(String, PathBuf, u64)> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().to_str()?.strip_suffix(".log")?.to_owned();
            let wanted = process.is_none_or(|process| process == name);
            wanted.then(|| (name, entry.path(), 0))
        })
        .collect();
    files.sort();
    if files.is_empty() {
        bail!("{}: no such log", logs.display());
    }
    Ok(files)
}

fn tail(file: &Path, lines: usize) -> anyhow::Result<String> {
    let read = || {
        let mut opened = std::fs::File::open(file)?;
        let len = opened.metadata()?.len();
        opened.seek(SeekFrom::Start(len.saturating_sub(TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        opened.read_to_end(&mut bytes)?;
        Ok::<_, std::io::Error>(bytes)
    };
    let bytes = read().with_context(|| format!("cannot read {}", file.display()))?;
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    Ok(all[all.len().saturating_sub(lines)..].join("\n"))
}

/// What was written since; whole lines only.
fn grown(file: &Path, seen: &mut u64) -> anyhow::Result<String> {
    let read = || {
        let mut opened = std::fs::File::open(file)?;
        opened.seek(SeekFrom::Start(*seen))?;
        let mut bytes = Vec::new();
        opened.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok::<_, std::io::Error>(bytes)
    };
    let mut bytes = read().with_context(|| format!("cannot read {}", file.display()))?;
    let whole = bytes
        .iter()
        .rposition(|b| *b == b'\n')
        .map_or(0, |at| at + 1);
    bytes.truncate(whole);
    *seen += whole as u64;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_and_what_comes_after_them() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(folder.path().join("logs")).expect("is made");
        let file = folder.path().join("logs/worker-0.log");
        std::fs::write(&file, "a\nb\nc\n").expect("is written");
        let files = named(folder.path(), None).expect("is there");
        assert_eq!(files[0].0, "worker-0");
        assert!(named(folder.path(), Some("worker-1")).is_err());
        assert_eq!(tail(&file, 2).expect("is read"), "b\nc");
        let mut seen = 6;
        std::fs::write(&file, "a\nb\nc\nd\nhal").expect("is written");
        assert_eq!(grown(&file, &mut seen).expect("is read"), "d\n");
        assert_eq!(seen, 8, "half a line waits");
    }
}
