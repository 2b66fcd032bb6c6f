//! One micro-batch on the host: what data hands to the train step, for every task.

/// `b` pairs. Row-major, in the order of the lane's stream. S is the image side, T the text length.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostBatch {
    /// b.
    pub pairs: usize,
    /// T, tokens per text.
    pub text_len: usize,
    /// S, pixels per side.
    pub image_side: usize,
    /// Token ids `[b, T]`, padded.
    pub ids: Vec<i32>,
    /// 1 for real tokens, 0 for padding.
    pub text_mask: Vec<u8>,
    /// The ids after MLM masking; empty for tasks without it.
    pub masked_ids: Vec<i32>,
    /// True ids at masked positions, -100 elsewhere; empty for tasks without MLM.
    pub mlm_labels: Vec<i32>,
    /// Normalised pixels `[b, 3, S, S]`.
    pub images: Vec<f32>,
    /// NLVR2's second images `[b, 3, S, S]`; empty for other tasks.
    pub second_images: Vec<f32>,
    /// 1 match, 0 no match; empty for tasks whose false pairs are not drawn here.
    pub itm_labels: Vec<i32>,
    /// The false images of the rows of label 0, in order.
    pub false_images: Vec<f32>,
    /// What a classifier should say.
    pub targets: Targets,
    /// Place of each pair in the datasets, counted in their manifests' order.
    pub pair_ids: Vec<u64>,
    /// The id of the first pair of each row's image: rows of one image have the same.
    pub image_ids: Vec<u64>,
}

/// What a classifier should say, by row.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Targets {
    /// The task has no classifier.
    #[default]
    None,
    /// SNLI-VE and NLVR2: one class.
    Classes(Vec<i32>),
    /// VQA: soft scores of a few answers.
    Scores {
        /// Rows of the dataset's answer file.
        answers: usize,
        /// (answer, score) of each row; all others are 0. Empty where a test split tells none.
        rows: Vec<Vec<(u32, f32)>>,
    },
}

impl HostBatch {
    /// Images of the ITM pass `[b, 3, S, S]`: true ones where the label is 1, else false ones.
    pub fn itm_images(&self, out: &mut Vec<f32>) {
        let size = 3 * self.image_side * self.image_side;
        let mut others = self.false_images.chunks_exact(size);
        for (label, image) in self.itm_labels.iter().zip(self.images.chunks_exact(size)) {
            let image = match label {
                0 => others.next().expect("one for each label 0"),
                _ => image,
            };
            out.extend_from_slice(image);
        }
    }

    /// Bytes of its vectors.
    pub fn bytes(&self) -> u64 {
        let words = self.ids.len() + self.masked_ids.len() + self.mlm_labels.len();
        let pixels = self.images.len() + self.second_images.len() + self.false_images.len();
        (4 * (words + pixels) + self.text_mask.len()) as u64
    }
}
