//! The host side of a device batch: plain vectors in, plain numbers out.
//!
//! Filled by the train step from what the data plane made. It refuses to know the device.

use crate::error::ModelError;

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
        let expect = |what, expected: usize, found: usize| {
            if expected == found {
                return Ok(());
            }
            Err(ModelError::Length {
                what,
                expected,
                found,
            })
        };
        expect("batch.text_len", sizes.text_len, self.text_len)?;
        let rows = self.rows();
        if rows == 0 {
            return Err(ModelError::Length {
                what: "batch rows",
                expected: 1,
                found: 0,
            });
        }
        let tokens = rows * self.text_len;
        let pixels = rows * 3 * sizes.image_side * sizes.image_side;
        expect("batch.masked_ids", tokens, self.masked_ids.len())?;
        expect("batch.ids", tokens, self.ids.len())?;
        expect("batch.mlm_labels", tokens, self.mlm_labels.len())?;
        expect("batch.text_mask", tokens, self.text_mask.len())?;
        expect("batch.images", pixels, self.images.len())?;
        expect("batch.itm_images", pixels, self.itm_images.len())?;
        expect("batch.itm_labels", rows, self.itm_labels.len())?;
        let vocab = sizes.vocab as i64;
        in_range("batch.masked_ids", &self.masked_ids, vocab, None)?;
        in_range("batch.ids", &self.ids, vocab, None)?;
        in_range("batch.mlm_labels", &self.mlm_labels, vocab, Some(IGNORED))?;
        in_range("batch.itm_labels", &self.itm_labels, 2, None)
    }
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
