//! Fills the flat vector of a model from files, one after the other.
//!
//! Shapes are compared before a number is read, so no file can ask for more memory than the model
//! has. What may stay fresh: heads of tasks, weights that nothing reads, the cross-modal part as
//! long as no file holds one, and what `init.fresh` names.

use std::collections::BTreeMap;

use belfry_configs::Init;
use belfry_model::resize_positions;

use super::error::{WeightsError, some};
use super::file::TensorFile;
use super::layout::{self, Layout, Place};
use super::pickle::Element;
use super::report::{Applied, FileReport, Report, Unused};
use super::target::{Target, Targets};

/// The image towers' position tables (CLIP, ViT): the only tensors that are scaled.
const POSITION_TABLES: [&str; 2] = [
    "vit_model.visual.positional_embedding",
    "vit_model.pos_embed",
];
/// Gets a third row for NLVR2's second image (model_spec 8).
const TOKEN_TYPES: &str = "token_type_embeddings.weight";

/// A model being filled.
pub(crate) struct Filling {
    targets: Targets,
    flat: Vec<f32>,
    fresh: Vec<String>,
    applied: BTreeMap<String, Applied>,
    /// By the model's name; resolved if another file holds it in the right shape.
    misshaped: BTreeMap<String, String>,
    report: Report,
}

/// How a stored shape becomes the model's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fit {
    Same,
    /// Sides of the grids.
    Scale {
        from: usize,
        to: usize,
    },
    /// Row 2 from row 1.
    CopyRow,
}

impl Filling {
    pub fn new(init: &Init, targets: &Targets, flat: Vec<f32>) -> Result<Self, WeightsError> {
        if flat.len() != targets.elements() {
            return Err(WeightsError::Length {
                found: flat.len(),
                expected: targets.elements(),
            });
        }
        for prefix in &init.fresh {
            if !targets.iter().any(|t| t.name.starts_with(prefix)) {
                return Err(WeightsError::FreshPrefix {
                    prefix: prefix.clone(),
                });
            }
        }
        Ok(Filling {
            targets: targets.clone(),
            flat,
            fresh: init.fresh.clone(),
            applied: BTreeMap::new(),
            misshaped: BTreeMap::new(),
            report: Report::default(),
        })
    }

    fn is_fresh(&self, name: &str) -> bool {
        self.fresh.iter().any(|prefix| name.starts_with(prefix))
    }

    /// Takes from `file` what the model has a place for.
    pub fn take(&mut self, mut file: TensorFile) -> Result<(), WeightsError> {
        let keys = file.tensors.keys().chain(file.others.keys());
        let Some(layout) = Layout::of(keys.clone().map(String::as_str)) else {
            let keys: Vec<String> = keys.cloned().collect();
            return Err(WeightsError::UnknownLayout {
                file: file.name,
                tensors: file.tensors.len(),
                keys: some(&keys),
            });
        };
        let (groups, stranger) = self.group(&file, layout)?;
        let mut applied = 0;
        let found = !groups.is_empty();
        for (name, keys) in groups {
            applied += usize::from(self.fill(&mut file, &name, keys)?);
        }
        if let (false, Some(example)) = (found, stranger) {
            return Err(WeightsError::WrongArchitecture {
                file: file.name,
                layout: layout.describe(),
                example,
            });
        }
        self.report.files.push(FileReport {
            file: file.name,
            sha256: file.sha256,
            layout: layout.describe(),
            tensors: file.tensors.len(),
            applied,
        });
        Ok(())
    }

    /// The file's keys by the model's name, thirds in their order; and a name that the model lacks.
    #[allow(clippy::type_complexity)]
    fn group(
        &mut self,
        file: &TensorFile,
        layout: Layout,
    ) -> Result<(BTreeMap<String, Vec<String>>, Option<String>), WeightsError> {
        let mut places: BTreeMap<String, Vec<(Place, String)>> = BTreeMap::new();
        let mut stranger = None;
        for key in file.tensors.keys().chain(file.others.keys()) {
            let place = layout.place(key);
            let reason = match &place {
                _ if key.ends_with("position_ids") => "a buffer that is computed",
                None => "no weight of an encoder",
                Some(place) if self.targets.get(&place.target).is_none() => {
                    stranger.get_or_insert_with(|| place.target.clone());
                    "the configured model has no such tensor"
                }
                Some(place) if self.is_fresh(&place.target) => "init.fresh starts it anew",
                Some(place) => {
                    let same = places.entry(place.target.clone()).or_default();
                    same.push((place.clone(), key.clone()));
                    continue;
                }
            };
            self.report.unused.push(Unused {
                file: self.report.files.len(),
                key: key.clone(),
                reason,
            });
        }
        let mut groups = BTreeMap::new();
        for (target, mut members) in places {
            members.sort_by_key(|(place, _)| place.third);
            for pair in members.windows(2) {
                if pair[0].0 == pair[1].0 {
                    return Err(WeightsError::Ambiguous {
                        file: file.name.clone(),
                        first: pair[0].1.clone(),
                        second: pair[1].1.clone(),
                        target,
                    });
                }
            }
            let needed = layout::parts(&members[0].0);
            let keys: Vec<String> = members.into_iter().map(|(_, key)| key).collect();
            if keys.len() != needed {
                return Err(WeightsError::Format {
                    file: file.name.clone(),
                    reason: format!(
                        "holds only {} of the query, key and value that make `{target}`",
                        keys.join(", ")
                    ),
                });
            }
            groups.insert(target, keys);
        }
        Ok((groups, stranger))
    }

    /// Fills one tensor from its keys; false if its shape does not fit.
    fn fill(
        &mut self,
        file: &mut TensorFile,
        name: &str,
        keys: Vec<String>,
    ) -> Result<bool, WeightsError> {
        let target = self.targets.get(name).expect("was looked up").clone();
        let mut notes = Vec::new();
        let mut fit = Fit::Same;
        for key in &keys {
            let refuse = |found: String| WeightsError::NotNumbers {
                file: file.name.clone(),
                key: key.clone(),
                found,
                target: name.to_owned(),
            };
            let Some(stored) = file.tensors.get(key) else {
                return Err(refuse(file.others[key].clone()));
            };
            match stored.element {
                Element::F32 => {}
                Element::F16 => notes.push("widened from f16".to_owned()),
                Element::Bf16 => notes.push("widened from bf16".to_owned()),
                Element::F64 => notes.push("rounded from f64".to_owned()),
                Element::Whole { .. } => return Err(refuse("a tensor of integers".into())),
            }
            match fits(&target, &stored.shape, keys.len()) {
                Ok(found) => fit = found,
                Err(expected) => {
                    let found = &stored.shape;
                    let told = format!("`{key}` is {found:?}, `{name}` needs {expected}");
                    self.misshaped.insert(name.to_owned(), told);
                    return Ok(false);
                }
            }
        }
        notes.dedup();
        let mut values = Vec::with_capacity(target.len);
        for key in &keys {
            let part = file.read(key)?;
            if let Some(element) = part.iter().position(|x| !x.is_finite()) {
                return Err(WeightsError::NotFinite {
                    file: file.name.clone(),
                    key: key.clone(),
                    element,
                    value: part[element],
                });
            }
            values.extend(part);
        }
        let width = target.shape.last().copied().unwrap_or(1);
        match fit {
            Fit::Same => {}
            Fit::Scale { from, to } => {
                notes.push(format!("positions scaled from {from}x{from} to {to}x{to}"));
                values = resize_positions(&values, width, to)
                    .expect("`fits` has seen a class row and a square");
            }
            Fit::CopyRow => {
                notes.push("row 2 copied from row 1".to_owned());
                values.extend_from_within(width..);
            }
        }
        self.flat[target.offset..target.offset + target.len].copy_from_slice(&values);
        self.misshaped.remove(name);
        let applied = Applied {
            name: name.to_owned(),
            file: self.report.files.len(),
            keys,
            notes,
        };
        self.applied.insert(name.to_owned(), applied);
        Ok(true)
    }

    /// Checks that nothing is random which must not be.
    pub fn finish(mut self) -> Result<(Vec<f32>, Report), WeightsError> {
        let fused = self.applied.keys().any(|name| layout::is_cross_modal(name));
        let needed = |name: &str| layout::is_encoder(name) || layout::is_cross_modal(name) && fused;
        // A head of another size is no fresh head either: it is told, and named in init.fresh or not.
        let wrong = self
            .misshaped
            .iter()
            .filter(|(name, _)| !layout::is_unread(name));
        let wrong: Vec<String> = wrong.map(|(_, told)| told.clone()).collect();
        if !wrong.is_empty() {
            return Err(WeightsError::Misshaped {
                count: wrong.len(),
                list: some(&wrong),
            });
        }
        let names = self.targets.iter().map(|e| e.name.clone());
        let fresh: Vec<String> = names.filter(|n| !self.applied.contains_key(n)).collect();
        let missing: Vec<String> = fresh
            .iter()
            .filter(|name| needed(name) && !self.is_fresh(name))
            .cloned()
            .collect();
        if !missing.is_empty() {
            return Err(WeightsError::Missing {
                count: missing.len(),
                list: some(&missing),
            });
        }
        self.report.applied = self.applied.into_values().collect();
        self.report.fresh = fresh;
        self.report.misshaped = self.misshaped.into_values().collect();
        Ok((self.flat, self.report))
    }
}

/// How `found` becomes the target's shape (or a third of it), or the shape that was expected.
fn fits(target: &Target, found: &[usize], parts: usize) -> Result<Fit, String> {
    let mut expected = target.shape.clone();
    if parts > 1 {
        expected[0] /= parts;
    }
    let single = |shape: &[usize]| shape.iter().all(|axis| *axis == 1);
    // `[]` and `[1]` are both one number.
    if found == expected || single(found) && single(&expected) {
        return Ok(Fit::Same);
    }
    if target.name == TOKEN_TYPES && expected[..] == [3, expected[1]] && found == [2, expected[1]] {
        return Ok(Fit::CopyRow);
    }
    let told = format!("{expected:?}");
    if POSITION_TABLES.contains(&target.name.as_str()) {
        let (rows, same) = rows_of(&expected, found);
        let side = |rows: usize| {
            let side = rows.saturating_sub(1).isqrt();
            (rows > 1 && side * side + 1 == rows).then_some(side)
        };
        return match (same, rows.map(side)) {
            (true, [Some(to), Some(from)]) => Ok(Fit::Scale { from, to }),
            (true, [Some(_), None]) => Err(format!(
                "{told}, or a class row and a square of patches (a distilled DeiT has one row more; \
                 take a plain one)"
            )),
            _ => Err(told),
        };
    }
    Err(told)
}

/// Rows of two position tables `[rows, width]` or `[1, rows, width]`, and whether the rest agrees.
fn rows_of(expected: &[usize], found: &[usize]) -> ([usize; 2], bool) {
    let split = |shape: &[usize]| match shape {
        [rows, width] | [1, rows, width] => Some((*rows, *width)),
        _ => None,
    };
    match (split(expected), split(found)) {
        (Some((to, width)), Some((from, same))) => ([to, from], width == same),
        _ => ([0, 0], false),
    }
}
