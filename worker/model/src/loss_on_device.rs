//! The losses of `loss`, computed where the logits are.
//!
//! On a GPU the logits of the vocabulary are too many to cross to the host in every device batch,
//! and reading them would stop the device until the host has answered. Here a row's loss, its score
//! and the gradient of its logits stay on the device, and only one loss and one score per row cross,
//! whenever somebody asks. Ties go to the lower class, as on the host.

use burn::tensor::{DType, Int, Tensor, TensorData, activation};

/// What the rows of logits say on the device.
pub(crate) struct Rows {
    /// Loss and score of each row, `[rows, 2]`.
    pub said: Tensor<2>,
    /// d(sum of weighted losses)/d(logits), `[rows, classes]`.
    pub slopes: Tensor<2>,
}

/// Cross-entropy against one class per row. `weights` multiply the rows' gradients.
///
/// # Shapes
/// logits `[rows, classes]`, labels and weights `[rows]`
pub(crate) fn cross_entropy(logits: Tensor<2>, labels: &[i32], weights: &[f32]) -> Rows {
    let device = logits.device();
    let [rows, classes] = logits.dims();
    let labels = TensorData::new(labels.to_vec(), [rows, 1]);
    let labels = Tensor::<2, Int>::from_data(labels, &device);
    let max = logits.clone().max_dim(1);
    let shifted = logits.clone() - max.clone();
    let exp = shifted.clone().exp();
    let sum = exp.clone().sum_dim(1);
    let loss = sum.clone().log() - shifted.gather(1, labels.clone());
    let numbers = numbers(classes, &device);
    let score = first_largest(logits, max, &numbers).equal(labels.clone());
    let at_label = numbers.equal(labels).float().cast(DType::F32);
    let slopes = (exp / sum - at_label) * column(weights, &device);
    Rows {
        said: Tensor::cat(vec![loss, score.float().cast(DType::F32)], 1),
        slopes,
    }
}

/// Binary cross-entropy of every class against soft labels, summed over classes.
///
/// # Shapes
/// logits and scores `[rows, classes]`, weights `[rows]`
pub(crate) fn binary_cross_entropy(logits: Tensor<2>, scores: &[f32], weights: &[f32]) -> Rows {
    let device = logits.device();
    let [rows, classes] = logits.dims();
    let scores = Tensor::from_data(TensorData::new(scores.to_vec(), [rows, classes]), &device);
    let positive = activation::relu(logits.clone());
    let small = logits.clone().abs().neg().exp().log1p();
    let loss = (positive - logits.clone() * scores.clone() + small).sum_dim(1);
    let max = logits.clone().max_dim(1);
    let best = first_largest(logits.clone(), max, &numbers(classes, &device));
    let slopes = (activation::sigmoid(logits) - scores.clone()) * column(weights, &device);
    Rows {
        said: Tensor::cat(vec![loss, scores.gather(1, best)], 1),
        slopes,
    }
}

/// The classes' numbers, `[1, classes]`.
fn numbers(classes: usize, device: &burn::tensor::Device) -> Tensor<2, Int> {
    let numbers: Vec<i32> = (0..classes as i32).collect();
    Tensor::from_data(TensorData::new(numbers, [1, classes]), device)
}

/// The lowest class that reaches the row's maximum, `[rows, 1]`.
fn first_largest(logits: Tensor<2>, max: Tensor<2>, numbers: &Tensor<2, Int>) -> Tensor<2, Int> {
    let [rows, classes] = logits.dims();
    let smaller = logits.lower(max.expand([rows, classes]));
    let numbers = numbers.clone().expand([rows, classes]);
    numbers.mask_fill(smaller, classes as i32 - 1).min_dim(1)
}

fn column(values: &[f32], device: &burn::tensor::Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len(), 1]), device)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loss;
    use crate::weights::read;
    use burn::tensor::Device;

    const CLASSES: usize = 5;
    const GROUPS: [usize; 4] = [0, 0, 0, 1];

    fn logits() -> Vec<f32> {
        let mut logits: Vec<f32> = (0..20).map(|i| ((i * 7) % 11) as f32 * 0.5 - 2.0).collect();
        // A tie, which the lower class wins.
        logits[6] = 4.0;
        logits[8] = 4.0;
        logits
    }

    fn near(ours: &[f32], theirs: &[f32]) {
        assert_eq!(ours.len(), theirs.len());
        for (a, b) in ours.iter().zip(theirs) {
            assert!((a - b).abs() < 1e-6, "{a} {b}");
        }
    }

    fn check(rows: Rows, host: &[loss::GroupLoss], slopes: &[f32]) {
        near(&read(rows.slopes, "slopes").unwrap(), slopes);
        let said = read(rows.said, "losses").unwrap();
        for (group, host) in host.iter().enumerate() {
            let mine = (0..4).filter(|row| GROUPS[*row] == group);
            let (mut loss, mut score) = (0.0f64, 0.0f64);
            for row in mine {
                loss += f64::from(said[2 * row]) / f64::from(host.rows);
                score += f64::from(said[2 * row + 1]);
            }
            assert!((loss - host.mean).abs() < 1e-6, "{loss} {}", host.mean);
            assert!((score - host.score).abs() < 1e-6, "{score} {}", host.score);
        }
    }

    #[test]
    fn device_and_host_say_the_same() {
        let tensor = || {
            let data = TensorData::new(logits(), [4, CLASSES]);
            Tensor::<2>::from_data(data, &Device::flex())
        };
        let weights = [1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0, 1.0];
        let labels = [2, 1, 0, 4];
        let mut slopes = logits();
        let host = loss::cross_entropy(&mut slopes, CLASSES, &labels, &GROUPS, 2);
        check(cross_entropy(tensor(), &labels, &weights), &host, &slopes);
        let scores: Vec<f32> = (0..20).map(|i| (i % 4) as f32 * 0.3).collect();
        let mut slopes = logits();
        let host = loss::binary_cross_entropy(&mut slopes, CLASSES, &scores, &GROUPS, 2);
        let rows = binary_cross_entropy(tensor(), &scores, &weights);
        check(rows, &host, &slopes);
    }
}
