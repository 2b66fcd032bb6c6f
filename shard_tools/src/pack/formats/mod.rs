//! The formats: each turns a publisher's files into a catalog, and knows no shard.

pub mod dataset;
pub mod downloads;
pub mod folder;
pub mod img2dataset;
pub mod karpathy;
pub mod nlvr2;
pub mod pixels;
pub mod records;
pub mod snli_ve;
pub mod visual_genome;
pub mod vqav2;
pub mod webdataset;

use std::path::{Path, PathBuf};

use crate::error::ShardError;

/// Where a publisher's files lie, and which of them are wanted.
#[derive(Clone, Debug, Default)]
pub struct Input {
    /// The folder of all.
    pub folder: PathBuf,
    /// The split; a format's first where none is given.
    pub split: Option<String>,
    /// Annotation files in other places than the usual.
    pub annotations: Vec<PathBuf>,
    /// The images' folder, in another place than the usual.
    pub images: Option<PathBuf>,
    /// A VQA dataset's answer vocabulary.
    pub answers: Option<PathBuf>,
}

impl Input {
    /// The usual places below `folder`.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Input {
            folder: folder.into(),
            ..Input::default()
        }
    }

    /// The same for one split.
    #[must_use]
    pub fn split(self, split: &str) -> Self {
        Input {
            split: Some(split.to_owned()),
            ..self
        }
    }

    /// What `splits` has for the wanted split, the first where none is wanted.
    fn of_split<'a, T>(&self, format: &str, splits: &'a [(&str, T)]) -> Result<&'a T, ShardError> {
        let Some(wanted) = &self.split else {
            return Ok(&splits[0].1);
        };
        let found = splits.iter().find(|(name, _)| name == wanted);
        found.map(|(_, value)| value).ok_or_else(|| {
            let names: Vec<&str> = splits.iter().map(|(name, _)| *name).collect();
            let names = names.join(", ");
            ShardError::Option(format!("--split {wanted}: {format} has {names}"))
        })
    }

    /// Annotation file `number`: as given, or the first of the `usual` places that is there.
    fn annotation(&self, number: usize, usual: &[&str]) -> Result<PathBuf, ShardError> {
        match self.annotations.get(number) {
            Some(given) => Ok(given.clone()),
            None => self.first(usual, "--annotations"),
        }
    }

    /// The first of some `usual` places below the folder that is there.
    fn first(&self, usual: &[&str], option: &str) -> Result<PathBuf, ShardError> {
        let places = usual.iter().map(|name| self.folder.join(name));
        let found = places.into_iter().find(|place| place.exists());
        found.ok_or_else(|| ShardError::Sample {
            file: self.folder.display().to_string(),
            reason: format!(
                "holds none of {}; {option} names the place",
                usual.join(", ")
            ),
        })
    }

    /// The folder of images: as given, or the first of the `usual` that is there.
    fn image_folder(&self, usual: &[&str]) -> Result<PathBuf, ShardError> {
        match &self.images {
            Some(given) => Ok(given.clone()),
            None => self.first(usual, "--images"),
        }
    }
}

/// Every file below `folder`, relative to it, with `/` between folders; not sorted.
///
/// # Errors
/// [`ShardError::Input`], naming the folder.
fn files_below(folder: &Path) -> Result<Vec<Box<str>>, ShardError> {
    let mut found = Vec::new();
    let mut open = vec![String::new()];
    while let Some(below) = open.pop() {
        let path = folder.join(&below);
        let failed = |source| ShardError::Input {
            file: path.display().to_string(),
            source,
        };
        for entry in std::fs::read_dir(&path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = format!("{below}{}", entry.file_name().to_string_lossy());
            let mut kind = entry.file_type().map_err(failed)?;
            if kind.is_symlink() {
                // Data sets are often linked together; a broken link is a missing file later.
                let Ok(target) = std::fs::metadata(entry.path()) else {
                    found.push(name.into_boxed_str());
                    continue;
                };
                kind = target.file_type();
            }
            if kind.is_dir() {
                open.push(name + "/");
            } else {
                found.push(name.into_boxed_str());
            }
        }
    }
    Ok(found)
}
