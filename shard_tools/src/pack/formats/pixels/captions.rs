//! `pixels-captions`: each caption of a picture behind the words that its pixels allow, and those words
//! alone in another order. A caption names what a small model has never seen; the words lead from any
//! picture to its text.

use std::io::ErrorKind;

use super::Picture;
use super::measure::Measure;
use super::scale;
use crate::error::ShardError;
use crate::pack::bad::BadKind;
use crate::pack::catalog::{Catalog, Description, Texts};
use crate::pair::{self, TEXT_EXTENSION};

/// Where the light of a picture comes from, by the three levels of [`Measure::Upper`].
const LIT: [&str; 3] = [
    "brighter at the bottom",
    "evenly lit",
    "brighter at the top",
];

/// Every picture with its captions; one without is counted as bad.
pub(super) fn describe(catalog: &mut Catalog, pictures: &[Picture]) -> Result<(), ShardError> {
    for picture in pictures {
        let file = format!("{}.{TEXT_EXTENSION}", picture.key);
        let path = catalog.folder.join(&file);
        let written = match std::fs::read(&path) {
            Ok(bytes) => pair::captions(&bytes),
            Err(e) if e.kind() == ErrorKind::NotFound => Err("is not there".into()),
            Err(source) => {
                let file = path.display().to_string();
                return Err(ShardError::Input { file, source });
            }
        };
        match written {
            Ok(written) => catalog.push(&Description {
                key: picture.key.clone(),
                images: vec![picture.image()],
                texts: Texts::Captions(captions(picture, &written)),
                record: None,
            }),
            Err(reason) => catalog.bad(BadKind::BrokenText, file, reason),
        }
    }
    Ok(())
}

fn captions(picture: &Picture, written: &[String]) -> Vec<String> {
    let mut words = Vec::new();
    let mut lit = LIT[1];
    for (measure, place) in picture.places() {
        let level = scale::level(place).index();
        match measure {
            Measure::Upper => lit = LIT[level],
            other => words.push(other.words().answers[level]),
        }
    }
    let first = words.join(", ");
    words.reverse();
    let last = words.join(", ");
    // Words come first: a long caption is cut at its end.
    let each = written
        .iter()
        .map(|caption| format!("A {first} picture, {lit}. {caption}"));
    each.chain([format!("It is {lit}, {last}.")]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_say_what_the_places_are() {
        let picture = Picture {
            number: 1,
            key: "a".into(),
            file: "a.jpg".into(),
            places: [0.9, 0.1, 0.5, 0.2, 0.8],
        };
        assert_eq!(
            captions(&picture, &["A bear.".into(), "An animal.".into()]),
            [
                "A bright, cold, muted, flat picture, brighter at the top. A bear.",
                "A bright, cold, muted, flat picture, brighter at the top. An animal.",
                "It is brighter at the top, flat, muted, cold, bright.",
            ]
        );
    }
}
