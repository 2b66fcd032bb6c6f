//! `pixels-snli-ve`: the hypothesis of each measure that a picture has much of it.
//!
//! Little contradicts it, much entails it; of what lies between the pixels say neither, and it is
//! neutral. Each hypothesis has as many pictures of every label: the text alone says nothing.

use super::balance::{Candidate, balanced};
use super::measure::Measure;
use super::scale::{self, Level};
use super::{EVEN, NEAR, Picture, leave_out};
use crate::pack::catalog::{Catalog, Description, Texts};
use crate::pair::Pair;

const CONTRADICTION: u32 = 0;
const NEUTRAL: u32 = 1;
const ENTAILMENT: u32 = 2;

/// The label of the hypothesis that a picture has much.
fn label(level: Level) -> u32 {
    match level {
        Level::Little => CONTRADICTION,
        Level::Between => NEUTRAL,
        Level::Much => ENTAILMENT,
    }
}

/// Every hypothesis that the pictures decide clearly.
pub(super) fn describe(catalog: &mut Catalog, pictures: &[Picture]) {
    let mut all: Vec<(usize, Pair)> = Vec::new();
    for (index, measure) in Measure::ALL.into_iter().enumerate() {
        let mut near = 0;
        let mut candidates = Vec::new();
        for (order, picture) in pictures.iter().enumerate() {
            let Some(level) = scale::clear(picture.places[index]) else {
                near += 1;
                continue;
            };
            let label = label(level);
            let id = format!("{}#{index}", picture.key);
            let pair = Pair {
                text: measure.words().says.to_owned(),
                id: Some(id.clone()),
                labels: vec![label],
                scores: Vec::new(),
            };
            candidates.push(Candidate {
                label,
                name: id,
                value: (order, pair),
            });
        }
        let labels = [CONTRADICTION, NEUTRAL, ENTAILMENT];
        let (kept, left_out) = balanced(candidates, &labels);
        leave_out(catalog, EVEN, left_out);
        leave_out(catalog, NEAR, near);
        all.extend(kept);
    }
    // Stable: a picture's hypotheses stay in the order of the measures.
    all.sort_by_key(|(order, _)| *order);
    for of_picture in all.chunk_by(|a, b| a.0 == b.0) {
        let picture = &pictures[of_picture[0].0];
        let pairs = of_picture.iter().map(|(_, pair)| pair.clone());
        catalog.push(&Description {
            key: picture.key.clone(),
            images: vec![picture.image()],
            texts: Texts::Pairs(pairs.collect()),
            record: None,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pair::Contents;
    use std::collections::BTreeMap;

    #[test]
    fn each_hypothesis_has_every_label_equally_often_and_each_is_true() {
        let of = |number: u64| Picture {
            number,
            key: format!("p{number}"),
            file: format!("p{number}.jpg"),
            // Twice as many pictures with little as with much.
            places: [(number as f64 / 31.0).powi(2); 5],
        };
        let pictures: Vec<Picture> = (1..=30).map(of).collect();
        let mut catalog = Catalog::new("in", Contents::SnliVe);
        describe(&mut catalog, &pictures);
        let mut counts: BTreeMap<String, [u32; 3]> = BTreeMap::new();
        for index in 0..catalog.len() {
            let found = catalog.get(index);
            let number: f64 = found.key[1..].parse().expect("a number");
            let place = (number / 31.0).powi(2);
            let Texts::Pairs(pairs) = found.texts else {
                panic!("hypotheses have labels")
            };
            for pair in pairs {
                let expected = match (place < 1.0 / 3.0, place >= 2.0 / 3.0) {
                    (true, _) => CONTRADICTION,
                    (_, true) => ENTAILMENT,
                    (false, false) => NEUTRAL,
                };
                assert_eq!(pair.labels, [expected], "{} of {place}", pair.text);
                counts.entry(pair.text).or_default()[pair.labels[0] as usize] += 1;
            }
        }
        assert_eq!(counts.len(), 5);
        for (text, [contradiction, neutral, entailment]) in counts {
            assert!(neutral > 3, "{text}: {neutral}");
            assert!(contradiction == neutral && entailment == neutral, "{text}");
        }
    }
}
