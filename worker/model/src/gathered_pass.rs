//! The second pass of one micro-batch against the whole global batch: matching of pairs and hard
//! negatives, and backward through the towers from it and from the contrast's slopes.
//!
//! The towers run over the own rows and over those that the hard negatives are; the fusion starts
//! from copies of their experts, stacked into pairs, and hands back what it owes to each expert,
//! row by row in an order that the host fixes. It refuses to know where slopes and negatives come
//! from.

use belfry_configs::rng::Key;
use burn::tensor::Tensor;

use crate::batch::Labels;
use crate::draws::Draws;
use crate::error::ModelError;
use crate::gathered::GatheredBatch;
use crate::gradient::{Target, scattered, select};
use crate::heads::{ContrastiveHeads, unit};
use crate::layers::{Linear, score_mask};
use crate::loss::GroupLoss;
use crate::pass::Pass;
use crate::pretrain::match_logits;
use crate::scored::Scored;
use crate::tower::ManagerTower;
use crate::weights::{Weights, enter, new_leaf};
use crate::whole_batch::ContrastSlopes;

/// Text and image.
const SIDES: [usize; 2] = [0, 1];

/// What a fused row is of its own row; part of its draws.
const FUSED: [&str; 3] = ["pair", "hard image", "hard text"];

/// Experts of text and image, `[rows, length, hidden]` each.
type Experts = [Vec<Tensor<3>>; 2];

/// What is owed to each of the experts of text and image, where anything is.
type Owed = [Vec<Option<Tensor<3>>>; 2];

/// See the module.
pub(crate) struct GatheredPass<'a> {
    pub tower: &'a ManagerTower,
    pub itc: &'a ContrastiveHeads,
    pub itm: &'a Linear,
    pub batch: &'a GatheredBatch,
    /// Of the towers' pass and of the fusion's.
    pub number: u64,
    /// One per text.
    pub keys: Option<&'a [Key]>,
}

/// What the towers gave: the ends of their graphs.
struct Towers {
    experts: Experts,
    /// Features of length 1 of the own rows, of text and image.
    features: [Tensor<2>; 2],
}

impl<'a> GatheredPass<'a> {
    /// Adds the gradient; gives the matching loss.
    pub fn run(
        &self,
        weights: &'a Weights,
        contrast: &ContrastSlopes,
        mut gradient: Target,
    ) -> Result<GroupLoss, ModelError> {
        let draws = self.keys.map_or(Draws::Off, Draws::Keys);
        let mut pass = self.tower.pass(weights, self.number, draws, None);
        let towers = self.towers(&mut pass)?;
        let (matches, owed) = self.fusion(weights, &towers, gradient.again())?;
        let table = self.tower.table();
        let place = table.place(self.itc.temperature);
        gradient.add_number(table, place, contrast.temperature as f32);
        let mut terms = Vec::new();
        for side in SIDES {
            let features = &towers.features[side];
            let slopes = pass.constant(contrast.features[side].clone(), features.dims());
            terms.push((features.clone() * slopes).sum());
            let pairs = towers.experts[side].iter().zip(&owed[side]);
            // The derivative of sum(expert * owed) is what is owed; its value is never read.
            terms.extend(pairs.filter_map(|(expert, owed)| {
                let owed = enter(owed.clone()?, weights.device());
                Some((expert.clone() * owed).sum())
            }));
        }
        let total = terms.into_iter().reduce(|a, b| a + b);
        let total = total.expect("two features at least");
        let slopes = pass.backward(total, Some(gradient.again()))?;
        pass.collect(slopes, gradient)?;
        Ok(matches)
    }

    fn towers(&self, pass: &mut Pass<'a>) -> Result<Towers, ModelError> {
        let (batch, pairs) = (self.batch, self.batch.own.pairs);
        let ids = [&batch.own.ids[..], &batch.other_ids].concat();
        let mask = self.text_mask();
        let pixels = [&batch.own.images[..], &batch.other_images].concat();
        let images = batch.images(self.tower.sizes.image_side);
        let (texts, _) = self.tower.text_layers(pass, &ids, &mask, batch.texts())?;
        let images = self.tower.image_layers(pass, &pixels, images)?;
        let features = [self.itc.text(pass, &texts), self.itc.image(pass, &images)];
        let texts = self.tower.text_experts(pass, &texts)?;
        let images = self.tower.image_experts(pass, &images, 1)?;
        Ok(Towers {
            experts: [texts, images],
            features: features.map(|rows| unit(rows.narrow(0, 0, pairs))),
        })
    }

    fn text_mask(&self) -> Vec<f32> {
        [&self.batch.own.text_mask[..], &self.batch.other_text_mask].concat()
    }

    /// Matching of the pairs, of each text with its hard image and of each image with its hard text:
    /// the loss, its gradient but for the towers, and what it owes to each of the towers' experts.
    fn fusion(
        &self,
        weights: &Weights,
        towers: &Towers,
        mut gradient: Target,
    ) -> Result<(GroupLoss, Owed), ModelError> {
        let keys = self.fused_keys();
        let draws = keys.as_deref().map_or(Draws::Off, Draws::Keys);
        let mut pass = self.tower.pass(weights, self.number, draws, None);
        let rows = [0, 1].map(|side| self.fused_rows(side));
        let copies: Experts = SIDES.map(|side| {
            let experts = towers.experts[side].iter();
            experts
                .map(|expert| {
                    new_leaf(
                        stacked(expert.clone().inner(), &rows[side]),
                        weights.device(),
                    )
                })
                .collect()
        });
        let length = self.batch.own.text_len;
        let mask = self.text_mask();
        let mask: Vec<f32> = rows[0]
            .iter()
            .flat_map(|row| &mask[row * length..][..length])
            .copied()
            .collect();
        let (pairs, fused) = (self.batch.own.pairs, rows[0].len());
        let mask = score_mask(&pass, &mask, fused);
        let features = self
            .tower
            .fused_features(&mut pass, copies.clone(), &mask)?;
        let scored = Scored {
            logits: match_logits(&mut pass, self.itm, features)?,
            labels: Labels::Classes((0..fused).map(|row| i32::from(row < pairs)).collect()),
            groups: vec![0; fused],
        };
        let (losses, slopes) = scored.losses(&pass, 1)?;
        let mut slopes = scored.backward(&mut pass, slopes, Some(gradient.again()))?;
        let owed = SIDES.map(|side| {
            let copies = copies[side].iter().zip(&towers.experts[side]);
            let owed = copies.map(|(copy, expert)| {
                let [count, ..] = expert.dims();
                unstacked(slopes.take(copy)?, &rows[side], count)
            });
            owed.collect()
        });
        pass.collect(slopes, gradient)?;
        Ok((losses.read()?[0], owed))
    }

    /// The rows of a side's experts that the fused rows are made of: pairs, texts with hard images,
    /// images with hard texts.
    fn fused_rows(&self, side: usize) -> Vec<usize> {
        let own: Vec<usize> = (0..self.batch.own.pairs).collect();
        match side {
            0 => [&own[..], &own, &self.batch.hard_texts].concat(),
            _ => [&own[..], &self.batch.hard_images, &own].concat(),
        }
    }

    /// One per fused row: of the own row that it belongs to, and of what it is of it.
    fn fused_keys(&self) -> Option<Vec<Key>> {
        let own = &self.keys?[..self.batch.own.pairs];
        let keys = FUSED
            .iter()
            .flat_map(|name| own.iter().map(|key| key.with_name(name)));
        Some(keys.collect())
    }
}

/// Rows of experts outside autodiff, by their places.
fn stacked(experts: Tensor<3>, rows: &[usize]) -> Tensor<3> {
    let [count, length, hidden] = experts.dims();
    let flat = experts.reshape([count, length * hidden]);
    select(&flat, rows).reshape([rows.len(), length, hidden])
}

/// The transpose of [`stacked`]: the sum of each row's copies, of `count` rows.
fn unstacked(copies: Tensor<3>, rows: &[usize], count: usize) -> Option<Tensor<3>> {
    let [fused, length, hidden] = copies.dims();
    let ids: Vec<i32> = rows.iter().map(|row| *row as i32).collect();
    let flat = copies.reshape([fused, length * hidden]);
    let sums = scattered(flat, &ids, None, count)?;
    Some(sums.reshape([count, length, hidden]))
}
