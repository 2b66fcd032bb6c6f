//! Where a picture stands among the others, and which words that allows.
//!
//! A picture's place is the share of pictures that measure less. The lower third is little, the upper
//! third is much; what lies between is neither. Of a difference the sign decides: the third that
//! differs least is neither.

/// So near to the line between two words neither is said for certain.
pub const MARGIN: f64 = 0.05;
/// Of two pictures the one is more only when so many others stand between them.
pub const APART: f64 = 0.2;
/// Annotators of a question, as VQAv2 has them.
const ANNOTATORS: usize = 10;
/// The lines between little, neither and much.
const LINES: [f64; 2] = [1.0 / 3.0, 2.0 / 3.0];

/// How much of a measure a picture has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// The lower third.
    Little,
    /// What lies between.
    Between,
    /// The upper third.
    Much,
}

impl Level {
    /// Its place among three answers.
    pub fn index(self) -> usize {
        self as usize
    }
}

/// Places of `values` among each other, in 0..1; equal ones stand at one place. Of `signed` ones
/// those below 0 stand below the middle.
pub fn places(values: &[f64], signed: bool) -> Vec<f64> {
    let size = |value: f64| if signed { value.abs() } else { value };
    let mut sorted: Vec<f64> = values.iter().copied().map(size).collect();
    sorted.sort_by(f64::total_cmp);
    let place = |value: f64| {
        let less = sorted.partition_point(|other| *other < value);
        let to = sorted.partition_point(|other| *other <= value);
        (less + to) as f64 / (2 * sorted.len()) as f64
    };
    let stands = |value: &f64| match (signed, *value) {
        (false, value) => place(value),
        (true, 0.0) => 0.5,
        (true, value) => 0.5 + 0.5 * value.signum() * place(value.abs()),
    };
    values.iter().map(stands).collect()
}

/// The level at `place`.
pub fn level(place: f64) -> Level {
    match LINES.map(|line| place >= line) {
        [false, _] => Level::Little,
        [true, false] => Level::Between,
        [true, true] => Level::Much,
    }
}

/// The level, where no line is near.
pub fn clear(place: f64) -> Option<Level> {
    let near = LINES.iter().any(|line| (place - line).abs() < MARGIN);
    (!near).then(|| level(place))
}

/// What ten annotators would say at `place`: near a line up to three of them say what lies beyond.
pub fn said(place: f64) -> Vec<Level> {
    let own = level(place);
    let mut said = vec![own; ANNOTATORS];
    let near = LINES.map(|line| (line, (place - line).abs()));
    let Some((line, away)) = near.into_iter().find(|(_, away)| *away < MARGIN) else {
        return said;
    };
    let other = match (own, line == LINES[0]) {
        (Level::Between, true) => Level::Little,
        (Level::Between, false) => Level::Much,
        _ => Level::Between,
    };
    let others = match away / MARGIN {
        close if close < 1.0 / 3.0 => 3,
        close if close < 2.0 / 3.0 => 2,
        _ => 1,
    };
    said[ANNOTATORS - others..].fill(other);
    said
}

/// Which of two places is higher, where they are far enough apart.
pub fn more(left: f64, right: f64) -> Option<bool> {
    ((left - right).abs() >= APART).then_some(left > right)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_stand_at_one_place_and_signs_part_a_difference() {
        assert_eq!(
            places(&[5.0, 1.0, 5.0, 9.0], false),
            [0.5, 0.125, 0.5, 0.875]
        );
        let signed = places(&[-4.0, 1.0, 0.0, 2.0], true);
        assert_eq!(signed, [0.5 - 0.4375, 0.5 + 0.1875, 0.5, 0.5 + 0.3125]);
        assert_eq!(
            levels(&signed),
            [Level::Little, Level::Much, Level::Between, Level::Much]
        );
    }

    fn levels(places: &[f64]) -> Vec<Level> {
        places.iter().map(|place| level(*place)).collect()
    }

    #[test]
    fn a_third_of_the_pictures_has_each_level() {
        let values: Vec<f64> = (0..30).map(f64::from).collect();
        let levels = levels(&places(&values, false));
        for (index, expected) in [Level::Little, Level::Between, Level::Much]
            .iter()
            .enumerate()
        {
            let third = &levels[10 * index..10 * index + 10];
            assert!(third.iter().all(|level| level == expected), "{third:?}");
        }
    }

    #[test]
    fn near_a_line_nothing_is_certain() {
        assert_eq!(clear(0.1), Some(Level::Little));
        assert_eq!(clear(0.5), Some(Level::Between));
        assert_eq!(clear(0.9), Some(Level::Much));
        assert_eq!((clear(0.3), clear(0.36), clear(0.7)), (None, None, None));
        let others = |place: f64, own: Level| said(place).iter().filter(|l| **l != own).count();
        assert_eq!(others(0.1, Level::Little), 0);
        assert_eq!(others(0.33, Level::Little), 3);
        assert_eq!(others(0.31, Level::Little), 2);
        assert_eq!(others(0.29, Level::Little), 1);
        assert_eq!(said(0.34)[9], Level::Little);
        assert_eq!(said(0.66)[9], Level::Much);
        assert_eq!(said(0.67)[9], Level::Between);
        assert_eq!(
            (more(0.5, 0.4), more(0.5, 0.2), more(0.1, 0.6)),
            (None, Some(true), Some(false))
        );
    }
}
