//! The text tower: RoBERTa (model_spec 2), all layer outputs.
//!
//! Tokens in, one tensor per layer out. It refuses to know which layers are managed.

use burn::tensor::Tensor;

use crate::error::ModelError;
use crate::layers::{AttentionBlock, FeedForward, INIT_STD, LayerNorm, LayerSizes, Linear};
use crate::params::{Builder, Init, ParamId};
use crate::pass::{Dropout, Pass};

/// RoBERTa's padding id; also the padding row of its position table.
pub(crate) const PAD: i32 = 1;
/// RoBERTa's published layer norm epsilon.
const EPSILON: f32 = 1e-5;

#[derive(Clone, Debug)]
struct Layer {
    attention: AttentionBlock,
    feed_forward: FeedForward,
}

/// The text tower.
#[derive(Clone, Debug)]
pub(crate) struct TextTower {
    words: ParamId,
    positions: ParamId,
    token_type: ParamId,
    norm: LayerNorm,
    dropout: Dropout,
    layers: Vec<Layer>,
    width: usize,
}

impl TextTower {
    pub fn new(b: &mut Builder, config: &belfry_configs::TextTower, dropout: f32) -> Self {
        let sizes = LayerSizes {
            hidden: config.hidden as usize,
            heads: config.heads as usize,
            intermediate: config.intermediate as usize,
            dropout,
            epsilon: EPSILON,
        };
        let width = sizes.hidden;
        let padded = Init::NormalPadded {
            std: INIT_STD,
            zero_row: PAD as usize,
        };
        b.at("text_transformer", |b| {
            b.unused(
                "pooler.dense.weight",
                &[width, width],
                Init::Normal(INIT_STD),
            );
            b.unused("pooler.dense.bias", &[width], Init::Constant(0.0));
            let layers = (0..config.layers).map(|layer| {
                b.at(format!("encoder.layer.{layer}"), |b| Layer {
                    attention: AttentionBlock::new(b, "attention", sizes),
                    feed_forward: FeedForward::new(b, sizes),
                })
            });
            let layers = layers.collect();
            b.at("embeddings", |b| TextTower {
                words: b.table(
                    "word_embeddings.weight",
                    &[config.vocab as usize, width],
                    padded,
                ),
                positions: b.table(
                    "position_embeddings.weight",
                    &[config.positions as usize, width],
                    padded,
                ),
                token_type: b.leaf(
                    "token_type_embeddings.weight",
                    &[1, width],
                    Init::Normal(INIT_STD),
                ),
                norm: LayerNorm::new(b, "LayerNorm", width, EPSILON),
                dropout: Dropout {
                    rate: dropout,
                    site: b.name("dropout"),
                },
                layers,
                width,
            })
        })
    }

    /// # Shapes
    /// ids `[batch x length]`, mask `[batch, 1, 1, length]` → per layer `[batch, length, hidden]`
    pub fn forward(
        &self,
        pass: &mut Pass,
        ids: &[i32],
        batch: usize,
        mask: &Tensor<4>,
    ) -> Result<Vec<Tensor<3>>, ModelError> {
        let length = ids.len() / batch;
        let words = pass.gather(self.words, ids.to_vec(), PAD);
        let positions = pass.gather(self.positions, position_ids(ids, length), PAD);
        let token_type = pass
            .weights
            .vector(self.token_type)
            .reshape([1, self.width]);
        let sum = (words + positions + token_type).reshape([batch, length, self.width]);
        let mut x = pass.dropout(&self.dropout, self.norm.forward(pass, sum));
        pass.record("text_embeddings", &x)?;
        let mut outputs = Vec::with_capacity(self.layers.len());
        for (l, layer) in self.layers.iter().enumerate() {
            let attended = layer.attention.forward(pass, x.clone(), x, Some(mask));
            x = layer.feed_forward.forward(pass, attended);
            pass.record(&format!("text_layer.{l}"), &x)?;
            outputs.push(x.clone());
        }
        Ok(outputs)
    }
}

/// Tokens count 2, 3, 4, …; every pad has position 1. From the ids given, not from the attention
/// mask (model_spec 2).
fn position_ids(ids: &[i32], length: usize) -> Vec<i32> {
    let of_row = |row: &[i32]| {
        let mut tokens = 0;
        let position = |id: &i32| {
            let token = i32::from(*id != PAD);
            tokens += token;
            token * tokens + PAD
        };
        row.iter().map(position).collect::<Vec<i32>>()
    };
    ids.chunks(length).flat_map(of_row).collect()
}

/// Linear projection of a tower's output into the cross-modal width, with a vector per layer.
#[derive(Clone, Debug)]
pub(crate) struct Transform {
    linear: Linear,
    layer_embeddings: ParamId,
    name: &'static str,
}

impl Transform {
    /// `name` is `text` or `image`; `layers` all layers of the tower, `[inputs, outputs]` the widths.
    pub fn new(b: &mut Builder, name: &'static str, layers: usize, widths: [usize; 2]) -> Self {
        let table = format!("layer_embeddings_{name}.weight");
        Transform {
            linear: Linear::new(
                b,
                &format!("cross_modal_{name}_transform"),
                widths[0],
                widths[1],
            ),
            layer_embeddings: b.leaves(
                &table,
                &[layers, widths[1]],
                Init::Normal(INIT_STD),
                layers,
            ),
            name,
        }
    }

    /// Managed layers in the managers' width: `W x + b + type + layer embedding` (model_spec 4).
    ///
    /// # Shapes
    /// per layer `[batch, length, inputs]` → `[batch, length, outputs]`; `first` is the absolute
    /// index of the first layer given.
    pub fn forward(
        &self,
        pass: &mut Pass,
        managed: &[Tensor<3>],
        first: usize,
        token_type: &Tensor<1>,
    ) -> Result<Vec<Tensor<3>>, ModelError> {
        let project = |(i, x): (usize, &Tensor<3>)| {
            let layer = pass.weights.part(self.layer_embeddings, first + i);
            self.linear
                .forward_plus(pass, x.clone(), token_type.clone() + layer)
        };
        let experts: Vec<Tensor<3>> = managed.iter().enumerate().map(project).collect();
        if pass.is_traced() {
            let stacked: Tensor<4> = Tensor::stack(experts.clone(), 1);
            pass.record(&format!("{}_manager_input", self.name), &stacked)?;
            let plain = managed
                .iter()
                .map(|x| self.linear.forward(pass, x.clone()))
                .collect();
            let stacked: Tensor<4> = Tensor::stack(plain, 1);
            pass.record(&format!("{}_transform.0", self.name), &stacked)?;
        }
        Ok(experts)
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn positions_count_tokens_and_leave_pads_at_one() {
        let ids = [0, 7, 2, 1, 1, 0, 1, 9, 2, 1];
        assert_eq!(super::position_ids(&ids, 5), [2, 3, 4, 1, 1, 2, 1, 3, 4, 1]);
    }
}
