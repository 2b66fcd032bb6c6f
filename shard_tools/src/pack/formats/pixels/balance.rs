//! As many of every label as of the rarest: a model that looks at the text alone then guesses.

use std::collections::BTreeMap;

use crate::manifest::sha256;

/// One that may be asked.
pub struct Candidate<T> {
    /// The label.
    pub label: u32,
    /// Names it among those of one question, and decides by its hash whether it stays.
    pub name: String,
    /// What is asked.
    pub value: T,
}

/// Of each of `labels` as many as of the rarest, and how many that leaves out. The names' hashes
/// choose, so that neither the order nor the number of the others decides who comes first.
pub fn balanced<T>(candidates: Vec<Candidate<T>>, labels: &[u32]) -> (Vec<T>, u64) {
    let all = candidates.len();
    let mut by_label: BTreeMap<u32, Vec<(String, T)>> = BTreeMap::new();
    for candidate in candidates {
        let hash = sha256(candidate.name.as_bytes());
        let same = by_label.entry(candidate.label).or_default();
        same.push((hash, candidate.value));
    }
    let count = |label: &u32| by_label.get(label).map_or(0, Vec::len);
    let each = labels.iter().map(count).min().unwrap_or(0);
    let mut kept = Vec::with_capacity(each * labels.len());
    for (label, mut same) in by_label {
        if labels.contains(&label) {
            same.sort_by(|a, b| a.0.cmp(&b.0));
            kept.extend(same.into_iter().take(each).map(|(_, value)| value));
        }
    }
    let left_out = (all - kept.len()) as u64;
    (kept, left_out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rarest_label_decides_and_the_order_does_not() {
        let candidates = |numbers: &[u32]| {
            let one = |n: &u32| Candidate {
                label: u32::from(n.is_multiple_of(4)),
                name: format!("picture {n}"),
                value: *n,
            };
            numbers.iter().map(one).collect::<Vec<_>>()
        };
        let forth: Vec<u32> = (0..20).collect();
        let back: Vec<u32> = (0..20).rev().collect();
        let (mut kept, left_out) = balanced(candidates(&forth), &[0, 1]);
        let (mut again, _) = balanced(candidates(&back), &[0, 1]);
        kept.sort_unstable();
        again.sort_unstable();
        assert_eq!((kept.len(), left_out), (10, 10));
        assert_eq!(kept, again);
        assert_eq!(kept.iter().filter(|n| *n % 4 == 0).count(), 5);
        let (none, left_out) = balanced(candidates(&[1, 2, 3]), &[0, 1]);
        assert_eq!(
            (none.len(), left_out),
            (0, 3),
            "a label without a picture is not asked for"
        );
    }
}
