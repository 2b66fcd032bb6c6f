//! Retrieval at evaluation: texts and images encoded once, similarities of all, match logits of
//! chosen pairs (model_spec 14).
//!
//! Which pairs are worth a fusion pass, and what is made of their scores, is the evaluation's
//! business. Draws nothing.

use burn::tensor::{Tensor, TensorData};

use crate::batch::expect;
use crate::contrast::dot;
use crate::draws::Draws;
use crate::error::ModelError;
use crate::heads::{Heads, unit};
use crate::layers::score_mask;
use crate::pass::Pass;
use crate::tower::ManagerTower;
use crate::weights::{Weights, read};

/// Encoded texts: their experts stay on the device.
#[derive(Clone, Debug)]
pub struct EncodedTexts {
    side: Encoded,
    mask: Vec<f32>,
}

/// Encoded images: their experts stay on the device.
#[derive(Clone, Debug)]
pub struct EncodedImages {
    side: Encoded,
}

#[derive(Clone, Debug)]
struct Encoded {
    experts: Vec<Tensor<3>>,
    /// Contrastive features of length 1, `[rows, width]`.
    features: Vec<f32>,
    rows: usize,
}

/// Cosine similarity of every image with every text, without temperature, `[images, texts]`.
pub fn similarities(images: &EncodedImages, texts: &EncodedTexts) -> Vec<f32> {
    let (images, texts) = (&images.side, &texts.side);
    let width = texts.features.len() / texts.rows;
    let row = |image| {
        let texts = texts.features.chunks(width);
        texts.map(move |text| dot(image, text) as f32)
    };
    images.features.chunks(width).flat_map(row).collect()
}

impl ManagerTower {
    /// Token ids and mask, `[rows, text_len]`.
    ///
    /// # Errors
    /// [`ModelError`] if the model has no contrastive head or the vectors do not fit.
    pub fn encode_texts(
        &self,
        weights: &Weights,
        ids: &[i32],
        mask: &[f32],
    ) -> Result<EncodedTexts, ModelError> {
        let Heads::Contrast { itc, .. } = &self.heads else {
            return Err(self.other_task("retrieval or pretrain_itc"));
        };
        let rows = ids.len() / self.sizes.text_len;
        self.batch_sizes()
            .check_texts(rows, self.sizes.text_len, ids, mask)?;
        let weights = weights.without_gradient();
        let mut pass = Pass::new(&weights, 0, Draws::Off, None);
        let (layers, _) = self.text_layers(&mut pass, ids, mask, rows)?;
        let features = unit(itc.text(&pass, &layers));
        Ok(EncodedTexts {
            side: Encoded {
                experts: self.text_experts(&mut pass, &layers)?,
                features: read(features, "text features")?,
                rows,
            },
            mask: mask.to_vec(),
        })
    }

    /// Normalised images, `[rows, 3, side, side]`.
    ///
    /// # Errors
    /// As [`ManagerTower::encode_texts`].
    pub fn encode_images(
        &self,
        weights: &Weights,
        images: &[f32],
    ) -> Result<EncodedImages, ModelError> {
        let Heads::Contrast { itc, .. } = &self.heads else {
            return Err(self.other_task("retrieval or pretrain_itc"));
        };
        let side = self.sizes.image_side;
        let rows = (images.len() / (3 * side * side)).max(1);
        self.batch_sizes().check_images("images", rows, images)?;
        let weights = weights.without_gradient();
        let mut pass = Pass::new(&weights, 0, Draws::Off, None);
        let layers = self.image_layers(&mut pass, images, rows)?;
        let features = unit(itc.image(&pass, &layers));
        Ok(EncodedImages {
            side: Encoded {
                experts: self.image_experts(&mut pass, &layers, 1)?,
                features: read(features, "image features")?,
                rows,
            },
        })
    }

    /// The logit of "match" of every pair (row of `texts`, row of `images`): one fusion pass for
    /// all of them.
    ///
    /// # Errors
    /// As [`ManagerTower::encode_texts`]; [`ModelError::Range`] for a row that does not exist.
    pub fn match_logits(
        &self,
        weights: &Weights,
        texts: &EncodedTexts,
        images: &EncodedImages,
        pairs: &[(usize, usize)],
    ) -> Result<Vec<f32>, ModelError> {
        let Heads::Contrast { itm, .. } = &self.heads else {
            return Err(self.other_task("retrieval or pretrain_itc"));
        };
        if pairs.is_empty() {
            return expect("pairs", 1, 0).map(|()| Vec::new());
        }
        let weights = weights.without_gradient();
        let mut pass = Pass::new(&weights, 0, Draws::Off, None);
        let text_rows: Vec<usize> = pairs.iter().map(|(text, _)| *text).collect();
        let image_rows: Vec<usize> = pairs.iter().map(|(_, image)| *image).collect();
        let experts = [
            texts.side.select(&pass, &text_rows)?,
            images.side.select(&pass, &image_rows)?,
        ];
        let length = self.sizes.text_len;
        let mask = text_rows
            .iter()
            .flat_map(|row| &texts.mask[row * length..][..length]);
        let mask: Vec<f32> = mask.copied().collect();
        let mask = score_mask(&pass, &mask, pairs.len());
        let features = self.fused_features(&mut pass, experts, &mask)?;
        let logits = read(itm.forward(&pass, features), "match logits")?;
        Ok(logits.chunks(2).map(|logits| logits[1]).collect())
    }
}

impl Encoded {
    fn select(&self, pass: &Pass, rows: &[usize]) -> Result<Vec<Tensor<3>>, ModelError> {
        if let Some(index) = rows.iter().position(|row| *row >= self.rows) {
            return Err(ModelError::Range {
                what: "pairs",
                index,
                value: rows[index] as i64,
                low: 0,
                high: self.rows as i64,
            });
        }
        let indices: Vec<i32> = rows.iter().map(|row| *row as i32).collect();
        let indices = TensorData::new(indices, [rows.len()]);
        let indices = Tensor::from_data(indices, pass.weights.device());
        let select = |x: &Tensor<3>| x.clone().select(0, indices.clone());
        Ok(self.experts.iter().map(select).collect())
    }
}
