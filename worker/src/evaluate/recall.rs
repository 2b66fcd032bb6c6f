//! Which texts and images are worth a fusion pass, and recalls from what it said (model_spec 14).
//!
//! Pure: scores in, places and shares out; ties go to the lower index. It refuses to know where
//! scores come from.

use super::tally::Figure;

/// What a pair has that was not scored.
pub const UNSCORED: f32 = -100.0;
/// The k of recall@k.
const RANKS: [usize; 3] = [1, 5, 10];

/// Scores of all images against all texts, `[images, texts]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Scores {
    texts: usize,
    values: Vec<f32>,
}

impl Scores {
    /// No pair is scored.
    pub fn unscored(images: usize, texts: usize) -> Self {
        Scores {
            texts,
            values: vec![UNSCORED; images * texts],
        }
    }

    /// Given ones, row-major.
    pub fn of(texts: usize, values: Vec<f32>) -> Self {
        Scores { texts, values }
    }

    /// Scores a pair.
    pub fn set(&mut self, image: usize, text: usize, score: f32) {
        self.values[image * self.texts + text] = score;
    }

    /// The larger one of both, element by element.
    pub fn max(mut self, other: &Scores) -> Self {
        let pairs = self.values.iter_mut().zip(&other.values);
        pairs.for_each(|(own, other)| *own = own.max(*other));
        self
    }

    /// Row-major values.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// IR@1, 5, 10, TR@1, 5, 10 and the mean of the six. IR@k: share of texts whose image is among
    /// their k best images; TR@k: share of images among whose k best texts one belongs to them.
    /// `image_of_text` tells each text's image.
    pub fn recalls(&self, image_of_text: &[u32]) -> Vec<Figure> {
        let images = self.values.len() / self.texts.max(1);
        // The best place that any of an image's texts has in the image's row.
        let mut best_of_image = vec![usize::MAX; images];
        let mut found_texts = [0usize; 3];
        for (text, image) in image_of_text.iter().enumerate() {
            let image = *image as usize;
            let column = (0..images).map(|i| self.values[i * self.texts + text]);
            let place = place(column, image);
            for (found, k) in found_texts.iter_mut().zip(RANKS) {
                *found += usize::from(place < k);
            }
            let row = &self.values[image * self.texts..][..self.texts];
            let in_row = self::place(row.iter().copied(), text);
            best_of_image[image] = best_of_image[image].min(in_row);
        }
        let share = |found: usize, all: usize| found as f64 / all.max(1) as f64;
        let within = |k: usize| best_of_image.iter().filter(|place| **place < k).count();
        let ir = RANKS.iter().zip(found_texts);
        let ir = ir.map(|(k, found)| (format!("ir{k}"), share(found, image_of_text.len())));
        let tr = RANKS
            .iter()
            .map(|k| (format!("tr{k}"), share(within(*k), images)));
        let mut all: Vec<(String, f64)> = ir.chain(tr).collect();
        let mean = all.iter().map(|(_, value)| value).sum::<f64>() / all.len() as f64;
        all.push(("r_mean".into(), mean));
        let figure = |(name, value)| Figure { name, value };
        all.into_iter().map(figure).collect()
    }
}

/// How many come before element `own`: larger ones, and equal ones of a lower index.
fn place(scores: impl Iterator<Item = f32> + Clone, own: usize) -> usize {
    let mine = scores.clone().nth(own).unwrap_or(UNSCORED);
    let before = |(index, score): &(usize, f32)| *score > mine || (*score == mine && *index < own);
    scores.enumerate().filter(before).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn recalls_are_counted_by_hand() {
        // Two images; texts 0 and 1 belong to the first, 2 to the second.
        let scores = Scores::of(3, vec![0.1, 0.9, 0.5, 0.8, 0.2, 0.5]);
        let figures = scores.recalls(&[0, 0, 1]);
        let value = |name: &str| {
            let found = figures.iter().find(|f| f.name == name);
            found.expect("is there").value
        };
        // Text 0 prefers the wrong image, text 1 its own; text 2 ties, and the lower image wins.
        assert_eq!(value("ir1"), 1.0 / 3.0);
        assert_eq!(value("ir5"), 1.0);
        // The first image's best text is its own; the second's is not.
        assert_eq!(value("tr1"), 0.5);
        assert_eq!(value("tr5"), 1.0);
        let mean = (1.0 / 3.0 + 0.5 + 4.0) / 6.0;
        assert!((value("r_mean") - mean).abs() < 1e-15);
    }

    #[test]
    fn both_ways_of_scoring_are_joined_by_the_larger() {
        let (mut rows, mut columns) = (Scores::unscored(2, 2), Scores::unscored(2, 2));
        rows.set(0, 1, -3.0);
        columns.set(0, 1, -2.0);
        columns.set(1, 0, 4.0);
        let both = rows.max(&columns);
        assert_eq!(both.values(), [UNSCORED, -2.0, 4.0, UNSCORED]);
    }

    proptest! {
        /// Against a full sort of every row and column.
        #[test]
        fn recalls_are_those_of_a_sort(
            images in 1usize..8,
            seeds in prop::collection::vec(0u8..6, 8 * 20),
            texts in prop::collection::vec(0u32..8, 1..20),
        ) {
            let image_of_text: Vec<u32> = texts.iter().map(|i| i % images as u32).collect();
            let count = image_of_text.len();
            let values: Vec<f32> = seeds[..images * count].iter().map(|v| f32::from(*v)).collect();
            let figures = Scores::of(count, values.clone()).recalls(&image_of_text);
            let sorted = |mut all: Vec<(usize, f32)>| {
                all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                all.into_iter().map(|(index, _)| index).collect::<Vec<usize>>()
            };
            for (nth, k) in RANKS.into_iter().enumerate() {
                let of_text = |text: usize| {
                    let column = (0..images).map(|i| (i, values[i * count + text])).collect();
                    sorted(column).iter().take(k).any(|i| *i == image_of_text[text] as usize)
                };
                let of_image = |image: usize| {
                    let row = (0..count).map(|t| (t, values[image * count + t])).collect();
                    sorted(row).iter().take(k).any(|t| image_of_text[*t] as usize == image)
                };
                let ir = (0..count).filter(|t| of_text(*t)).count() as f64 / count as f64;
                let tr = (0..images).filter(|i| of_image(*i)).count() as f64 / images as f64;
                prop_assert_eq!(figures[nth].value, ir);
                prop_assert_eq!(figures[3 + nth].value, tr);
            }
        }
    }
}
