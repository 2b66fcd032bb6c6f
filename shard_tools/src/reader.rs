//! From a tar's bytes to samples: pure, and every lie of a header is a named error.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::path::Component;

use crate::error::ShardError;
use crate::manifest::{Member, SampleEntry};
use crate::pair::{self, PAIRS_EXTENSION, TEXT_EXTENSION};

/// Extensions of images, lower case.
const IMAGE_EXTENSIONS: [&str; 4] = ["jpg", "jpeg", "png", "webp"];
/// Longest caption file: a thousand captions of a kilobyte.
pub(crate) const TEXT_BYTES_MAX: u64 = 1 << 20;
/// Longest image file.
pub(crate) const IMAGE_BYTES_MAX: u64 = 256 << 20;
/// Most images of one sample; NLVR2 has two.
const IMAGES_MAX: usize = 2;

/// Whether `extension` is an image's.
pub fn is_image(extension: &str) -> bool {
    IMAGE_EXTENSIONS.contains(&extension.to_ascii_lowercase().as_str())
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

/// What a member is in its sample, by what stands behind the first dot of its base name.
enum Role {
    /// `jpg`, or `0.jpg` and `1.jpg`: the place among the sample's images.
    Image(usize),
    Text,
    /// Anything else; webdataset allows it.
    Other,
}

fn role(extension: &str) -> Role {
    let extension = extension.to_ascii_lowercase();
    if extension == TEXT_EXTENSION || extension == PAIRS_EXTENSION {
        return Role::Text;
    }
    let (place, format) = extension.rsplit_once('.').unwrap_or(("", &extension));
    if !is_image(format) {
        return Role::Other;
    }
    match place {
        "" | "0" => Role::Image(0),
        "1" => Role::Image(1),
        _ => Role::Other,
    }
}

/// A sample as far as its members were seen.
struct Group {
    key: String,
    images: [Option<Member>; IMAGES_MAX],
    text: Option<Member>,
}

/// All samples of a tar, by webdataset's rule: members that share a name up to the first dot of
/// the base name belong together. Sources are left at 0.
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
    let mut groups: Vec<Group> = Vec::new();
    let mut keys = BTreeSet::new();
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
        if groups.last().is_none_or(|last| last.key != key) {
            if !keys.insert(key.clone()) {
                return Err(fail(&name, header, format!("sample `{key}` comes twice")));
            }
            let (images, text) = Default::default();
            groups.push(Group { key, images, text });
        }
        let group = groups.last_mut().expect("pushed above");
        let (slot, limit) = match role(extension) {
            Role::Image(place) => (&mut group.images[place], IMAGE_BYTES_MAX),
            Role::Text => (&mut group.text, TEXT_BYTES_MAX),
            Role::Other => continue,
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
        .map(|group| {
            let key = group.key;
            let missing = |what: &str| fail(&key, next, format!("the sample has no {what}"));
            if group.images[0].is_none() {
                return Err(missing("image"));
            }
            let text = group
                .text
                .ok_or_else(|| missing("text (.txt or .pairs.json)"))?;
            let found = pair::pairs(&text.name, member_bytes(tar, shard, &text)?)
                .map_err(|reason| fail(&text.name, text.offset, reason))?;
            Ok(SampleEntry {
                images: group.images.into_iter().flatten().collect(),
                pairs: found.len() as u32,
                source: 0,
                key,
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
        assert_eq!(samples[0].pairs, 2);
        assert_eq!(
            member_bytes(&bytes, "x.tar", &samples[0].images[0]).expect("inside"),
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
    fn two_images_and_pairs_are_one_sample() {
        let pairs = br#"[{"text":"both are red","labels":[1]}]"#;
        let bytes = tar(&[
            ("s/a.0.png", b"P"),
            ("s/a.1.png", b"Q"),
            ("s/a.pairs.json", pairs),
            ("s/a.json", b"{}"),
        ]);
        let samples = scan(&bytes, "x.tar").expect("good");
        assert_eq!(
            (samples[0].key.as_str(), samples[0].images.len()),
            ("s/a", 2)
        );
        assert_eq!((samples.len(), samples[0].pairs), (1, 1));
    }

    #[test]
    fn incomplete_and_double_samples_are_refused() {
        assert!(error(&tar(&[("a.jpg", b"J")])).contains("has no text"));
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
