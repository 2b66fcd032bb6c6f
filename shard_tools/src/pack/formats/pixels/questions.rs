//! `pixels-vqa`: questions with answers of VQAv2's form.
//!
//! Of each measure: which of two words is right, whether one of them is, and which of three words. The
//! last is asked near a line too; there some of ten annotators say the neighbouring word, and the
//! soft scores are theirs. The answer file is the same whichever pictures are packed.

use bytes::Bytes;

use super::balance::{Candidate, balanced};
use super::measure::Measure;
use super::scale::{self, Level};
use super::{EVEN, NEAR, Picture, leave_out};
use crate::manifest::ANSWERS_FILE;
use crate::pack::answers::Vocabulary;
use crate::pack::catalog::{Catalog, Description, Texts};
use crate::pair::Pair;

/// Room for the questions of one picture in a question's number, as VQAv2 numbers them.
const QUESTIONS_MAX: u64 = 1000;
const NO: &str = "no";
const YES: &str = "yes";

/// A question about one picture.
struct Asked {
    picture: usize,
    /// Which of a picture's questions.
    number: u64,
    text: &'static str,
    /// What ten annotators answer.
    answers: Vec<&'static str>,
}

/// Every question that the pictures answer clearly, and the answer file.
pub(super) fn describe(catalog: &mut Catalog, pictures: &[Picture]) {
    let vocabulary = vocabulary();
    let text = serde_json::to_vec(vocabulary.answers()).expect("plain data");
    catalog.files.push((ANSWERS_FILE.into(), Bytes::from(text)));
    let mut all: Vec<Asked> = Vec::new();
    for (index, measure) in Measure::ALL.into_iter().enumerate() {
        for kind in Kind::ALL {
            all.extend(asked(catalog, pictures, (index, measure), kind));
        }
    }
    all.sort_by_key(|asked| (asked.picture, asked.number));
    for of_picture in all.chunk_by(|a, b| a.picture == b.picture) {
        let picture = &pictures[of_picture[0].picture];
        let pair = |asked: &Asked| {
            let (labels, scores) = vocabulary.labels(asked.answers.iter().copied());
            Pair {
                text: asked.text.to_owned(),
                id: Some((picture.number * QUESTIONS_MAX + asked.number).to_string()),
                labels,
                scores,
            }
        };
        catalog.push(&Description {
            key: picture.key.clone(),
            images: vec![picture.image()],
            texts: Texts::Pairs(of_picture.iter().map(pair).collect()),
            record: None,
        });
    }
}

/// All answers in the order in which they are asked for: three words of each measure, no and yes.
fn vocabulary() -> Vocabulary {
    let words = Measure::ALL.map(|measure| measure.words().answers).concat();
    let all = words.into_iter().chain([NO, YES]);
    Vocabulary::new(all.map(str::to_owned).collect())
}

/// What is asked about a measure.
#[derive(Clone, Copy)]
enum Kind {
    /// Little or much.
    Choice,
    /// Little, much, or neither.
    How,
    /// Whether it is much.
    Is,
}

impl Kind {
    const ALL: [Kind; 3] = [Kind::Choice, Kind::How, Kind::Is];

    fn number(self) -> u64 {
        match self {
            Kind::Choice => 0,
            Kind::How => 1,
            Kind::Is => 2,
        }
    }
}

/// Questions of one kind, as many of every answer as of the rarest.
fn asked(
    catalog: &mut Catalog,
    pictures: &[Picture],
    (index, measure): (usize, Measure),
    kind: Kind,
) -> Vec<Asked> {
    let words = measure.words();
    let number = index as u64 * Kind::ALL.len() as u64 + kind.number();
    let mut near = 0;
    let mut candidates = Vec::new();
    for (order, picture) in pictures.iter().enumerate() {
        let place = picture.places[index];
        let clear = scale::clear(place).filter(|level| *level != Level::Between);
        let (text, label, answers) = match (kind, clear) {
            (Kind::How, _) => {
                let said = scale::said(place);
                let answers = said.into_iter().map(|level| words.answers[level.index()]);
                let own = scale::level(place).index();
                (words.how, own, answers.collect())
            }
            (_, None) => {
                near += 1;
                continue;
            }
            (Kind::Choice, Some(level)) => {
                let own = level.index();
                (words.choice, own, vec![words.answers[own]; 10])
            }
            (Kind::Is, Some(level)) => {
                let yes = level == Level::Much;
                let answer = if yes { YES } else { NO };
                (words.asks, usize::from(yes), vec![answer; 10])
            }
        };
        candidates.push(Candidate {
            label: label as u32,
            name: format!("{number}/{}", picture.key),
            value: Asked {
                picture: order,
                number,
                text,
                answers,
            },
        });
    }
    let labels: &[u32] = match kind {
        Kind::Choice => &[0, 2],
        Kind::How => &[0, 1, 2],
        Kind::Is => &[0, 1],
    };
    let (kept, left_out) = balanced(candidates, labels);
    leave_out(catalog, EVEN, left_out);
    leave_out(catalog, NEAR, near);
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pair::Contents;

    fn pictures() -> Vec<Picture> {
        let of = |number: u64| Picture {
            number,
            key: format!("p{number}"),
            file: format!("p{number}.jpg"),
            places: [number as f64 / 31.0; 5],
        };
        (1..=30).map(of).collect()
    }

    #[test]
    fn every_answer_of_a_question_is_as_frequent_as_the_others() {
        let mut catalog = Catalog::new("in", Contents::Vqa);
        describe(&mut catalog, &pictures());
        let answers = vocabulary();
        let mut counts = std::collections::BTreeMap::new();
        let mut ids = std::collections::BTreeSet::new();
        for index in 0..catalog.len() {
            let Texts::Pairs(pairs) = catalog.get(index).texts else {
                panic!("questions have labels")
            };
            for pair in pairs {
                let answer = answers.answers()[pair.labels[0] as usize].clone();
                *counts.entry((pair.text, answer)).or_insert(0) += 1;
                let id: u64 = pair.id.expect("has one").parse().expect("is a number");
                assert!(ids.insert(id), "{id} comes twice");
            }
        }
        let of = |text: &str, answer: &str| counts.get(&(text.to_owned(), answer.to_owned()));
        for words in Measure::ALL.map(Measure::words) {
            let [little, between, much] = words.answers;
            assert!(of(words.how, little).is_some_and(|n| *n >= 8));
            assert_eq!(of(words.how, little), of(words.how, between));
            assert_eq!(of(words.how, little), of(words.how, much));
            assert!(of(words.choice, little).is_some_and(|n| *n >= 8));
            assert_eq!(of(words.choice, little), of(words.choice, much));
            assert!(of(words.asks, YES).is_some_and(|n| *n >= 8));
            assert_eq!(of(words.asks, YES), of(words.asks, NO));
        }
        assert_eq!(answers.answers().len(), 17);
    }

    #[test]
    fn near_a_line_the_neighbouring_answer_has_a_score() {
        let mut catalog = Catalog::new("in", Contents::Vqa);
        describe(&mut catalog, &pictures());
        let found = (0..catalog.len()).map(|index| catalog.get(index));
        let tenth = found
            .into_iter()
            .find(|d| d.key == "p10")
            .expect("is asked");
        let Texts::Pairs(pairs) = tenth.texts else {
            panic!("questions have labels")
        };
        let how = pairs.iter().find(|pair| pair.text == LIGHT_HOW);
        let how = how.expect("is asked near a line too");
        // 10/31 lies 0.011 below the first line: three of ten say "medium".
        assert_eq!(
            (&how.labels[..], &how.scores[..]),
            (&[0, 1][..], &[1.0, 0.9][..])
        );
        assert!(
            pairs.iter().all(|pair| pair.labels.len() == 2),
            "nothing else is asked"
        );
        assert_eq!(how.id.as_deref(), Some("10001"));
    }

    const LIGHT_HOW: &str = "how bright is the picture?";
}
