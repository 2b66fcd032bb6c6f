//! ManagerTower as a whole: the authors' pre-training model (model_spec 1-5, 8).
//!
//! Text tower and image tower, their transforms, the cross-modal encoder, poolers and the MLM and
//! ITM heads. Losses and passes are in `pretrain`.

use burn::tensor::{Tensor, activation};

use belfry_configs::Model;

use crate::batch::BatchSizes;
use crate::cross_modal::{CROSS_EPSILON, CrossModal, Outputs};
use crate::error::ModelError;
use crate::image_tower::ImageTower;
use crate::layers::{INIT_STD, LayerNorm, Linear, Pooler, score_mask};
use crate::params::{Builder, Init, ParamId, ParamTable};
use crate::pass::Pass;
use crate::text_tower::{TextTower, Transform};

/// Shape of the table that CLIP's text side leaves in the authors' model.
const CLIP_LEFTOVERS: [usize; 2] = [77, 512];
/// First temperature of the contrastive loss, which pre-training does not use (model_spec 8).
const TEMPERATURE: f32 = 0.07;

/// The structure of a ManagerTower with MLM and ITM heads. Holds no numbers: see [`ParamTable`].
#[derive(Clone, Debug)]
pub struct ManagerTower {
    table: ParamTable,
    text: TextTower,
    image: ImageTower,
    text_transform: Transform,
    image_transform: Transform,
    token_types: ParamId,
    cross_modal: CrossModal,
    text_pooler: Pooler,
    image_pooler: Pooler,
    pub(crate) mlm: MlmHead,
    pub(crate) itm: Linear,
    pub(crate) sizes: Sizes,
}

/// Sizes that passes ask for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub text_len: usize,
    pub vocab: usize,
    pub image_side: usize,
    pub text_first_managed: usize,
    pub image_first_managed: usize,
    /// Managers that draw noise in one pass.
    pub manager_calls: usize,
    pub noise_lens: [usize; 2],
}

/// MLM head: linear, GELU, LN, decoder that is not tied to the word table.
#[derive(Clone, Debug)]
pub(crate) struct MlmHead {
    dense: Linear,
    norm: LayerNorm,
    decoder: Linear,
}

impl MlmHead {
    /// # Shapes
    /// `[rows, hidden]` → `[rows, vocab]`
    pub fn forward(&self, pass: &Pass, x: Tensor<2>) -> Tensor<2> {
        let x = activation::gelu(self.dense.forward(pass, x));
        self.decoder.forward(pass, self.norm.forward(pass, x))
    }
}

/// What one forward pass reads.
pub(crate) struct Inputs<'a> {
    pub ids: &'a [i32],
    pub text_mask: &'a [f32],
    pub pixels: &'a [f32],
    pub batch: usize,
}

impl ManagerTower {
    /// The model of these sizes for captions of `text_len` tokens.
    ///
    /// # Errors
    /// [`ModelError::Sizes`] naming the key that does not fit.
    pub fn new(model: &Model, text_len: usize) -> Result<Self, ModelError> {
        Self::with_clip_leftovers(model, text_len, CLIP_LEFTOVERS)
    }

    /// The same with another shape of the unused `vit_model.positional_embedding` (context, width),
    /// for checkpoints of CLIP models other than the published one.
    ///
    /// # Errors
    /// As [`ManagerTower::new`].
    pub fn with_clip_leftovers(
        model: &Model,
        text_len: usize,
        leftovers: [usize; 2],
    ) -> Result<Self, ModelError> {
        check(model, text_len)?;
        let mut builder = Builder::default();
        let b = &mut builder;
        let hidden = model.hidden as usize;
        b.unused("temperature", &[], Init::Constant(TEMPERATURE));
        let text_width = [model.text.hidden as usize, hidden];
        let image_width = [model.image.hidden as usize, hidden];
        let vocab = model.text.vocab as usize;
        let text = TextTower::new(b, &model.text, model.dropout);
        let image = ImageTower::new(b, &model.image, leftovers);
        let text_transform = Transform::new(b, "text", model.text.layers as usize, text_width);
        let image_transform = Transform::new(b, "image", model.image.layers as usize, image_width);
        let token_types = b.leaves(
            "token_type_embeddings.weight",
            &[2, hidden],
            Init::Normal(INIT_STD),
            2,
        );
        let cross_modal = CrossModal::new(b, model);
        let text_pooler = Pooler::new(b, "cross_modal_text_pooler", hidden);
        let image_pooler = Pooler::new(b, "cross_modal_image_pooler", hidden);
        let mlm = b.at("mlm_score", |b| MlmHead {
            dense: Linear::new(b, "transform.dense", hidden, hidden),
            norm: LayerNorm::new(b, "transform.LayerNorm", hidden, CROSS_EPSILON),
            decoder: Linear::named(b, "decoder.weight", Some("bias"), [vocab, hidden]),
        });
        let itm = Linear::new(b, "itm_score.fc", 2 * hidden, 2);
        let grid = (model.image.size / model.image.patch) as usize;
        let noise = |experts: u32, length: usize| experts as usize * length * hidden;
        let sizes = Sizes {
            text_len,
            vocab,
            image_side: model.image.size as usize,
            text_first_managed: (model.text.layers - model.text.managed) as usize,
            image_first_managed: (model.image.layers - model.image.managed) as usize,
            manager_calls: if model.manager_noise {
                2 * model.cross_layers as usize
            } else {
                0
            },
            noise_lens: [
                noise(model.text.managed, text_len),
                noise(model.image.managed, grid * grid + 1),
            ],
        };
        Ok(ManagerTower {
            table: builder.finish(),
            text,
            image,
            text_transform,
            image_transform,
            token_types,
            cross_modal,
            text_pooler,
            image_pooler,
            mlm,
            itm,
            sizes,
        })
    }

    /// Names, shapes and places of all parameters.
    pub fn table(&self) -> &ParamTable {
        &self.table
    }

    pub(crate) fn batch_sizes(&self) -> BatchSizes {
        BatchSizes {
            text_len: self.sizes.text_len,
            vocab: self.sizes.vocab,
            image_side: self.sizes.image_side,
        }
    }

    /// Both towers and the cross-modal encoder.
    ///
    /// # Shapes
    /// → text stream `[batch, text_len, hidden]`, image stream; both as `outputs` says.
    pub(crate) fn encode(
        &self,
        pass: &mut Pass,
        inputs: &Inputs,
        outputs: Outputs,
    ) -> Result<(Tensor<3>, Option<Tensor<3>>), ModelError> {
        let mask = score_mask(pass, inputs.text_mask, inputs.batch);
        let text = self.text.forward(pass, inputs.ids, inputs.batch, &mask)?;
        let image = self.image.forward(pass, inputs.pixels, inputs.batch)?;
        let first = self.sizes.text_first_managed;
        let token_type = pass.weights.part(self.token_types, 0);
        let text = self
            .text_transform
            .forward(pass, &text[first..], first, &token_type)?;
        let first = self.sizes.image_first_managed;
        let token_type = pass.weights.part(self.token_types, 1);
        let image = self
            .image_transform
            .forward(pass, &image, first, &token_type)?;
        self.cross_modal.forward(pass, text, image, &mask, outputs)
    }

    /// `concat(text pooled, image pooled)` (model_spec 4).
    ///
    /// # Shapes
    /// two `[batch, length, hidden]` → `[batch, 2 x hidden]`
    pub(crate) fn pool(
        &self,
        pass: &mut Pass,
        text: Tensor<3>,
        image: Tensor<3>,
    ) -> Result<Tensor<2>, ModelError> {
        let text = self.text_pooler.forward(pass, text);
        let image = self.image_pooler.forward(pass, image);
        pass.record("text_pooled", &text)?;
        pass.record("image_pooled", &image)?;
        Ok(Tensor::cat(vec![text, image], 1))
    }
}

fn check(model: &Model, text_len: usize) -> Result<(), ModelError> {
    let refuse = |key, value: u32, reason: String| {
        Err(ModelError::Sizes {
            key,
            value: value.into(),
            reason,
        })
    };
    let heads = [
        ("model.heads", model.heads, model.hidden),
        ("model.text.heads", model.text.heads, model.text.hidden),
        ("model.image.heads", model.image.heads, model.image.hidden),
    ];
    for (key, heads, width) in heads {
        if heads == 0 || width == 0 || !width.is_multiple_of(heads) {
            return refuse(key, heads, format!("must divide the width {width}"));
        }
    }
    let managed = [
        ("model.text.managed", model.text.managed, model.text.layers),
        (
            "model.image.managed",
            model.image.managed,
            model.image.layers,
        ),
    ];
    for (key, managed, layers) in managed {
        if managed == 0 || managed > layers {
            return refuse(key, managed, format!("must lie in 1..={layers}"));
        }
    }
    let patch = model.image.patch;
    if patch == 0 || model.image.size == 0 || !model.image.size.is_multiple_of(patch) {
        return refuse(
            "model.image.patch",
            patch,
            format!("must divide {}", model.image.size),
        );
    }
    if model.cross_layers == 0 || model.mlp_ratio == 0 || model.text.intermediate == 0 {
        return refuse(
            "model.cross_layers",
            model.cross_layers,
            "needs at least 1".into(),
        );
    }
    if model.text.vocab < 2 {
        return refuse(
            "model.text.vocab",
            model.text.vocab,
            "must hold the padding id 1".into(),
        );
    }
    if !(0.0..1.0).contains(&model.dropout) {
        return refuse(
            "model.dropout",
            0,
            format!("{} does not lie in 0..1", model.dropout),
        );
    }
    // Tokens take positions 2, 3, …
    if text_len == 0 || text_len + 2 > model.text.positions as usize {
        let reason = format!("must hold text_len + 2 = {} rows", text_len + 2);
        return refuse("model.text.positions", model.text.positions, reason);
    }
    Ok(())
}
