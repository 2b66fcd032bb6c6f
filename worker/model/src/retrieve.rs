//! One micro-batch of a contrastive task: ITC against the group, ITM with hard negatives
//! (model_spec 8), in front of them the MLM pass where pre-training has it.
//!
//! Host batch in, a report and an added gradient out, as in `pretrain`. What looks across samples
//! is in `contrast_pass`.

use belfry_configs::rng::Key;

use crate::batch::{RetrievalBatch, RetrievalReport, expect};
use crate::contrast::TEMPERATURE_BOUNDS;
use crate::contrast_pass::ContrastPass;
use crate::draws::Draws;
use crate::error::ModelError;
use crate::gradient::Target;
use crate::group::Group;
use crate::heads::{Heads, MlmHead};
use crate::loss::GroupLoss;
use crate::pass::{Pass, Trace};
use crate::scored::Run;
use crate::tower::{Images, Inputs, ManagerTower};
use crate::weights::Weights;
use crate::words::Words;

/// The pass that predicts masked words, where there is one.
pub(crate) const MLM: u64 = 0;

/// One hard negative per row.
#[derive(Clone, Copy, Debug)]
pub enum Negatives<'a> {
    /// Given: places in the group of an image for each text and of a text for each image.
    Given {
        /// An image for each text.
        images: &'a [usize],
        /// A text for each image.
        texts: &'a [usize],
    },
    /// Drawn by similarity from this key.
    Drawn(Key),
}

/// What a contrastive step is given beside its batch.
pub struct Company<'a> {
    /// The group that it sees.
    pub group: &'a mut dyn Group,
    /// Where hard negatives come from.
    pub negatives: Negatives<'a>,
}

impl ManagerTower {
    /// Adds the gradient of ITC + ITM (+ MLM) to `gradient`, other members' use of these rows
    /// included, and reports the micro-batch. `draws` holds one key.
    ///
    /// # Errors
    /// [`ModelError`] if model, batch, draws or vectors do not fit, before anything is computed;
    /// [`ModelError::Group`] if the group fails.
    pub fn retrieve_gradient<'a>(
        &self,
        weights: &Weights,
        batch: &RetrievalBatch,
        draws: Draws<'_>,
        company: Company<'_>,
        gradient: impl Into<Target<'a>>,
    ) -> Result<RetrievalReport, ModelError> {
        let run = Run::training(weights, draws, gradient.into())?;
        self.retrieve(batch, company, run)
    }

    /// The same report without gradient, dropout or noise.
    ///
    /// # Errors
    /// As [`ManagerTower::retrieve_gradient`].
    pub fn retrieve_evaluate(
        &self,
        weights: &Weights,
        batch: &RetrievalBatch,
        company: Company<'_>,
    ) -> Result<RetrievalReport, ModelError> {
        let weights = weights.without_gradient();
        self.retrieve(batch, company, Run::evaluation(&weights))
    }

    /// As [`ManagerTower::retrieve_evaluate`] with given draws, and shows every intermediate tensor.
    ///
    /// # Errors
    /// As [`ManagerTower::retrieve_gradient`].
    pub fn retrieve_trace(
        &self,
        weights: &Weights,
        batch: &RetrievalBatch,
        draws: Draws<'_>,
        company: Company<'_>,
    ) -> Result<(RetrievalReport, Trace), ModelError> {
        let mut trace = Trace::default();
        let weights = weights.without_gradient();
        let report = self.retrieve(batch, company, Run::traced(&weights, draws, &mut trace))?;
        Ok((report, trace))
    }

    /// The place of the temperature in the flat parameters and the bounds between which every update
    /// brings it back; the authors do this in place before every forward pass, and here weights do
    /// not change in a pass. `None` of a model without a contrastive loss.
    pub fn bounded_temperature(&self) -> Option<(usize, [f32; 2])> {
        let Heads::Contrast { itc, .. } = &self.heads else {
            return None;
        };
        let place = self.table().offset(itc.temperature);
        Some((place, TEMPERATURE_BOUNDS))
    }

    /// Brings the temperature back between its bounds.
    pub fn clamp_temperature(&self, params: &mut [f32]) {
        if let Some((offset, [low, high])) = self.bounded_temperature() {
            params[offset] = params[offset].clamp(low, high);
        }
    }

    /// Whether masked words are predicted beside the contrast.
    pub fn predicts_words(&self) -> bool {
        matches!(&self.heads, Heads::Contrast { mlm: Some(_), .. })
    }

    fn retrieve(
        &self,
        batch: &RetrievalBatch,
        company: Company,
        run: Run,
    ) -> Result<RetrievalReport, ModelError> {
        let Heads::Contrast { mlm, itc, itm } = &self.heads else {
            return Err(self.other_task("retrieval or pretrain_itc"));
        };
        batch.check(&self.batch_sizes(), mlm.is_some())?;
        company.check(batch.pairs)?;
        let (rows, fused_rows) = (batch.pairs, 3 * batch.pairs);
        let pass_rows: &[usize] = match mlm {
            Some(_) => &[rows, fused_rows],
            None => &[fused_rows],
        };
        self.check_run(&run, 1, pass_rows)?;
        let Run {
            weights,
            draws,
            mut gradient,
            mut trace,
        } = run;
        let mut words = GroupLoss::default();
        if let Some(head) = mlm {
            let gradient = gradient.as_mut().map(Target::again);
            let pass = self.pass(weights, MLM, draws, trace.as_deref_mut());
            words = self.masked_words(pass, head, batch, gradient)?;
        }
        let number = if mlm.is_some() { MLM + 1 } else { 0 };
        let pass = self.pass(weights, number, draws, trace);
        let contrast = ContrastPass {
            tower: self,
            itc,
            itm,
            batch,
        };
        let (itc_loss, matches) = contrast.run(pass, company, gradient)?;
        Ok(RetrievalReport::of(itc_loss, matches, words, rows))
    }

    /// The MLM pass of contrastive pre-training.
    pub(crate) fn masked_words<'a>(
        &'a self,
        mut pass: Pass<'a>,
        head: &MlmHead,
        batch: &RetrievalBatch,
        gradient: Option<Target>,
    ) -> Result<GroupLoss, ModelError> {
        let words = Words {
            inputs: Inputs {
                ids: &batch.masked_ids,
                text_mask: &batch.text_mask,
                images: Images::Pixels {
                    values: &batch.images,
                    token_type: 1,
                },
                batch: batch.pairs,
            },
            labels: &batch.mlm_labels,
            tokens: batch.pairs * batch.text_len,
        };
        if !words.any() && !pass.is_traced() {
            return Ok(GroupLoss::default());
        }
        match self.score_words(&mut pass, head, &words)? {
            Some(scored) => Ok(scored.finish(pass, 1, gradient)?.read()?[0]),
            None => Ok(GroupLoss::default()),
        }
    }
}

impl Company<'_> {
    fn check(&self, pairs: usize) -> Result<(), ModelError> {
        let (first, places) = (self.group.first(), self.group.images().len());
        if first + pairs > places {
            return expect("rows of the contrastive group", first + pairs, places);
        }
        let Negatives::Given { images, texts } = self.negatives else {
            return Ok(());
        };
        expect("hard negative images", pairs, images.len())?;
        expect("hard negative texts", pairs, texts.len())?;
        for negatives in [images, texts] {
            if let Some(index) = negatives.iter().position(|place| *place >= places) {
                return Err(ModelError::Range {
                    what: "hard negatives",
                    index,
                    value: negatives[index] as i64,
                    low: 0,
                    high: places as i64,
                });
            }
        }
        Ok(())
    }
}
