//! From a tar's bytes to samples: pure, and every lie of a header is a named error.

use std::io::Read as _;
use std::path::Component;

use crate::error::ShardError;
use crate::manifest::{Member, SampleEntry};

/// Extensions of images, lower case.
const IMAGE_EXTENSIONS: [&str; 4] = ["jpg", "jpeg", "png", "webp"];
/// Longest caption file: a thousand captions of a kilobyte.
const TEXT_BYTES_MAX: u64 = 1 << 20;
/// Longest image file.
const IMAGE_BYTES_MAX: u64 = 256 << 20;
/// Longest caption, in bytes.
const CAPTION_BYTES_MAX: usize = 16 << 10;

/// Whether `extension` is an image's.
pub fn is_image(extension: &str) -> bool {
    IMAGE_EXTENSIONS.contains(&extension.to_ascii_lowercase().as_str())
}

/// Captions of a caption file: one a line, trimmed, empty ones dropped, duplicates dropped
/// first-seen (model_spec 13).
///
/// # Errors
/// A reason: not UTF-8, too long, none.
pub fn captions(text: &[u8]) -> Result<Vec<String>, String> {
    let text = std::str::from_utf8(text).map_err(|e| format!("captions are not UTF-8: {e}"))?;
    let mut seen: Vec<String> = Vec::new();
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty()) {
        if line.len() > CAPTION_BYTES_MAX {
            return Err(format!(
                "a caption is longer than {CAPTION_BYTES_MAX} bytes"
            ));
        }
        if !seen.iter().any(|s| s == line) {
            seen.push(line.to_owned());
        }
    }
    if seen.is_empty() {
        return Err("no caption".into());
    }
    Ok(seen)
}

/// The data of `member`.
///
/// # Errors
/// [`ShardError::Member`] when the shard ends before it.
pub fn member_bytes<'a>(
    tar: &'a [u8],
    shard: &str,
    member: &Member,
) -> Result<&'a [u8], ShardError> {
    let end = member.offset.checked_add(member.bytes);
    let range = end.map(|end| member.offset as usize..end as usize);
    range
        .and_then(|r| tar.get(r))
        .ok_or_else(|| ShardError::Member {
            shard: shard.to_owned(),
            member: member.name.clone(),
            offset: member.offset,
            reason: "lies beyond the end of the shard; the shard is cut off".into(),
        })
}

/// All samples of a tar, by webdataset's rule: members that share a name up to the first dot of
/// the base name belong together.
///
/// # Errors
/// [`ShardError::Member`], naming shard, member and offset.
pub fn scan(tar: &[u8], shard: &str) -> Result<Vec<SampleEntry>, ShardError> {
    let fail = |member: &str, offset: u64, reason: String| ShardError::Member {
        shard: shard.to_owned(),
        member: member.to_owned(),
        offset,
        reason,
    };
    let mut archive = tar::Archive::new(tar);
    let mut groups: Vec<(String, Option<Member>, Option<Member>)> = Vec::new();
    let mut next = 0u64;
    let entries = archive.entries().map_err(|e| fail("-", 0, e.to_string()))?;
    for entry in entries {
        let mut entry = entry.map_err(|e| fail("-", next, format!("not a tar header: {e}")))?;
        let header = entry.raw_header_position();
        let path = entry
            .path()
            .map_err(|e| fail("-", header, format!("bad name: {e}")))?;
        let name = path.to_string_lossy().into_owned();
        if path
            .components()
            .any(|c| !matches!(c, Component::Normal(_) | Component::CurDir))
        {
            return Err(fail(&name, header, "its path leaves the archive".into()));
        }
        let (offset, bytes) = (entry.raw_file_position(), entry.size());
        let end = offset
            .checked_add(bytes)
            .filter(|end| *end <= tar.len() as u64);
        let Some(end) = end else {
            let reason = format!(
                "its header says {bytes} bytes, the shard ends after {}; the shard is cut off or \
                 the header lies",
                (tar.len() as u64).saturating_sub(offset)
            );
            return Err(fail(&name, header, reason));
        };
        next = end.next_multiple_of(512);
        let kind = entry.header().entry_type();
        if kind.is_dir() {
            continue;
        }
        if !kind.is_file() {
            return Err(fail(
                &name,
                header,
                format!("{kind:?} is not a regular file"),
            ));
        }
        let base = name.rsplit('/').next().unwrap_or(&name).to_owned();
        let Some((stem, extension)) = base.split_once('.') else {
            return Err(fail(&name, header, "its name has no extension".into()));
        };
        let key = name[..name.len() - base.len() + stem.len()].to_owned();
        if groups.last().is_none_or(|(last, ..)| *last != key) {
            if groups.iter().any(|(k, ..)| *k == key) {
                return Err(fail(&name, header, format!("sample `{key}` comes twice")));
            }
            groups.push((key, None, None));
        }
        let (_, image, text) = groups.last_mut().expect("pushed above");
        let (slot, limit) = if is_image(extension) {
            (image, IMAGE_BYTES_MAX)
        } else if extension.eq_ignore_ascii_case("txt") {
            (text, TEXT_BYTES_MAX)
        } else {
            continue;
        };
        if bytes > limit {
            return Err(fail(
                &name,
                header,
                format!("{bytes} bytes, over the limit of {limit}"),
            ));
        }
        if slot.is_some() {
            return Err(fail(
                &name,
                header,
                "a second member of this kind in its sample".into(),
            ));
        }
        // A short read here would mean that the reader above and this tar disagree.
        let mut first = [0u8; 1];
        let read = entry
            .read(&mut first)
            .map_err(|e| fail(&name, offset, e.to_string()))?;
        if read == 0 && bytes > 0 {
            return Err(fail(&name, offset, "no data behind its header".into()));
        }
        *slot = Some(Member {
            name,
            offset,
            bytes,
        });
    }
    groups
        .into_iter()
        .map(|(key, image, text)| {
            let missing = |what: &str| fail(&key, next, format!("the sample has no {what}"));
            let image = image.ok_or_else(|| missing("image"))?;
            let text = text.ok_or_else(|| missing("caption file (.txt)"))?;
            let found = captions(member_bytes(tar, shard, &text)?)
                .map_err(|reason| fail(&text.name, text.offset, reason))?;
            Ok(SampleEntry {
                key,
                captions: found.len() as u32,
                image,
                text,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::tar_of;

    fn tar(members: &[(&str, &[u8])]) -> Vec<u8> {
        tar_of(members.iter().map(|(n, d)| ((*n).to_owned(), d.to_vec())))
    }

    fn error(bytes: &[u8]) -> String {
        scan(bytes, "x.tar")
            .expect_err("must be refused")
            .to_string()
    }

    #[test]
    fn samples_come_with_offsets_and_caption_counts() {
        let bytes = tar(&[
            ("a.jpg", b"JPEG"),
            ("a.txt", b"one\ntwo\none\n"),
            ("b.PNG", b"P"),
            ("b.txt", b"x"),
        ]);
        let samples = scan(&bytes, "x.tar").expect("good");
        assert_eq!(samples.len(), 2);
        assert_eq!(samples[0].captions, 2);
        assert_eq!(
            member_bytes(&bytes, "x.tar", &samples[0].image).expect("inside"),
            b"JPEG"
        );
        assert_eq!(samples[1].key, "b");
    }

    #[test]
    fn a_truncated_tar_names_member_and_offset() {
        let bytes = tar(&[("a.jpg", &[7; 4000]), ("a.txt", b"one")]);
        let told = error(&bytes[..2000]);
        assert!(told.contains("x.tar, member a.jpg, offset 0"), "{told}");
    }

    #[test]
    fn a_lying_size_and_a_broken_header_are_named() {
        let mut bytes = tar(&[("a.jpg", b"JPEG"), ("a.txt", b"one")]);
        bytes[130] ^= 1;
        assert!(error(&bytes).contains("offset 0"), "{}", error(&bytes));
    }

    #[test]
    fn incomplete_and_double_samples_are_refused() {
        assert!(error(&tar(&[("a.jpg", b"J")])).contains("no caption file"));
        assert!(error(&tar(&[("a.txt", b"t")])).contains("no image"));
        assert!(
            error(&tar(&[("a.jpg", b"J"), ("a.png", b"J"), ("a.txt", b"t")])).contains("second")
        );
        assert!(error(&tar(&[("a.jpg", b"J"), ("a.txt", b"\xff")])).contains("UTF-8"));
    }

    proptest::proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..3000)) {
            let _ = scan(&bytes, "x.tar");
        }
    }
}
