//! The image tower: CLIP's ViT (model_spec 3), outputs of the managed layers behind `ln_post`.
//!
//! Pixels in, one tensor per managed layer out. No mask, no dropout.

use burn::tensor::Tensor;

use crate::error::ModelError;
use crate::layers::{INIT_STD, LayerNorm, Linear, PackedProjection, attend, quick_gelu};
use crate::params::{Builder, Init, ParamId};
use crate::pass::Pass;

/// CLIP's layer norm epsilon.
const EPSILON: f32 = 1e-5;
/// CLIP's feed-forward width over its own width.
const MLP_RATIO: usize = 4;

#[derive(Clone, Debug)]
struct Block {
    norm_1: LayerNorm,
    projection: PackedProjection,
    output: Linear,
    norm_2: LayerNorm,
    widen: Linear,
    narrow: Linear,
}

/// The image tower.
#[derive(Clone, Debug)]
pub(crate) struct ImageTower {
    patches: Linear,
    class_embedding: ParamId,
    positions: ParamId,
    norm_pre: LayerNorm,
    norm_post: LayerNorm,
    blocks: Vec<Block>,
    managed: usize,
    heads: usize,
    width: usize,
    side: usize,
    patch: usize,
}

impl ImageTower {
    /// `leftovers` are the shape of the unused table that CLIP's text side leaves in the authors'
    /// model (context length, width).
    pub fn new(
        b: &mut Builder,
        config: &belfry_configs::ImageTower,
        leftovers: [usize; 2],
    ) -> Self {
        let (width, patch) = (config.hidden as usize, config.patch as usize);
        let grid = (config.size / config.patch) as usize;
        // CLIP starts class and position embeddings at width^-1/2.
        let narrow = Init::Normal((width as f32).sqrt().recip());
        b.at("vit_model", |b| {
            b.unused("positional_embedding", &leftovers, Init::Normal(INIT_STD));
            LayerNorm::unused(b, "ln_final", leftovers[1]);
            b.at("visual", |b| {
                let blocks = (0..config.layers).map(|block| {
                    b.at(format!("transformer.resblocks.{block}"), |b| Block {
                        norm_1: LayerNorm::new(b, "ln_1", width, EPSILON),
                        projection: PackedProjection::new(b, "attn.in_proj", width),
                        output: Linear::new(b, "attn.out_proj", width, width),
                        norm_2: LayerNorm::new(b, "ln_2", width, EPSILON),
                        widen: Linear::new(b, "mlp.c_fc", width, MLP_RATIO * width),
                        narrow: Linear::new(b, "mlp.c_proj", MLP_RATIO * width, width),
                    })
                });
                let blocks = blocks.collect();
                ImageTower {
                    patches: Linear::convolution(b, "conv1.weight", width, patch),
                    class_embedding: b.leaf("class_embedding", &[width], narrow),
                    positions: b.leaf("positional_embedding", &[grid * grid + 1, width], narrow),
                    norm_pre: LayerNorm::new(b, "ln_pre", width, EPSILON),
                    norm_post: LayerNorm::new(b, "ln_post", width, EPSILON),
                    blocks,
                    managed: config.managed as usize,
                    heads: config.heads as usize,
                    width,
                    side: config.size as usize,
                    patch,
                }
            })
        })
    }

    /// # Shapes
    /// pixels `[batch x 3 x side x side]` → per managed layer `[batch, 1 + patches, width]`
    pub fn forward(
        &self,
        pass: &mut Pass,
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
        let mut x = self.norm_pre.forward(pass, x);
        pass.record("image_ln_pre", &x)?;
        let first_managed = self.blocks.len() - self.managed;
        let mut outputs = Vec::with_capacity(self.managed);
        for (l, block) in self.blocks.iter().enumerate() {
            let qkv = block
                .projection
                .forward(pass, block.norm_1.forward(pass, x.clone()));
            x = x + block
                .output
                .forward(pass, attend(pass, qkv, self.heads, None, None));
            let wide = block
                .widen
                .forward(pass, block.norm_2.forward(pass, x.clone()));
            x = x + block.narrow.forward(pass, quick_gelu(wide));
            pass.record(&format!("image_layer.{l}"), &x)?;
            if l >= first_managed {
                let output = self.norm_post.forward(pass, x.clone());
                pass.record(&format!("image_ln_post.{}", l - first_managed), &output)?;
                outputs.push(output);
            }
        }
        Ok(outputs)
    }
}

impl Linear {
    /// A convolution whose stride is its kernel, over patches cut on the host: a plain product with
    /// the kernel `[width, 3, patch, patch]` seen as `[width, 3 x patch x patch]`.
    fn convolution(b: &mut Builder, name: &str, width: usize, patch: usize) -> Self {
        Linear::shaped(b, name, &[width, 3, patch, patch])
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
