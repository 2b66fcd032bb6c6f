//! Cross-entropies with means inside micro-batches, and their gradient with respect to the logits.
//!
//! The loss is the last thing the device computes and the first thing that must not depend on it:
//! logits come to the host, losses are folded there in f64 in row order, ties go to the lower class,
//! and the gradient goes back as a constant that the backward pass starts from. Price: one copy of
//! the logits (masked tokens x vocabulary) each way. It refuses to know which head made the logits.

use rayon::prelude::*;

/// What the rows of one micro-batch contribute.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct GroupLoss {
    /// Mean over the rows; 0 without rows.
    pub mean: f64,
    /// Rows.
    pub rows: u32,
    /// Rows whose arg-max is their label; of soft labels the sum of the arg-maxes' scores.
    pub score: f64,
}

/// Means per group and, in `logits`, their gradient.
///
/// `logits` is `[rows, classes]` and is overwritten by d(sum of the groups' means)/d(logits);
/// `labels` and `groups` (ascending, below `group_count`) have one element per row.
pub(crate) fn cross_entropy(
    logits: &mut [f32],
    classes: usize,
    labels: &[i32],
    groups: &[usize],
    group_count: usize,
) -> Vec<GroupLoss> {
    by_group(logits, classes, groups, group_count, |i, row, weight| {
        one_class(row, labels[i] as usize, weight)
    })
}

/// As [`cross_entropy`] for soft labels `[rows, classes]`: the binary cross-entropy of every class,
/// summed over classes (model_spec 8, VQA).
pub(crate) fn binary_cross_entropy(
    logits: &mut [f32],
    classes: usize,
    scores: &[f32],
    groups: &[usize],
    group_count: usize,
) -> Vec<GroupLoss> {
    by_group(logits, classes, groups, group_count, |i, row, weight| {
        soft_classes(row, &scores[i * classes..(i + 1) * classes], weight)
    })
}

/// Folds what `one_row(index, logits, weight)` says of each row: its loss and score.
fn by_group(
    logits: &mut [f32],
    classes: usize,
    groups: &[usize],
    group_count: usize,
    one_row: impl Fn(usize, &mut [f32], f64) -> (f64, f64) + Sync,
) -> Vec<GroupLoss> {
    let mut losses = vec![GroupLoss::default(); group_count];
    for group in groups {
        losses[*group].rows += 1;
    }
    // Rows are independent, so threads cannot change a bit.
    let rows: Vec<(f64, f64)> = logits
        .par_chunks_mut(classes)
        .enumerate()
        .map(|(i, row)| one_row(i, row, 1.0 / f64::from(losses[groups[i]].rows)))
        .collect();
    for ((loss, score), group) in rows.into_iter().zip(groups) {
        losses[*group].mean += loss;
        losses[*group].score += score;
    }
    for loss in &mut losses {
        loss.mean /= f64::from(loss.rows.max(1));
    }
    losses
}

/// The class of the largest logit, of several the lowest.
fn arg_max(row: &[f32]) -> usize {
    let mut best = 0;
    for (class, logit) in row.iter().enumerate() {
        if *logit > row[best] {
            best = class;
        }
    }
    best
}

fn soft_classes(row: &mut [f32], scores: &[f32], weight: f64) -> (f64, f64) {
    let score = f64::from(scores[arg_max(row)]);
    let mut loss = 0.0f64;
    for (logit, score) in row.iter_mut().zip(scores) {
        let (z, y) = (f64::from(*logit), f64::from(*score));
        let small = (-z.abs()).exp();
        loss += z.max(0.0) - z * y + small.ln_1p();
        let likely = if z >= 0.0 { 1.0 } else { small } / (1.0 + small);
        *logit = ((likely - y) * weight) as f32;
    }
    (loss, score)
}

fn one_class(row: &mut [f32], label: usize, weight: f64) -> (f64, f64) {
    let best = arg_max(row);
    let shift = row[best];
    let at_label = f64::from(row[label] - shift);
    let mut sum = 0.0f64;
    for logit in row.iter_mut() {
        *logit = (*logit - shift).exp();
        sum += f64::from(*logit);
    }
    let scale = (weight / sum) as f32;
    for value in row.iter_mut() {
        *value *= scale;
    }
    // The label's own term without the cancellation of (p - 1) rounded twice.
    row[label] = ((at_label.exp() / sum - 1.0) * weight) as f32;
    (sum.ln() - at_label, f64::from(u8::from(best == label)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uniform_logits_cost_the_logarithm_of_the_classes() {
        let mut logits = vec![3.0f32; 12];
        let losses = cross_entropy(&mut logits, 4, &[0, 3, 1], &[0, 0, 2], 3);
        assert!((losses[0].mean - 4f64.ln()).abs() < 1e-12);
        assert_eq!(losses[1], GroupLoss::default(), "no rows, no loss, no NaN");
        assert_eq!(
            (losses[0].score, losses[2].score),
            (1.0, 0.0),
            "ties go to the lower class"
        );
        assert_eq!(logits[..4], [-0.375, 0.125, 0.125, 0.125]);
        assert_eq!(logits[8..], [0.25, -0.75, 0.25, 0.25]);
    }

    #[test]
    fn the_gradient_is_the_difference_quotient() {
        let start = [0.3f32, -1.2, 2.0, 0.7, 0.1, -0.4];
        let loss = |logits: &[f32]| {
            let losses = cross_entropy(&mut logits.to_vec(), 3, &[1, 2], &[0, 1], 2);
            losses.iter().map(|l| l.mean).sum::<f64>()
        };
        let mut gradient = start.to_vec();
        cross_entropy(&mut gradient, 3, &[1, 2], &[0, 1], 2);
        for i in 0..6 {
            let (mut up, mut down) = (start, start);
            up[i] += 1e-2;
            down[i] -= 1e-2;
            let slope = (loss(&up) - loss(&down)) / f64::from(up[i] - down[i]);
            assert!(
                (slope - f64::from(gradient[i])).abs() < 5e-5,
                "{i}: {slope} {}",
                gradient[i]
            );
        }
    }

    #[test]
    fn soft_labels_cost_the_sum_over_classes_and_slope_accordingly() {
        let start = [0.3f32, -1.2, 2.0, 0.7, 0.1, -0.4];
        let scores = [0.0, 0.3, 0.9, 1.0, 0.0, 0.0];
        let run = |logits: &mut [f32]| binary_cross_entropy(logits, 3, &scores, &[0, 0], 1)[0];
        let mut gradient = start.to_vec();
        let all = run(&mut gradient);
        let one = |z: f64, y: f64| {
            -y * (1.0 / (1.0 + (-z).exp())).ln() - (1.0 - y) * (1.0 / (1.0 + z.exp())).ln()
        };
        let by_hand = start.iter().zip(&scores);
        let by_hand: f64 = by_hand
            .map(|(z, y)| one(f64::from(*z), f64::from(*y)))
            .sum();
        assert!((all.mean - by_hand / 2.0).abs() < 1e-6);
        assert!((all.score - 1.9).abs() < 1e-6, "{}", all.score);
        for i in 0..6 {
            let (mut up, mut down) = (start, start);
            up[i] += 1e-2;
            down[i] -= 1e-2;
            let width = f64::from(up[i] - down[i]);
            let slope = (run(&mut up.to_vec()).mean - run(&mut down.to_vec()).mean) / width;
            assert!((slope - f64::from(gradient[i])).abs() < 5e-5, "{i}");
        }
    }

    #[test]
    fn huge_logits_stay_finite() {
        let mut logits = vec![1e30f32, -1e30, 0.0];
        let losses = cross_entropy(&mut logits, 3, &[0], &[0], 1);
        assert_eq!(losses[0].mean, 0.0);
        assert!(logits.iter().all(|g| g.is_finite()));
    }
}
