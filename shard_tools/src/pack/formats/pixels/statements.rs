//! `pixels-nlvr2`: statements that compare two pictures.
//!
//! In each of several rounds the pictures stand in a ring, ordered by hash, and each is compared with
//! the next. Of both directions of a comparison one is true and one is false: as many statements are
//! true as false, and every word is in both.

use std::collections::BTreeSet;

use super::scale;
use super::{NEAR, Picture, leave_out};
use crate::manifest::sha256;
use crate::pack::catalog::{Catalog, Description, Texts};
use crate::pair::Pair;

/// Rings: so often each picture stands left, and so often right.
const ROUNDS: u32 = 4;
const SIDES: [&str; 2] = ["left", "right"];

/// Every statement that two pictures decide clearly.
pub(super) fn describe(catalog: &mut Catalog, pictures: &[Picture]) {
    let mut seen = BTreeSet::new();
    for round in 0..ROUNDS {
        let mut ring: Vec<&Picture> = pictures.iter().collect();
        ring.sort_by_cached_key(|picture| sha256(format!("{round}/{}", picture.key).as_bytes()));
        let next = ring.iter().cycle().skip(1);
        for (left, right) in ring.iter().zip(next) {
            if left.key == right.key || !seen.insert((&left.key, &right.key)) {
                continue;
            }
            compare(catalog, left, right);
        }
    }
}

fn compare(catalog: &mut Catalog, left: &Picture, right: &Picture) {
    let key = format!("{}--{}", left.key, right.key);
    let mut pairs = Vec::new();
    let mut near = 0;
    for ((measure, of_left), (_, of_right)) in left.places().zip(right.places()) {
        let Some([less, more]) = measure.words().than else {
            continue;
        };
        let Some(left_is_more) = scale::more(of_left, of_right) else {
            near += 1;
            continue;
        };
        // Both directions, in words that each pair chooses anew.
        let by_hash = sha256(format!("{key}/{measure:?}").as_bytes()).as_bytes()[0];
        let (word, more) = if by_hash.is_multiple_of(2) {
            (more, true)
        } else {
            (less, false)
        };
        for side in 0..2 {
            let is_more = left_is_more == (side == 0);
            pairs.push(Pair {
                text: statement(side, word),
                id: Some(format!("{key}-{}", pairs.len())),
                labels: vec![u32::from(is_more == more)],
                scores: Vec::new(),
            });
        }
    }
    leave_out(catalog, NEAR, near);
    if pairs.is_empty() {
        return;
    }
    catalog.push(&Description {
        key,
        images: vec![left.image(), right.image()],
        texts: Texts::Pairs(pairs),
        record: None,
    });
}

fn statement(side: usize, word: &str) -> String {
    let (one, other) = (SIDES[side], SIDES[1 - side]);
    format!("The {one} picture is {word} than the {other} one.")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pair::Contents;

    #[test]
    fn half_of_the_statements_is_true_and_each_says_what_is() {
        let of = |number: u64| Picture {
            number,
            key: format!("p{number}"),
            file: format!("p{number}.jpg"),
            places: [number as f64 / 13.0; 5],
        };
        let pictures: Vec<Picture> = (1..=12).map(of).collect();
        let mut catalog = Catalog::new("in", Contents::Nlvr2);
        describe(&mut catalog, &pictures);
        assert!(catalog.len() > 20, "{} pairs of pictures", catalog.len());
        let (mut said, mut truths, mut words) = (0, 0, BTreeSet::new());
        for index in 0..catalog.len() {
            let found = catalog.get(index);
            let (left, right) = found.key.split_once("--").expect("two pictures");
            let number = |key: &str| key[1..].parse::<i32>().expect("a number");
            assert_eq!(found.images.len(), 2);
            let Texts::Pairs(pairs) = found.texts else {
                panic!("statements have labels")
            };
            for pair in pairs {
                let more = ["brighter", "warmer", "more vivid", "starker"];
                let says_more = more.iter().any(|word| pair.text.contains(word));
                let first_is_left = pair.text.starts_with("The left");
                let left_is_more = number(left) > number(right);
                let truth = says_more == (left_is_more == first_is_left);
                assert_eq!(
                    pair.labels,
                    [u32::from(truth)],
                    "{} of {}",
                    pair.text,
                    found.key
                );
                said += 1;
                truths += u32::from(truth);
                words.insert(pair.text);
            }
        }
        assert_eq!(2 * truths, said);
        assert_eq!(words.len(), 16, "every word of both sides: {words:?}");
    }
}
