//! What an evaluation counts, and how counts are folded (model_spec 14).
//!
//! Right ones are counted in integers, losses are summed in f64 in the order of the chunks, and the
//! only divisions come at the end: so the numbers do not depend on who counted what. Pure; it
//! refuses to know data, models and files.

use std::collections::BTreeMap;

use belfry_proto::objective;
use serde::{Deserialize, Serialize};

/// Scores are counted in millionths: a soft score of VQA is a multiple of 0.1, packed as f32.
const SCORE_UNITS: f64 = 1e6;

/// A named number of an evaluation: accuracies and recalls lie in 0..=1.
#[derive(Clone, Debug, PartialEq)]
pub struct Figure {
    /// As in the run's metrics: `mlm_loss`, `vqa_score`, `ir1`.
    pub name: String,
    /// Its value.
    pub value: f64,
}

/// An f64 that is written with all its bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Exact(pub f64);

impl From<Exact> for String {
    fn from(exact: Exact) -> String {
        format!("{:016x}", exact.0.to_bits())
    }
}

impl TryFrom<String> for Exact {
    type Error = std::num::ParseIntError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        Ok(Exact(f64::from_bits(u64::from_str_radix(&text, 16)?)))
    }
}

/// What is counted of one objective in one part of the data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sum {
    /// Losses, added in order.
    pub loss: Exact,
    /// How many were added: micro-batches of pre-training, rows of a classifier.
    pub losses: u64,
    /// Scores in millionths; a right one is worth 1.
    pub right: u64,
    /// How many were scored: masked tokens, rows.
    pub scored: u64,
}

impl Sum {
    /// One more loss.
    pub fn add_loss(&mut self, loss: f64) {
        self.loss.0 += loss;
        self.losses += 1;
    }

    /// One more row with a score of 0..=1.
    pub fn add_score(&mut self, score: f64) {
        self.right += (score * SCORE_UNITS).round() as u64;
        self.scored += 1;
    }

    /// `right` of `scored` more.
    pub fn add_right(&mut self, right: u64, scored: u64) {
        self.right += right * SCORE_UNITS as u64;
        self.scored += scored;
    }

    fn add(&mut self, more: &Sum) {
        self.loss.0 += more.loss.0;
        self.losses += more.losses;
        self.right += more.right;
        self.scored += more.scored;
    }

    fn mean_loss(&self) -> f64 {
        mean(self.loss.0, self.losses)
    }

    fn mean_score(&self) -> f64 {
        mean(self.right as f64, self.scored * SCORE_UNITS as u64)
    }
}

fn mean(sum: f64, count: u64) -> f64 {
    if count > 0 { sum / count as f64 } else { 0.0 }
}

/// Sums by objective and part of the data.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Tally(BTreeMap<String, BTreeMap<u32, Sum>>);

/// A part of the data whose figures are told apart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Index in `data.validation`.
    pub dataset: u32,
    /// Index in the dataset's sources.
    pub source: u32,
    /// The dataset's name, or its source's where it has several; letters, digits and `_`.
    pub name: String,
}

impl Tally {
    /// The sum of an objective (`mlm`, `vqa`) in a part.
    pub fn sum(&mut self, objective: &str, part: u32) -> &mut Sum {
        if !self.0.contains_key(objective) {
            self.0.insert(objective.to_owned(), BTreeMap::new());
        }
        let parts = self.0.get_mut(objective).expect("was put there");
        parts.entry(part).or_default()
    }

    /// Adds the tally of the next chunk.
    pub fn add(&mut self, next: &Tally) {
        for (objective, parts) in &next.0 {
            for (part, sum) in parts {
                self.sum(objective, *part).add(sum);
            }
        }
    }

    /// `NAME_loss` and `NAME_accuracy` (of VQA `vqa_score`) of every objective, in the order of
    /// `objectives`. With several parts, plain names are those of the first dataset, by which
    /// checkpoints are chosen (dev before test), and every part has its own `NAME_loss.PART`.
    pub fn figures(&self, objectives: &[&str], parts: &[Part]) -> Vec<Figure> {
        let mut figures = Vec::new();
        for objective in objectives {
            let Some(sums) = self.0.get(*objective) else {
                continue;
            };
            let mut first = Sum::default();
            let of_first = |part: &u32| parts.get(*part as usize).is_none_or(|p| p.dataset == 0);
            sums.iter()
                .filter(|(part, _)| of_first(part))
                .for_each(|(_, sum)| first.add(sum));
            push(&mut figures, objective, "", &first);
            if parts.len() > 1 {
                for (part, sum) in sums {
                    if let Some(part) = parts.get(*part as usize) {
                        push(&mut figures, objective, &format!(".{}", part.name), sum);
                    }
                }
            }
        }
        figures
    }
}

/// What a mean over nothing would be is left out.
fn push(figures: &mut Vec<Figure>, objective: &str, part: &str, sum: &Sum) {
    if sum.losses == 0 && sum.scored == 0 {
        return;
    }
    for (name, value) in [
        (objective::loss_key(objective), sum.mean_loss()),
        (objective::accuracy_key(objective), sum.mean_score()),
    ] {
        figures.push(Figure {
            name: format!("{name}{part}"),
            value,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(dataset: u32, name: &str) -> Part {
        Part {
            dataset,
            source: 0,
            name: name.into(),
        }
    }

    #[test]
    fn soft_scores_are_counted_exactly_and_losses_in_order() {
        let mut all = Tally::default();
        for chunk in 0..10 {
            let mut one = Tally::default();
            for score in [0.3f32, 0.6, 0.9, 1.0, 0.0] {
                let sum = one.sum("vqa", 0);
                sum.add_score(score.into());
                sum.add_loss(0.1 * f64::from(chunk));
            }
            all.add(&one);
        }
        let figures = all.figures(&["vqa"], &[part(0, "val")]);
        assert_eq!(figures[1].name, "vqa_score");
        assert_eq!(figures[1].value, 0.56, "no rounding on the way");
        assert_eq!(figures[0].name, "vqa_loss");
        assert!((figures[0].value - 0.45).abs() < 1e-12);
    }

    #[test]
    fn parts_have_figures_of_their_own_and_the_first_dataset_the_plain_names() {
        let mut tally = Tally::default();
        tally.sum("nlvr2", 0).add_right(3, 4);
        tally.sum("nlvr2", 1).add_right(1, 4);
        let parts = [part(0, "dev"), part(1, "test1")];
        let figures = tally.figures(&["nlvr2"], &parts);
        let value = |name: &str| figures.iter().find(|f| f.name == name).map(|f| f.value);
        assert_eq!(value("nlvr2_accuracy"), Some(0.75));
        assert_eq!(value("nlvr2_accuracy.dev"), Some(0.75));
        assert_eq!(value("nlvr2_accuracy.test1"), Some(0.25));
    }

    #[test]
    fn every_bit_comes_back_from_text() {
        let mut tally = Tally::default();
        let sum = tally.sum("mlm", 0);
        sum.add_loss(0.1 + 0.2);
        sum.add_loss(f64::MIN_POSITIVE);
        let text = serde_json::to_string(&tally).expect("plain");
        let back: Tally = serde_json::from_str(&text).expect("its own text");
        assert_eq!(back, tally);
        assert!(serde_json::from_str::<Exact>("\"xyz\"").is_err());
    }

    #[test]
    fn what_nobody_scored_has_no_figure() {
        let mut tally = Tally::default();
        tally.sum("vqa", 0);
        assert!(tally.figures(&["vqa", "mlm"], &[]).is_empty());
    }
}
