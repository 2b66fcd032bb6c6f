//! The index of a folder of images: contrastive features of its images and captions, kept beside
//! them, so that a folder is encoded once.
//!
//! An entry holds for the weights that made it and the bytes that it was made of; whatever else is
//! there is encoded again. It refuses to know queries.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};
use shard_tools::manifest::sha256;

use super::Reader;
use crate::files;
use crate::trained::Trained;

/// The index, in the folder itself.
pub const INDEX_FILE: &str = ".belfry-index.json";
/// The version that this program reads.
const FORMAT: u32 = 1;
/// Endings of files that are taken for images.
const IMAGES: [&str; 6] = ["jpg", "jpeg", "png", "webp", "gif", "bmp"];
/// More would not be searched in a moment by a loop over all.
const FILES_MAX: usize = 1_000_000;

/// What the model saw, with its feature of length 1.
#[derive(Clone, Debug)]
pub struct Entry {
    /// File name of the image that it is or belongs to.
    pub file: String,
    /// The caption; empty where it is the image.
    pub caption: String,
    /// `[width]`.
    pub feature: Vec<f32>,
}

/// A folder's images and captions.
pub struct Index {
    /// Images, by file name.
    pub images: Vec<Entry>,
    /// Captions, by image and line.
    pub captions: Vec<Entry>,
    /// Images and captions that were encoded now.
    pub fresh: usize,
    /// Files that are no images after all, with why.
    pub broken: Vec<(String, String)>,
}

/// The file: features by what they were made of.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    format: u32,
    /// Weights and settings.
    model: String,
    /// By SHA-256 of an image's bytes; f32, little-endian, hexadecimal.
    images: BTreeMap<String, String>,
    /// By caption.
    captions: BTreeMap<String, String>,
}

impl Index {
    /// Reads the folder's index, encodes what is missing, and writes it again if that was anything.
    pub fn of(folder: &Path, trained: &Trained, reader: &Reader) -> anyhow::Result<Self> {
        let names = image_files(folder)?;
        ensure!(
            !names.is_empty(),
            "--index {}: holds no image ({})",
            folder.display(),
            IMAGES.join(", ")
        );
        let settings = belfry_worker::evaluate::settings_sha256(&trained.config);
        let model = format!("{} {settings}", trained.sha256);
        let before = stored(&folder.join(INDEX_FILE), &model);
        let mut making = Making {
            trained,
            reader,
            before,
            after: Stored {
                format: FORMAT,
                model,
                ..Stored::default()
            },
            fresh: 0,
        };
        let (images, broken) = making.images(folder, &names)?;
        let captions = making.captions(folder, &images)?;
        if making.fresh > 0 {
            let text = serde_json::to_string(&making.after)?;
            // A folder that may be read but not written is searched all the same.
            if let Err(error) = files::replace(&folder.join(INDEX_FILE), &text) {
                eprintln!("the index is not kept: {error:#}");
            }
        }
        Ok(Index {
            images,
            captions,
            fresh: making.fresh,
            broken,
        })
    }
}

/// Names of files that are taken for images, in order.
fn image_files(folder: &Path) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    let entries = std::fs::read_dir(folder);
    for entry in entries.with_context(|| format!("--index {}", folder.display()))? {
        let path = entry?.path();
        let ending = path
            .extension()
            .and_then(|e| e.to_str())
            .unwrap_or_default();
        let is_image = IMAGES
            .iter()
            .any(|image| ending.eq_ignore_ascii_case(image));
        if let (true, Some(name)) = (is_image, path.file_name().and_then(|n| n.to_str())) {
            names.push(name.to_owned());
        }
        ensure!(
            names.len() <= FILES_MAX,
            "--index: more than {FILES_MAX} images"
        );
    }
    names.sort();
    Ok(names)
}

/// What a file holds of this model; nothing where it is damaged or of another one.
fn stored(file: &Path, model: &str) -> Stored {
    let read = std::fs::read(file).ok();
    let stored = read.and_then(|text| serde_json::from_slice::<Stored>(&text).ok());
    let own = |stored: &Stored| stored.format == FORMAT && stored.model == model;
    stored.filter(own).unwrap_or_default()
}

struct Making<'a> {
    trained: &'a Trained,
    reader: &'a Reader<'a>,
    before: Stored,
    after: Stored,
    fresh: usize,
}

/// Files that cannot be used, with why.
type Broken = Vec<(String, String)>;

impl Making<'_> {
    fn images(&mut self, folder: &Path, names: &[String]) -> anyhow::Result<(Vec<Entry>, Broken)> {
        let (mut entries, mut broken) = (Vec::new(), Vec::new());
        let size = self.trained.config.eval.pairs_per_batch as usize;
        for names in names.chunks(size) {
            let (mut pixels, mut new) = (Vec::new(), Vec::new());
            for name in names {
                let path = folder.join(name);
                let bytes = std::fs::read(&path);
                let bytes = bytes.with_context(|| format!("cannot read {}", path.display()))?;
                let hash = sha256(&bytes);
                let known = self
                    .before
                    .images
                    .get(&hash)
                    .filter(|hex| numbers(hex).is_some());
                if let Some(hex) = known {
                    self.after.images.insert(hash.clone(), hex.clone());
                } else {
                    match self.reader.pixels(&bytes) {
                        Ok(more) => {
                            pixels.extend(more);
                            new.push(hash.clone());
                        }
                        Err(reason) => {
                            broken.push((name.clone(), reason));
                            continue;
                        }
                    }
                }
                entries.push((name.clone(), hash));
            }
            if new.is_empty() {
                continue;
            }
            self.fresh += new.len();
            let encoded = self
                .trained
                .model
                .encode_images(&self.trained.weights, &pixels)?;
            let width = encoded.features().len() / new.len();
            for (hash, feature) in new.into_iter().zip(encoded.features().chunks(width)) {
                self.after.images.insert(hash, hexadecimal(feature));
            }
        }
        let entry = |(file, hash): (String, String)| {
            let feature = self.after.images.get(&hash).and_then(|hex| numbers(hex));
            Entry {
                file,
                caption: String::new(),
                feature: feature.unwrap_or_default(),
            }
        };
        Ok((entries.into_iter().map(entry).collect(), broken))
    }

    /// Captions of `key.txt` beside `key.jpg`, one a line.
    fn captions(&mut self, folder: &Path, images: &[Entry]) -> anyhow::Result<Vec<Entry>> {
        let mut all = Vec::new();
        for image in images {
            let file = folder.join(PathBuf::from(&image.file).with_extension("txt"));
            let text = match std::fs::read(&file) {
                Ok(text) => text,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => {
                    let what = format!("cannot read {}", file.display());
                    return Err(anyhow::Error::new(error).context(what));
                }
            };
            let captions = shard_tools::pair::captions(&text);
            let captions =
                captions.map_err(|reason| anyhow::anyhow!("{}: {reason}", file.display()))?;
            all.extend(
                captions
                    .into_iter()
                    .map(|caption| (image.file.clone(), caption)),
            );
        }
        let known = |hex: &&String| numbers(hex).is_some();
        let mut new: Vec<&String> = Vec::new();
        for (_, caption) in &all {
            match self.before.captions.get(caption).filter(known) {
                Some(hex) => drop(self.after.captions.insert(caption.clone(), hex.clone())),
                None => new.push(caption),
            }
        }
        new.sort();
        new.dedup();
        self.fresh += new.len();
        let (model, weights) = (&self.trained.model, &self.trained.weights);
        for captions in new.chunks(self.trained.config.eval.pairs_per_batch as usize) {
            let tokens = self.reader.cut_texts(captions.iter().map(|c| c.as_str()))?;
            let encoded = model.encode_texts(weights, &tokens.ids, &tokens.mask)?;
            let width = encoded.features().len() / captions.len();
            for (caption, feature) in captions.iter().zip(encoded.features().chunks(width)) {
                let hex = hexadecimal(feature);
                self.after.captions.insert((*caption).clone(), hex);
            }
        }
        let entry = |(file, caption): (String, String)| {
            let feature = self
                .after
                .captions
                .get(&caption)
                .and_then(|hex| numbers(hex));
            Entry {
                file,
                feature: feature.unwrap_or_default(),
                caption,
            }
        };
        Ok(all.into_iter().map(entry).collect())
    }
}

fn hexadecimal(numbers: &[f32]) -> String {
    let bytes = numbers.iter().flat_map(|n| n.to_le_bytes());
    bytes.map(|byte| format!("{byte:02x}")).collect()
}

fn numbers(text: &str) -> Option<Vec<f32>> {
    let digits = text.as_bytes();
    if digits.is_empty() || !digits.len().is_multiple_of(8) {
        return None;
    }
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    let bytes: Vec<u8> = digits.chunks(2).map(byte).collect::<Option<_>>()?;
    let (words, _) = bytes.as_chunks::<4>();
    Some(words.iter().map(|word| f32::from_le_bytes(*word)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_come_back_from_text_bit_by_bit() {
        let features = [0.1f32, -0.0, 3.5e-30];
        let back = numbers(&hexadecimal(&features)).expect("its own text");
        let bits = |all: &[f32]| all.iter().map(|f| f.to_bits()).collect::<Vec<u32>>();
        assert_eq!(bits(&back), bits(&features));
        assert!(numbers("").is_none() && numbers("00").is_none() && numbers("zzzzzzzz").is_none());
    }

    #[test]
    fn an_index_of_other_weights_or_a_damaged_one_holds_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join(INDEX_FILE);
        let mut index = Stored {
            format: FORMAT,
            model: "a".into(),
            ..Stored::default()
        };
        index.captions.insert("a dog".into(), hexadecimal(&[1.0]));
        let text = serde_json::to_string(&index).expect("plain");
        std::fs::write(&file, &text).expect("writes");
        assert_eq!(stored(&file, "a").captions.len(), 1);
        assert!(stored(&file, "b").captions.is_empty());
        std::fs::write(&file, &text[..text.len() / 2]).expect("writes");
        assert!(stored(&file, "a").captions.is_empty());
    }
}
