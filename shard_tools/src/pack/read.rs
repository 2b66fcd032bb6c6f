//! From a description to a sample: its bytes read, looked at, its texts brought into one form.
//!
//! Image bytes stay what they are. What is wrong with a sample is told in its outcome; an error is
//! only what would be wrong with others too: a disk, a store.

use std::path::Path;

use bytes::Bytes;
use serde::Deserialize;

use super::bad::{Bad, BadKind};
use super::catalog::{Catalog, Description, Place, Texts};
use crate::check::{self, Check};
use crate::error::ShardError;
use crate::manifest::Member;
use crate::pair::{self, Contents, PAIRS_EXTENSION, Pair, TEXT_EXTENSION};
use crate::reader::{IMAGE_BYTES_MAX, TEXT_BYTES_MAX};

/// A sample ready for a shard.
pub struct Sample {
    /// Its members' names and bytes, in order.
    pub members: Vec<(String, Bytes)>,
    /// Its pairs.
    pub pairs: u32,
    /// Captions left out because the sample has them already, or because they are blank.
    pub repeated: u32,
}

impl Sample {
    /// Bytes it takes in a tar, headers and padding included; names of over 100 bytes take more.
    pub fn tar_bytes(&self) -> u64 {
        let member = |(_, data): &(String, Bytes)| 512 + data.len().next_multiple_of(512) as u64;
        self.members.iter().map(member).sum()
    }
}

/// What became of a sample.
pub enum Outcome {
    /// It can be packed.
    Good(Sample),
    /// It cannot.
    Bad(Bad),
}

/// Two members of a tar with no more than this between them are read in one go.
const GAP_BYTES_MAX: u64 = 64 << 10;

/// Bytes that came from tars.
type Fetched = Vec<(u32, u64, Bytes)>;

fn places(parts: &[Description]) -> impl Iterator<Item = &Place> {
    let texts = parts.iter().filter_map(|part| match &part.texts {
        Texts::At(place) => Some(place),
        _ => None,
    });
    let records = parts.iter().filter_map(|part| part.record.as_ref());
    parts[0].images.iter().chain(texts).chain(records)
}

/// Reads those places of a sample that are members of tars, neighbours in one request.
///
/// # Errors
/// [`ShardError::Store`].
pub async fn fetch(catalog: &Catalog, parts: &[Description]) -> Result<Fetched, ShardError> {
    let mut members: Vec<(u32, &Member)> = places(parts)
        .filter_map(|place| match place {
            Place::Member(tar, member) => Some((*tar, member)),
            Place::File(_) => None,
        })
        .collect();
    members.sort_by_key(|(tar, member)| (*tar, member.offset));
    let mut fetched = Vec::with_capacity(members.len());
    let mut rest = &members[..];
    while let Some((tar, first)) = rest.first().copied() {
        let mut end = first.offset + first.bytes;
        let near = rest.iter().take_while(|(other, member)| {
            let joins = *other == tar && member.offset <= end + GAP_BYTES_MAX;
            if joins {
                end = end.max(member.offset + member.bytes);
            }
            joins
        });
        let count = near.count();
        let (root, file) = &catalog.tars[tar as usize];
        let bytes = if end > first.offset {
            root.get_range(file, first.offset..end).await?
        } else {
            Bytes::new()
        };
        for (_, member) in &rest[..count] {
            let begin = ((member.offset - first.offset) as usize).min(bytes.len());
            let end = (begin + member.bytes as usize).min(bytes.len());
            fetched.push((tar, member.offset, bytes.slice(begin..end)));
        }
        rest = &rest[count..];
    }
    Ok(fetched)
}

/// Makes a sample of its `parts`.
///
/// # Errors
/// [`ShardError::Input`] where a file is there and cannot be read.
pub fn read(
    catalog: &Catalog,
    parts: &[Description],
    fetched: &Fetched,
    check: Check,
) -> Result<Outcome, ShardError> {
    let reader = Reader {
        catalog,
        parts,
        fetched,
    };
    match reader.sample(check) {
        Ok(sample) => Ok(Outcome::Good(sample)),
        Err(Failure::Bad(bad)) => Ok(Outcome::Bad(bad)),
        Err(Failure::Fatal(error)) => Err(error),
    }
}

enum Failure {
    Bad(Bad),
    Fatal(ShardError),
}

struct Reader<'a> {
    catalog: &'a Catalog,
    parts: &'a [Description],
    fetched: &'a Fetched,
}

/// What img2dataset writes beside an image.
#[derive(Deserialize)]
struct Record {
    status: Option<String>,
    error_message: Option<String>,
    caption: Option<String>,
}

impl Reader<'_> {
    fn bad(&self, kind: BadKind, place: &Place, reason: impl Into<String>) -> Failure {
        Failure::Bad(Bad {
            kind,
            place: self.catalog.name(place),
            reason: reason.into(),
        })
    }

    fn sample(&self, check: Check) -> Result<Sample, Failure> {
        let first = &self.parts[0];
        if let Some(other) = self.parts.iter().find(|part| part.images != first.images) {
            let reason = format!(
                "has the key `{}`, as {} has",
                first.key,
                self.catalog.name(self.somewhere())
            );
            let place = other.images.first().unwrap_or(self.somewhere());
            return Err(self.bad(BadKind::DoubleKey, place, reason));
        }
        // Texts first: they are cheap, and a failed download says why there is no image.
        let (pairs, repeated) = self.pairs()?;
        if first.images.len() != self.catalog.contents.images() {
            let (found, needed) = (first.images.len(), self.catalog.contents.images());
            let reason = format!("`{}` has {found} images, not {needed}", first.key);
            return Err(self.bad(BadKind::MissingImage, self.somewhere(), reason));
        }
        let mut members = Vec::with_capacity(first.images.len() + 1);
        for (index, place) in first.images.iter().enumerate() {
            let bytes = self.bytes(place, BadKind::MissingImage, IMAGE_BYTES_MAX)?;
            let kind = check::examine(&bytes, check)
                .map_err(|reason| self.bad(BadKind::BrokenImage, place, reason))?;
            let extension = kind.extension();
            let name = match first.images.len() {
                1 => format!("{}.{extension}", first.key),
                _ => format!("{}.{index}.{extension}", first.key),
            };
            members.push((name, bytes));
        }
        let count = pairs.len() as u32;
        let (extension, text) = written(self.catalog.contents, &pairs);
        pair::pairs(extension, &text).map_err(|reason| self.text_failure(reason))?;
        if text.len() as u64 > TEXT_BYTES_MAX {
            let reason = format!("{} bytes of texts, over {TEXT_BYTES_MAX}", text.len());
            return Err(self.text_failure(reason));
        }
        members.push((format!("{}.{extension}", first.key), Bytes::from(text)));
        Ok(Sample {
            members,
            pairs: count,
            repeated,
        })
    }

    /// A place that tells people which sample it is.
    fn somewhere(&self) -> &Place {
        let first = &self.parts[0];
        let text = match &first.texts {
            Texts::At(place) => Some(place),
            _ => None,
        };
        let place = text.or(first.images.first()).or(first.record.as_ref());
        place.expect("a description has a place")
    }

    fn text_failure(&self, reason: String) -> Failure {
        self.bad(BadKind::BrokenText, self.somewhere(), reason)
    }

    /// The sample's pairs, and how many captions were blank or there already.
    fn pairs(&self) -> Result<(Vec<Pair>, u32), Failure> {
        let mut pairs = Vec::new();
        for part in self.parts {
            let record = self.record(part)?;
            let caption = record.and_then(|record| record.caption);
            match (&part.texts, caption) {
                (Texts::Captions(captions), _) => {
                    pairs.extend(captions.iter().cloned().map(Pair::caption));
                }
                (Texts::Pairs(given), _) => pairs.extend(given.iter().cloned()),
                (Texts::At(_) | Texts::InRecord, Some(caption)) => {
                    pairs.push(Pair::caption(caption));
                }
                (Texts::At(place), None) => pairs.extend(self.text_file(place)?),
                (Texts::InRecord, None) => {}
            }
        }
        if self.catalog.contents != Contents::Captions {
            return Ok((pairs, 0));
        }
        let given = pairs.len();
        let texts = pairs.into_iter().map(|pair| pair.text);
        let kept = pair::distinct(texts).map_err(|reason| self.text_failure(reason))?;
        let repeated = (given - kept.len()) as u32;
        Ok((kept.into_iter().map(Pair::caption).collect(), repeated))
    }

    fn text_file(&self, place: &Place) -> Result<Vec<Pair>, Failure> {
        let bytes = self.bytes(place, BadKind::BrokenText, TEXT_BYTES_MAX)?;
        let name = match place {
            Place::File(file) => file,
            Place::Member(_, member) => &member.name,
        };
        let broken = |reason: String| self.bad(BadKind::BrokenText, place, reason);
        if name.to_ascii_lowercase().ends_with(PAIRS_EXTENSION) {
            return pair::pairs(name, &bytes).map_err(broken);
        }
        let text = std::str::from_utf8(&bytes)
            .map_err(|e| broken(format!("captions are not UTF-8: {e}")))?;
        let lines = text.lines().filter(|line| !line.trim().is_empty());
        Ok(lines.map(|line| Pair::caption(line.to_owned())).collect())
    }

    fn record(&self, part: &Description) -> Result<Option<Record>, Failure> {
        let Some(place) = &part.record else {
            return Ok(None);
        };
        let bytes = self.bytes(place, BadKind::BrokenRecord, TEXT_BYTES_MAX)?;
        let record: Record = serde_json::from_slice(&bytes)
            .map_err(|e| self.bad(BadKind::BrokenRecord, place, format!("not a record: {e}")))?;
        match record.status.as_deref() {
            None | Some("success") => Ok(Some(record)),
            Some(status) => {
                let why = record.error_message.as_deref().unwrap_or("no reason given");
                let reason = format!("status `{status}`: {why}");
                Err(self.bad(BadKind::FailedDownload, place, reason))
            }
        }
    }

    fn bytes(&self, place: &Place, missing: BadKind, bytes_max: u64) -> Result<Bytes, Failure> {
        let bytes = match place {
            Place::File(file) => self.file(place, file, missing)?,
            Place::Member(tar, member) => {
                let found =
                    |(t, offset, _): &&(u32, u64, Bytes)| *t == *tar && *offset == member.offset;
                let (_, _, bytes) = self.fetched.iter().find(found).expect("was fetched");
                if bytes.len() as u64 != member.bytes {
                    let reason = "lies beyond the end of its tar; the tar is cut off";
                    return Err(self.bad(missing, place, reason));
                }
                bytes.clone()
            }
        };
        if bytes.len() as u64 > bytes_max {
            let reason = format!("{} bytes, over the limit of {bytes_max}", bytes.len());
            return Err(self.bad(missing, place, reason));
        }
        Ok(bytes)
    }

    fn file(&self, place: &Place, file: &str, missing: BadKind) -> Result<Bytes, Failure> {
        use std::io::ErrorKind as E;
        let path = self.catalog.folder.join(Path::new(file));
        match std::fs::read(&path) {
            Ok(bytes) => Ok(Bytes::from(bytes)),
            Err(e) if matches!(e.kind(), E::NotFound | E::NotADirectory | E::IsADirectory) => {
                Err(self.bad(missing, place, "is not there"))
            }
            Err(source) => Err(Failure::Fatal(ShardError::Input {
                file: path.display().to_string(),
                source,
            })),
        }
    }
}

/// The text member's extension and bytes.
fn written(contents: Contents, pairs: &[Pair]) -> (&'static str, Vec<u8>) {
    if contents == Contents::Captions {
        let lines = pairs.iter().flat_map(|pair| [pair.text.as_str(), "\n"]);
        return (TEXT_EXTENSION, lines.collect::<String>().into_bytes());
    }
    let text = serde_json::to_vec(pairs).expect("plain data");
    (PAIRS_EXTENSION, text)
}
