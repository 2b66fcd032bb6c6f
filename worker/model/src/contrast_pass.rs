//! The pass that looks across samples: contrast of the towers' features against the group, then
//! matching of pairs and hard negatives (model_spec 8).
//!
//! Two graphs instead of one, because gradients travel between members while neither is alive on
//! the device of the other: first the towers up to experts and features; then, from copies of the
//! experts, the fusion of pairs and negatives. Backward runs through the fusion, hands the
//! negatives' gradients to whoever holds them, and continues through the towers with what comes
//! back. The towers run once, as in the authors' code. Price: experts cross to the host and back.
//! It refuses to know who the group's members are.

use burn::tensor::Tensor;

use belfry_configs::Task;

use crate::batch::{Labels, RetrievalBatch};
use crate::contrast::{Contrast, Features, Positives, TEMPERATURE_BOUNDS};
use crate::error::ModelError;
use crate::gradient::Target;
use crate::group::{Group, GroupError};
use crate::heads::{ContrastiveHeads, unit};
use crate::layers::{Linear, score_mask};
use crate::loss::GroupLoss;
use crate::pass::Pass;
use crate::pretrain::match_logits;
use crate::retrieve::{Company, Negatives};
use crate::scored::Scored;
use crate::segments::Slopes;
use crate::tower::ManagerTower;
use crate::weights::read;

/// Text and image.
const SIDES: [usize; 2] = [0, 1];

/// Experts of text and image, `[rows, length, hidden]` each.
type Experts = [Vec<Tensor<3>>; 2];

/// The contrast pass of one micro-batch.
pub(crate) struct ContrastPass<'a> {
    pub tower: &'a ManagerTower,
    pub itc: &'a ContrastiveHeads,
    pub itm: &'a Linear,
    pub batch: &'a RetrievalBatch,
}

/// What the towers gave: the end of the first graph.
struct Towers {
    experts: Experts,
    /// Features of length 1, of text and image.
    features: [Tensor<2>; 2],
}

/// Hard negatives, from the group.
struct Hard {
    /// Places of texts for the images, and of images for the texts.
    places: [Vec<usize>; 2],
    experts: Experts,
    text_mask: Vec<f32>,
}

/// The second graph: where it starts and what it ends in.
struct Fusion {
    own: Experts,
    hard: Experts,
    scored: Scored,
}

impl<'a> ContrastPass<'a> {
    /// Contrastive loss and matching loss; their gradient, if asked.
    pub fn run(
        &self,
        mut pass: Pass<'a>,
        company: Company,
        gradient: Option<Target>,
    ) -> Result<(f64, GroupLoss), ModelError> {
        let Company { group, negatives } = company;
        let towers = self.towers(&mut pass)?;
        let (contrast, places) = self.contrast(&mut pass, &towers, group, negatives)?;
        let hard = self.fetch(&pass, &towers, group, places)?;
        let fusion = self.fuse(&mut pass, &towers, &hard, gradient.is_some())?;
        let (losses, slopes) = fusion.scored.losses(&pass, 1)?;
        if let Some(mut gradient) = gradient {
            let Fusion {
                own,
                hard: copies,
                scored,
            } = fusion;
            let sum = Some(gradient.again());
            let mut slopes = scored.backward(&mut pass, slopes, sum)?;
            let table = self.tower.table();
            let place = table.place(self.itc.temperature);
            gradient.add_number(table, place, contrast.temperature as f32);
            let mut owed = self.owed_to_features(&pass, &towers, group, &contrast)?;
            for side in SIDES {
                let copies = own[side].iter().zip(&copies[side]);
                for (x, (own, hard_x)) in towers.experts[side].iter().zip(copies) {
                    let [_, length, hidden] = x.dims();
                    let theirs = gradient_of(hard_x, &mut slopes)?;
                    let back = group.give_back(&theirs, length * hidden, &hard.places[side]);
                    let back = back.map_err(|e| failed("gradients of hard negatives", e))?;
                    let sum = add(gradient_of(own, &mut slopes)?, &back);
                    owed.push((x.clone() * pass.constant(sum, x.dims())).sum());
                }
            }
            let total = owed.into_iter().reduce(|a, b| a + b);
            let total = total.expect("two features at least");
            let slopes = pass.backward(total, Some(gradient.again()))?;
            pass.collect(slopes, gradient)?;
        }
        Ok((contrast.loss, losses.read()?[0]))
    }

    fn towers(&self, pass: &mut Pass<'a>) -> Result<Towers, ModelError> {
        let RetrievalBatch {
            ids,
            text_mask,
            images,
            pairs,
            ..
        } = self.batch;
        let (texts, _) = self.tower.text_layers(pass, ids, text_mask, *pairs)?;
        let images = self.tower.image_layers(pass, images, *pairs)?;
        let text = self.itc.text(pass, &texts);
        let image = self.itc.image(pass, &images);
        pass.record("itc_text_head", &text)?;
        pass.record("itc_image_head", &image)?;
        let texts = self.tower.text_experts(pass, &texts)?;
        let images = self.tower.image_experts(pass, &images, 1)?;
        Ok(Towers {
            experts: [texts, images],
            features: [unit(text), unit(image)],
        })
    }

    /// The contrast of own features against the group's, and the places of hard negatives.
    fn contrast(
        &self,
        pass: &mut Pass,
        towers: &Towers,
        group: &mut dyn Group,
        negatives: Negatives,
    ) -> Result<(Contrast, [Vec<usize>; 2]), ModelError> {
        let width = towers.features[0].dims()[1];
        let everyone: Vec<usize> = (0..group.images().len()).collect();
        let (mut own, mut all): (Features, Features) = Default::default();
        for side in SIDES {
            own[side] = read(towers.features[side].clone(), "features")?;
            let rows = group.fetch(&own[side], width, &everyone);
            all[side] = rows.map_err(|e| failed("features", e))?;
        }
        let positives = Positives {
            images: group.images(),
            first: group.first(),
            one_hot: self.tower.task == Task::PretrainItc,
        };
        let [low, high] = TEMPERATURE_BOUNDS;
        let temperature = pass.weights.number(self.itc.temperature).clamp(low, high);
        let targets = positives.targets(self.batch.pairs);
        let contrast = Contrast::new(&own, &all, width, &targets, temperature);
        self.record_contrast(pass, &contrast, targets)?;
        let places = self.choose(&contrast, &positives, negatives);
        Ok((contrast, places))
    }

    /// What backward starts from at the features: as queries, and as keys of the whole group.
    fn owed_to_features(
        &self,
        pass: &Pass,
        towers: &Towers,
        group: &mut dyn Group,
        contrast: &Contrast,
    ) -> Result<Vec<Tensor<1>>, ModelError> {
        let everyone: Vec<usize> = (0..group.images().len()).collect();
        let mut owed = Vec::new();
        for side in SIDES {
            let features = &towers.features[side];
            let [_, width] = features.dims();
            let back = group.give_back(&contrast.group[side], width, &everyone);
            let back = back.map_err(|e| failed("gradients of features", e))?;
            let slopes = add(contrast.own[side].clone(), &back);
            owed.push((features.clone() * pass.constant(slopes, features.dims())).sum());
        }
        Ok(owed)
    }

    /// Places of texts for the images, and of images for the texts.
    fn choose(
        &self,
        contrast: &Contrast,
        positives: &Positives,
        negatives: Negatives,
    ) -> [Vec<usize>; 2] {
        let key = match negatives {
            Negatives::Given { images, texts } => return [texts.to_vec(), images.to_vec()],
            Negatives::Drawn(key) => key,
        };
        let candidates = if self.tower.sizes.global_negatives {
            0..positives.images.len()
        } else {
            positives.first..positives.first + self.batch.pairs
        };
        // A text asks for images: its side of the contrast chooses the other side's place.
        let draw = |asking: usize, name: &str| {
            contrast.draw(asking, positives, candidates.clone(), key.with_name(name))
        };
        [draw(1, "texts"), draw(0, "images")]
    }

    fn fetch(
        &self,
        pass: &Pass,
        towers: &Towers,
        group: &mut dyn Group,
        places: [Vec<usize>; 2],
    ) -> Result<Hard, ModelError> {
        let mut experts = Experts::default();
        for side in SIDES {
            for expert in &towers.experts[side] {
                let [rows, length, hidden] = expert.dims();
                let own = read(expert.clone(), "experts")?;
                let fetched = group.fetch(&own, length * hidden, &places[side]);
                let fetched = fetched.map_err(|e| failed("hard negatives", e))?;
                experts[side].push(pass.constant(fetched, [rows, length, hidden]));
            }
        }
        let mask = &self.batch.text_mask;
        let text_mask = group.fetch(mask, self.batch.text_len, &places[0]);
        Ok(Hard {
            experts,
            text_mask: text_mask.map_err(|e| failed("text masks", e))?,
            places,
        })
    }

    /// The pairs, each text with its hard image, each image with its hard text.
    fn fuse(
        &self,
        pass: &mut Pass<'a>,
        towers: &Towers,
        hard: &Hard,
        training: bool,
    ) -> Result<Fusion, ModelError> {
        let rows = self.batch.pairs;
        let leaves = |experts: &Experts| {
            SIDES.map(|side| experts[side].iter().map(|x| leaf(x, training)).collect())
        };
        let (own, copies): (Experts, Experts) = (leaves(&towers.experts), leaves(&hard.experts));
        let stack = |side: usize| -> Vec<Tensor<3>> {
            let pairs = own[side].iter().zip(&copies[side]);
            let parts = pairs.map(|(own, hard)| match side {
                0 => vec![own.clone(), own.clone(), hard.clone()],
                _ => vec![own.clone(), hard.clone(), own.clone()],
            });
            parts.map(|parts| Tensor::cat(parts, 0)).collect()
        };
        let mask = &self.batch.text_mask;
        let mask = score_mask(pass, &[mask, mask, &hard.text_mask[..]].concat(), 3 * rows);
        let stacked = SIDES.map(|side| pass.cut(stack(side)));
        let features = self.tower.fused_features(pass, stacked, &mask)?;
        let scored = Scored {
            logits: match_logits(pass, self.itm, features)?,
            labels: Labels::Classes((0..3 * rows).map(|row| i32::from(row < rows)).collect()),
            groups: vec![0; 3 * rows],
        };
        Ok(Fusion {
            own,
            hard: copies,
            scored,
        })
    }

    fn record_contrast(
        &self,
        pass: &mut Pass,
        contrast: &Contrast,
        targets: Vec<f32>,
    ) -> Result<(), ModelError> {
        if !pass.is_traced() {
            return Ok(());
        }
        let shape = [self.batch.pairs, targets.len() / self.batch.pairs];
        let [t2i, i2t] = contrast.logits.clone();
        for (name, values) in [
            ("itc_logits_t2i", t2i),
            ("itc_logits_i2t", i2t),
            ("itc_targets", targets),
        ] {
            pass.record(name, &pass.constant(values, shape))?;
        }
        Ok(())
    }
}

fn failed(what: &'static str, source: GroupError) -> ModelError {
    ModelError::Group { what, source }
}

fn add(mut sum: Vec<f32>, terms: &[f32]) -> Vec<f32> {
    sum.iter_mut()
        .zip(terms)
        .for_each(|(sum, term)| *sum += term);
    sum
}

/// The same numbers at the start of a new graph; gradients are asked of it if it is trained on.
fn leaf(x: &Tensor<3>, training: bool) -> Tensor<3> {
    if training {
        x.clone().detach().require_grad()
    } else {
        x.clone()
    }
}

/// A leaf's gradient; zeros if nothing reached it.
fn gradient_of(leaf: &Tensor<3>, slopes: &mut Slopes) -> Result<Vec<f32>, ModelError> {
    match slopes.take(leaf) {
        Some(gradient) => read(gradient, "gradient of experts"),
        None => Ok(vec![0.0; leaf.shape().num_elements()]),
    }
}
