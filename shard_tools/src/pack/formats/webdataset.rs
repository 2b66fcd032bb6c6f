//! `webdataset`: tars of images with `.txt` captions (or our `.pairs.json`), as other programs write
//! them: long names, upper-case extensions, other members beside. Belfry's own datasets too, whose
//! indexes spare a look at the tars.
//!
//! A tar is read to its end once to find the members; the images are read when they are packed.

use std::io::{Cursor, Read, Seek};
use std::path::Component;

use super::dataset;
use crate::error::ShardError;
use crate::manifest::{MANIFEST_FILE, Member};
use crate::pack::bad::BadKind;
use crate::pack::catalog::{Catalog, Description, Place, Texts};
use crate::pair::{Contents, PAIRS_EXTENSION, TEXT_EXTENSION};
use crate::store::Root;

/// Extensions of images: those that training reads, and those whose images count as bad.
const IMAGES: [&str; 9] = [
    "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif",
];

/// How members become samples.
#[derive(Clone, Copy, Debug, Default)]
pub struct Members {
    /// `.json` is img2dataset's record of the download.
    pub records: bool,
    /// A sample's key is its tar's name and its key in the tar, for tars that count from 0 each.
    pub tar_in_key: bool,
}

/// Every sample of the tars below `location`.
///
/// # Errors
/// [`ShardError`], naming the tar.
pub async fn catalog(location: &str, members: Members) -> Result<Catalog, ShardError> {
    let root = Root::existing(location)?;
    if !members.records && root.exists(MANIFEST_FILE).await? {
        return dataset::catalog(&root).await;
    }
    let mut catalog = Catalog::new(location, Contents::Captions);
    for (file, _) in root.list("").await? {
        if file.ends_with(".tar") {
            scan(&mut catalog, &root, &file, members).await?;
        }
    }
    catalog.some("sample in a tar")
}

async fn scan(
    catalog: &mut Catalog,
    root: &Root,
    file: &str,
    members: Members,
) -> Result<(), ShardError> {
    let tar = catalog.tars.len() as u32;
    catalog.tars.push((root.clone(), file.to_owned()));
    let mut scan = Scan {
        catalog,
        tar,
        file,
        members,
        open: None,
    };
    let found = match root.local_folder() {
        Some(folder) => {
            let path = folder.join(file);
            let opened = std::fs::File::open(&path).and_then(|f| Ok((f.metadata()?.len(), f)));
            let (bytes, opened) = opened.map_err(|source| ShardError::Input {
                file: path.display().to_string(),
                source,
            })?;
            scan.all(opened, bytes)
        }
        None => {
            let bytes = root.get(file).await?;
            scan.all(Cursor::new(&bytes), bytes.len() as u64)
        }
    };
    scan.close();
    if let Err((offset, reason)) = found {
        let place = format!("{file}, offset {offset}");
        catalog.bad(BadKind::BrokenRecord, place, reason);
    }
    Ok(())
}

/// Reads one tar's headers.
struct Scan<'a> {
    catalog: &'a mut Catalog,
    tar: u32,
    file: &'a str,
    members: Members,
    open: Option<Group>,
}

/// A sample as far as its members were seen.
struct Group {
    key: String,
    images: [Option<Member>; 2],
    text: Option<Member>,
    record: Option<Member>,
    /// Why it cannot be packed.
    wrong: Option<(BadKind, String)>,
}

impl Scan<'_> {
    /// Every member; where and why the tar cannot be read on.
    fn all<R: Read + Seek>(&mut self, reader: R, bytes: u64) -> Result<(), (u64, String)> {
        let mut archive = tar::Archive::new(reader);
        let mut next = 0;
        let entries = archive.entries_with_seek();
        for entry in entries.map_err(|e| (0, e.to_string()))? {
            let entry = entry.map_err(|e| (next, format!("not a tar header: {e}")))?;
            let (header, offset) = (entry.raw_header_position(), entry.raw_file_position());
            let path = entry
                .path()
                .map_err(|e| (header, format!("bad name: {e}")))?;
            let name = path.to_string_lossy().trim_start_matches("./").to_owned();
            let inside = |c| matches!(c, Component::Normal(_) | Component::CurDir);
            if !path.components().all(inside) {
                return Err((header, format!("member {name} leaves the archive")));
            }
            let end = offset.checked_add(entry.size());
            if end.is_none_or(|end| end > bytes) {
                let reason = format!("the tar is cut off inside member {name}");
                return Err((header, reason));
            }
            next = offset + entry.size();
            if entry.header().entry_type().is_file() {
                let bytes = entry.size();
                self.member(Member {
                    name,
                    offset,
                    bytes,
                });
            }
        }
        Ok(())
    }

    /// Members that share a name up to the first dot of the base name are one sample.
    fn member(&mut self, member: Member) {
        let base = member.name.rsplit('/').next().unwrap_or(&member.name);
        let Some((stem, extension)) = base.split_once('.') else {
            return self.catalog.leave_out("members without an extension");
        };
        let key = member.name[..member.name.len() - base.len() + stem.len()].to_owned();
        let extension = extension.to_ascii_lowercase();
        if self.open.as_ref().is_none_or(|open| open.key != key) {
            self.close();
            self.open = Some(Group {
                key,
                images: [None, None],
                text: None,
                record: None,
                wrong: None,
            });
        }
        let open = self.open.as_mut().expect("opened above");
        let (place, format) = extension.rsplit_once('.').unwrap_or(("", &extension));
        let slot = match (place, format) {
            ("" | "0", format) if IMAGES.contains(&format) => &mut open.images[0],
            ("1", format) if IMAGES.contains(&format) => &mut open.images[1],
            _ if extension == TEXT_EXTENSION || extension == PAIRS_EXTENSION => &mut open.text,
            ("", "json") if self.members.records => &mut open.record,
            // Anything else is allowed beside a sample.
            _ => return,
        };
        if slot.is_some() {
            let reason = format!("{} is a second member of its kind", member.name);
            open.wrong = Some((BadKind::DoubleKey, reason));
        }
        *slot = Some(member);
    }

    fn close(&mut self) {
        let Some(group) = self.open.take() else {
            return;
        };
        let place = |member| Place::Member(self.tar, member);
        let images: Vec<Place> = group.images.into_iter().flatten().map(place).collect();
        let record = group.record.map(place);
        let texts = match (group.text, &record) {
            (Some(text), _) => Some(Texts::At(place(text))),
            (None, Some(_)) => Some(Texts::InRecord),
            (None, None) => None,
        };
        if images.is_empty() && texts.is_none() {
            return self.catalog.leave_out("members of no sample");
        }
        let wrong = group.wrong.or_else(|| match (images.len(), &texts) {
            // A record without image is a download that failed; it says why when it is read.
            (0, _) if record.is_none() => Some((BadKind::MissingImage, "has no image".into())),
            (_, None) => Some((BadKind::BrokenText, "has no .txt or .pairs.json".into())),
            _ => None,
        });
        match (wrong, texts) {
            (None, Some(texts)) => {
                let key = match self.members.tar_in_key {
                    false => group.key,
                    true => format!("{}/{}", self.file.trim_end_matches(".tar"), group.key),
                };
                self.catalog.push(&Description {
                    key,
                    images,
                    texts,
                    record,
                });
            }
            (wrong, _) => {
                let (kind, reason) = wrong.unwrap_or((BadKind::BrokenText, "has no text".into()));
                let place = format!("{}, sample {}", self.file, group.key);
                self.catalog.bad(kind, place, reason);
            }
        }
    }
}
