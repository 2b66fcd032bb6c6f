//! One micro-batch on the host: what data hands to the train step.

/// `b` pairs. Row-major, in the order of the lane's stream.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostBatch {
    /// b.
    pub pairs: usize,
    /// T, tokens per caption.
    pub text_len: usize,
    /// S, pixels per side.
    pub image_side: usize,
    /// Token ids `[b, T]`, padded with 1.
    pub ids: Vec<i32>,
    /// The same after MLM masking.
    pub masked_ids: Vec<i32>,
    /// True ids at masked positions, -100 elsewhere.
    pub mlm_labels: Vec<i32>,
    /// 1 for real tokens, 0 for padding.
    pub text_mask: Vec<u8>,
    /// Normalised pixels `[b, 3, S, S]`.
    pub images: Vec<f32>,
    /// The same, with false images in rows of label 0.
    pub itm_images: Vec<f32>,
    /// 1 match, 0 no match.
    pub itm_labels: Vec<i32>,
    /// Place of each pair in the dataset, counted in the manifest's order.
    pub pair_ids: Vec<u64>,
}
