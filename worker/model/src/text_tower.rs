//! The text tower: RoBERTa (model_spec 2) or BERT (17), all layer outputs.
//!
//! Tokens in, one tensor per layer out. It refuses to know which layers are managed.

use burn::tensor::Tensor;

use crate::error::ModelError;
use crate::layers::{AttentionBlock, FeedForward, INIT_STD, LayerNorm, LayerSizes};
use crate::params::{Builder, Init, ParamId};
use crate::pass::{Dropout, Pass};
use belfry_configs::TextKind;

/// What sets RoBERTa and BERT apart.
#[derive(Clone, Copy, Debug)]
struct Layout {
    /// Padding id: its row of the word table gets no gradient.
    pad: i32,
    /// The padding row of the position table, if it has one.
    position_pad: Option<i32>,
    token_types: usize,
    /// As published with the weights.
    epsilon: f32,
}

impl Layout {
    fn of(kind: TextKind) -> Self {
        match kind {
            TextKind::Roberta => Layout {
                pad: 1,
                position_pad: Some(1),
                token_types: 1,
                epsilon: 1e-5,
            },
            TextKind::Bert => Layout {
                pad: 0,
                position_pad: None,
                token_types: 2,
                epsilon: 1e-12,
            },
        }
    }
}

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
    layout: Layout,
}

impl TextTower {
    pub fn new(b: &mut Builder, config: &belfry_configs::TextTower, dropout: f32) -> Self {
        let layout = Layout::of(config.kind);
        let sizes = LayerSizes {
            hidden: config.hidden as usize,
            heads: config.heads as usize,
            intermediate: config.intermediate as usize,
            dropout,
            epsilon: layout.epsilon,
        };
        let width = sizes.hidden;
        let padded = |row: i32| Init::NormalPadded {
            std: INIT_STD,
            zero_row: row as usize,
        };
        let position_init = layout.position_pad.map_or(Init::Normal(INIT_STD), padded);
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
                    padded(layout.pad),
                ),
                positions: b.table(
                    "position_embeddings.weight",
                    &[config.positions as usize, width],
                    position_init,
                ),
                token_type: b.leaves(
                    "token_type_embeddings.weight",
                    &[layout.token_types, width],
                    Init::Normal(INIT_STD),
                    layout.token_types,
                ),
                norm: LayerNorm::new(b, "LayerNorm", width, layout.epsilon),
                dropout: Dropout {
                    rate: dropout,
                    site: b.name("dropout"),
                },
                layers,
                width,
                layout,
            })
        })
    }

    /// # Shapes
    /// ids `[batch x length]`, mask `[batch, 1, 1, length]` → per layer `[batch, length, hidden]`
    pub fn forward<'a>(
        &'a self,
        pass: &mut Pass<'a>,
        ids: &[i32],
        batch: usize,
        mask: &Tensor<4>,
    ) -> Result<Vec<Tensor<3>>, ModelError> {
        let length = ids.len() / batch;
        let Layout {
            pad, position_pad, ..
        } = self.layout;
        let positions = match position_pad {
            Some(first) => counted_positions(ids, length, pad, first),
            None => (0..ids.len()).map(|i| (i % length) as i32).collect(),
        };
        let words = pass.gather(self.words, ids.to_vec(), Some(pad));
        let positions = pass.gather(self.positions, positions, position_pad);
        let token_type = pass
            .weights
            .vector(self.token_type)
            .reshape([1, self.width]);
        let sum = (words + positions + token_type).reshape([batch, length, self.width]);
        let x = pass.dropout(&self.dropout, self.norm.forward(pass, sum));
        pass.record("text_embeddings", &x)?;
        let mut x = pass.cut(vec![x]).remove(0);
        let mut outputs = Vec::with_capacity(self.layers.len());
        for (l, layer) in self.layers.iter().enumerate() {
            let mask = mask.clone();
            let layer = pass.block(vec![x], move |pass, x| {
                let (x, mask) = (x[0].clone(), pass.adopt(&mask));
                let attended = layer.attention.forward(pass, x.clone(), x, Some(&mask));
                Ok(vec![layer.feed_forward.forward(pass, attended)])
            });
            x = layer?.remove(0);
            pass.record(&format!("text_layer.{l}"), &x)?;
            outputs.push(x.clone());
        }
        Ok(outputs)
    }
}

/// RoBERTa's positions: tokens count on from the padding row, every pad stands on it. From the ids
/// given, not from the attention mask (model_spec 2).
fn counted_positions(ids: &[i32], length: usize, pad: i32, padding_row: i32) -> Vec<i32> {
    let of_row = |row: &[i32]| {
        let mut tokens = 0;
        let position = |id: &i32| {
            let token = i32::from(*id != pad);
            tokens += token;
            token * tokens + padding_row
        };
        row.iter().map(position).collect::<Vec<i32>>()
    };
    ids.chunks(length).flat_map(of_row).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn positions_count_tokens_and_leave_pads_at_one() {
        let ids = [0, 7, 2, 1, 1, 0, 1, 9, 2, 1];
        let positions = super::counted_positions(&ids, 5, 1, 1);
        assert_eq!(positions, [2, 3, 4, 1, 1, 2, 1, 3, 4, 1]);
    }
}
