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
use crate::heads::{ContrastiveHeads, Heads, unit};
use crate::layers::{Linear, score_mask};
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
    /// Contrastive features of length 1, `[rows, width]`; empty where the model has none.
    features: Vec<f32>,
    rows: usize,
}

/// Experts of some rows on the host: what [`ManagerTower::encode_texts`] or
/// [`ManagerTower::encode_images`] gave, kept for a later fusion pass.
#[derive(Clone, Debug, PartialEq)]
pub struct HostExperts {
    /// Experts, their tokens, their width.
    pub shape: [usize; 3],
    /// `[experts, tokens, width]` of each row.
    pub rows: Vec<Vec<f32>>,
}

impl EncodedTexts {
    /// Contrastive features of length 1, `[texts, width]`; empty where the model has none.
    pub fn features(&self) -> &[f32] {
        &self.side.features
    }

    /// The experts, read from the device.
    ///
    /// # Errors
    /// [`ModelError::Device`].
    pub fn to_host(&self) -> Result<HostExperts, ModelError> {
        self.side.to_host()
    }
}

impl EncodedImages {
    /// Contrastive features of length 1, `[images, width]`; empty where the model has none.
    pub fn features(&self) -> &[f32] {
        &self.side.features
    }

    /// The experts, read from the device.
    ///
    /// # Errors
    /// [`ModelError::Device`].
    pub fn to_host(&self) -> Result<HostExperts, ModelError> {
        self.side.to_host()
    }
}

/// Cosine similarity of two features of length 1, without temperature.
pub fn similarity(image: &[f32], text: &[f32]) -> f32 {
    dot(image, text) as f32
}

/// Cosine similarity of every image with every text, without temperature, `[images, texts]`. Both
/// must have features.
pub fn similarities(images: &EncodedImages, texts: &EncodedTexts) -> Vec<f32> {
    let (images, texts) = (&images.side, &texts.side);
    let width = texts.features.len() / texts.rows;
    let row = |image| {
        let texts = texts.features.chunks(width);
        texts.map(move |text| similarity(image, text))
    };
    images.features.chunks(width).flat_map(row).collect()
}

impl ManagerTower {
    /// Token ids and mask, `[rows, text_len]`. Features come with contrastive tasks only.
    ///
    /// # Errors
    /// [`ModelError`] if the model has no matching head or the vectors do not fit.
    pub fn encode_texts(
        &self,
        weights: &Weights,
        ids: &[i32],
        mask: &[f32],
    ) -> Result<EncodedTexts, ModelError> {
        let (itc, _) = self.matching()?;
        let rows = ids.len() / self.sizes.text_len;
        self.batch_sizes()
            .check_texts(rows, self.sizes.text_len, ids, mask)?;
        let weights = weights.without_gradient();
        let mut pass = Pass::new(&weights, 0, Draws::Off, None);
        let (layers, _) = self.text_layers(&mut pass, ids, mask, rows)?;
        let features = itc.map(|itc| read(unit(itc.text(&pass, &layers)), "text features"));
        Ok(EncodedTexts {
            side: Encoded {
                experts: self.text_experts(&mut pass, &layers)?,
                features: features.transpose()?.unwrap_or_default(),
                rows,
            },
            mask: mask.to_vec(),
        })
    }

    /// Normalised images, `[rows, 3, side, side]`. Features come with contrastive tasks only.
    ///
    /// # Errors
    /// As [`ManagerTower::encode_texts`].
    pub fn encode_images(
        &self,
        weights: &Weights,
        images: &[f32],
    ) -> Result<EncodedImages, ModelError> {
        let (itc, _) = self.matching()?;
        let side = self.sizes.image_side;
        let rows = (images.len() / (3 * side * side)).max(1);
        self.batch_sizes().check_images("images", rows, images)?;
        let weights = weights.without_gradient();
        let mut pass = Pass::new(&weights, 0, Draws::Off, None);
        let layers = self.image_layers(&mut pass, images, rows)?;
        let features = itc.map(|itc| read(unit(itc.image(&pass, &layers)), "image features"));
        Ok(EncodedImages {
            side: Encoded {
                experts: self.image_experts(&mut pass, &layers, 1)?,
                features: features.transpose()?.unwrap_or_default(),
                rows,
            },
        })
    }

    /// Texts that were encoded before, without features. `mask` is `[rows, text_len]`.
    ///
    /// # Errors
    /// [`ModelError::Length`] if rows and mask do not fit.
    pub fn texts_from_host(
        &self,
        weights: &Weights,
        (shape, rows): ([usize; 3], &[&[f32]]),
        mask: &[f32],
    ) -> Result<EncodedTexts, ModelError> {
        expect("text masks", rows.len() * self.sizes.text_len, mask.len())?;
        Ok(EncodedTexts {
            side: Encoded::from_host(weights, shape, rows)?,
            mask: mask.to_vec(),
        })
    }

    /// Images that were encoded before, without features.
    ///
    /// # Errors
    /// [`ModelError::Length`] if the rows have another shape.
    pub fn images_from_host(
        &self,
        weights: &Weights,
        (shape, rows): ([usize; 3], &[&[f32]]),
    ) -> Result<EncodedImages, ModelError> {
        Ok(EncodedImages {
            side: Encoded::from_host(weights, shape, rows)?,
        })
    }

    /// The heads that judge pairs: contrast, where there is one, and matching.
    fn matching(&self) -> Result<(Option<&ContrastiveHeads>, &Linear), ModelError> {
        match &self.heads {
            Heads::Pretrain { itm, .. } => Ok((None, itm)),
            Heads::Contrast { itc, itm, .. } => Ok((Some(itc), itm)),
            Heads::Classify(_) => Err(self.other_task("retrieval, pretrain_itc or pretrain")),
        }
    }

    /// The logit of "match" of every pair (row of `texts`, row of `images`): one fusion pass for
    /// all of them.
    ///
    /// # Errors
    /// As [`ManagerTower::pair_logits`].
    pub fn match_logits(
        &self,
        weights: &Weights,
        texts: &EncodedTexts,
        images: &EncodedImages,
        pairs: &[(usize, usize)],
    ) -> Result<Vec<f32>, ModelError> {
        let logits = self.pair_logits(weights, texts, images, pairs)?;
        Ok(logits.into_iter().map(|[_, matches]| matches).collect())
    }

    /// The logits of "no match" and "match" of every pair, likewise.
    ///
    /// # Errors
    /// As [`ManagerTower::encode_texts`]; [`ModelError::Range`] for a row that does not exist.
    pub fn pair_logits(
        &self,
        weights: &Weights,
        texts: &EncodedTexts,
        images: &EncodedImages,
        pairs: &[(usize, usize)],
    ) -> Result<Vec<[f32; 2]>, ModelError> {
        let (_, itm) = self.matching()?;
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
        Ok(logits
            .chunks(2)
            .map(|logits| [logits[0], logits[1]])
            .collect())
    }
}

impl Encoded {
    fn to_host(&self) -> Result<HostExperts, ModelError> {
        let [_, length, width] = self.experts.first().map_or([0; 3], Tensor::dims);
        let size = length * width;
        let mut rows = vec![Vec::with_capacity(self.experts.len() * size); self.rows];
        for expert in &self.experts {
            let values = read(expert.clone(), "experts")?;
            let parts = rows.iter_mut().zip(values.chunks_exact(size));
            parts.for_each(|(row, part)| row.extend_from_slice(part));
        }
        Ok(HostExperts {
            shape: [self.experts.len(), length, width],
            rows,
        })
    }

    fn from_host(
        weights: &Weights,
        shape: [usize; 3],
        rows: &[&[f32]],
    ) -> Result<Self, ModelError> {
        let [experts, length, width] = shape;
        let size = length * width;
        for row in rows {
            expect("experts of a row", experts * size, row.len())?;
        }
        let weights = weights.without_gradient();
        let expert = |number: usize| {
            let parts = rows.iter().map(|row| &row[number * size..][..size]);
            let values: Vec<f32> = parts.flatten().copied().collect();
            let values = TensorData::new(values, [rows.len(), length, width]);
            Tensor::from_data(values, weights.device())
        };
        Ok(Encoded {
            experts: (0..experts).map(expert).collect(),
            features: Vec::new(),
            rows: rows.len(),
        })
    }

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
