//! Findings kept: a file that one process writes and that is read when it goes on, or when shares
//! are joined.
//!
//! JSON lines: the first says of what evaluation it is, each other one holds a unit's finding. Every
//! line has its own hash, so what a crash has torn is found and done again. It refuses to know what
//! findings mean.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use belfry_configs::{Datasets, ValidConfig};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use xxhash_rust::xxh3::xxh3_64;

use super::{Finding, Work};
use crate::error::WorkerError;

/// The version of these files.
const FORMAT: u32 = 1;

/// What evaluation findings are of: only those of the same one may be joined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Version of the file.
    pub format: u32,
    /// The state's step, where it is a run's.
    pub step: Option<u64>,
    /// SHA-256 of the parameters, flat in name order, little-endian.
    pub weights_sha256: String,
    /// SHA-256 of the settings that decide the numbers.
    pub settings_sha256: String,
    /// SHA-256 of the manifests of `data.validation`.
    pub data_sha256: Vec<String>,
    /// What there is to do.
    pub work: Work,
}

impl Identity {
    /// The version that this program writes.
    pub const FORMAT: u32 = FORMAT;

    /// A short name of it, for files that only it may read.
    pub fn owner(&self) -> String {
        let text = serde_json::to_vec(self).unwrap_or_default();
        format!("{:032x}", xxhash_rust::xxh3::xxh3_128(&text))
    }
}

/// SHA-256 of the settings that decide an evaluation's numbers: not where data and caches lie.
pub fn settings_sha256(config: &ValidConfig) -> String {
    let mut data = config.data.clone();
    (data.train, data.validation) = (Datasets::default(), Datasets::default());
    (data.pack_from, data.cache_dir) = (None, None);
    (data.pack_holdout, data.cache_bytes_max) = (0, 0);
    (data.prefetch_steps, data.prefetch_bytes_max) = (0, 0);
    data.quarantine_shards_max = 0;
    let mut eval = config.eval.clone();
    eval.experts_bytes_max = 0;
    let decides = (
        &config.model,
        &data,
        &config.precision,
        &eval,
        (
            config.run.seed,
            &config.run.device,
            config.batch.micro_batch,
        ),
    );
    let text = serde_json::to_vec(&decides).unwrap_or_default();
    shard_tools::manifest::sha256(&text)
}

/// A line: a hash over the text of what it says.
#[derive(Serialize, Deserialize)]
struct Line<'a> {
    xxh3: String,
    #[serde(borrow)]
    says: &'a RawValue,
}

/// A finding with its unit.
#[derive(Serialize, Deserialize)]
struct Found {
    unit: u64,
    finding: Finding,
}

/// A file that findings are appended to.
pub struct TallyFile {
    path: PathBuf,
    file: File,
}

impl TallyFile {
    /// Opens `path` for the findings of `identity`. What stands in it of the same evaluation is
    /// kept, but for a last line that was torn; what is of another one is written over.
    ///
    /// # Errors
    /// [`WorkerError::Scratch`] naming the file.
    pub fn open(path: &Path, identity: &Identity) -> Result<Self, WorkerError> {
        let failed = |source| WorkerError::Scratch {
            path: path.to_owned(),
            source,
        };
        let text = match std::fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(failed(error)),
        };
        let mut kept = 0;
        if first_says(&text).as_ref() == Some(identity) {
            for line in text.split_inclusive(|byte| *byte == b'\n') {
                if !line.ends_with(b"\n") || says::<serde_json::Value>(line).is_none() {
                    break;
                }
                kept += line.len();
            }
        }
        let opened = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(false)
            .open(path);
        let mut file = opened.map_err(failed)?;
        file.set_len(kept as u64).map_err(failed)?;
        std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0)).map_err(failed)?;
        let mut opened = TallyFile {
            path: path.to_owned(),
            file,
        };
        if kept == 0 {
            opened.line(identity)?;
        }
        Ok(opened)
    }

    /// Appends what a unit gave.
    ///
    /// # Errors
    /// [`WorkerError::Scratch`].
    pub fn append(&mut self, unit: u64, finding: &Finding) -> Result<(), WorkerError> {
        self.line(&Found {
            unit,
            finding: finding.clone(),
        })
    }

    fn line(&mut self, says: &impl Serialize) -> Result<(), WorkerError> {
        let text = line(says).map_err(std::io::Error::from);
        let written = text.and_then(|text| self.file.write_all(&text));
        written.map_err(|source| WorkerError::Scratch {
            path: self.path.clone(),
            source,
        })
    }
}

/// Identity and findings of a file, by unit; a torn or changed line ends what is believed.
///
/// # Errors
/// [`WorkerError::Scratch`], [`WorkerError::TallyFile`] if the first line is not as it must be.
pub fn found(path: &Path) -> Result<(Identity, BTreeMap<u64, Finding>), WorkerError> {
    let text = std::fs::read(path).map_err(|source| WorkerError::Scratch {
        path: path.to_owned(),
        source,
    })?;
    let Some(identity) = first_says(&text) else {
        return Err(WorkerError::TallyFile {
            path: path.to_owned(),
            reason: "does not begin as a tally file of this version".into(),
        });
    };
    let mut findings = BTreeMap::new();
    for line in text.split_inclusive(|byte| *byte == b'\n').skip(1) {
        let Some(Found { unit, finding }) = says(line) else {
            break;
        };
        if unit < identity.work.units {
            findings.insert(unit, finding);
        }
    }
    Ok((identity, findings))
}

/// Findings as lines without an identity: for who knows of what they are.
pub(super) fn lines(findings: &[(u64, Finding)]) -> Result<Vec<u8>, serde_json::Error> {
    let mut text = Vec::new();
    for (unit, finding) in findings {
        let (unit, finding) = (*unit, finding.clone());
        text.extend(line(&Found { unit, finding })?);
    }
    Ok(text)
}

/// Findings from [`lines`], as far as they are whole.
pub(super) fn from_lines(text: &[u8]) -> impl Iterator<Item = (u64, Finding)> + '_ {
    let lines = text.split_inclusive(|byte| *byte == b'\n');
    lines.map_while(|line| says(line).map(|Found { unit, finding }| (unit, finding)))
}

fn line(says: &impl Serialize) -> Result<Vec<u8>, serde_json::Error> {
    let says = serde_json::value::to_raw_value(says)?;
    let line = Line {
        xxh3: format!("{:016x}", xxh3_64(says.get().as_bytes())),
        says: &says,
    };
    let mut text = serde_json::to_vec(&line)?;
    text.push(b'\n');
    Ok(text)
}

fn first_says(text: &[u8]) -> Option<Identity> {
    let line = text.split_inclusive(|byte| *byte == b'\n').next()?;
    let identity: Identity = says(line)?;
    (identity.format == FORMAT).then_some(identity)
}

fn says<T: DeserializeOwned>(line: &[u8]) -> Option<T> {
    let line: Line = serde_json::from_slice(line).ok()?;
    let found = format!("{:016x}", xxh3_64(line.says.get().as_bytes()));
    if found != line.xxh3 {
        return None;
    }
    serde_json::from_str(line.says.get()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evaluate::{Chosen, Tally};
    use belfry_configs::Task;

    fn identity(weights: &str) -> Identity {
        Identity {
            format: FORMAT,
            step: Some(4),
            weights_sha256: weights.into(),
            settings_sha256: String::new(),
            data_sha256: vec!["d".into()],
            work: Work {
                task: Task::Vqa,
                pairs: 5,
                units: 5,
                parts: Vec::new(),
                images: 0,
                image_of_text: Vec::new(),
            },
        }
    }

    fn finding(loss: f64) -> Finding {
        let mut tally = Tally::default();
        tally.sum("vqa", 0).add_loss(loss);
        let chosen = vec![Chosen {
            id: "7".into(),
            class: 3,
        }];
        Finding::Chunk { tally, chosen }
    }

    #[test]
    fn what_was_found_is_found_again_and_a_torn_end_is_not() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("tally.jsonl");
        let mut file = TallyFile::open(&path, &identity("w")).expect("is made");
        for unit in [0, 3] {
            file.append(unit, &finding(0.1 * unit as f64))
                .expect("is written");
        }
        drop(file);
        let whole = std::fs::read(&path).expect("is there");
        std::fs::write(&path, &whole[..whole.len() - 9]).expect("writes");
        let (read, findings) = found(&path).expect("begins well");
        assert_eq!((read, findings.len()), (identity("w"), 1));
        // Going on writes over the torn line.
        let mut file = TallyFile::open(&path, &identity("w")).expect("goes on");
        file.append(3, &finding(0.1 * 3.0)).expect("is written");
        assert_eq!(std::fs::read(&path).expect("is there"), whole);
        let (_, findings) = found(&path).expect("is whole");
        assert_eq!(findings[&3], finding(0.1 * 3.0));
    }

    #[test]
    fn findings_of_other_weights_and_changed_lines_are_not_believed() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("tally.jsonl");
        let mut file = TallyFile::open(&path, &identity("w")).expect("is made");
        file.append(1, &finding(0.5)).expect("is written");
        let text = std::fs::read_to_string(&path).expect("is there");
        std::fs::write(&path, text.replace("\"class\":3", "\"class\":4")).expect("writes");
        assert!(found(&path).expect("begins well").1.is_empty());
        drop(TallyFile::open(&path, &identity("other")).expect("is made anew"));
        let (read, findings) = found(&path).expect("begins well");
        assert_eq!((read, findings.len()), (identity("other"), 0));
        std::fs::write(&path, "hello").expect("writes");
        let refused = found(&path).expect_err("is none").to_string();
        assert!(refused.contains("tally.jsonl"), "{refused}");
    }
}
