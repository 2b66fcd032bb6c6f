//! Contrastive tasks at sizes that no golden file has: gradients are slopes, a group's members give
//! the losses of the whole, negatives follow their key, refusals name what does not fit.

use belfry_configs::rng::{Key, Purpose};
use belfry_configs::{Model, Task};
use belfry_model::{
    Alone, Company, Device, Draws, Group, GroupError, ManagerTower, ModelError, Negatives,
    RetrievalBatch, RetrievalReport, Weights, add_rows,
};

mod tiny;
use tiny::{
    TEXT_LEN, check_slope, enlarge, keys, retrieval_batch, uneven, vqa, wide, with_threads,
};

fn retrieval(task: Task) -> ManagerTower {
    let model = Model { task, ..vqa() };
    ManagerTower::new(&uneven(model), TEXT_LEN).unwrap()
}

fn retrieve(
    tower: &ManagerTower,
    params: &[f32],
    batch: &RetrievalBatch,
    draws: Draws,
    company: Company,
) -> (Vec<f32>, RetrievalReport) {
    let weights = Weights::load(tower.table(), params, &Device::flex().autodiff()).unwrap();
    let mut gradient = vec![0.0; tower.table().elements()];
    let report = tower.retrieve_gradient(&weights, batch, draws, company, &mut gradient);
    (gradient, report.unwrap())
}

#[test]
fn contrastive_tasks_have_the_slope_of_their_loss() {
    for task in [Task::Retrieval, Task::PretrainItc] {
        let tower = retrieval(task);
        let mut params = tower.table().init(3);
        enlarge(&mut params);
        let batch = retrieval_batch(0, 3, task == Task::PretrainItc);
        let keys = keys(&[10]);
        let step = |params: &[f32]| {
            let company = Company {
                group: &mut Alone::new(vec![1, 2, 1]),
                negatives: Negatives::Given {
                    images: &[1, 0, 1],
                    texts: &[1, 2, 1],
                },
            };
            retrieve(&tower, params, &batch, Draws::Keys(&keys), company)
        };
        let (slope, report) = step(&params);
        assert_eq!(report.mlm_masked > 0, task == Task::PretrainItc);
        let loss = |params: &[f32]| {
            let (_, report) = step(params);
            report.itc_loss + report.itm_loss + report.mlm_loss
        };
        for part in [
            "",
            "itc_",
            "temperature",
            "text_transformer",
            "vit_model",
            "manager_tower",
        ] {
            let what = format!("{task:?}");
            check_slope(&what, tower.table(), &params, &slope, part, loss);
        }
    }
}

/// A part of a group whose other rows are known beforehand: what a lane sees of gathered features.
struct Part {
    images: Vec<u64>,
    first: usize,
    pairs: usize,
    /// Every call's matrix of the whole group, in call order.
    known: std::vec::IntoIter<Vec<f32>>,
}

/// Alone, but remembers what was fetched from it.
struct Recorder {
    alone: Alone,
    fetched: Vec<Vec<f32>>,
}

impl Group for Recorder {
    fn images(&self) -> &[u64] {
        self.alone.images()
    }
    fn first(&self) -> usize {
        0
    }
    fn fetch(
        &mut self,
        own: &[f32],
        width: usize,
        wanted: &[usize],
    ) -> Result<Vec<f32>, GroupError> {
        self.fetched.push(own.to_vec());
        self.alone.fetch(own, width, wanted)
    }
    fn give_back(
        &mut self,
        rows: &[f32],
        width: usize,
        wanted: &[usize],
    ) -> Result<Vec<f32>, GroupError> {
        self.alone.give_back(rows, width, wanted)
    }
}

impl Group for Part {
    fn images(&self) -> &[u64] {
        &self.images
    }
    fn first(&self) -> usize {
        self.first
    }
    fn fetch(
        &mut self,
        own: &[f32],
        width: usize,
        wanted: &[usize],
    ) -> Result<Vec<f32>, GroupError> {
        let all = self
            .known
            .next()
            .ok_or("a call more than the whole group made")?;
        let ours = &all[self.first * width..][..self.pairs * width];
        assert!(
            own.iter().zip(ours).all(|(a, b)| (a - b).abs() < 1e-5),
            "own rows differ"
        );
        Ok(wanted
            .iter()
            .flat_map(|place| all[place * width..][..width].to_vec())
            .collect())
    }
    fn give_back(
        &mut self,
        rows: &[f32],
        width: usize,
        wanted: &[usize],
    ) -> Result<Vec<f32>, GroupError> {
        let mut sum = vec![0.0; self.images.len() * width];
        add_rows(&mut sum, rows, width, wanted);
        Ok(sum[self.first * width..][..self.pairs * width].to_vec())
    }
}

#[test]
fn losses_against_a_group_are_those_of_the_whole() {
    let tower = retrieval(Task::Retrieval);
    let params = tower.table().init(3);
    let weights = Weights::load(tower.table(), &params, &Device::flex()).unwrap();
    let (group, negatives) = ([1, 2, 1, 3], ([3, 0, 1, 0], [1, 2, 3, 2]));
    let mut whole = Recorder {
        alone: Alone::new(group.to_vec()),
        fetched: Vec::new(),
    };
    let company = Company {
        group: &mut whole,
        negatives: Negatives::Given {
            images: &negatives.0,
            texts: &negatives.1,
        },
    };
    let all = tower
        .retrieve_evaluate(&weights, &retrieval_batch(0, 4, false), company)
        .unwrap();
    let (mut itc, mut itm) = (0.0, 0.0);
    for first in [0, 2] {
        let mut part = Part {
            images: group.to_vec(),
            first,
            pairs: 2,
            known: whole.fetched.clone().into_iter(),
        };
        let company = Company {
            group: &mut part,
            negatives: Negatives::Given {
                images: &negatives.0[first..first + 2],
                texts: &negatives.1[first..first + 2],
            },
        };
        let batch = retrieval_batch(first, 2, false);
        let report = tower.retrieve_evaluate(&weights, &batch, company).unwrap();
        itc += report.itc_loss / 2.0;
        itm += report.itm_loss / 2.0;
    }
    assert!((itc - all.itc_loss).abs() < 1e-6, "{itc} {}", all.itc_loss);
    assert!((itm - all.itm_loss).abs() < 1e-6, "{itm} {}", all.itm_loss);
}

#[test]
fn drawn_negatives_follow_the_key_and_the_candidates() {
    let step = |global_negatives, key| {
        let mut model = Model {
            task: Task::Retrieval,
            ..vqa()
        };
        model.head.global_negatives = global_negatives;
        let tower = ManagerTower::new(&model, TEXT_LEN).unwrap();
        let params = tower.table().init(3);
        let weights = Weights::load(tower.table(), &params, &Device::flex()).unwrap();
        let company = Company {
            group: &mut Alone::new((0..6).collect()),
            negatives: Negatives::Drawn(Key::new(key, Purpose::Negatives)),
        };
        let batch = retrieval_batch(0, 6, false);
        tower.retrieve_evaluate(&weights, &batch, company).unwrap()
    };
    assert_eq!(step(true, 1), step(true, 1));
    assert_ne!(step(true, 1).itm_loss, step(true, 2).itm_loss);
    assert_eq!(step(true, 1).itc_loss, step(true, 2).itc_loss);
    // Alone the whole group is the micro-batch.
    assert_eq!(step(true, 3), step(false, 3));
}

#[test]
fn a_temperature_out_of_bounds_is_brought_back() {
    let tower = retrieval(Task::Retrieval);
    let mut params = tower.table().init(3);
    let place = tower.table().get("temperature").unwrap().offset;
    for (value, kept) in [(-0.3, 0.001), (0.7, 0.5), (0.2, 0.2)] {
        params[place] = value;
        tower.clamp_temperature(&mut params);
        assert_eq!(params[place], kept);
    }
    let other = ManagerTower::new(&vqa(), TEXT_LEN).unwrap();
    let mut params = other.table().init(3);
    let before = params.clone();
    other.clamp_temperature(&mut params);
    assert_eq!(params, before);
}

#[test]
fn threads_change_no_bit() {
    let keys = keys(&[10]);
    let model = wide(Model {
        task: Task::Retrieval,
        ..vqa()
    });
    let tower = ManagerTower::new(&model, TEXT_LEN).unwrap();
    let params = tower.table().init(3);
    let batch = retrieval_batch(0, 3, false);
    let run = || {
        let company = Company {
            group: &mut Alone::new(vec![1, 2, 3]),
            negatives: Negatives::Drawn(keys[0]),
        };
        retrieve(&tower, &params, &batch, Draws::Keys(&keys), company).0
    };
    assert!(with_threads(1, &run) == with_threads(3, &run));
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let tower = ManagerTower::new(&vqa(), TEXT_LEN).unwrap();
    let params = tower.table().init(3);
    let weights = Weights::load(tower.table(), &params, &Device::flex()).unwrap();
    let company = Company {
        group: &mut Alone::new(vec![1, 2]),
        negatives: Negatives::Drawn(keys(&[1])[0]),
    };
    let pairs = retrieval_batch(0, 2, false);
    let error = tower
        .retrieve_evaluate(&weights, &pairs, company)
        .unwrap_err();
    assert!(
        matches!(
            error,
            ModelError::Task {
                task: Task::Vqa,
                ..
            }
        ),
        "{error}"
    );

    let tower = retrieval(Task::Retrieval);
    let params = tower.table().init(3);
    let weights = Weights::load(tower.table(), &params, &Device::flex()).unwrap();
    let company = Company {
        group: &mut Alone::new(vec![1, 2]),
        negatives: Negatives::Given {
            images: &[1, 2],
            texts: &[0, 0],
        },
    };
    let error = tower
        .retrieve_evaluate(&weights, &pairs, company)
        .unwrap_err();
    assert!(
        matches!(
            error,
            ModelError::Range {
                what: "hard negatives",
                value: 2,
                ..
            }
        ),
        "{error}"
    );
}

/// A group that loses its connection.
struct Broken;

impl Group for Broken {
    fn images(&self) -> &[u64] {
        &[1, 2]
    }
    fn first(&self) -> usize {
        0
    }
    fn fetch(&mut self, _: &[f32], _: usize, _: &[usize]) -> Result<Vec<f32>, GroupError> {
        Err("connection reset".into())
    }
    fn give_back(&mut self, _: &[f32], _: usize, _: &[usize]) -> Result<Vec<f32>, GroupError> {
        Err("connection reset".into())
    }
}

#[test]
fn a_broken_group_is_an_error_with_its_cause() {
    let tower = retrieval(Task::Retrieval);
    let params = tower.table().init(3);
    let weights = Weights::load(tower.table(), &params, &Device::flex()).unwrap();
    let company = Company {
        group: &mut Broken,
        negatives: Negatives::Drawn(keys(&[1])[0]),
    };
    let batch = retrieval_batch(0, 2, false);
    let error = tower
        .retrieve_evaluate(&weights, &batch, company)
        .unwrap_err();
    let ModelError::Group { source, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(source.to_string(), "connection reset");
}
