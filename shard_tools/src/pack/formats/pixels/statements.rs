//! `pixels-nlvr2`: statements that compare two pictures.
//!
//! In each of several rounds the pictures stand in a ring, ordered by hash, and each is compared with
//! the next. What is true of two pictures is false once they change sides, and both are packed: as many
//! statements are true as false, of every word.

use std::collections::BTreeSet;

use super::scale;
use super::{NEAR, Picture, leave_out};
use crate::manifest::sha256;
use crate::pack::catalog::{Catalog, Description, Texts};
use crate::pair::Pair;

/// Rings: so often each picture meets two others.
const ROUNDS: u32 = 4;

/// Every statement that two pictures decide clearly.
pub(super) fn describe(catalog: &mut Catalog, pictures: &[Picture]) {
    let mut met = BTreeSet::new();
    for round in 0..ROUNDS {
        let mut ring: Vec<&Picture> = pictures.iter().collect();
        ring.sort_by_cached_key(|picture| sha256(format!("{round}/{}", picture.key).as_bytes()));
        let next = ring.iter().cycle().skip(1);
        for (one, other) in ring.iter().zip(next) {
            let pair = [&one.key, &other.key];
            let [low, high] = [pair.iter().min(), pair.iter().max()];
            if one.key == other.key || !met.insert((low.copied(), high.copied())) {
                continue;
            }
            compare(catalog, one, other);
            compare(catalog, other, one);
        }
    }
}

fn compare(catalog: &mut Catalog, left: &Picture, right: &Picture) {
    let key = format!("{}--{}", left.key, right.key);
    let mut pairs = Vec::new();
    let mut near = 0;
    for ((measure, of_left), (_, of_right)) in left.places().zip(right.places()) {
        let Some(more) = measure.words().more else {
            continue;
        };
        let Some(left_is_more) = scale::more(of_left, of_right) else {
            near += 1;
            continue;
        };
        pairs.push(Pair {
            text: format!("The left picture is {more} than the right one."),
            id: Some(format!("{key}-{}", pairs.len())),
            labels: vec![u32::from(left_is_more)],
            scores: Vec::new(),
        });
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
        let mut said = std::collections::BTreeMap::new();
        for index in 0..catalog.len() {
            let found = catalog.get(index);
            let (left, right) = found.key.split_once("--").expect("two pictures");
            let number = |key: &str| key[1..].parse::<i32>().expect("a number");
            assert_eq!(found.images.len(), 2);
            let Texts::Pairs(pairs) = found.texts else {
                panic!("statements have labels")
            };
            for pair in pairs {
                let truth = number(left) > number(right);
                assert_eq!(
                    pair.labels,
                    [u32::from(truth)],
                    "{} of {}",
                    pair.text,
                    found.key
                );
                said.entry(pair.text).or_insert([0, 0])[usize::from(truth)] += 1;
            }
        }
        assert_eq!(said.len(), 4, "every word: {said:?}");
        for (text, [no, yes]) in said {
            assert!(yes > 5 && yes == no, "{text}: {no} false, {yes} true");
        }
    }
}
