//! The cross-modal encoder: managers and co-attention layers of both streams (model_spec 4).
//!
//! Experts in, the two streams' last outputs out. It refuses to know tasks; it only asks which
//! outputs someone will read, because what nobody reads is not computed.

use burn::tensor::Tensor;

use crate::error::ModelError;
use crate::layers::{AttentionBlock, FeedForward, LayerSizes, normalise};
use crate::manager::{EPSILON, Manager, ManagerSizes};
use crate::params::Builder;
use crate::pass::Pass;
use belfry_configs::Model;

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

/// Managers and layers of one stream.
#[derive(Clone, Debug)]
struct Stream {
    managers: Vec<Manager>,
    layers: Vec<CrossLayer>,
}

/// The cross-modal encoder.
#[derive(Clone, Debug)]
pub(crate) struct CrossModal {
    text: Stream,
    image: Stream,
}

impl CrossModal {
    pub fn new(b: &mut Builder, config: &Model) -> Self {
        let hidden = config.hidden as usize;
        let sizes = LayerSizes {
            hidden,
            heads: config.heads as usize,
            intermediate: hidden * config.mlp_ratio as usize,
            dropout: config.dropout,
            epsilon: CROSS_EPSILON,
        };
        let mut stream = |name: &str, experts: u32, position: usize| {
            let manager_sizes = ManagerSizes {
                kind: config.manager,
                weight: config.manager_weight,
                noise: config.manager_noise,
                experts: experts as usize,
                hidden,
            };
            let depth = config.cross_layers as usize;
            let managers = format!("cross_modal_{name}_manager_tower");
            let managers = b.at(managers, |b| {
                let manager = |i| Manager::new(b, i, 2 * i + position, manager_sizes);
                (0..depth).map(manager).collect()
            });
            let layers = format!("cross_modal_{name}_layers");
            let layers = (0..depth)
                .map(|i| CrossLayer::new(b, &layers, i, sizes))
                .collect();
            Stream { managers, layers }
        };
        let text = stream("text", config.text.managed, 0);
        let image = stream("image", config.image.managed, 1);
        CrossModal { text, image }
    }

    /// # Shapes
    /// experts `[batch, length, hidden]` each, text mask `[batch, 1, 1, text length]` → the last
    /// outputs of the text and the image stream. What `outputs` does not name may be missing or cut.
    pub fn forward(
        &self,
        pass: &mut Pass,
        text_experts: Vec<Tensor<3>>,
        image_experts: Vec<Tensor<3>>,
        text_mask: &Tensor<4>,
        outputs: Outputs,
    ) -> Result<(Tensor<3>, Option<Tensor<3>>), ModelError> {
        let normalised = |experts: Vec<Tensor<3>>| -> Vec<Tensor<3>> {
            experts.into_iter().map(|x| normalise(x, EPSILON)).collect()
        };
        let (text_experts, image_experts) = (normalised(text_experts), normalised(image_experts));
        let depth = self.text.layers.len();
        let mut previous: Option<(Tensor<3>, Tensor<3>)> = None;
        for i in 0..depth {
            let (below_text, below_image) = match &previous {
                Some((x, y)) => (Some((x, y)), Some((y, x))),
                None => (None, None),
            };
            let x = self.text.managers[i].forward(pass, &text_experts, below_text)?;
            let y = self.image.managers[i].forward(pass, &image_experts, below_image)?;
            pass.record(&format!("text_manager.{i}"), &x)?;
            pass.record(&format!("image_manager.{i}"), &y)?;
            let last = i + 1 == depth;
            let queries = |stream: &Tensor<3>| match outputs {
                Outputs::FirstTokens if last => stream.clone().narrow(1, 0, 1),
                _ => stream.clone(),
            };
            let (text, image) = ((&x, Some(text_mask)), (&y, None));
            let text_out = self.text.layers[i].forward(pass, queries(&x), text, image);
            pass.record(&format!("text_cross.{i}"), &text_out)?;
            if last && outputs == Outputs::Text {
                return Ok((text_out, None));
            }
            let image_out = self.image.layers[i].forward(pass, queries(&y), image, text);
            pass.record(&format!("image_cross.{i}"), &image_out)?;
            previous = Some((text_out, image_out));
        }
        let (x, y) = previous.expect("a cross-modal encoder has at least one layer");
        Ok((x, Some(y)))
    }
}
