//! `cc` and `sbu`: captions with URLs, beside a folder of the images that could be downloaded.
//!
//! Conceptual Captions: the publisher's tsv of caption and URL, whose images are named by their row
//! (`00000017.jpg` or `17`: row 17, from 0), as the authors downloaded them. SBU: the publisher's
//! json or its two text files, whose images are named as their URL ends. Both: a json list of
//! `[file, caption]`. Which images exist is what the folder says; the others are missing.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::records::{self, Parsed};
use super::{Input, files_below};
use crate::error::ShardError;
use crate::pack::bad::BadKind;
use crate::pack::catalog::{Catalog, Description, Place, Texts, key_of};
use crate::pair::Contents;

/// What an image's name says.
#[derive(Clone, Copy)]
enum NamedBy {
    /// The row of its record.
    Row,
    /// The last part of its URL, or of the file that its record names.
    File,
}

impl NamedBy {
    /// What is compared: digits without leading zeros, or the file's name.
    fn name(self, path: &str) -> Option<&str> {
        let base = path.rsplit('/').next().unwrap_or(path);
        match self {
            NamedBy::File => Some(base),
            NamedBy::Row => {
                let stem = base.split('.').next().unwrap_or(base);
                let digits = !stem.is_empty() && stem.bytes().all(|b| b.is_ascii_digit());
                let number = stem.trim_start_matches('0');
                digits.then_some(if number.is_empty() { "0" } else { number })
            }
        }
    }
}

/// The images of a folder, found by name.
struct Images {
    named_by: NamedBy,
    /// Paths, sorted by name.
    paths: Vec<Box<str>>,
    used: usize,
}

impl Images {
    fn below(folder: &Path, named_by: NamedBy) -> Result<Self, ShardError> {
        let mut paths = files_below(folder)?;
        paths.retain(|path| named_by.name(path).is_some());
        paths.sort_unstable_by(|a, b| (named_by.name(a), a).cmp(&(named_by.name(b), b)));
        Ok(Images {
            named_by,
            paths,
            used: 0,
        })
    }

    /// All paths of this name.
    fn of(&self, name: &str) -> &[Box<str>] {
        let key = |path: &str| self.named_by.name(path).map(|found| found.cmp(name));
        let begin = self
            .paths
            .partition_point(|path| key(path).is_some_and(|o| o.is_lt()));
        let end = self
            .paths
            .partition_point(|path| key(path).is_some_and(|o| o.is_le()));
        &self.paths[begin..end]
    }
}

/// Adds records to a catalog as far as their image is there.
struct Describer {
    catalog: Catalog,
    images: Images,
}

impl Describer {
    fn new(folder: PathBuf, named_by: NamedBy) -> Result<Self, ShardError> {
        Ok(Describer {
            images: Images::below(&folder, named_by)?,
            catalog: Catalog::new(folder, Contents::Captions),
        })
    }

    /// One record: where it stands, its image's name, its caption.
    fn add(&mut self, place: String, name: &str, caption: &str) {
        let found = self.images.of(name);
        match found {
            [] => {
                let reason = format!("no image `{name}` below the images' folder");
                self.catalog.bad(BadKind::MissingImage, place, reason);
            }
            [path] => {
                let path = path.to_string();
                self.images.used += 1;
                self.catalog.push(&Description {
                    key: key_of(&path),
                    images: vec![Place::File(path)],
                    texts: Texts::Captions(vec![caption.to_owned()]),
                    record: None,
                });
            }
            [one, other, ..] => {
                let reason = format!("`{one}` and `{other}` both are its image");
                self.catalog.bad(BadKind::DoubleKey, place, reason);
            }
        }
    }

    fn bad(&mut self, place: String, reason: impl Into<String>) {
        self.catalog.bad(BadKind::BrokenRecord, place, reason);
    }

    fn done(mut self, what: &str) -> Result<Catalog, ShardError> {
        let unnamed = self.images.paths.len().saturating_sub(self.images.used);
        if unnamed > 0 {
            let rule = "files of the images' folder that no record names".to_owned();
            self.catalog.left_out.insert(rule, unnamed as u64);
        }
        self.catalog.some(what)
    }
}

fn is_json(file: &Path) -> bool {
    file.extension()
        .is_some_and(|extension| extension == "json")
}

/// Conceptual Captions.
///
/// # Errors
/// [`ShardError`], naming the file.
pub fn conceptual_captions(input: &Input) -> Result<Catalog, ShardError> {
    let splits = [
        ("train", "Train_GCC-training.tsv"),
        ("val", "Validation_GCC-1.1.0-Validation.tsv"),
    ];
    let tsv = *input.of_split("cc", &splits)?;
    let split = input.split.as_deref().unwrap_or("train");
    let list = format!("{split}_annot.json");
    let file = input.annotation(0, &[tsv, &format!("utils/{tsv}"), &list])?;
    let [one, other] = [format!("{split}_image"), format!("images_{split}")];
    let folder = input.image_folder(&[&one, &other, "images"])?;
    if is_json(&file) {
        return pairs_of_file_and_caption(folder, &file);
    }
    let exist = input.folder.join(format!("{split}_image_exist.txt"));
    let downloaded = exist.exists().then(|| rows(&exist)).transpose()?;
    let mut describer = Describer::new(folder, NamedBy::Row)?;
    records::lines(&file, |row, line| {
        let place = format!("{}:{}", records::name(&file), row + 1);
        if downloaded.as_ref().is_some_and(|rows| !rows.contains(&row)) {
            let rule = format!("records that {split}_image_exist.txt does not list");
            return describer.catalog.leave_out(&rule);
        }
        match line.map(|line| line.split_once('\t')) {
            Ok(Some((caption, _url))) if !caption.trim().is_empty() => {
                describer.add(place, &row.to_string(), caption);
            }
            Ok(Some(_)) => describer.bad(place, "the caption is empty"),
            Ok(None) => describer.bad(place, "no tab between caption and URL"),
            Err(reason) => describer.bad(place, reason),
        }
    })?;
    describer.done("caption")
}

/// Rows of the images that a list of files names.
fn rows(file: &Path) -> Result<BTreeSet<u64>, ShardError> {
    let mut rows = BTreeSet::new();
    records::lines(file, |_, line| {
        let name = line.ok().and_then(|line| NamedBy::Row.name(line.trim()));
        rows.extend(name.and_then(|name| name.parse::<u64>().ok()));
    })?;
    Ok(rows)
}

/// SBU captions.
///
/// # Errors
/// [`ShardError`], naming the file.
pub fn sbu(input: &Input) -> Result<Catalog, ShardError> {
    input.of_split("sbu", &[("train", ())])?;
    let places = [
        "sbu-captions-all.json",
        "SBU_captioned_photo_dataset_captions.txt",
        "annot.json",
    ];
    let file = input.annotation(0, &places)?;
    let folder = input.image_folder(&["SBU", "images", "images_train", "dataset"])?;
    if is_json(&file) && !is_object(&file)? {
        return pairs_of_file_and_caption(folder, &file);
    }
    let mut describer = Describer::new(folder, NamedBy::File)?;
    if is_json(&file) {
        sbu_json(&mut describer, &file)?;
    } else {
        let urls = "SBU_captioned_photo_dataset_urls.txt";
        sbu_text(&mut describer, &file, &input.annotation(1, &[urls])?)?;
    }
    describer.done("caption")
}

/// `sbu-captions-all.json`: columns of equal length.
#[derive(Deserialize)]
struct Columns {
    image_urls: Vec<Value>,
    captions: Vec<Value>,
}

fn sbu_json(describer: &mut Describer, file: &Path) -> Result<(), ShardError> {
    let wrong = |reason: String| ShardError::Sample {
        file: file.display().to_string(),
        reason,
    };
    let text = std::fs::read(file).map_err(|source| ShardError::Input {
        file: file.display().to_string(),
        source,
    })?;
    let Columns {
        image_urls,
        captions,
    } = serde_json::from_slice(&text).map_err(|e| wrong(format!("not as expected: {e}")))?;
    if image_urls.len() != captions.len() {
        let (urls, captions) = (image_urls.len(), captions.len());
        return Err(wrong(format!("{urls} image_urls and {captions} captions")));
    }
    for (number, (url, caption)) in image_urls.iter().zip(&captions).enumerate() {
        let place = format!("{}: [{number}]", records::name(file));
        match (url.as_str(), caption.as_str()) {
            (Some(url), Some(caption)) => sbu_record(describer, place, url, caption),
            _ => describer.bad(place, "image_urls or captions: not a string"),
        }
    }
    Ok(())
}

fn sbu_record(describer: &mut Describer, place: String, url: &str, caption: &str) {
    if caption.trim().is_empty() {
        return describer.bad(place, "the caption is empty");
    }
    let name = url.trim().rsplit('/').next().unwrap_or(url);
    describer.add(place, name, caption);
}

/// Two files, line by line.
fn sbu_text(describer: &mut Describer, captions: &Path, urls: &Path) -> Result<(), ShardError> {
    let mut all = Vec::new();
    records::lines(urls, |_, url| all.push(url.map(Box::<str>::from)))?;
    let mut count = 0;
    records::lines(captions, |row, caption| {
        count += 1;
        let place = format!("{}:{}", records::name(captions), row + 1);
        match (caption, all.get(row as usize)) {
            (Ok(caption), Some(Ok(url))) => sbu_record(describer, place, url, caption),
            (Err(reason), _) => describer.bad(place, reason),
            (_, Some(Err(reason))) => describer.bad(place, format!("its URL: {reason}")),
            (_, None) => describer.bad(place, "has no URL"),
        }
    })?;
    for row in count..all.len() {
        describer.bad(
            format!("{}:{}", records::name(urls), row + 1),
            "has no caption",
        );
    }
    Ok(())
}

/// Whether the first thing in the file is `{`.
fn is_object(file: &Path) -> Result<bool, ShardError> {
    use std::io::Read as _;
    let mut begin = Vec::new();
    let opened = std::fs::File::open(file).and_then(|f| f.take(4096).read_to_end(&mut begin));
    opened.map_err(|source| ShardError::Input {
        file: file.display().to_string(),
        source,
    })?;
    Ok(begin.trim_ascii_start().starts_with(b"{"))
}

/// A JSON list of `[file, caption]`.
fn pairs_of_file_and_caption(folder: PathBuf, file: &Path) -> Result<Catalog, ShardError> {
    let mut describer = Describer::new(folder, NamedBy::File)?;
    records::list(
        file,
        "annotations",
        |place, pair: Parsed<(String, String)>| match pair {
            Ok((_, caption)) if caption.trim().is_empty() => {
                describer.bad(place, "the caption is empty");
            }
            Ok((path, caption)) => {
                let name = path.rsplit('/').next().unwrap_or(&path);
                describer.add(place, name, &caption);
            }
            Err(reason) => describer.bad(place, reason),
        },
    )?;
    describer.done("caption")
}
