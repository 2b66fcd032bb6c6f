//! The model as a whole: ManagerTower, BridgeTower or METER with one task's heads (model_spec 1-8).
//!
//! Text tower and image tower, their transforms, the cross-modal encoder, poolers and heads. Losses
//! and passes are with the tasks: `pretrain`, `classify`, `retrieve`.

use burn::tensor::Tensor;

use belfry_configs::{Model, Recompute, System, Task};

use crate::batch::BatchSizes;
use crate::cross_modal::{CrossModal, Outputs};
use crate::draws::Draws;
use crate::error::ModelError;
use crate::heads::Heads;
use crate::image_tower::ImageTower;
use crate::layers::{INIT_STD, Pooler, score_mask};
use crate::params::{Builder, Init, ParamId, ParamTable};
use crate::pass::{Pass, Trace};
use crate::text_tower::TextTower;
use crate::transform::{Tower, Transform};
use crate::weights::Weights;

/// Shape of the table that CLIP's text side leaves in the authors' model.
const CLIP_LEFTOVERS: [usize; 2] = [77, 512];

/// The structure of a model: of the paper's ManagerTower or of a system that it is compared with.
/// Holds no numbers: see [`ParamTable`].
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
    pub(crate) heads: Heads,
    pub(crate) task: Task,
    pub(crate) sizes: Sizes,
    recompute: Recompute,
}

/// Sizes that passes ask for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub text_len: usize,
    pub vocab: usize,
    pub image_side: usize,
    /// Managers that draw noise in one pass.
    pub manager_calls: usize,
    /// Elements per row of a text and of an image manager's noise.
    pub noise_lens: [usize; 2],
    pub global_negatives: bool,
    /// Width of a contrastive feature.
    pub contrastive: usize,
    /// The lowest text layer that is looked at.
    text_first: usize,
}

/// What one forward pass reads.
pub(crate) struct Inputs<'a> {
    pub ids: &'a [i32],
    pub text_mask: &'a [f32],
    pub images: Images<'a>,
    pub batch: usize,
}

/// The images of a forward pass.
pub(crate) enum Images<'a> {
    /// Normalised pixels `[batch, 3, side, side]`, for the image tower.
    Pixels {
        values: &'a [f32],
        /// Row of the token type table: 1, of NLVR2's second image 2.
        token_type: usize,
    },
    /// Experts `[batch, length, hidden]` that the image tower gave before.
    Experts(Vec<Tensor<3>>),
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
        let (text_view, image_view) = (Tower::text(model), Tower::image(model));
        let text = TextTower::new(b, &model.text, model.dropout);
        let image = ImageTower::new(b, &model.image, image_view.looked_at(model), leftovers);
        let text_transform = Transform::new(b, model, text_view);
        let image_transform = Transform::new(b, model, image_view);
        let types = if model.task == Task::Nlvr2 { 3 } else { 2 };
        let token_types = b.leaves(
            "token_type_embeddings.weight",
            &[types, hidden],
            Init::Normal(INIT_STD),
            types,
        );
        let experts = [text_view.experts(model), image_view.experts(model)];
        let cross_modal = CrossModal::new(b, model, experts);
        let text_pooler = Pooler::new(b, "cross_modal_text_pooler", hidden);
        let image_pooler = Pooler::new(b, "cross_modal_image_pooler", hidden);
        let heads = Heads::new(b, model);
        let grid = (model.image.size / model.image.patch) as usize;
        let noise = |experts: u32, length: usize| experts as usize * length * hidden;
        let noisy = model.system == System::ManagerTower && model.manager_noise;
        let sizes = Sizes {
            text_len,
            vocab: model.text.vocab as usize,
            image_side: model.image.size as usize,
            manager_calls: if noisy {
                2 * model.cross_layers as usize
            } else {
                0
            },
            noise_lens: [
                noise(experts[0], text_len),
                noise(experts[1], grid * grid + 1),
            ],
            global_negatives: model.head.global_negatives,
            contrastive: model.head.contrastive_hidden as usize,
            text_first: (model.text.layers - text_view.looked_at(model)) as usize,
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
            heads,
            task: model.task,
            sizes,
            recompute: Recompute::None,
        })
    }

    /// The same model, with what its backward passes compute again. Changes no bit.
    pub fn recomputing(self, recompute: Recompute) -> Self {
        ManagerTower { recompute, ..self }
    }

    /// Pass `number` over `weights`, differentiated as this model does.
    pub(crate) fn pass<'a>(
        &self,
        weights: &'a Weights,
        number: u64,
        draws: Draws<'a>,
        trace: Option<&'a mut Trace>,
    ) -> Pass<'a> {
        let mut pass = Pass::new(weights, number, draws, trace);
        pass.recompute = self.recompute;
        pass
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

    /// A batch came that belongs to other tasks.
    pub(crate) fn other_task(&self, needed: &'static str) -> ModelError {
        ModelError::Task {
            needed,
            task: self.task,
        }
    }

    /// The text tower: outputs of the layers that the system looks at, lowest first, and what
    /// attention to the text adds to its scores.
    pub(crate) fn text_layers<'a>(
        &'a self,
        pass: &mut Pass<'a>,
        ids: &[i32],
        mask: &[f32],
        batch: usize,
    ) -> Result<(Vec<Tensor<3>>, Tensor<4>), ModelError> {
        let mask = score_mask(pass, mask, batch);
        let mut layers = self.text.forward(pass, ids, batch, &mask)?;
        layers.drain(..self.sizes.text_first);
        Ok((layers, mask))
    }

    /// The image tower, likewise.
    pub(crate) fn image_layers<'a>(
        &'a self,
        pass: &mut Pass<'a>,
        pixels: &[f32],
        batch: usize,
    ) -> Result<Vec<Tensor<3>>, ModelError> {
        self.image.forward(pass, pixels, batch)
    }

    /// Text layers in the cross-modal width.
    pub(crate) fn text_experts<'a>(
        &'a self,
        pass: &mut Pass<'a>,
        layers: &[Tensor<3>],
    ) -> Result<Vec<Tensor<3>>, ModelError> {
        pass.block(layers.to_vec(), |pass, layers| {
            let token_type = pass.weights.part(self.token_types, 0);
            self.text_transform.forward(pass, layers, &token_type)
        })
    }

    /// Image layers in the cross-modal width.
    pub(crate) fn image_experts<'a>(
        &'a self,
        pass: &mut Pass<'a>,
        layers: &[Tensor<3>],
        image_type: usize,
    ) -> Result<Vec<Tensor<3>>, ModelError> {
        pass.block(layers.to_vec(), move |pass, layers| {
            let token_type = pass.weights.part(self.token_types, image_type);
            self.image_transform.forward(pass, layers, &token_type)
        })
    }

    /// The cross-modal encoder, from experts of text and image.
    ///
    /// # Shapes
    /// → text stream `[batch, text_len, hidden]`, image stream; both as `outputs` says.
    fn fuse<'a>(
        &'a self,
        pass: &mut Pass<'a>,
        experts: [Vec<Tensor<3>>; 2],
        text_mask: &Tensor<4>,
        outputs: Outputs,
    ) -> Result<(Tensor<3>, Option<Tensor<3>>), ModelError> {
        self.text_transform.record_experts(pass, &experts[0])?;
        self.image_transform.record_experts(pass, &experts[1])?;
        self.cross_modal.forward(pass, experts, text_mask, outputs)
    }

    /// Both towers and the cross-modal encoder.
    pub(crate) fn encode<'a>(
        &'a self,
        pass: &mut Pass<'a>,
        inputs: &Inputs,
        outputs: Outputs,
    ) -> Result<(Tensor<3>, Option<Tensor<3>>), ModelError> {
        let (experts, mask) = self.experts(pass, inputs)?;
        self.fuse(pass, experts, &mask, outputs)
    }

    fn experts<'a>(
        &'a self,
        pass: &mut Pass<'a>,
        inputs: &Inputs,
    ) -> Result<([Vec<Tensor<3>>; 2], Tensor<4>), ModelError> {
        let (text, mask) = self.text_layers(pass, inputs.ids, inputs.text_mask, inputs.batch)?;
        let image = match &inputs.images {
            Images::Pixels { values, token_type } => {
                let layers = self.image_layers(pass, values, inputs.batch)?;
                self.image_experts(pass, &layers, *token_type)?
            }
            Images::Experts(experts) => experts.clone(),
        };
        let text = self.text_experts(pass, &text)?;
        Ok(([text, image], mask))
    }

    /// Both streams' pooled features of one text and image each (model_spec's cls_feats).
    pub(crate) fn features<'a>(
        &'a self,
        pass: &mut Pass<'a>,
        inputs: &Inputs,
    ) -> Result<Tensor<2>, ModelError> {
        let (experts, mask) = self.experts(pass, inputs)?;
        self.fused_features(pass, experts, &mask)
    }

    /// The same, from experts.
    pub(crate) fn fused_features<'a>(
        &'a self,
        pass: &mut Pass<'a>,
        experts: [Vec<Tensor<3>>; 2],
        text_mask: &Tensor<4>,
    ) -> Result<Tensor<2>, ModelError> {
        let outputs = if pass.is_traced() {
            Outputs::All
        } else {
            Outputs::FirstTokens
        };
        let (text, image) = self.fuse(pass, experts, text_mask, outputs)?;
        let image = image.expect("only the MLM pass goes without the image stream");
        self.pool(pass, text, image)
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
    if model.system == System::BridgeTower {
        let towers = [managed[0], managed[1]];
        for (key, managed, _) in towers {
            if managed != model.cross_layers {
                let reason = format!("must be model.cross_layers = {}", model.cross_layers);
                return refuse(key, managed, reason);
            }
        }
        if model.text.layers != model.image.layers {
            let reason = format!("must be model.text.layers = {}", model.text.layers);
            return refuse("model.image.layers", model.image.layers, reason);
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
    let rows = text_len + model.text.first_position() as usize;
    if text_len == 0 || rows > model.text.positions as usize {
        let reason = format!("must hold {rows} rows for {text_len} tokens");
        return refuse("model.text.positions", model.text.positions, reason);
    }
    Ok(())
}
