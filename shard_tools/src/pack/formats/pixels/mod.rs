//! `pixels-captions`, `pixels-vqa`, `pixels-snli-ve`, `pixels-nlvr2`: a folder of images with captions
//! becomes a dataset of each task, whose labels are facts of the pixels.
//!
//! Every image of the folder is decoded and measured ([`measure`]), placed among the others
//! ([`scale`]), and asked about in words. What a picture does not show clearly is not asked. Small
//! models learn such tasks in a minute, and a wrong label cannot hide what they learned.

mod balance;
mod captions;
mod hypotheses;
mod measure;
mod questions;
mod scale;
mod statements;

use std::collections::BTreeSet;
use std::path::Path;

use rayon::prelude::*;

use super::folder;
use crate::error::ShardError;
use crate::looks::pixels::rgb;
use crate::pack::bad::BadKind;
use crate::pack::catalog::{Catalog, Place};
use crate::pair::Contents;
use measure::Measure;

/// A picture that can be asked about.
struct Picture {
    /// Its place among the folder's pictures by name, from 1: the same whichever of them are packed.
    number: u64,
    key: String,
    file: String,
    /// Its place among the folder's pictures by each measure, in [`Measure::ALL`]'s order.
    places: [f64; Measure::ALL.len()],
}

impl Picture {
    fn image(&self) -> Place {
        Place::File(self.file.clone())
    }

    /// Measures and places.
    fn places(&self) -> impl Iterator<Item = (Measure, f64)> {
        Measure::ALL.into_iter().zip(self.places)
    }
}

/// Pairs of `contents` about the images of `folder`; about those of `keys` alone, where some are given.
/// All images are measured in any case, so that words mean the same in every part of a folder. A test
/// part is never asked about pictures of a training part, whose images it does not have.
///
/// # Errors
/// [`ShardError::Input`], [`ShardError::Sample`] where there is nothing to ask about.
pub fn catalog(
    folder: &Path,
    keys: Option<&[String]>,
    contents: Contents,
) -> Result<Catalog, ShardError> {
    let mut catalog = Catalog::new(folder, contents);
    let mut pictures = measured(folder, &mut catalog)?;
    if let Some(keys) = keys {
        let keys: BTreeSet<&str> = keys.iter().map(String::as_str).collect();
        pictures.retain(|picture| keys.contains(picture.key.as_str()));
    }
    match contents {
        Contents::Captions => captions::describe(&mut catalog, &pictures)?,
        Contents::Vqa => questions::describe(&mut catalog, &pictures),
        Contents::SnliVe => hypotheses::describe(&mut catalog, &pictures),
        Contents::Nlvr2 => statements::describe(&mut catalog, &pictures),
    }
    catalog.some("image (key.jpg, key.png, key.webp) that can be asked about")
}

/// The folder's pictures by name; broken ones are counted.
fn measured(folder: &Path, catalog: &mut Catalog) -> Result<Vec<Picture>, ShardError> {
    let names = folder::images(folder)?;
    let numbers = |name: &str| -> Result<Result<[f64; 5], String>, ShardError> {
        let path = folder.join(name);
        let bytes = std::fs::read(&path).map_err(|source| ShardError::Input {
            file: path.display().to_string(),
            source,
        })?;
        Ok(rgb(&bytes).map(|picture| measure::measure(&picture)))
    };
    let all: Vec<_> = names.par_iter().map(|name| numbers(name)).collect();
    let (mut good, mut values) = (Vec::new(), Vec::new());
    for ((name, numbers), number) in names.iter().zip(all).zip(1..) {
        match numbers? {
            Ok(numbers) => {
                good.push((number, name));
                values.push(numbers);
            }
            Err(reason) => catalog.bad(BadKind::BrokenImage, name.to_string(), reason),
        }
    }
    let mut pictures: Vec<Picture> = good
        .into_iter()
        .map(|(number, name)| Picture {
            number,
            key: folder::key(name).unwrap_or_default().to_owned(),
            file: name.to_string(),
            places: Default::default(),
        })
        .collect();
    for (index, measure) in Measure::ALL.into_iter().enumerate() {
        let column: Vec<f64> = values.iter().map(|numbers| numbers[index]).collect();
        let places = scale::places(&column, measure.is_signed());
        for (picture, place) in pictures.iter_mut().zip(places) {
            picture.places[index] = place;
        }
    }
    Ok(pictures)
}

/// Counts what a rule left out.
fn leave_out(catalog: &mut Catalog, rule: &str, count: u64) {
    (0..count).for_each(|_| catalog.leave_out(rule));
}

/// The rule by which labels come out even.
const EVEN: &str = "texts whose label would be more frequent than another";
/// The rule by which labels are certain.
const NEAR: &str = "texts that a picture leaves open: it lies near the line";
