//! The host side of a device batch: plain vectors in, plain numbers out.
//!
//! Filled by the train step from what the data plane made. It refuses to know the device.

use crate::error::ModelError;
use crate::loss::GroupLoss;

/// The label of a token that the MLM loss ignores.
pub(crate) const IGNORED: i32 = -100;

/// `micro_batches` micro-batches of `pairs` pairs that go through the network together.
/// B = micro_batches x pairs, T = text_len, S = image side.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PretrainBatch {
    /// Micro-batches: the groups over which losses are means.
    pub micro_batches: usize,
    /// Pairs of one micro-batch.
    pub pairs: usize,
    /// Tokens per caption.
    pub text_len: usize,
    /// Token ids with MLM masking, `[B, T]`.
    pub masked_ids: Vec<i32>,
    /// Token ids, `[B, T]`.
    pub ids: Vec<i32>,
    /// The original id where a token is to be predicted, else -100, `[B, T]`.
    pub mlm_labels: Vec<i32>,
    /// 1 for tokens, 0 for padding, `[B, T]`.
    pub text_mask: Vec<f32>,
    /// True images, normalised, `[B, 3, S, S]`.
    pub images: Vec<f32>,
    /// Images of the ITM pass: true where `itm_labels` is 1, else false ones, `[B, 3, S, S]`.
    pub itm_images: Vec<f32>,
    /// 1 where image and caption match, `[B]`.
    pub itm_labels: Vec<i32>,
}

/// `micro_batches` micro-batches of `pairs` texts with one image each, or two (NLVR2), and what the
/// classifier should say. B = micro_batches x pairs, T = text_len, S = image side.
#[derive(Clone, Debug, PartialEq)]
pub struct ClassifyBatch {
    /// Micro-batches: the groups over which losses are means.
    pub micro_batches: usize,
    /// Texts of one micro-batch.
    pub pairs: usize,
    /// Tokens per text.
    pub text_len: usize,
    /// Token ids, `[B, T]`.
    pub ids: Vec<i32>,
    /// 1 for tokens, 0 for padding, `[B, T]`.
    pub text_mask: Vec<f32>,
    /// Images, normalised, `[B, 3, S, S]` each: one vector, of NLVR2 two.
    pub images: Vec<Vec<f32>>,
    /// One row per text.
    pub labels: Labels,
}

/// What logits should say.
#[derive(Clone, Debug, PartialEq)]
pub enum Labels {
    /// One class per row: cross-entropy.
    Classes(Vec<i32>),
    /// A soft score per row and class (VQA): binary cross-entropy, summed over classes.
    Scores(Vec<f32>),
}

/// What happened in one micro-batch of a classifier.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ClassifyReport {
    /// Mean loss over the texts.
    pub loss: f64,
    /// Texts judged rightly; of VQA the sum of the chosen answers' soft scores. Ties go to the
    /// lower class.
    pub score: f64,
    /// Texts.
    pub pairs: u32,
}

/// One micro-batch of `pairs` matching texts and images. One only: whatever looks across samples
/// sees a group that is fixed by the run, not by how many micro-batches share a device batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RetrievalBatch {
    /// Texts, and images.
    pub pairs: usize,
    /// Tokens per text.
    pub text_len: usize,
    /// Token ids, `[B, T]`.
    pub ids: Vec<i32>,
    /// 1 for tokens, 0 for padding, `[B, T]`.
    pub text_mask: Vec<f32>,
    /// Images, normalised, `[B, 3, S, S]`.
    pub images: Vec<f32>,
    /// Token ids with MLM masking, `[B, T]`; empty but for `pretrain_itc`.
    pub masked_ids: Vec<i32>,
    /// The original id where a token is to be predicted, else -100; empty but for `pretrain_itc`.
    pub mlm_labels: Vec<i32>,
}

/// What happened in the micro-batch of a contrastive step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RetrievalReport {
    /// Mean of the two directions' cross-entropies against the group.
    pub itc_loss: f64,
    /// Mean cross-entropy over the true pairs and both kinds of hard negatives.
    pub itm_loss: f64,
    /// Pairs and negatives judged rightly, of three times `pairs`.
    pub itm_correct: u32,
    /// Mean cross-entropy over the masked tokens; 0 if there are none.
    pub mlm_loss: f64,
    /// Masked tokens.
    pub mlm_masked: u32,
    /// Masked tokens whose most likely word is right.
    pub mlm_correct: u32,
    /// Pairs.
    pub pairs: u32,
}

impl RetrievalReport {
    pub(crate) fn of(itc_loss: f64, matches: GroupLoss, words: GroupLoss, pairs: usize) -> Self {
        RetrievalReport {
            itc_loss,
            itm_loss: matches.mean,
            itm_correct: matches.score as u32,
            mlm_loss: words.mean,
            mlm_masked: words.rows,
            mlm_correct: words.score as u32,
            pairs: pairs as u32,
        }
    }
}

/// What happened in one micro-batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MicroBatchReport {
    /// Mean cross-entropy over the masked tokens; exactly 0 if there are none.
    pub mlm_loss: f64,
    /// Mean cross-entropy over the pairs.
    pub itm_loss: f64,
    /// Masked tokens. 0 flags a micro-batch without MLM loss.
    pub mlm_masked: u32,
    /// Masked tokens whose most likely word is right (ties: the lower id).
    pub mlm_correct: u32,
    /// Pairs judged rightly (ties: no match).
    pub itm_correct: u32,
    /// Pairs.
    pub pairs: u32,
}

/// Sizes that a batch is checked against.
pub(crate) struct BatchSizes {
    pub text_len: usize,
    pub vocab: usize,
    pub image_side: usize,
}

impl PretrainBatch {
    /// Rows of the device batch.
    pub fn rows(&self) -> usize {
        self.micro_batches * self.pairs
    }

    /// Checks lengths and ranges, so that nothing on the device can be out of bounds.
    pub(crate) fn check(&self, sizes: &BatchSizes) -> Result<(), ModelError> {
        let rows = self.rows();
        sizes.check_texts(rows, self.text_len, &self.ids, &self.text_mask)?;
        sizes.check_words(rows, &self.masked_ids, &self.mlm_labels)?;
        sizes.check_images("batch.images", rows, &self.images)?;
        sizes.check_images("batch.itm_images", rows, &self.itm_images)?;
        expect("batch.itm_labels", rows, self.itm_labels.len())?;
        in_range("batch.itm_labels", &self.itm_labels, 2, None)
    }
}

impl ClassifyBatch {
    /// Rows of the device batch.
    pub fn rows(&self) -> usize {
        self.micro_batches * self.pairs
    }

    pub(crate) fn check(
        &self,
        sizes: &BatchSizes,
        images: usize,
        classes: usize,
    ) -> Result<(), ModelError> {
        self.check_inputs(sizes, images)?;
        let rows = self.rows();
        match &self.labels {
            Labels::Classes(labels) => {
                expect("batch.labels", rows, labels.len())?;
                in_range("batch.labels", labels, classes as i64, None)
            }
            Labels::Scores(scores) => expect("batch.labels", rows * classes, scores.len()),
        }
    }

    /// The same without labels.
    pub(crate) fn check_inputs(&self, sizes: &BatchSizes, images: usize) -> Result<(), ModelError> {
        let rows = self.rows();
        sizes.check_texts(rows, self.text_len, &self.ids, &self.text_mask)?;
        expect("batch.images per text", images, self.images.len())?;
        for images in &self.images {
            sizes.check_images("batch.images", rows, images)?;
        }
        Ok(())
    }
}

impl RetrievalBatch {
    pub(crate) fn check(&self, sizes: &BatchSizes, words: bool) -> Result<(), ModelError> {
        sizes.check_texts(self.pairs, self.text_len, &self.ids, &self.text_mask)?;
        sizes.check_images("batch.images", self.pairs, &self.images)?;
        let rows = if words { self.pairs } else { 0 };
        sizes.check_words(rows, &self.masked_ids, &self.mlm_labels)
    }
}

impl BatchSizes {
    pub fn check_texts(
        &self,
        rows: usize,
        text_len: usize,
        ids: &[i32],
        mask: &[f32],
    ) -> Result<(), ModelError> {
        expect("batch.text_len", self.text_len, text_len)?;
        if rows == 0 {
            return expect("batch rows", 1, 0);
        }
        expect("batch.ids", rows * text_len, ids.len())?;
        expect("batch.text_mask", rows * text_len, mask.len())?;
        in_range("batch.ids", ids, self.vocab as i64, None)
    }

    fn check_words(&self, rows: usize, ids: &[i32], labels: &[i32]) -> Result<(), ModelError> {
        let (tokens, vocab) = (rows * self.text_len, self.vocab as i64);
        expect("batch.masked_ids", tokens, ids.len())?;
        expect("batch.mlm_labels", tokens, labels.len())?;
        in_range("batch.masked_ids", ids, vocab, None)?;
        in_range("batch.mlm_labels", labels, vocab, Some(IGNORED))
    }

    pub fn check_images(
        &self,
        what: &'static str,
        rows: usize,
        images: &[f32],
    ) -> Result<(), ModelError> {
        let pixels = rows * 3 * self.image_side * self.image_side;
        expect(what, pixels, images.len())
    }
}

/// Refuses a length that does not fit.
pub(crate) fn expect(what: &'static str, expected: usize, found: usize) -> Result<(), ModelError> {
    if expected == found {
        return Ok(());
    }
    Err(ModelError::Length {
        what,
        expected,
        found,
    })
}

fn in_range(
    what: &'static str,
    values: &[i32],
    high: i64,
    also: Option<i32>,
) -> Result<(), ModelError> {
    let bad = |v: i32| Some(v) != also && !(0..high).contains(&i64::from(v));
    match values.iter().position(|v| bad(*v)) {
        None => Ok(()),
        Some(index) => {
            let value = i64::from(values[index]);
            Err(ModelError::Range {
                what,
                index,
                value,
                low: 0,
                high,
            })
        }
    }
}
