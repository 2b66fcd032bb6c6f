//! VQA answers: their normalisation, the vocabulary of those that are frequent, soft scores.
//!
//! The normalisation is the public VQA evaluation's as the authors' preparation applies it
//! (model_spec 13), with its quirks, since the classes depend on them.

use std::collections::BTreeMap;

use super::contractions::contraction;

/// An answer is a class when it is the majority's for so many questions.
const QUESTIONS_MIN: u32 = 9;
/// Periods that are removed from one answer at most.
const PERIODS_MAX: usize = 32;
/// Characters that are removed or become a space.
const PUNCTUATION: [char; 21] = [
    ';', '/', '[', ']', '"', '{', '}', '(', ')', '=', '+', '\\', '_', '-', '>', '<', '@', '`', ',',
    '?', '!',
];
const NUMBERS: [(&str, &str); 12] = [
    ("none", "0"),
    ("zero", "0"),
    ("one", "1"),
    ("two", "2"),
    ("three", "3"),
    ("four", "4"),
    ("five", "5"),
    ("six", "6"),
    ("seven", "7"),
    ("eight", "8"),
    ("nine", "9"),
    ("ten", "10"),
];
const ARTICLES: [&str; 3] = ["a", "an", "the"];

/// Normalises an answer.
///
/// Punctuation goes where it stands beside a space of the given answer, or anywhere when a comma
/// stands between digits; else it becomes a space. Periods go unless a digit follows. Then lower
/// case, number words as digits, no articles, contractions with their apostrophe, no commas.
pub fn normalize(answer: &str) -> String {
    let grouped = has_grouped_digits(answer);
    let mut text = answer.to_owned();
    for mark in PUNCTUATION {
        let beside = answer.contains(&format!("{mark} ")) || answer.contains(&format!(" {mark}"));
        let with = if grouped || beside { "" } else { " " };
        text = text.replace(mark, with);
    }
    let text = without_periods(&text).to_lowercase();
    let words = text.split_whitespace().filter_map(|word| {
        let number = NUMBERS.iter().find(|(name, _)| *name == word);
        let word = number.map_or(word, |(_, digits)| digits);
        (!ARTICLES.contains(&word)).then(|| contraction(word).unwrap_or(word))
    });
    words.collect::<Vec<_>>().join(" ").replace(',', "")
}

/// Whether a comma stands between two digits.
fn has_grouped_digits(text: &str) -> bool {
    let digits = |w: &[u8]| w[0].is_ascii_digit() && w[1] == b',' && w[2].is_ascii_digit();
    text.as_bytes().windows(3).any(digits)
}

fn without_periods(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let (mut rest, mut removed) = (text.chars().peekable(), 0);
    while let Some(c) = rest.next() {
        let before_digit = rest.peek().is_some_and(char::is_ascii_digit);
        if c == '.' && !before_digit && removed < PERIODS_MAX {
            removed += 1;
        } else {
            kept.push(c);
        }
    }
    kept
}

/// The score of an answer that `count` of the ten annotators gave.
pub fn soft_score(count: u32) -> f32 {
    match count {
        0 => 0.0,
        1 => 0.3,
        2 => 0.6,
        3 => 0.9,
        _ => 1.0,
    }
}

/// Counts majority answers until they become a [`Vocabulary`].
#[derive(Default)]
pub struct Majorities {
    /// Number of questions of each answer, and its place in the order of first sight.
    counts: BTreeMap<String, (u32, usize)>,
}

impl Majorities {
    /// One more question with this majority answer.
    pub fn add(&mut self, answer: &str) {
        let place = self.counts.len();
        let count = self.counts.entry(normalize(answer)).or_insert((0, place));
        count.0 += 1;
    }

    /// The frequent answers in the order in which they were first seen: class i is row i.
    pub fn vocabulary(self) -> Vocabulary {
        let counts = self.counts.into_iter();
        let mut kept: Vec<(usize, String)> = counts
            .filter(|(_, (count, _))| *count >= QUESTIONS_MIN)
            .map(|(answer, (_, place))| (place, answer))
            .collect();
        kept.sort();
        Vocabulary::new(kept.into_iter().map(|(_, answer)| answer).collect())
    }
}

/// The answers that are classes.
pub struct Vocabulary {
    answers: Vec<String>,
    classes: BTreeMap<String, u32>,
}

impl Vocabulary {
    /// Class i is `answers[i]`.
    pub fn new(answers: Vec<String>) -> Self {
        let classes = answers.iter().cloned().zip(0..).collect();
        Vocabulary { answers, classes }
    }

    /// The answers, in the order of their classes.
    pub fn answers(&self) -> &[String] {
        &self.answers
    }

    /// Classes and soft scores of the answers of a question's annotators, each normalised, in the
    /// order in which they were first given; answers outside the vocabulary are dropped.
    pub fn labels<'a>(&self, answers: impl IntoIterator<Item = &'a str>) -> (Vec<u32>, Vec<f32>) {
        let mut counts: Vec<(u32, u32)> = Vec::new();
        for answer in answers {
            let Some(class) = self.classes.get(&normalize(answer)) else {
                continue;
            };
            match counts.iter_mut().find(|(seen, _)| seen == class) {
                Some((_, count)) => *count += 1,
                None => counts.push((*class, 1)),
            }
        }
        let scored = |(class, count)| (class, soft_score(count));
        counts.into_iter().map(scored).unzip()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_the_frequent_answers_in_the_order_of_first_sight() {
        let mut majorities = Majorities::default();
        for (answer, times) in [("Two", 5), ("rare", 8), ("yes", 9), ("2", 4), ("a yes", 1)] {
            (0..times).for_each(|_| majorities.add(answer));
        }
        let vocabulary = majorities.vocabulary();
        assert_eq!(vocabulary.answers(), ["2", "yes"]);
        let labels = vocabulary.labels(["yes", "two", "rare", "Yes!", "2"]);
        assert_eq!(labels, (vec![1, 0], vec![0.6, 0.6]));
    }

    #[test]
    fn quirks_are_kept() {
        assert_eq!(normalize("x, y"), "x y");
        assert_eq!(normalize("x,y"), "x y");
        // A comma between digits removes every mark of the answer, and joins what it stood between.
        assert_eq!(normalize("1,000-2,000"), "10002000");
        assert_eq!(normalize("3.5.b"), "3.5b");
        assert_eq!(normalize(&".".repeat(40)), ".".repeat(8));
        // The table holds this one the wrong way round.
        assert_eq!(normalize("somebody'd"), "somebodyd");
    }
}
