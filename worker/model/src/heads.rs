//! The tasks' heads (model_spec 8): from the cross-modal encoder's outputs to logits, and from the
//! towers' outputs to contrastive features.
//!
//! Which head a model has is decided by its task; parameters are exactly those of the authors'
//! model for that task. Losses are elsewhere.

use burn::tensor::Tensor;

use crate::cross_modal::CROSS_EPSILON;
use crate::layers::{LayerNorm, Linear, gelu};
use crate::params::{Builder, Init, ParamId};
use crate::pass::{Dropout, Pass};
use belfry_configs::{Model, System, Task};

/// Layer norm epsilon inside classifiers.
const EPSILON: f32 = 1e-5;
/// Below this length a feature is not scaled up to 1.
const UNIT_EPSILON: f32 = 1e-12;
/// SNLI-VE: contradiction, neutral, entailment.
const ENTAILMENTS: usize = 3;

/// What a task's model ends in.
#[derive(Clone, Debug)]
pub(crate) enum Heads {
    /// Masked words and matching.
    Pretrain { mlm: MlmHead, itm: Linear },
    /// One classifier: VQA, SNLI-VE, NLVR2.
    Classify(Classifier),
    /// Contrast and matching; with masked words in the pre-training variant.
    Contrast {
        mlm: Option<MlmHead>,
        itc: ContrastiveHeads,
        itm: Linear,
    },
}

impl Heads {
    pub fn new(b: &mut Builder, model: &Model) -> Self {
        let hidden = model.hidden as usize;
        let itm = |b: &mut Builder| Linear::new(b, "itm_score.fc", 2 * hidden, 2);
        let unread = |b: &mut Builder| {
            let temperature = Init::Constant(model.head.temperature);
            b.unused("temperature", &[], temperature);
        };
        match model.task {
            Task::Pretrain => {
                unread(b);
                Heads::Pretrain {
                    mlm: MlmHead::new(b, model),
                    itm: itm(b),
                }
            }
            Task::Vqa | Task::SnliVe | Task::Nlvr2 => {
                unread(b);
                Heads::Classify(Classifier::new(b, model))
            }
            Task::Retrieval | Task::PretrainItc => Heads::Contrast {
                mlm: (model.task == Task::PretrainItc).then(|| MlmHead::new(b, model)),
                itc: ContrastiveHeads::new(b, model),
                itm: itm(b),
            },
        }
    }
}

/// MLM head: linear, GELU, LN, decoder that is not tied to the word table.
#[derive(Clone, Debug)]
pub(crate) struct MlmHead {
    dense: Linear,
    norm: LayerNorm,
    decoder: Linear,
}

impl MlmHead {
    fn new(b: &mut Builder, model: &Model) -> Self {
        let (hidden, vocab) = (model.hidden as usize, model.text.vocab as usize);
        b.at("mlm_score", |b| MlmHead {
            dense: Linear::new(b, "transform.dense", hidden, hidden),
            norm: LayerNorm::new(b, "transform.LayerNorm", hidden, CROSS_EPSILON),
            decoder: Linear::named(b, "decoder.weight", Some("bias"), &[vocab, hidden]),
        })
    }

    /// # Shapes
    /// `[rows, hidden]` → `[rows, vocab]`
    pub fn forward(&self, pass: &Pass, x: Tensor<2>) -> Tensor<2> {
        let x = gelu(self.dense.forward(pass, x));
        self.decoder.forward(pass, self.norm.forward(pass, x))
    }
}

/// A classifier over pooled features: linear, LN, GELU, linear; or a single linear layer.
#[derive(Clone, Debug)]
pub(crate) struct Classifier {
    /// The authors' name.
    pub name: &'static str,
    /// Images per text, each with a pass of its own.
    pub images: usize,
    pub classes: usize,
    dropout: Dropout,
    first: Linear,
    rest: Option<(LayerNorm, Linear)>,
}

impl Classifier {
    fn new(b: &mut Builder, model: &Model) -> Self {
        let head = &model.head;
        let (name, images, classes) = match model.task {
            Task::Nlvr2 => ("nlvr2_classifier", 2, 2),
            Task::SnliVe => ("snli_classifier", 1, ENTAILMENTS),
            _ => ("vqa_classifier", 1, head.answers as usize),
        };
        let width = 2 * model.hidden as usize;
        let inputs = images * width;
        let hidden = match model.system {
            // METER has no such setting (model_spec 7).
            System::Meter => width,
            _ => width * head.hidden_scale as usize,
        };
        b.at(name, |b| {
            let (first, rest) = if head.layers == 1 {
                (Linear::new(b, "0", inputs, classes), None)
            } else {
                let norm = LayerNorm::new(b, "1", hidden, EPSILON);
                let last = Linear::new(b, "3", hidden, classes);
                (Linear::new(b, "0", inputs, hidden), Some((norm, last)))
            };
            let dropout = Dropout {
                rate: if images == 2 { head.nlvr2_dropout } else { 0.0 },
                site: b.name("dropout"),
            };
            Classifier {
                name,
                images,
                classes,
                dropout,
                first,
                rest,
            }
        })
    }

    /// # Shapes
    /// `[rows, images x 2 x hidden]` → `[rows, classes]`
    pub fn forward(&self, pass: &Pass, x: Tensor<2>) -> Tensor<2> {
        let x = self.first.forward(pass, pass.dropout(&self.dropout, x));
        match &self.rest {
            Some((norm, last)) => last.forward(pass, gelu(norm.forward(pass, x))),
            None => x,
        }
    }
}

/// Projections of the towers' first tokens and the temperature of their similarities.
#[derive(Clone, Debug)]
pub(crate) struct ContrastiveHeads {
    text: Linear,
    image: Linear,
    pub temperature: ParamId,
}

impl ContrastiveHeads {
    fn new(b: &mut Builder, model: &Model) -> Self {
        let width = model.head.contrastive_hidden as usize;
        let head = |b: &mut Builder, name: &str, inputs: u32| {
            let name = format!("cross_modal_itc_{name}_head.fc");
            Linear::new(b, &name, inputs as usize, width)
        };
        ContrastiveHeads {
            text: head(b, "text", model.text.hidden),
            image: head(b, "image", model.image.hidden),
            temperature: b.number("temperature", model.head.temperature),
        }
    }

    /// # Shapes
    /// the text tower's layers `[rows, length, hidden]`, of which the last is read →
    /// `[rows, contrastive]`
    pub fn text(&self, pass: &Pass, layers: &[Tensor<3>]) -> Tensor<2> {
        self.text.forward(pass, first_token(layers))
    }

    /// As [`ContrastiveHeads::text`] of the image tower.
    pub fn image(&self, pass: &Pass, layers: &[Tensor<3>]) -> Tensor<2> {
        self.image.forward(pass, first_token(layers))
    }
}

/// Rows of length 1.
pub(crate) fn unit(x: Tensor<2>) -> Tensor<2> {
    let length = (x.clone() * x.clone()).sum_dim(1).sqrt();
    x * length.clamp_min(UNIT_EPSILON).recip()
}

fn first_token(layers: &[Tensor<3>]) -> Tensor<2> {
    let x = layers.last().expect("a tower has layers");
    let [rows, _, width] = x.dims();
    x.clone().narrow(1, 0, 1).reshape([rows, width])
}
