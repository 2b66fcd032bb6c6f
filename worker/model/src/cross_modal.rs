//! The cross-modal encoder: aggregation and co-attention layers of both streams (model_spec 4-7).
//!
//! Experts in, the two streams' last outputs out. It refuses to know tasks; it only asks which
//! outputs someone will read, because what nobody reads is not computed.

use burn::tensor::Tensor;

use crate::error::ModelError;
use crate::layers::{AttentionBlock, FeedForward, LayerNorm, LayerSizes, normalise};
use crate::manager::{Below, EPSILON, Manager, ManagerSizes};
use crate::params::Builder;
use crate::pass::Pass;
use belfry_configs::{Manager as Kind, Model, System};

/// The cross-modal layers' epsilon: RoBERTa's library default, not its published one [!].
pub(crate) const CROSS_EPSILON: f32 = 1e-12;

/// Which outputs of the last layers are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outputs {
    /// Both streams, all tokens.
    All,
    /// The text stream only (MLM).
    Text,
    /// The first token of both streams (ITM).
    FirstTokens,
}

#[derive(Clone, Debug)]
struct CrossLayer {
    self_attention: AttentionBlock,
    cross_attention: AttentionBlock,
    feed_forward: FeedForward,
}

impl CrossLayer {
    fn new(b: &mut Builder, name: &str, layer: usize, sizes: LayerSizes) -> Self {
        b.at(format!("{name}.{layer}"), |b| CrossLayer {
            self_attention: AttentionBlock::new(b, "attention", sizes),
            cross_attention: AttentionBlock::new(b, "crossattention", sizes),
            feed_forward: FeedForward::new(b, sizes),
        })
    }

    /// `queries` are the rows of `own` whose outputs are wanted.
    fn forward(
        &self,
        pass: &Pass,
        queries: Tensor<3>,
        (own, own_mask): (&Tensor<3>, Option<&Tensor<4>>),
        (other, other_mask): (&Tensor<3>, Option<&Tensor<4>>),
    ) -> Tensor<3> {
        let x = self
            .self_attention
            .forward(pass, queries, own.clone(), own_mask);
        let x = self
            .cross_attention
            .forward(pass, x, other.clone(), other_mask);
        self.feed_forward.forward(pass, x)
    }
}

/// How a stream's experts and its cross-modal layers come together.
#[derive(Clone, Debug)]
enum Aggregation {
    /// ManagerTower: a manager in front of every layer (model_spec 5).
    Managers(Vec<Manager>),
    /// BridgeTower: layer i sees expert i, added to the layer below and normed (model_spec 6).
    LinkTowers(Vec<LayerNorm>),
    /// METER: the only expert enters below the first layer (model_spec 7).
    Below,
}

impl Aggregation {
    /// `name` is `text` or `image`; `position` the stream's place in call order.
    fn new(b: &mut Builder, config: &Model, name: &str, experts: u32, position: usize) -> Self {
        let depth = config.cross_layers as usize;
        let hidden = config.hidden as usize;
        match config.system {
            System::ManagerTower => {
                let sizes = ManagerSizes::new(config, experts);
                b.at(format!("cross_modal_{name}_manager_tower"), |b| {
                    let manager = |i| Manager::new(b, i, 2 * i + position, sizes);
                    Aggregation::Managers((0..depth).map(manager).collect())
                })
            }
            System::BridgeTower => {
                let link = |i: usize| match i {
                    0 => format!("cross_modal_{name}_layernorm"),
                    i => format!("cross_modal_{name}_link_tower.{}.LayerNorm", i - 1),
                };
                let norm = |i| LayerNorm::new(b, &link(i), hidden, EPSILON);
                Aggregation::LinkTowers((0..depth).map(norm).collect())
            }
            System::Meter => Aggregation::Below,
        }
    }

    /// What cross-modal layer `i` of this stream starts from.
    fn forward(
        &self,
        pass: &mut Pass,
        i: usize,
        experts: &[Tensor<3>],
        below: Below,
    ) -> Result<Tensor<3>, ModelError> {
        Ok(match self {
            Aggregation::Managers(managers) => managers[i].forward(pass, experts, below)?,
            Aggregation::LinkTowers(norms) => {
                let expert = experts[i].clone();
                let sum = match below.own.last() {
                    Some(own) => expert + own.clone(),
                    None => expert,
                };
                norms[i].forward(pass, sum)
            }
            Aggregation::Below => below.own.last().unwrap_or(&experts[0]).clone(),
        })
    }

    /// What the golden files call the result in front of layer `i`; METER has none.
    fn record_name(&self, stream: &str, i: usize) -> Option<String> {
        match self {
            Aggregation::Managers(_) => Some(format!("{stream}_manager.{i}")),
            Aggregation::LinkTowers(_) => Some(match i {
                0 => format!("{stream}_first_layernorm"),
                i => format!("{stream}_link.{}", i - 1),
            }),
            Aggregation::Below => None,
        }
    }
}

/// Aggregation and layers of one stream.
#[derive(Clone, Debug)]
struct Stream {
    aggregation: Aggregation,
    layers: Vec<CrossLayer>,
}

/// The cross-modal encoder.
#[derive(Clone, Debug)]
pub(crate) struct CrossModal {
    text: Stream,
    image: Stream,
    /// Outputs of earlier layers that an aggregation looks back at.
    memory: usize,
}

impl CrossModal {
    /// `experts` of text and image.
    pub fn new(b: &mut Builder, config: &Model, experts: [u32; 2]) -> Self {
        let hidden = config.hidden as usize;
        let depth = config.cross_layers as usize;
        let sizes = LayerSizes {
            hidden,
            heads: config.heads as usize,
            intermediate: hidden * config.mlp_ratio as usize,
            dropout: config.dropout,
            epsilon: CROSS_EPSILON,
        };
        let mut stream = |name: &str, experts: u32, position: usize| {
            let aggregation = Aggregation::new(b, config, name, experts, position);
            let layers = format!("cross_modal_{name}_layers");
            let layers = (0..depth)
                .map(|i| CrossLayer::new(b, &layers, i, sizes))
                .collect();
            Stream {
                aggregation,
                layers,
            }
        };
        CrossModal {
            text: stream("text", experts[0], 0),
            image: stream("image", experts[1], 1),
            memory: match (config.system, config.manager) {
                (System::ManagerTower, Kind::SaeJoint | Kind::SaeSplit) => depth,
                _ => 1,
            },
        }
    }

    /// # Shapes
    /// experts `[batch, length, hidden]` each, text mask `[batch, 1, 1, text length]` → the last
    /// outputs of the text and the image stream. What `outputs` does not name may be missing or cut.
    pub fn forward<'a>(
        &'a self,
        pass: &mut Pass<'a>,
        experts: [Vec<Tensor<3>>; 2],
        text_mask: &Tensor<4>,
        outputs: Outputs,
    ) -> Result<(Tensor<3>, Option<Tensor<3>>), ModelError> {
        let experts = self.prepare(pass, experts)?;
        let depth = self.text.layers.len();
        let (mut texts, mut images) = (Vec::new(), Vec::new());
        for i in 0..depth {
            let outputs = if i + 1 < depth { Outputs::All } else { outputs };
            let parts = [&experts[0], &experts[1], &texts, &images];
            let ([text_experts, image_experts, below, _], mask) =
                (parts.map(Vec::len), text_mask.clone());
            let made = pass.block(parts.map(Vec::as_slice).concat(), move |pass, inputs| {
                let (text_experts, rest) = inputs.split_at(text_experts);
                let (image_experts, rest) = rest.split_at(image_experts);
                let (texts, images) = rest.split_at(below);
                let mask = pass.adopt(&mask);
                let sides = [(text_experts, texts), (image_experts, images)];
                self.layer(pass, i, sides, &mask, outputs)
            });
            let mut made = made?.into_iter();
            let text = made.next().expect("a layer gives the text stream");
            remember(&mut texts, text, self.memory);
            match made.next() {
                Some(image) => remember(&mut images, image, self.memory),
                None => images.clear(),
            }
        }
        let text = texts.pop();
        let text = text.expect("a cross-modal encoder has at least one layer");
        Ok((text, images.pop()))
    }

    /// Experts as aggregations want them, once for all layers.
    fn prepare(
        &self,
        pass: &mut Pass,
        [texts, images]: [Vec<Tensor<3>>; 2],
    ) -> Result<[Vec<Tensor<3>>; 2], ModelError> {
        let Aggregation::Managers(_) = &self.text.aggregation else {
            return Ok([texts, images]);
        };
        let normalised = |experts| {
            pass.block(experts, |_, experts| {
                Ok(experts
                    .iter()
                    .map(|x| normalise(x.clone(), EPSILON))
                    .collect())
            })
        };
        let [texts, images] = [texts, images].map(normalised);
        Ok([texts?, images?])
    }

    /// Layer `i` of both streams from their experts and what they gave below: the text stream's
    /// output and, unless nobody reads it, the image stream's.
    fn layer(
        &self,
        pass: &mut Pass,
        i: usize,
        [(text_experts, texts), (image_experts, images)]: [(&[Tensor<3>], &[Tensor<3>]); 2],
        text_mask: &Tensor<4>,
        outputs: Outputs,
    ) -> Result<Vec<Tensor<3>>, ModelError> {
        let below_text = Below {
            own: texts,
            other: images,
        };
        let below_image = Below {
            own: images,
            other: texts,
        };
        let (text, image) = (&self.text.aggregation, &self.image.aggregation);
        let x = text.forward(pass, i, text_experts, below_text)?;
        let y = image.forward(pass, i, image_experts, below_image)?;
        for (aggregation, stream, tensor) in [(text, "text", &x), (image, "image", &y)] {
            if let Some(name) = aggregation.record_name(stream, i) {
                pass.record(&name, tensor)?;
            }
        }
        let queries = |stream: &Tensor<3>| match outputs {
            Outputs::FirstTokens => stream.clone().narrow(1, 0, 1),
            _ => stream.clone(),
        };
        let (text, image) = ((&x, Some(text_mask)), (&y, None));
        let text_out = self.text.layers[i].forward(pass, queries(&x), text, image);
        pass.record(&format!("text_cross.{i}"), &text_out)?;
        if outputs == Outputs::Text {
            return Ok(vec![text_out]);
        }
        let image_out = self.image.layers[i].forward(pass, queries(&y), image, text);
        pass.record(&format!("image_cross.{i}"), &image_out)?;
        Ok(vec![text_out, image_out])
    }
}

/// Keeps the newest `memory` outputs: older ones live no longer than backward needs them.
fn remember(outputs: &mut Vec<Tensor<3>>, newest: Tensor<3>, memory: usize) {
    if outputs.len() == memory {
        outputs.remove(0);
    }
    outputs.push(newest);
}
