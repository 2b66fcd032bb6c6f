//! How large a model is: parameters, multiply-accumulates and activations per module, as functions
//! of its sizes alone (paper Table 6, model_spec 16).
//!
//! No tensor is made: a model of any size is counted at once. Counted is the encoder up to
//! `cls_feats` without any task's head, as in Table 6; unused tensors that the authors' model holds
//! are counted as parameters too. What is shared by passes or left out because nobody reads it is
//! counted like the rest: the numbers are the model's, not this implementation's.

use belfry_configs::{
    ContrastiveScope, ImageKind, ImageTower, Manager, ManagerQuery, ManagerWeight, Model,
    Recompute, System, Task, TextKind, TextTower,
};

use crate::shared_images::graphs;
use crate::transform::Tower;

/// Multiply-accumulates that one element of a layer norm counts for, scale and shift included. What
/// Table 6's counter (fvcore) takes for it.
const NORM_MACS: u64 = 5;
/// Elements of CLIP's text side in the authors' model: a position table 77 x 512 and a norm of 512.
const CLIP_LEFTOVERS: u64 = 77 * 512 + 2 * 512;
/// CLIP's and ViT's feed-forward width over their own width.
const IMAGE_MLP_RATIO: u64 = 4;
/// Rows of the table that see each distinct image once.
const IMAGE_TOWER: &str = "image tower";
const TEXT_TOWER: &str = "text tower";
const TEXT_TRANSFORM: &str = "text transform";
const IMAGE_TRANSFORM: &str = "image transform";
const UNUSED: &str = "unused";
/// Bytes of an f32.
const F32: u64 = 4;

/// A module's share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// Elements of its parameters.
    pub parameters: u64,
    /// Multiply-accumulates of one pass over one pair: linear layers, matrix products, convolution
    /// and layer norms. The paper calls them FLOPs; real operations are about twice as many.
    pub macs: u64,
    /// f32 elements that one pair's forward pass keeps for its backward, as this implementation has
    /// it: inputs of linear layers, what norms and activation functions need, both sides of
    /// attention's products, dropout masks.
    pub activations: u64,
}

impl std::ops::Add for Share {
    type Output = Share;
    fn add(self, other: Share) -> Share {
        Share {
            parameters: self.parameters + other.parameters,
            macs: self.macs + other.macs,
            activations: self.activations + other.activations,
        }
    }
}

impl std::ops::Mul<u64> for Share {
    type Output = Share;
    fn mul(self, times: u64) -> Share {
        Share {
            parameters: self.parameters * times,
            macs: self.macs * times,
            activations: self.activations * times,
        }
    }
}

impl std::iter::Sum for Share {
    fn sum<I: Iterator<Item = Share>>(shares: I) -> Share {
        shares.fold(Share::default(), |a, b| a + b)
    }
}

impl Share {
    fn with_parameters(self, parameters: u64) -> Share {
        Share { parameters, ..self }
    }

    /// The same module used so often.
    fn times_used(self, times: u64) -> Share {
        (self * times).with_parameters(self.parameters)
    }
}

/// A row of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleSize {
    /// The module.
    pub name: &'static str,
    /// Its share.
    pub share: Share,
}

/// A model as it is counted.
struct Counted<'a> {
    model: &'a Model,
    /// Tokens of text and image.
    lengths: [u64; 2],
    /// Cross-modal width.
    width: u64,
}

/// Shares by module, in the order of a forward pass over one pair with `text_len` tokens.
pub fn modules(model: &Model, text_len: usize) -> Vec<ModuleSize> {
    let counted = Counted::new(model, text_len);
    let [text, image] = counted.lengths;
    let (text_tower, image_tower) = (Tower::text(model), Tower::image(model));
    let row = |name, share| ModuleSize { name, share };
    vec![
        row(TEXT_TOWER, counted.text_tower(&model.text)),
        row(IMAGE_TOWER, counted.image_tower(&model.image)),
        row(TEXT_TRANSFORM, counted.transform(&text_tower, text)),
        row(IMAGE_TRANSFORM, counted.transform(&image_tower, image)),
        row("embeddings", counted.embeddings()),
        row(
            "text managers",
            counted.fusion(text_tower.experts(model).into(), text, image),
        ),
        row(
            "image managers",
            counted.fusion(image_tower.experts(model).into(), image, text),
        ),
        row("text cross layers", counted.cross_layers(text, image)),
        row("image cross layers", counted.cross_layers(image, text)),
        row(
            "poolers",
            linear(1, counted.width, counted.width) * 2 + kept(2 * counted.width),
        ),
        row(UNUSED, counted.unused()),
    ]
}

/// The whole.
pub fn total(modules: &[ModuleSize]) -> Share {
    modules.iter().map(|module| module.share).sum()
}

/// Multiply-accumulates of both towers and their transforms: what is computed of a text and of an
/// image alone.
pub fn tower_macs(modules: &[ModuleSize]) -> u64 {
    let own =
        |module: &&ModuleSize| module.name.ends_with("tower") || module.name.ends_with("transform");
    modules
        .iter()
        .filter(own)
        .map(|module| module.share.macs)
        .sum()
}

/// Bytes of a share's activations, of one pair.
pub fn activation_bytes(share: Share) -> u64 {
    F32 * share.activations
}

/// Memory of a worker at the peak of a training step on the host, in bytes, by what holds it; all f32.
/// `trained` are the elements of all parameters, heads included; the device batch has `pairs` pairs.
///
/// Passes run side by side, the image tower in several graphs. The first of those adds its gradients
/// to the sum as they come, the others' wait for it. What the workers sum stands behind the lanes'
/// own gradient, and its memory is kept from step to step.
pub fn training_bytes(
    model: &Model,
    text_len: usize,
    (pairs, trained): (u64, u64),
    recompute: Recompute,
) -> Vec<(&'static str, u64)> {
    let modules = modules(model, text_len);
    let share = |name: &str| {
        let named = modules.iter().filter(|module| module.name == name);
        total(&named.cloned().collect::<Vec<_>>())
    };
    let whole = total(&modules);
    let image = share(IMAGE_TOWER) + share(IMAGE_TRANSFORM);
    let counted = Counted::new(model, text_len);
    // The passes of pre-training run side by side and share the images of matching pairs. Contrast
    // encodes hard negatives beside the pairs, where they may lie in any lane, and fuses them all.
    let whole_batch = model.head.contrastive_scope == ContrastiveScope::GlobalBatch;
    let (images, fused, beside) = match model.task {
        Task::Pretrain => (pairs + pairs.div_ceil(2), 2 * pairs, 2),
        Task::Retrieval | Task::PretrainItc if whole_batch => (2 * pairs, 3 * pairs, 1),
        Task::Retrieval | Task::PretrainItc => (pairs, 3 * pairs, 1),
        Task::Nlvr2 => (2 * pairs, 2 * pairs, 1),
        Task::Vqa | Task::SnliVe => (pairs, pairs, 1),
    };
    let texts = match model.task {
        Task::Retrieval | Task::PretrainItc => images,
        _ => fused,
    };
    let tables = counted.text_tables(&model.text);
    let pass = whole.parameters - image.parameters - share(UNUSED).parameters - tables;
    let graphs = graphs(images as usize, true) as u64;
    let waiting = ((beside - 1) * pass).max((graphs - 1) * image.parameters);
    // The heads are one graph, the largest there is.
    let under_way = trained - whole.parameters;
    let block = counted.largest_block(&modules);
    let mut rows = vec![
        ("parameters", trained),
        ("AdamW's moments", 2 * trained),
        ("gradient of the lanes", trained),
        ("gradients on their way to it", waiting + under_way),
        ("gradient of all workers", trained),
    ];
    match recompute {
        Recompute::None => {
            let text = (share(TEXT_TOWER) + share(TEXT_TRANSFORM)).activations;
            let fusion = whole.activations - image.activations - text;
            let kept = texts * text + fused * fusion + images * image.activations;
            rows.push(("activations", kept));
        }
        Recompute::Blocks => {
            let [of_pass, of_image] = counted.between_blocks();
            let kept = fused * of_pass + images * of_image;
            rows.push(("activations between blocks", kept));
            rows.push(("blocks that run again", beside * pairs * block));
        }
    }
    // About as large as the activations that they belong to.
    rows.push(("gradients inside blocks", beside * pairs * block));
    rows.into_iter().map(|(what, n)| (what, F32 * n)).collect()
}

/// `[rows, inputs] x [inputs, outputs] + bias`.
fn linear(rows: u64, inputs: u64, outputs: u64) -> Share {
    Share {
        parameters: inputs * outputs + outputs,
        macs: rows * inputs * outputs,
        activations: rows * inputs,
    }
}

/// A layer norm over `width`, on `rows` rows.
fn norm(rows: u64, width: u64) -> Share {
    Share {
        parameters: 2 * width,
        macs: NORM_MACS * rows * width,
        // The centred input for the variance, the normalised one for the scale.
        activations: 2 * rows * width,
    }
}

/// Parameters alone.
fn held(parameters: u64) -> Share {
    Share {
        parameters,
        ..Share::default()
    }
}

/// Activations alone.
fn kept(activations: u64) -> Share {
    Share {
        activations,
        ..Share::default()
    }
}

/// Self-attention or cross-attention of `rows` queries on `keys` keys, with its four projections.
fn attention(rows: u64, keys: u64, width: u64, heads: u64, dropout: bool) -> Share {
    // Keys and values share their input.
    let projections = linear(rows, width, width) * 2 + linear(keys, width, width) * 2;
    let shared = if rows == keys { 2 } else { 1 } * keys * width;
    // Scores and their exponentials; with dropout also its mask.
    let scores = if dropout { 3 } else { 2 } * heads * rows * keys;
    let products = Share {
        parameters: 0,
        macs: 2 * rows * keys * width,
        // Queries, keys, values, and the result before its division.
        activations: 2 * rows * width + 2 * keys * width + scores,
    };
    let sum = projections + products + mask(rows, width, dropout);
    Share {
        activations: sum.activations - shared,
        ..sum
    }
}

/// Two linear layers around an activation function that keeps `inputs` tensors of its width.
fn feed_forward(rows: u64, width: u64, inside: u64, inputs: u64, dropout: bool) -> Share {
    linear(rows, width, inside)
        + linear(rows, inside, width)
        + kept(inputs * rows * inside)
        + mask(rows, width, dropout)
}

/// The mask of a dropout.
fn mask(rows: u64, width: u64, dropout: bool) -> Share {
    kept(if dropout { rows * width } else { 0 })
}

impl<'a> Counted<'a> {
    fn new(model: &'a Model, text_len: usize) -> Self {
        let grid = u64::from(model.image.size / model.image.patch);
        Counted {
            model,
            lengths: [text_len as u64, grid * grid + 1],
            width: model.hidden.into(),
        }
    }

    /// Elements of the look-up tables, whose gradients are rows.
    fn text_tables(&self, tower: &TextTower) -> u64 {
        (u64::from(tower.vocab) + u64::from(tower.positions)) * u64::from(tower.hidden)
    }

    /// Elements that stand between the blocks of one pass over one pair, and of one image's way
    /// through its tower: what segments begin with, and the small graphs in front of the towers.
    fn between_blocks(&self) -> [u64; 2] {
        let (model, width) = (self.model, self.width);
        let [text_len, image_len] = self.lengths;
        let (text, image) = (Tower::text(model), Tower::image(model));
        let experts = [text, image].map(|tower| u64::from(tower.experts(model)));
        let experts = experts[0] * text_len + experts[1] * image_len;
        // Managers normalise the experts once for all; images that passes share are copied for each.
        let normalised = u64::from(model.system == System::ManagerTower) * experts;
        let own = u64::from(text.experts(model)) * text_len;
        let copied = u64::from(image.experts(model)) * image_len;
        let layers = u64::from(model.cross_layers) * (text_len + image_len);
        let embeddings = 4 * text_len * u64::from(text.hidden);
        let text_layers = u64::from(text.layers) * text_len * u64::from(text.hidden);
        let pass = embeddings + text_layers + (own + copied + normalised + layers) * width;
        let patch = u64::from(model.image.patch);
        let patches = (image_len - 1) * 3 * patch * patch;
        let outputs = 3 + u64::from(image.layers + image.looked_at(model));
        let image = patches + outputs * image_len * u64::from(image.hidden) + copied * width;
        [pass, image]
    }

    /// Activations of the largest block of one pair: a layer of a tower, or a cross-modal layer with
    /// its managers, of average size.
    fn largest_block(&self, modules: &[ModuleSize]) -> u64 {
        let layers = |name: &str| match name {
            TEXT_TOWER => Some((0, self.model.text.layers)),
            IMAGE_TOWER => Some((1, self.model.image.layers)),
            name if name.contains("managers") || name.contains("cross layers") => {
                Some((2, self.model.cross_layers))
            }
            _ => None,
        };
        let mut blocks = [0; 3];
        for module in modules {
            if let Some((block, count)) = layers(module.name) {
                blocks[block] += module.share.activations / u64::from(count);
            }
        }
        blocks.into_iter().max().unwrap_or(0)
    }

    fn text_tower(&self, tower: &TextTower) -> Share {
        let (length, width) = (self.lengths[0], u64::from(tower.hidden));
        let types = match tower.kind {
            TextKind::Roberta => 1,
            TextKind::Bert => 2,
        };
        let dropout = self.model.dropout > 0.0;
        let layer = attention(length, length, width, tower.heads.into(), dropout)
            + feed_forward(length, width, tower.intermediate.into(), 1, dropout)
            + norm(length, width) * 2;
        held(self.text_tables(tower) + types * width)
            + norm(length, width)
            + mask(length, width, dropout)
            + layer * tower.layers.into()
    }

    fn image_tower(&self, tower: &ImageTower) -> Share {
        let (length, width) = (self.lengths[1], u64::from(tower.hidden));
        let patch = u64::from(tower.patch);
        let patches = linear(length - 1, 3 * patch * patch, width);
        let in_front = match tower.kind {
            // A convolution without bias, and a norm of its own.
            ImageKind::Clip => {
                patches.with_parameters(patches.parameters - width) + norm(length, width)
            }
            ImageKind::Vit => patches,
        };
        // CLIP's activation keeps its sigmoid beside its input.
        let inputs = match tower.kind {
            ImageKind::Clip => 2,
            ImageKind::Vit => 1,
        };
        let block = attention(length, length, width, tower.heads.into(), false)
            + feed_forward(length, width, IMAGE_MLP_RATIO * width, inputs, false)
            + norm(length, width) * 2;
        // One norm behind all blocks that are looked at.
        let after = norm(length, width);
        let looked_at = u64::from(Tower::image(self.model).looked_at(self.model));
        in_front
            + held(width + length * width)
            + block * tower.layers.into()
            + after.times_used(looked_at)
    }

    /// One linear layer on every expert; METER's fusion before it has a gate for the lower layers.
    fn transform(&self, tower: &Tower, length: u64) -> Share {
        let width = u64::from(tower.hidden);
        let once = linear(length, width, self.width);
        let gates = if self.model.system == System::Meter && self.model.meter_fusion {
            let lower = u64::from(tower.layers) - 1;
            linear(length, width, width).times_used(lower) + kept(lower * length * width)
        } else {
            Share::default()
        };
        gates + once.times_used(tower.experts(self.model).into())
    }

    /// Token types, and the layer embeddings of managers.
    fn embeddings(&self) -> Share {
        let types = if self.model.task == Task::Nlvr2 { 3 } else { 2 };
        let layers = match self.model.system {
            System::ManagerTower => self.model.text.layers + self.model.image.layers,
            _ => 0,
        };
        held((types + u64::from(layers)) * self.width)
    }

    /// Everything between one stream's transform and its cross-modal layers.
    fn fusion(&self, experts: u64, length: u64, other: u64) -> Share {
        let depth = u64::from(self.model.cross_layers);
        match self.model.system {
            System::Meter => Share::default(),
            System::BridgeTower => norm(length, self.width) * depth,
            System::ManagerTower => (0..depth)
                .map(|layer| self.manager(layer, experts, length, other))
                .sum(),
        }
    }

    fn manager(&self, layer: u64, experts: u64, length: u64, other: u64) -> Share {
        let (model, width) = (self.model, self.width);
        let weight = match model.manager_weight {
            ManagerWeight::Scalar => 1,
            ManagerWeight::Vector => width,
        };
        let split = model.manager == Manager::SaeSplit;
        let every = matches!(model.manager, Manager::SaeJoint | Manager::SaeSplit);
        // Earlier cross-modal outputs that this manager looks at.
        let seen = if every { layer } else { layer.min(1) };
        // With noise weights have full size: one tensor per expert, their sum, its reciprocal.
        let noise = u64::from(model.manager_noise) * (experts + 2) * length * width;
        let norms = norm(length, width) * (experts + seen) + kept(noise);
        let temperature = 1;
        let adaptive = !every && model.manager != Manager::Saue && layer > 0;
        if !adaptive {
            let second = u64::from(split || !every);
            return norms + held((experts + seen) * weight + temperature + second);
        }
        // Of the authors' own adaptive manager alone: a second temperature that nothing reads.
        let fused = model.manager_query == ManagerQuery::Fused;
        let second = u64::from(fused && model.manager == Manager::Aaue);
        norms
            + held(weight + temperature + second)
            + if fused {
                self.fused_query(length, other)
            } else {
                Share::default()
            }
            + self.scores(experts, length, if fused { 2 * width } else { width })
    }

    /// What the own stream attends to in the other: one head, no value and no output projection.
    fn fused_query(&self, length: u64, other: u64) -> Share {
        let width = self.width;
        let attended = Share {
            parameters: 0,
            macs: 2 * length * other * width,
            activations: (length + other) * width + length * other,
        };
        linear(length, width, width) + linear(other, width, width) + norm(other, width) + attended
    }

    /// Scores of an adaptive manager from queries of width `query`, and their softmax.
    fn scores(&self, experts: u64, length: u64, query: u64) -> Share {
        let width = self.width;
        match self.model.manager {
            // The same layer for every expert, on expert and query side by side.
            Manager::ConcatAttention => {
                linear(length, width + query, width).times_used(experts)
                    + kept(experts * length * width)
            }
            // Keys are the experts' first tokens.
            Manager::CrossAttention => {
                let products = Share {
                    parameters: 0,
                    macs: length * experts * width,
                    activations: (length + experts) * width + length * experts,
                };
                linear(length, query, width) + linear(experts, width, width) + products
            }
            _ => linear(length, query, experts) + kept(length * experts),
        }
    }

    fn cross_layers(&self, rows: u64, other: u64) -> Share {
        let (width, heads) = (self.width, u64::from(self.model.heads));
        let (inside, dropout) = (
            u64::from(self.model.mlp_ratio) * width,
            self.model.dropout > 0.0,
        );
        let layer = attention(rows, rows, width, heads, dropout)
            + attention(rows, other, width, heads, dropout)
            + feed_forward(rows, width, inside, 1, dropout)
            + norm(rows, width) * 3;
        layer * self.model.cross_layers.into()
    }

    /// What the authors' model holds and nothing reads: the text tower's pooler, CLIP's leftovers,
    /// the temperature of the contrastive loss.
    fn unused(&self) -> Share {
        let width = u64::from(self.model.text.hidden);
        let leftovers = match self.model.image.kind {
            ImageKind::Clip => CLIP_LEFTOVERS,
            ImageKind::Vit => 0,
        };
        held(width * width + width + leftovers + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::attention;

    #[test]
    fn activations_of_a_small_attention_are_counted_by_hand() {
        // 3 queries on 3 keys, width 4, 2 heads: the input once (12), q, k, v (36), scores and
        // exponentials (36), the result (12), the output projection's input (12).
        assert_eq!(
            attention(3, 3, 4, 2, false).activations,
            12 + 36 + 36 + 12 + 12
        );
        // With dropout also the scores' mask and the output's.
        assert_eq!(attention(3, 3, 4, 2, true).activations, 108 + 18 + 12);
        // 3 on 5: both inputs (12 + 20), q (12), k and v (40), scores twice (60), result (12),
        // output's input (12).
        assert_eq!(
            attention(3, 5, 4, 2, false).activations,
            32 + 12 + 40 + 60 + 12 + 12
        );
    }
}
