//! Numbers of a picture that words can be said about. They are sums of 8-bit pixels, so every
//! machine measures the same; what is much and what is little, only other pictures tell.

use image::RgbImage;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Measure {
    /// Mean luma.
    Light,
    /// Mean red less mean blue.
    Warmth,
    /// Mean distance between a pixel's largest and smallest channel.
    Colour,
    /// Standard deviation of luma.
    Contrast,
    /// Mean luma of the upper half less that of the lower half.
    Upper,
}

/// How a measure is put into words.
pub struct Words {
    /// Answers for little, for what lies between, and for much.
    pub answers: [&'static str; 3],
    /// The question between little and much.
    pub choice: &'static str,
    /// The question with all three answers.
    pub how: &'static str,
    /// Whether it is much.
    pub asks: &'static str,
    /// That it is much.
    pub says: &'static str,
    /// More of it, of two pictures; none where two pictures are hard to compare in words.
    pub more: Option<&'static str>,
}

impl Measure {
    /// All of them, in the order in which pictures are described.
    pub const ALL: [Measure; 5] = [
        Measure::Light,
        Measure::Warmth,
        Measure::Colour,
        Measure::Contrast,
        Measure::Upper,
    ];

    /// Whether it is a difference whose sign says which side has more; of others the pictures' middle
    /// decides.
    pub fn is_signed(self) -> bool {
        self == Measure::Upper
    }

    /// Its words.
    pub fn words(self) -> &'static Words {
        match self {
            Measure::Light => &LIGHT,
            Measure::Warmth => &WARMTH,
            Measure::Colour => &COLOUR,
            Measure::Contrast => &CONTRAST,
            Measure::Upper => &UPPER,
        }
    }
}

const LIGHT: Words = Words {
    answers: ["dark", "medium", "bright"],
    choice: "is the picture dark or bright?",
    how: "how bright is the picture?",
    asks: "is the picture bright?",
    says: "The picture is bright.",
    more: Some("brighter"),
};
const WARMTH: Words = Words {
    answers: ["cold", "neutral", "warm"],
    choice: "are the colours cold or warm?",
    how: "how warm are the colours?",
    asks: "are the colours warm?",
    says: "The colours are warm.",
    more: Some("warmer"),
};
const COLOUR: Words = Words {
    answers: ["pale", "muted", "vivid"],
    choice: "is the picture pale or vivid?",
    how: "how vivid is the picture?",
    asks: "is the picture vivid?",
    says: "The picture is vivid.",
    more: Some("more vivid"),
};
const CONTRAST: Words = Words {
    answers: ["flat", "even", "stark"],
    choice: "is the contrast flat or stark?",
    how: "how stark is the contrast?",
    asks: "is the contrast stark?",
    says: "The contrast is stark.",
    more: Some("starker"),
};
const UPPER: Words = Words {
    answers: ["bottom", "neither", "top"],
    choice: "is the bottom or the top brighter?",
    how: "which half is brighter?",
    asks: "is the top half brighter?",
    says: "The top half is brighter.",
    more: None,
};

/// A thousandfold luma (ITU-R BT.601), which keeps sums whole.
fn luma([r, g, b]: [u8; 3]) -> u64 {
    299 * u64::from(r) + 587 * u64::from(g) + 114 * u64::from(b)
}

/// Sums over some pixels.
#[derive(Default)]
struct Sums {
    pixels: u64,
    luma: u64,
    luma_squared: u128,
    red: u64,
    blue: u64,
    chroma: u64,
}

impl Sums {
    fn add(&mut self, pixel: [u8; 3]) {
        let light = luma(pixel);
        let [r, g, b] = pixel;
        self.pixels += 1;
        self.luma += light;
        self.luma_squared += u128::from(light * light);
        self.red += u64::from(r);
        self.blue += u64::from(b);
        self.chroma += u64::from(r.max(g).max(b) - r.min(g).min(b));
    }

    fn mean(&self, sum: u64) -> f64 {
        sum as f64 / self.pixels.max(1) as f64
    }

    /// n² times the variance of luma is a whole number; only its root is rounded.
    fn deviation(&self) -> f64 {
        let (n, sum) = (u128::from(self.pixels), u128::from(self.luma));
        let spread = n * self.luma_squared - sum * sum;
        (spread as f64).sqrt() / self.pixels.max(1) as f64
    }
}

/// What `picture` measures, in [`Measure::ALL`]'s order; luma in thousandths of 0..=255.
pub fn measure(picture: &RgbImage) -> [f64; 5] {
    let (mut all, mut upper, mut lower) = (Sums::default(), Sums::default(), Sums::default());
    let height = picture.height();
    for (_, y, pixel) in picture.enumerate_pixels() {
        all.add(pixel.0);
        // The middle row of an odd height belongs to neither half.
        if y < height / 2 {
            upper.add(pixel.0);
        } else if y >= height.div_ceil(2) {
            lower.add(pixel.0);
        }
    }
    [
        all.mean(all.luma),
        all.mean(all.red) - all.mean(all.blue),
        all.mean(all.chroma),
        all.deviation(),
        upper.mean(upper.luma) - lower.mean(lower.luma),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_pixels() {
        let rows = [[200u8, 100, 0], [0, 0, 0], [0, 100, 200]];
        let picture = RgbImage::from_fn(2, 3, |_, y| image::Rgb(rows[y as usize]));
        let [light, warmth, colour, contrast, upper] = measure(&picture);
        // 0.299·200 + 0.587·100 and 0.587·100 + 0.114·200, in thousandths.
        let (first, last) = (118_500.0, 81_500.0);
        assert_eq!(light, (first + last) / 3.0);
        assert_eq!((warmth, colour), (0.0, 400.0 / 3.0));
        assert_eq!(upper, first - last);
        let mean = light;
        let variance = ((first - mean).powi(2) + mean * mean + (last - mean).powi(2)) / 3.0;
        assert!((contrast - variance.sqrt()).abs() < 1e-6, "{contrast}");
        let red = RgbImage::from_pixel(1, 1, image::Rgb([255, 0, 0]));
        // One row has no lower half to be compared with.
        assert_eq!(measure(&red), [76_245.0, 255.0, 255.0, 0.0, 0.0]);
    }

    #[test]
    fn no_two_answers_are_one_word() {
        let words = Measure::ALL.map(|measure| measure.words().answers);
        let mut all = words.concat();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 3 * Measure::ALL.len());
    }
}
