//! One micro-batch of a contrastive task against the whole global batch (model_spec 8), by two
//! passes: a first one without graph gives every row's features, a second one back-propagates what
//! [`WholeBatch`](crate::WholeBatch) says of them.
//!
//! Stands between the train step, which gathers features and reads rows of other lanes, and
//! `gathered_pass`. Dropout and noise are keyed by row, not by micro-batch: a row draws the same
//! numbers in both passes and wherever it is a hard negative, so the gradient of the whole batch
//! does not depend on how it is cut into micro-batches.

use belfry_configs::rng::Key;

use crate::batch::{BatchSizes, RetrievalBatch, RetrievalReport, expect};
use crate::draws::Draws;
use crate::error::ModelError;
use crate::gathered_pass::GatheredPass;
use crate::gradient::Target;
use crate::heads::{Heads, unit};
use crate::loss::GroupLoss;
use crate::retrieve::MLM;
use crate::scored::Run;
use crate::tower::ManagerTower;
use crate::weights::{Weights, read};
use crate::whole_batch::ContrastSlopes;

/// A micro-batch and the rows of the global batch that its hard negatives are. T texts and I images,
/// of both the micro-batch's own `pairs` first; a row that is a negative of several, or one of the
/// own, is there once.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GatheredBatch {
    /// The micro-batch; also its masked words, where the task has them.
    pub own: RetrievalBatch,
    /// Token ids of texts behind the own ones, `[T - pairs, text_len]`.
    pub other_ids: Vec<i32>,
    /// Their masks, alike.
    pub other_text_mask: Vec<f32>,
    /// Images behind the own ones, `[I - pairs, 3, S, S]`.
    pub other_images: Vec<f32>,
    /// For each own image a text, by its place among the T.
    pub hard_texts: Vec<usize>,
    /// For each own text an image, by its place among the I.
    pub hard_images: Vec<usize>,
}

impl GatheredBatch {
    pub(crate) fn texts(&self) -> usize {
        self.own.pairs + self.other_ids.len() / self.own.text_len.max(1)
    }

    pub(crate) fn images(&self, side: usize) -> usize {
        self.own.pairs + self.other_images.len() / (3 * side * side)
    }

    fn check(&self, sizes: &BatchSizes, words: bool) -> Result<(), ModelError> {
        self.own.check(sizes, words)?;
        let (texts, images) = (self.texts(), self.images(sizes.image_side));
        let (pairs, text_len) = (self.own.pairs, self.own.text_len);
        if texts > pairs {
            let others = texts - pairs;
            sizes.check_texts(others, text_len, &self.other_ids, &self.other_text_mask)?;
        }
        sizes.check_images("batch.other_images", images - pairs, &self.other_images)?;
        check_places("batch.hard_texts", &self.hard_texts, pairs, texts)?;
        check_places("batch.hard_images", &self.hard_images, pairs, images)
    }
}

fn check_places(
    what: &'static str,
    places: &[usize],
    pairs: usize,
    rows: usize,
) -> Result<(), ModelError> {
    expect(what, pairs, places.len())?;
    match places.iter().position(|place| *place >= rows) {
        None => Ok(()),
        Some(index) => Err(ModelError::Range {
            what,
            index,
            value: places[index] as i64,
            low: 0,
            high: rows as i64,
        }),
    }
}

fn draws(keys: Option<&[Key]>) -> Draws<'_> {
    keys.map_or(Draws::Off, Draws::Keys)
}

impl ManagerTower {
    /// The first pass: features of length 1 of `batch`'s rows, of text and image,
    /// `[pairs, contrastive]` each. `keys` are one per row, the very ones of the second pass; `None`
    /// draws nothing.
    ///
    /// # Errors
    /// [`ModelError`] if model, batch or keys do not fit, before anything is computed.
    pub fn contrastive_features(
        &self,
        weights: &Weights,
        batch: &RetrievalBatch,
        keys: Option<&[Key]>,
    ) -> Result<[Vec<f32>; 2], ModelError> {
        let Heads::Contrast { mlm, itc, .. } = &self.heads else {
            return Err(self.other_task("retrieval or pretrain_itc"));
        };
        batch.check(&self.batch_sizes(), mlm.is_some())?;
        if let Some(keys) = keys {
            expect("keys", batch.pairs, keys.len())?;
        }
        let weights = weights.without_gradient();
        let number = if mlm.is_some() { MLM + 1 } else { 0 };
        let mut pass = self.pass(&weights, number, draws(keys), None);
        let pairs = batch.pairs;
        let (texts, _) = self.text_layers(&mut pass, &batch.ids, &batch.text_mask, pairs)?;
        let images = self.image_layers(&mut pass, &batch.images, pairs)?;
        let text = unit(itc.text(&pass, &texts));
        let image = unit(itc.image(&pass, &images));
        Ok([read(text, "features")?, read(image, "features")?])
    }

    /// The second pass: adds to `gradient` that of the micro-batch's share of the whole batch's loss
    /// (contrast, matching of its pairs and hard negatives, masked words where the task has them),
    /// and reports the micro-batch. `contrast` is what the whole batch says of the own rows; `keys`
    /// are one per text of the batch, own ones first.
    ///
    /// Gradients of hard negatives, also of other lanes' rows, are added here: their towers run once
    /// more for it. Price: up to twice the towers' work of `retrieve_gradient`, beside the first
    /// pass.
    ///
    /// # Errors
    /// [`ModelError`] if model, batch, slopes, keys or vectors do not fit, before anything is
    /// computed.
    pub fn gathered_gradient<'a>(
        &self,
        weights: &Weights,
        batch: &GatheredBatch,
        contrast: &ContrastSlopes,
        keys: Option<&[Key]>,
        gradient: impl Into<Target<'a>>,
    ) -> Result<RetrievalReport, ModelError> {
        let Heads::Contrast { mlm, itc, itm } = &self.heads else {
            return Err(self.other_task("retrieval or pretrain_itc"));
        };
        let run = Run::training(weights, draws(keys), gradient.into())?;
        let pairs = batch.own.pairs;
        batch.check(&self.batch_sizes(), mlm.is_some())?;
        self.check_run(&run, batch.texts(), &[])?;
        for slopes in &contrast.features {
            let expected = pairs * self.sizes.contrastive;
            expect("slopes of features", expected, slopes.len())?;
        }
        let Some(mut gradient) = run.gradient else {
            return Err(ModelError::NoAutodiff);
        };
        let own = keys.map(|keys| &keys[..pairs]);
        let mut words = GroupLoss::default();
        if let Some(head) = mlm {
            let pass = self.pass(weights, MLM, draws(own), None);
            words = self.masked_words(pass, head, &batch.own, Some(gradient.again()))?;
        }
        let pass = GatheredPass {
            tower: self,
            itc,
            itm,
            batch,
            number: if mlm.is_some() { MLM + 1 } else { 0 },
            keys,
        };
        let matches = pass.run(weights, contrast, gradient)?;
        Ok(RetrievalReport::of(contrast.loss, matches, words, pairs))
    }
}
