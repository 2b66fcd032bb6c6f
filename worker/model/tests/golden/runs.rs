//! A training case through our model: its inputs as batches, and what comes out.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, Sender, channel};

use belfry_configs::Task;
use belfry_model::{
    ClassifyBatch, Company, Draws, GradientSum, Group, GroupError, Labels, ManagerTower,
    MicroBatchReport, Negatives, PretrainBatch, RetrievalBatch, Trace, Weights, add_rows,
};

use crate::arrays::Array;
use crate::cases::Case;
use crate::ways::Way;

/// Losses by the authors' names.
pub type Losses = BTreeMap<&'static str, f64>;

/// What a run is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// Losses and every intermediate tensor.
    Trace,
    /// Losses alone.
    Evaluate,
    /// Losses and the gradient.
    Gradient,
}

/// What came out: losses and traces of every micro-batch or process, and the mean gradient.
#[derive(Default)]
pub struct Outcome {
    pub losses: Vec<Losses>,
    pub traces: Vec<Trace>,
    pub gradient: Vec<f32>,
}

impl Outcome {
    /// The mean over micro-batches of the sum of losses.
    pub fn total(&self) -> f64 {
        let sums = self
            .losses
            .iter()
            .map(|losses| losses.values().sum::<f64>());
        sums.sum::<f64>() / self.losses.len() as f64
    }
}

/// Runs a case with the given weights.
pub fn run(case: &Case, tower: &ManagerTower, params: &[f32], ask: Ask, way: Way) -> Outcome {
    let noise = case.noise();
    let draws = if case.has_noise() {
        Draws::Noise(&noise)
    } else {
        Draws::Off
    };
    let one = Runner {
        case,
        tower,
        params,
        draws,
        ask,
        way,
    };
    let mut outcome = match case.task() {
        Task::Pretrain => one.pretrain(),
        Task::Vqa | Task::SnliVe | Task::Nlvr2 => one.classify(),
        Task::Retrieval | Task::PretrainItc => one.retrieve(),
    };
    let count = outcome.losses.len() as f32;
    outcome.gradient.iter_mut().for_each(|g| *g /= count);
    outcome
}

struct Runner<'a> {
    case: &'a Case,
    tower: &'a ManagerTower,
    params: &'a [f32],
    draws: Draws<'a>,
    ask: Ask,
    way: Way,
}

impl Runner<'_> {
    fn field(&self, prefix: &str, name: &str) -> &Array {
        let key = format!("{prefix}{name}");
        let field = self.case.io.get(&key);
        field.unwrap_or_else(|| panic!("{}: no `{key}`", self.case.name))
    }

    /// Every thread has its own: see [`Weights`].
    fn weights(&self) -> Weights {
        let gradients = self.ask == Ask::Gradient;
        self.way.weights(self.tower, self.params, gradients)
    }

    fn zeros(&self) -> Vec<f32> {
        vec![0.0; self.tower.table().elements()]
    }

    /// The case's micro-batches in device batches: all in one, but each alone where its tensors are
    /// shown.
    fn device_batches(&self) -> Vec<Vec<String>> {
        let prefixes = self.case.prefixes();
        match self.ask {
            Ask::Trace => prefixes.into_iter().map(|prefix| vec![prefix]).collect(),
            _ => vec![prefixes],
        }
    }

    fn pretrain(&self) -> Outcome {
        let mut outcome = Outcome::default();
        let (tower, weights, draws) = (self.tower, &self.weights(), self.draws);
        let mut sum = GradientSum::new(weights);
        for prefixes in self.device_batches() {
            let batch = self.pretrain_batch(&prefixes);
            let reports = match self.ask {
                Ask::Evaluate => tower.pretrain_evaluate(weights, &batch).unwrap(),
                Ask::Trace => {
                    let (reports, trace) = tower.pretrain_trace(weights, &batch, draws).unwrap();
                    outcome.traces.push(trace);
                    reports
                }
                Ask::Gradient => {
                    let reports = tower.pretrain_gradient(weights, &batch, draws, &mut sum);
                    reports.unwrap()
                }
            };
            let losses = |r: &MicroBatchReport| {
                Losses::from([("mlm_loss", r.mlm_loss), ("itm_loss", r.itm_loss)])
            };
            outcome.losses.extend(reports.iter().map(losses));
        }
        outcome.gradient = sum.finish().read().unwrap().to_vec();
        outcome
    }

    fn pretrain_batch(&self, prefixes: &[String]) -> PretrainBatch {
        let mut batch = PretrainBatch {
            micro_batches: prefixes.len(),
            ..PretrainBatch::default()
        };
        for prefix in prefixes {
            let field = |name: &str| self.field(prefix, name);
            let labels = field("rand/itm_labels").i32();
            let (images, others) = (field("in/image").f32(), field("in/false_image_0").f32());
            let size = images.len() / labels.len();
            for (row, label) in labels.iter().enumerate() {
                let from = if *label == 1 { &images } else { &others };
                batch
                    .itm_images
                    .extend_from_slice(&from[row * size..(row + 1) * size]);
            }
            batch.pairs = labels.len();
            batch.text_len = field("in/text_ids").shape[1];
            batch.itm_labels.extend(labels);
            batch.images.extend(images);
            batch.masked_ids.extend(field("in/text_ids_mlm").i32());
            batch.ids.extend(field("in/text_ids").i32());
            batch.mlm_labels.extend(field("in/text_labels_mlm").i32());
            batch.text_mask.extend(field("in/text_masks").f32());
        }
        batch
    }

    fn classify(&self) -> Outcome {
        let mut outcome = Outcome::default();
        let loss_name = match self.case.task() {
            Task::Nlvr2 => "nlvr2_loss",
            Task::SnliVe => "snli_loss",
            _ => "vqa_loss",
        };
        let (tower, weights, draws) = (self.tower, &self.weights(), self.draws);
        let mut sum = GradientSum::new(weights);
        for prefixes in self.device_batches() {
            let batch = self.classify_batch(&prefixes);
            let reports = match self.ask {
                Ask::Evaluate => tower.classify_evaluate(weights, &batch).unwrap(),
                Ask::Trace => {
                    let (reports, trace) = tower.classify_trace(weights, &batch, draws).unwrap();
                    outcome.traces.push(trace);
                    reports
                }
                Ask::Gradient => {
                    let reports = tower.classify_gradient(weights, &batch, draws, &mut sum);
                    reports.unwrap()
                }
            };
            let losses = reports.iter().map(|r| Losses::from([(loss_name, r.loss)]));
            outcome.losses.extend(losses);
        }
        outcome.gradient = sum.finish().read().unwrap().to_vec();
        outcome
    }

    fn classify_batch(&self, prefixes: &[String]) -> ClassifyBatch {
        let (images, label): (&[&str], _) = match self.case.task() {
            Task::Nlvr2 => (&["in/image_0", "in/image_1"], "in/answers"),
            Task::SnliVe => (&["in/image"], "in/labels"),
            _ => (&["in/image"], "in/vqa_targets"),
        };
        let all = |name: &str| -> Vec<f32> {
            let fields = prefixes.iter().map(|prefix| self.field(prefix, name));
            fields.flat_map(Array::f32).collect()
        };
        let integers = |name: &str| all(name).into_iter().map(|v| v as i32).collect();
        let first = self.field(&prefixes[0], "in/text_ids");
        ClassifyBatch {
            micro_batches: prefixes.len(),
            pairs: first.shape[0],
            text_len: first.shape[1],
            ids: integers("in/text_ids"),
            text_mask: all("in/text_masks"),
            images: images.iter().map(|name| all(name)).collect(),
            labels: match self.case.task() {
                Task::Vqa => Labels::Scores(all(label)),
                _ => Labels::Classes(integers(label)),
            },
        }
    }

    /// Processes see each other, each on a thread of its own; micro-batches do not.
    fn retrieve(&self) -> Outcome {
        let prefixes = self.case.prefixes();
        let pairs = self.field(&prefixes[0], "in/text_ids").shape[0];
        let together = prefixes[0].starts_with("rank");
        let groups = prefixes.chunks(if together { prefixes.len() } else { 1 });
        let mut all = Outcome {
            gradient: self.zeros(),
            ..Outcome::default()
        };
        for group in groups {
            let images = group.iter().flat_map(|prefix| self.images(prefix, pairs));
            let members = Member::group(group.len(), pairs, &images.collect::<Vec<u64>>());
            let outcomes: Vec<Outcome> = std::thread::scope(|scope| {
                let mut threads = Vec::new();
                for (prefix, member) in group.iter().zip(members) {
                    threads.push(scope.spawn(move || self.retrieve_one(prefix, member)));
                }
                let joined = threads.into_iter().map(|thread| thread.join().unwrap());
                joined.collect()
            });
            for one in outcomes {
                all.losses.extend(one.losses);
                all.traces.extend(one.traces);
                let sums = all.gradient.iter_mut().zip(one.gradient);
                sums.for_each(|(sum, g)| *sum += g);
            }
        }
        all
    }

    /// The pre-training variant knows no image twice.
    fn images(&self, prefix: &str, pairs: usize) -> Vec<u64> {
        match self.case.io.get(&format!("{prefix}in/img_index")) {
            Some(images) => images.values.iter().map(|v| *v as u64).collect(),
            None => (0..pairs as u64).collect(),
        }
    }

    fn retrieve_one(&self, prefix: &str, mut member: Member) -> Outcome {
        let field = |name: &str| self.field(prefix, name);
        let words = self.case.task() == Task::PretrainItc;
        let masked = |name: &str| if words { field(name).i32() } else { Vec::new() };
        let batch = RetrievalBatch {
            pairs: field("in/text_ids").shape[0],
            text_len: field("in/text_ids").shape[1],
            ids: field("in/text_ids").i32(),
            text_mask: field("in/text_masks").f32(),
            images: field("in/image").f32(),
            masked_ids: masked("in/text_ids_mlm"),
            mlm_labels: masked("in/text_labels_mlm"),
        };
        // Where candidates are the own rows, the authors count from the own first one.
        let global = self.case.json["config"]["gather_global_negative"] == true;
        let first = if global { 0 } else { member.first() };
        let negatives = |name: &str| -> Vec<usize> {
            field(name)
                .usize()
                .iter()
                .map(|place| first + place)
                .collect()
        };
        let images = negatives("rand/neg_image_for_text");
        let texts = negatives("rand/neg_text_for_image");
        let company = Company {
            group: &mut member,
            negatives: Negatives::Given {
                images: &images,
                texts: &texts,
            },
        };
        let (tower, weights) = (self.tower, &self.weights());
        let mut outcome = Outcome::default();
        let report = match self.ask {
            Ask::Evaluate => tower.retrieve_evaluate(weights, &batch, company).unwrap(),
            Ask::Trace => {
                let found = tower.retrieve_trace(weights, &batch, self.draws, company);
                let (report, trace) = found.unwrap();
                outcome.traces.push(trace);
                report
            }
            Ask::Gradient => {
                let (mut sum, draws) = (GradientSum::new(weights), self.draws);
                let found = tower.retrieve_gradient(weights, &batch, draws, company, &mut sum);
                outcome.gradient = sum.finish().read().unwrap().to_vec();
                found.unwrap()
            }
        };
        let mut losses =
            Losses::from([("itc_loss", report.itc_loss), ("itm_loss", report.itm_loss)]);
        if words {
            losses.insert("mlm_loss", report.mlm_loss);
        }
        outcome.losses.push(losses);
        outcome
    }
}

/// Rows or gradients under way, with the places that they are of.
type Message = (Vec<f32>, Vec<usize>);

/// One process of a contrastive group; the others are on other threads. A member that dies takes
/// its channels with it, so nobody waits for it.
struct Member {
    images: Vec<u64>,
    rank: usize,
    pairs: usize,
    to: Vec<Sender<Message>>,
    from: Vec<Receiver<Message>>,
}

impl Member {
    fn group(members: usize, pairs: usize, images: &[u64]) -> Vec<Member> {
        let member = |rank| Member {
            images: images.to_vec(),
            rank,
            pairs,
            to: Vec::new(),
            from: Vec::new(),
        };
        let mut group: Vec<Member> = (0..members).map(member).collect();
        for to in 0..members {
            for from in 0..members {
                let (sender, receiver) = channel();
                group[from].to.push(sender);
                group[to].from.push(receiver);
            }
        }
        group
    }

    fn exchange(&self, message: Message) -> Result<Vec<Message>, GroupError> {
        for to in &self.to {
            to.send(message.clone())?;
        }
        let received = self.from.iter().map(|from| from.recv());
        Ok(received.collect::<Result<Vec<Message>, _>>()?)
    }
}

impl Group for Member {
    fn images(&self) -> &[u64] {
        &self.images
    }

    fn first(&self) -> usize {
        self.rank * self.pairs
    }

    fn fetch(
        &mut self,
        own: &[f32],
        width: usize,
        wanted: &[usize],
    ) -> Result<Vec<f32>, GroupError> {
        let parts = self.exchange((own.to_vec(), Vec::new()))?;
        let all: Vec<f32> = parts.into_iter().flat_map(|(rows, _)| rows).collect();
        let row = |place: &usize| &all[place * width..][..width];
        Ok(wanted.iter().flat_map(row).copied().collect())
    }

    fn give_back(
        &mut self,
        gradient: &[f32],
        width: usize,
        wanted: &[usize],
    ) -> Result<Vec<f32>, GroupError> {
        let mut sum = vec![0.0; self.images.len() * width];
        for (rows, places) in self.exchange((gradient.to_vec(), wanted.to_vec()))? {
            add_rows(&mut sum, &rows, width, &places);
        }
        Ok(sum[self.first() * width..][..self.pairs * width].to_vec())
    }
}
