//! The gradient of a whole global batch, gathered from micro-batches of any size, is that of one
//! process which sees the whole batch as one micro-batch; with dropout and noise it does not depend
//! on the micro-batch either.

use belfry_configs::rng::{Key, Purpose};
use belfry_configs::{Model, Task};
use belfry_model::{
    Alone, Company, Device, Draws, GatheredBatch, HardNegatives, ManagerTower, ModelError,
    Negatives, RetrievalBatch, RetrievalReport, Weights, WholeBatch,
};

mod tiny;
use tiny::{TEXT_LEN, enlarge, relative, retrieval_batch, uneven, vqa, wide, with_threads};

/// Rows of the global batch.
const ROWS: usize = 8;
/// Two rows have one image, three another.
const IMAGES: [u64; ROWS] = [1, 2, 1, 3, 4, 2, 5, 2];

fn model(task: Task) -> Model {
    Model { task, ..vqa() }
}

fn negatives_key() -> Key {
    Key::new(3, Purpose::Negatives)
}

/// One key per row of the global batch.
fn row_keys() -> Vec<Key> {
    let key = |row| Key::new(5, Purpose::Dropout).with(row);
    (0..ROWS as u64).map(key).collect()
}

/// All rows, at weights that make every part of the gradient large.
struct Run {
    tower: ManagerTower,
    weights: Weights,
    words: bool,
    draws: bool,
}

impl Run {
    fn new(model: Model, draws: bool) -> Self {
        let words = model.task == Task::PretrainItc;
        let tower = ManagerTower::new(&model, TEXT_LEN).unwrap();
        let mut params = tower.table().init(3);
        enlarge(&mut params);
        let device = Device::flex().autodiff();
        let weights = Weights::load(tower.table(), &params, &device).unwrap();
        Run {
            tower,
            weights,
            words,
            draws,
        }
    }

    fn rows(&self, first: usize, pairs: usize) -> RetrievalBatch {
        retrieval_batch(first, pairs, self.words)
    }

    /// The first pass, in micro-batches.
    fn whole(&self, micro_batch: usize) -> WholeBatch {
        let keys = row_keys();
        let mut features = [Vec::new(), Vec::new()];
        for first in (0..ROWS).step_by(micro_batch) {
            let batch = self.rows(first, micro_batch);
            let keys = self.draws.then(|| &keys[first..first + micro_batch]);
            let found = self
                .tower
                .contrastive_features(&self.weights, &batch, keys)
                .unwrap();
            for (all, found) in features.iter_mut().zip(found) {
                all.extend(found);
            }
        }
        self.tower
            .whole_batch(&self.weights, features, IMAGES.to_vec(), negatives_key())
            .unwrap()
    }

    /// Both passes; the mean over micro-batches.
    fn gathered(&self, micro_batch: usize) -> (Vec<f32>, RetrievalReport) {
        let whole = self.whole(micro_batch);
        let mut gradient = vec![0.0; self.tower.table().elements()];
        let mut sum = RetrievalReport::default();
        let micro_batches = (ROWS / micro_batch) as f64;
        for first in (0..ROWS).step_by(micro_batch) {
            let rows = first..first + micro_batch;
            let (batch, keys) =
                self.with_negatives(first, micro_batch, &whole.negatives(rows.clone()));
            let keys = self.draws.then_some(&keys[..]);
            let slopes = whole.slopes(rows);
            let report = self
                .tower
                .gathered_gradient(&self.weights, &batch, &slopes, keys, &mut gradient)
                .unwrap();
            sum.itc_loss += report.itc_loss / micro_batches;
            sum.itm_loss += report.itm_loss / micro_batches;
            sum.mlm_loss += report.mlm_loss / micro_batches;
            sum.itm_correct += report.itm_correct;
            sum.pairs += report.pairs;
        }
        gradient.iter_mut().for_each(|g| *g /= micro_batches as f32);
        (gradient, sum)
    }

    /// A micro-batch with the rows that its negatives are, and the keys of its texts.
    fn with_negatives(
        &self,
        first: usize,
        pairs: usize,
        negatives: &HardNegatives,
    ) -> (GatheredBatch, Vec<Key>) {
        let mut batch = GatheredBatch {
            own: self.rows(first, pairs),
            ..GatheredBatch::default()
        };
        let own: Vec<usize> = (first..first + pairs).collect();
        let (mut texts, mut images) = (own.clone(), own);
        for place in &negatives.texts {
            if !texts.contains(place) {
                texts.push(*place);
                let other = self.rows(*place, 1);
                batch.other_ids.extend(other.ids);
                batch.other_text_mask.extend(other.text_mask);
            }
            let at = texts.iter().position(|text| text == place);
            batch.hard_texts.push(at.unwrap());
        }
        for place in &negatives.images {
            if !images.contains(place) {
                images.push(*place);
                batch.other_images.extend(self.rows(*place, 1).images);
            }
            let at = images.iter().position(|image| image == place);
            batch.hard_images.push(at.unwrap());
        }
        let keys = texts.iter().map(|row| row_keys()[*row]).collect();
        (batch, keys)
    }
}

#[test]
fn the_gathered_gradient_is_that_of_the_whole_batch_in_one_process() {
    for model in [uneven(model(Task::Retrieval)), model(Task::Retrieval)] {
        let run = Run::new(model, false);
        let drawn = run.whole(ROWS).negatives(0..ROWS);
        let mut expected = vec![0.0; run.tower.table().elements()];
        let company = Company {
            group: &mut Alone::new(IMAGES.to_vec()),
            negatives: Negatives::Given {
                images: &drawn.images,
                texts: &drawn.texts,
            },
        };
        let batch = run.rows(0, ROWS);
        let single = run
            .tower
            .retrieve_gradient(&run.weights, &batch, Draws::Off, company, &mut expected)
            .unwrap();
        for micro_batch in [1, 2, 4, 8] {
            let (gradient, report) = run.gathered(micro_batch);
            let difference = relative(&gradient, &expected);
            println!("micro-batch {micro_batch}: {difference:e} of the largest");
            assert!(difference < 1e-5, "micro-batch {micro_batch}: {difference}");
            assert!((report.itc_loss - single.itc_loss).abs() < 1e-6);
            assert!((report.itm_loss - single.itm_loss).abs() < 1e-6);
            assert_eq!(report.itm_correct, single.itm_correct);
            let place = run.tower.table().get("temperature").unwrap().offset;
            let slopes = (gradient[place], expected[place]);
            assert!((slopes.0 / slopes.1 - 1.0).abs() < 1e-4, "{slopes:?}");
        }
    }
}

/// Without masked words: their loss is a mean over a micro-batch's masks, so it does depend on it.
#[test]
fn with_dropout_and_noise_the_micro_batch_does_not_matter_either() {
    let run = Run::new(uneven(model(Task::Retrieval)), true);
    let (expected, whole) = run.gathered(ROWS);
    assert_ne!(
        Run::new(uneven(model(Task::Retrieval)), false)
            .gathered(ROWS)
            .0,
        expected,
        "something is drawn"
    );
    for micro_batch in [1, 2, 4] {
        let (gradient, report) = run.gathered(micro_batch);
        let difference = relative(&gradient, &expected);
        println!("micro-batch {micro_batch}, drawn: {difference:e} of the largest");
        assert!(difference < 1e-5, "micro-batch {micro_batch}: {difference}");
        assert!((report.itm_loss - whole.itm_loss).abs() < 1e-6);
        assert_eq!(report.itm_correct, whole.itm_correct);
    }
}

#[test]
fn contrastive_pre_training_adds_its_masked_words() {
    let run = Run::new(model(Task::PretrainItc), true);
    let (gradient, report) = run.gathered(2);
    assert!(report.mlm_loss > 0.0);
    let of = |part: &str| {
        let entries = run.tower.table().entries().iter();
        let entry = entries.clone().find(|e| e.name.contains(part));
        let entry = entry.unwrap();
        gradient[entry.offset..entry.offset + entry.len]
            .iter()
            .any(|g| *g != 0.0)
    };
    assert!(of("mlm_score") && of("itm_score") && of("itc_text") && of("temperature"));
}

#[test]
fn threads_change_no_bit() {
    let run = Run::new(wide(model(Task::Retrieval)), true);
    let gradient = || run.gathered(2).0;
    assert!(with_threads(1, &gradient) == with_threads(3, &gradient));
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let run = Run::new(model(Task::Retrieval), false);
    let whole = run.whole(4);
    let slopes = whole.slopes(0..2);
    let (mut batch, _) = run.with_negatives(0, 2, &whole.negatives(0..2));
    let mut gradient = vec![0.0; run.tower.table().elements()];
    let mut refused = |batch: &GatheredBatch, keys: Option<&[Key]>| {
        let done = run
            .tower
            .gathered_gradient(&run.weights, batch, &slopes, keys, &mut gradient);
        done.unwrap_err().to_string()
    };
    let few = refused(&batch, Some(&row_keys()[..1]));
    assert!(few.contains("`keys` holds 1 elements"), "{few}");
    batch.hard_images[1] = 9;
    let far = refused(&batch, None);
    assert!(
        far.contains("`batch.hard_images` at element 1 is 9"),
        "{far}"
    );
    let short = run
        .tower
        .whole_batch(
            &run.weights,
            [vec![0.0; 12], vec![0.0; 6]],
            vec![1, 2],
            negatives_key(),
        )
        .unwrap_err();
    assert!(
        matches!(short, ModelError::Length { found: 6, .. }),
        "{short}"
    );
}
