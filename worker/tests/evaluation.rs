//! The evaluator's arithmetic against what the authors' code made of the same numbers: recalls of a
//! score matrix, VQA's soft score and loss, accuracy.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use belfry_model::{Labels, judge_rows};
use belfry_worker::evaluate::{Figure, Part, Scores, Tally};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// The folder in `BELFRY_GOLDEN_DIR`, the whole set beside the repository, or the repository's.
fn golden() -> PathBuf {
    let house = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    if let Ok(folder) = std::env::var("BELFRY_GOLDEN_DIR") {
        let from_house = house.join(&folder);
        return if from_house.is_dir() {
            from_house
        } else {
            folder.into()
        };
    }
    let whole = house.join("../shared/golden");
    if whole.is_dir() {
        return whole;
    }
    house.join("tests/golden")
}

struct Array {
    shape: Vec<usize>,
    values: Vec<f64>,
}

impl Array {
    fn f32(&self) -> Vec<f32> {
        self.values.iter().map(|v| *v as f32).collect()
    }
}

fn arrays(name: &str) -> BTreeMap<String, Array> {
    let file = golden().join(format!("{name}.safetensors"));
    let bytes = std::fs::read(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let tensors = SafeTensors::deserialize(&bytes).expect("is whole");
    let array = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        let data = view.data();
        let values = match view.dtype() {
            Dtype::F32 => {
                let (words, _) = data.as_chunks::<4>();
                words
                    .iter()
                    .map(|w| f32::from_le_bytes(*w).into())
                    .collect()
            }
            Dtype::I64 => {
                let (words, _) = data.as_chunks::<8>();
                words
                    .iter()
                    .map(|w| i64::from_le_bytes(*w) as f64)
                    .collect()
            }
            other => panic!("{name}: {other:?}"),
        };
        let shape = view.shape().to_vec();
        (name, Array { shape, values })
    };
    tensors.tensors().into_iter().map(array).collect()
}

fn value(figures: &[Figure], name: &str) -> f64 {
    let found = figures.iter().find(|figure| figure.name == name);
    found
        .unwrap_or_else(|| panic!("no {name} in {figures:?}"))
        .value
}

#[test]
fn recalls_are_the_authors() {
    let arrays = arrays("recall");
    let text = std::fs::read(golden().join("recall.json")).expect("is there");
    let expected: Value = serde_json::from_slice(&text).expect("is JSON");
    let scores = &arrays["scores"];
    let images = &arrays["image_ids"].values;
    let image_of_text: Vec<u32> = arrays["text_image_ids"]
        .values
        .iter()
        .map(|id| images.iter().position(|i| i == id).expect("an image") as u32)
        .collect();
    let figures = Scores::of(scores.shape[1], scores.f32()).recalls(&image_of_text);
    for (ours, theirs) in [
        ("ir1", "ir_r1"),
        ("ir5", "ir_r5"),
        ("ir10", "ir_r10"),
        ("tr1", "tr_r1"),
        ("tr5", "tr_r5"),
        ("tr10", "tr_r10"),
        ("r_mean", "r_mean"),
    ] {
        let theirs = expected[theirs].as_f64().expect("a number");
        let ours = value(&figures, ours);
        assert!((ours - theirs).abs() < 1e-6, "{ours} {theirs}");
    }
}

#[test]
fn the_soft_score_the_loss_and_the_accuracy_are_the_authors() {
    let arrays = arrays("vqa_metric");
    let logits = arrays["logits"].f32();
    let classes = arrays["logits"].shape[1];
    let part = [Part {
        dataset: 0,
        source: 0,
        name: "val".into(),
    }];
    let figures = |objective: &str, labels: &Labels| {
        let mut tally = Tally::default();
        for row in judge_rows(&logits, classes, labels).expect("fits") {
            let sum = tally.sum(objective, 0);
            sum.add_loss(row.loss);
            sum.add_score(row.score);
        }
        tally.figures(&[objective], &part)
    };
    let soft = figures("vqa", &Labels::Scores(arrays["targets"].f32()));
    let near = |ours: f64, theirs: &str| {
        let theirs = arrays[theirs].values[0];
        assert!(
            (ours - theirs).abs() < 1e-5 * theirs.abs().max(1.0),
            "{ours} {theirs}"
        );
    };
    near(value(&soft, "vqa_score"), "vqa_score");
    near(value(&soft, "vqa_loss"), "bce_loss_times_labels");
    let labels = arrays["acc_labels"].values.iter().map(|v| *v as i32);
    // The authors leave out rows of label -100.
    let (kept, labels): (Vec<usize>, Vec<i32>) =
        labels.enumerate().filter(|(_, l)| *l >= 0).unzip();
    let mut tally = Tally::default();
    let rows: Vec<f32> = kept
        .iter()
        .flat_map(|row| logits[row * classes..][..classes].to_vec())
        .collect();
    for row in judge_rows(&rows, classes, &Labels::Classes(labels)).expect("fits") {
        tally.sum("snli_ve", 0).add_score(row.score);
    }
    near(
        value(&tally.figures(&["snli_ve"], &part), "snli_ve_accuracy"),
        "accuracy",
    );
}
