//! The image tower: CLIP's ViT (model_spec 3) or timm's (17), top layers' outputs behind `ln_post`.
//!
//! Pixels in, one tensor per layer that is looked at out. No mask, no dropout.

use burn::tensor::Tensor;

use crate::error::ModelError;
use crate::layers::{INIT_STD, LayerNorm, Linear, PackedProjection, attend, gelu, quick_gelu};
use crate::params::{Builder, Init, ParamId};
use crate::pass::Pass;
use belfry_configs::ImageKind;

/// Feed-forward width over the tower's own width.
const MLP_RATIO: usize = 4;

/// What sets CLIP's ViT and timm's apart: names, epsilon, activation, and the norm in front.
struct Layout {
    root: &'static str,
    patches: [&'static str; 2],
    patch_bias: bool,
    class: &'static str,
    positions: &'static str,
    /// Leading unit axes of class and position parameters: CLIP's have none.
    class_axes: &'static [usize],
    position_axes: &'static [usize],
    norm_pre: Option<&'static str>,
    norm_post: &'static str,
    blocks: &'static str,
    norms: [&'static str; 2],
    /// Weight and bias of the packed query, key and value projection.
    packed: [&'static str; 2],
    output: &'static str,
    feed_forward: [&'static str; 2],
    epsilon: f32,
    activation: fn(Tensor<3>) -> Tensor<3>,
}

const CLIP: Layout = Layout {
    root: "vit_model.visual",
    patches: ["conv1.weight", "conv1.bias"],
    patch_bias: false,
    class: "class_embedding",
    positions: "positional_embedding",
    class_axes: &[],
    position_axes: &[],
    norm_pre: Some("ln_pre"),
    norm_post: "ln_post",
    blocks: "transformer.resblocks",
    norms: ["ln_1", "ln_2"],
    packed: ["attn.in_proj_weight", "attn.in_proj_bias"],
    output: "attn.out_proj",
    feed_forward: ["mlp.c_fc", "mlp.c_proj"],
    epsilon: 1e-5,
    activation: quick_gelu,
};

/// ViT and DeiT (model_spec 17).
const TIMM: Layout = Layout {
    root: "vit_model",
    patches: ["patch_embed.proj.weight", "patch_embed.proj.bias"],
    patch_bias: true,
    class: "cls_token",
    positions: "pos_embed",
    class_axes: &[1, 1],
    position_axes: &[1],
    norm_pre: None,
    norm_post: "norm",
    blocks: "blocks",
    norms: ["norm1", "norm2"],
    packed: ["attn.qkv.weight", "attn.qkv.bias"],
    output: "attn.proj",
    feed_forward: ["mlp.fc1", "mlp.fc2"],
    epsilon: 1e-6,
    activation: gelu,
};

#[derive(Clone, Debug)]
struct Block {
    norm_1: LayerNorm,
    projection: PackedProjection,
    output: Linear,
    norm_2: LayerNorm,
    widen: Linear,
    narrow: Linear,
    activation: fn(Tensor<3>) -> Tensor<3>,
}

/// The image tower.
#[derive(Clone, Debug)]
pub(crate) struct ImageTower {
    patches: Linear,
    class_embedding: ParamId,
    positions: ParamId,
    norm_pre: Option<LayerNorm>,
    norm_post: LayerNorm,
    blocks: Vec<Block>,
    /// Top blocks whose outputs are given.
    outputs: usize,
    heads: usize,
    width: usize,
    side: usize,
    patch: usize,
}

impl ImageTower {
    /// A tower that gives its top `outputs` blocks' outputs. `leftovers` are the shape of the unused
    /// table that CLIP's text side leaves in the authors' model (context length, width).
    pub fn new(
        b: &mut Builder,
        config: &belfry_configs::ImageTower,
        outputs: u32,
        leftovers: [usize; 2],
    ) -> Self {
        let (width, patch) = (config.hidden as usize, config.patch as usize);
        let grid = (config.size / config.patch) as usize;
        // CLIP starts class and position embeddings at width^-1/2, timm where all else starts.
        let (layout, start) = match config.kind {
            ImageKind::Clip => (&CLIP, (width as f32).sqrt().recip()),
            ImageKind::Vit => (&TIMM, INIT_STD),
        };
        if config.kind == ImageKind::Clip {
            b.at("vit_model", |b| {
                b.unused("positional_embedding", &leftovers, Init::Normal(INIT_STD));
                LayerNorm::unused(b, "ln_final", leftovers[1]);
            });
        }
        let start = Init::Normal(start);
        let class_shape = [layout.class_axes, &[width]].concat();
        let position_shape = [layout.position_axes, &[grid * grid + 1, width]].concat();
        b.at(layout.root, |b| {
            let blocks = (0..config.layers).map(|block| {
                b.at(format!("{}.{block}", layout.blocks), |b| {
                    Block::new(b, layout, width)
                })
            });
            let blocks = blocks.collect();
            let bias = layout.patch_bias.then_some(layout.patches[1]);
            ImageTower {
                patches: Linear::convolution(b, layout.patches[0], bias, [width, patch]),
                class_embedding: b.leaf(layout.class, &class_shape, start),
                positions: b.leaf(layout.positions, &position_shape, start),
                norm_pre: layout
                    .norm_pre
                    .map(|name| LayerNorm::new(b, name, width, layout.epsilon)),
                norm_post: LayerNorm::new(b, layout.norm_post, width, layout.epsilon),
                blocks,
                outputs: outputs as usize,
                heads: config.heads as usize,
                width,
                side: config.size as usize,
                patch,
            }
        })
    }

    /// # Shapes
    /// pixels `[batch x 3 x side x side]` → per layer given `[batch, 1 + patches, width]`
    pub fn forward<'a>(
        &'a self,
        pass: &mut Pass<'a>,
        pixels: &[f32],
        batch: usize,
    ) -> Result<Vec<Tensor<3>>, ModelError> {
        let grid = self.side / self.patch;
        let columns = 3 * self.patch * self.patch;
        let patches = cut_patches(pixels, self.side, self.patch);
        let patches = pass.constant(patches, [batch, grid * grid, columns]);
        let patches = self.patches.forward(pass, patches);
        let class = pass
            .weights
            .vector(self.class_embedding)
            .reshape([1, 1, self.width]);
        let x = Tensor::cat(vec![class.expand([batch, 1, self.width]), patches], 1);
        let positions = pass.weights.vector(self.positions);
        let x = x + positions.reshape([1, grid * grid + 1, self.width]);
        let x = match &self.norm_pre {
            Some(norm) => norm.forward(pass, x),
            None => x,
        };
        pass.record("image_ln_pre", &x)?;
        let mut x = pass.cut(vec![x]).remove(0);
        let first = self.blocks.len() - self.outputs;
        let mut outputs = Vec::with_capacity(self.outputs);
        for (l, block) in self.blocks.iter().enumerate() {
            let mut layer = pass.block(vec![x], move |pass, x| {
                let x = block.forward(pass, x[0].clone(), self.heads);
                pass.record(&format!("image_layer.{l}"), &x)?;
                if l < first && !pass.is_traced() {
                    return Ok(vec![x]);
                }
                let output = self.norm_post.forward(pass, x.clone());
                pass.record(&format!("image_ln_post.{l}"), &output)?;
                Ok(vec![x, output])
            })?;
            x = layer.remove(0);
            if l >= first {
                outputs.append(&mut layer);
            }
        }
        Ok(outputs)
    }
}

impl Block {
    fn new(b: &mut Builder, layout: &Layout, width: usize) -> Self {
        let [norm_1, norm_2] = layout.norms;
        let [widen, narrow] = layout.feed_forward;
        Block {
            norm_1: LayerNorm::new(b, norm_1, width, layout.epsilon),
            projection: PackedProjection::new(b, layout.packed, width),
            output: Linear::new(b, layout.output, width, width),
            norm_2: LayerNorm::new(b, norm_2, width, layout.epsilon),
            widen: Linear::new(b, widen, width, MLP_RATIO * width),
            narrow: Linear::new(b, narrow, MLP_RATIO * width, width),
            activation: layout.activation,
        }
    }

    fn forward(&self, pass: &Pass, x: Tensor<3>, heads: usize) -> Tensor<3> {
        let qkv = self
            .projection
            .forward(pass, self.norm_1.forward(pass, x.clone()));
        let x = x + self
            .output
            .forward(pass, attend(pass, qkv, heads, None, None));
        let wide = self
            .widen
            .forward(pass, self.norm_2.forward(pass, x.clone()));
        x + self.narrow.forward(pass, (self.activation)(wide))
    }
}

impl Linear {
    /// A convolution whose stride is its kernel, over patches cut on the host: a plain product with
    /// the kernel `[width, 3, patch, patch]` seen as `[width, 3 x patch x patch]`.
    fn convolution(
        b: &mut Builder,
        weight: &str,
        bias: Option<&str>,
        [width, patch]: [usize; 2],
    ) -> Self {
        Linear::named(b, weight, bias, &[width, 3, patch, patch])
    }
}

/// Patches in row-major order (y, then x), each as the kernel lies in memory: channel, y, x.
fn cut_patches(pixels: &[f32], side: usize, patch: usize) -> Vec<f32> {
    let mut patches = Vec::with_capacity(pixels.len());
    for image in pixels.chunks(3 * side * side) {
        for top in (0..side).step_by(patch) {
            for left in (0..side).step_by(patch) {
                for channel in image.chunks(side * side) {
                    for row in channel[top * side..].chunks(side).take(patch) {
                        patches.extend_from_slice(&row[left..left + patch]);
                    }
                }
            }
        }
    }
    patches
}

#[cfg(test)]
mod tests {
    #[test]
    fn patches_are_cut_row_by_row() {
        let pixels: Vec<f32> = (0..3 * 16).map(|i| i as f32).collect();
        let patches = super::cut_patches(&pixels, 4, 2);
        assert_eq!(patches.len(), pixels.len());
        assert_eq!(
            patches[..4],
            [0.0, 1.0, 4.0, 5.0],
            "channel 0 of the first patch"
        );
        assert_eq!(
            patches[4..8],
            [16.0, 17.0, 20.0, 21.0],
            "channel 1 of the first patch"
        );
        assert_eq!(
            patches[12..16],
            [2.0, 3.0, 6.0, 7.0],
            "the second patch lies to the right"
        );
    }
}
