//! How good a state is: the one evaluator of training and command line (model_spec 14).
//!
//! The work of an evaluation is cut into units that depend on data and configuration alone: chunks of
//! pairs, or retrieval's queries. Each gives a [`Finding`], whoever computes it; findings are folded
//! in the order of units. So the figures are the same bits for any number of processes and any
//! interruption. In the order of the way: `chunks` and `retrieval` (what the model says), `tally` and
//! `recall` (what is made of it), `tally_file` (findings kept). It refuses to know who asked.

mod chunks;
mod experts;
mod in_run;
mod recall;
mod retrieval;
mod share;
mod tally;
mod tally_file;

use std::path::Path;
use std::sync::Arc;

use belfry_configs::{Task, ValidConfig};
use belfry_data::{DataPlane, Split};
use belfry_model::{ManagerTower, Weights};
use serde::{Deserialize, Serialize};

pub use chunks::Chosen;
pub use in_run::InRun;
pub use recall::{Scores, UNSCORED};
pub use retrieval::{EncoderRuns, Together};
pub use share::Share;
pub use tally::{Exact, Figure, Part, Sum, Tally};
pub use tally_file::{Identity, TallyFile, found, settings_sha256};

use crate::error::WorkerError;
use chunks::Judge;
use retrieval::{Encoder, Retrieval, Sides};

/// What an evaluation consists of: all that is needed to make figures of its findings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Work {
    /// The model's task.
    pub task: Task,
    /// Pairs of the data.
    pub pairs: u64,
    /// Units of work.
    pub units: u64,
    /// Parts of the data whose figures are told apart.
    pub parts: Vec<Part>,
    /// Images, of retrieval.
    pub images: u32,
    /// The image of every text, of retrieval.
    pub image_of_text: Vec<u32>,
}

/// What one unit of work gave.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finding {
    /// Of a chunk of pairs: counts, and what was chosen.
    Chunk {
        /// Counts and losses.
        tally: Tally,
        /// Choices for pairs with an id.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        chosen: Vec<Chosen>,
    },
    /// Of an image or a text: the nearest of the other side with their match logits, as bits.
    Query {
        /// (text or image, bits of the logit).
        scored: Vec<(u32, u32)>,
    },
}

/// An evaluation's outcome.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    /// In a fixed order.
    pub figures: Vec<Figure>,
    /// What was chosen for pairs with an id, in the order of the pairs.
    pub chosen: Vec<Chosen>,
}

/// Judges one state on `data.validation`.
pub struct Evaluator {
    config: ValidConfig,
    cache_dir: std::path::PathBuf,
    data: DataPlane,
    model: Arc<ManagerTower>,
    weights: Weights,
    work: Work,
    retrieval: Option<(Retrieval, Option<Sides>)>,
}

impl Evaluator {
    /// Opens the data of `data.validation` for a model with these weights.
    ///
    /// # Errors
    /// [`WorkerError::Data`]; [`WorkerError::Evaluation`] for more than can be ranked.
    pub fn open(
        config: &ValidConfig,
        cache_dir: &Path,
        model: Arc<ManagerTower>,
        weights: &Weights,
    ) -> Result<Self, WorkerError> {
        let data = DataPlane::open(config, cache_dir, Split::Validation)?;
        let retrieval = match config.model.task {
            Task::Retrieval | Task::PretrainItc => {
                Some(Retrieval::read(&data, config.data.text_len as usize)?)
            }
            _ => None,
        };
        let work = work(config, &data, retrieval.as_ref());
        Ok(Evaluator {
            config: config.clone(),
            cache_dir: cache_dir.to_owned(),
            data,
            model,
            weights: weights.without_gradient(),
            work,
            retrieval: retrieval.map(|retrieval| (retrieval, None)),
        })
    }

    /// What there is to do.
    pub fn work(&self) -> &Work {
        &self.work
    }

    /// Runs the uni-modal encoders over everything once, together with other processes where there
    /// are some; `owner` names weights and settings, so that nothing of another evaluation is taken.
    /// Tasks without ranking have nothing to do. [`Evaluator::find`] does it where it was not done.
    ///
    /// # Errors
    /// [`WorkerError::Data`], [`WorkerError::Model`], [`WorkerError::Scratch`].
    pub fn encode(&mut self, owner: &str, together: Option<&Together>) -> Result<(), WorkerError> {
        let Some((retrieval, sides)) = &mut self.retrieval else {
            return Ok(());
        };
        let encoder = Encoder {
            data: &self.data,
            model: &self.model,
            weights: &self.weights,
            settings: &self.config.eval,
        };
        *sides = Some(retrieval.encode(&encoder, &self.cache_dir, owner, together)?);
        Ok(())
    }

    /// What unit `unit` gives.
    ///
    /// # Errors
    /// [`WorkerError::Data`], [`WorkerError::Model`], [`WorkerError::Evaluation`].
    pub fn find(&mut self, unit: u64) -> Result<Finding, WorkerError> {
        if let Some((_, None)) = &self.retrieval {
            self.encode("", None)?;
        }
        let Some((retrieval, Some(sides))) = &self.retrieval else {
            let judge = Judge {
                config: &self.config,
                data: &self.data,
                model: &self.model,
                weights: &self.weights,
                parts: &self.work.parts,
            };
            let (tally, chosen) = judge.chunk(unit)?;
            return Ok(Finding::Chunk { tally, chosen });
        };
        let encoder = Encoder {
            data: &self.data,
            model: &self.model,
            weights: &self.weights,
            settings: &self.config.eval,
        };
        let scored = retrieval.query(&encoder, sides, unit as usize)?;
        let scored = scored
            .into_iter()
            .map(|(other, logit)| (other, logit.to_bits()));
        Ok(Finding::Query {
            scored: scored.collect(),
        })
    }

    /// All units by this process alone.
    ///
    /// # Errors
    /// As [`Evaluator::find`].
    pub fn evaluate(&mut self) -> Result<Evaluation, WorkerError> {
        let units = 0..self.work.units;
        let findings = units.map(|unit| self.find(unit));
        let findings: Vec<Finding> = findings.collect::<Result<_, _>>()?;
        self.work.conclude(&findings)
    }

    /// How often this process ran a uni-modal encoder for a ranking.
    pub fn encoder_runs(&self) -> EncoderRuns {
        let sides = self
            .retrieval
            .as_ref()
            .and_then(|(_, sides)| sides.as_ref());
        sides.map_or(EncoderRuns::default(), |sides| sides.runs)
    }
}

impl Work {
    /// The figures of all findings, which are given in the order of their units.
    ///
    /// # Errors
    /// [`WorkerError::Evaluation`] if findings are missing or of another kind.
    pub fn conclude(&self, findings: &[Finding]) -> Result<Evaluation, WorkerError> {
        if findings.len() as u64 != self.units {
            let found = findings.len();
            let reason = format!("{found} of {} units of work are done", self.units);
            return Err(WorkerError::Evaluation(reason));
        }
        let ranked = matches!(self.task, Task::Retrieval | Task::PretrainItc);
        let mut tally = Tally::default();
        let mut chosen = Vec::new();
        let (images, texts) = (self.images as usize, self.image_of_text.len());
        let mut scores = [(); 2].map(|()| Scores::unscored(images, texts));
        for (unit, finding) in findings.iter().enumerate() {
            match finding {
                Finding::Chunk {
                    tally: next,
                    chosen: more,
                } if !ranked => {
                    tally.add(next);
                    chosen.extend_from_slice(more);
                }
                Finding::Query { scored } if ranked => {
                    for (other, bits) in scored {
                        let other = *other as usize;
                        let (side, image, text) = match unit.checked_sub(images) {
                            None => (0, unit, other),
                            Some(text) => (1, other, text),
                        };
                        if image >= images || text >= texts {
                            let reason = format!("unit {unit} scores a pair that is not there");
                            return Err(WorkerError::Evaluation(reason));
                        }
                        scores[side].set(image, text, f32::from_bits(*bits));
                    }
                }
                _ => {
                    let reason = format!("unit {unit} is not of {:?}", self.task);
                    return Err(WorkerError::Evaluation(reason));
                }
            }
        }
        let figures = if ranked {
            let [of_images, of_texts] = scores;
            of_images.max(&of_texts).recalls(&self.image_of_text)
        } else {
            tally.figures(chunks::objectives(self.task), &self.parts)
        };
        Ok(Evaluation { figures, chosen })
    }
}

fn work(config: &ValidConfig, data: &DataPlane, retrieval: Option<&Retrieval>) -> Work {
    let pairs = data.pairs();
    let (images, image_of_text) = match retrieval {
        Some(retrieval) => (retrieval.sizes()[0], retrieval.image_of_text.clone()),
        None => (0, Vec::new()),
    };
    Work {
        task: config.model.task,
        pairs,
        units: match retrieval {
            Some(retrieval) => retrieval.sizes().iter().sum::<usize>() as u64,
            None => pairs.div_ceil(chunks::pairs_per_chunk(config)),
        },
        parts: parts(data),
        images: images as u32,
        image_of_text,
    }
}

/// Datasets, or their sources where they have several, each with a name of its own.
fn parts(data: &DataPlane) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    for (number, dataset) in (0..).zip(data.sequence().datasets()) {
        for (source, of_source) in (0..).zip(&dataset.sources) {
            let name = match dataset.sources.len() {
                1 => &dataset.name,
                _ => of_source,
            };
            let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
            let mut name: String = name.chars().map(plain).collect();
            if parts.iter().any(|part| part.name == name) {
                name = format!("{name}_{number}");
            }
            parts.push(Part {
                dataset: number,
                source,
                name,
            });
        }
    }
    parts
}
