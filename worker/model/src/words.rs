//! The pass that predicts masked words (model_spec 8): shared by both kinds of pre-training.

use burn::tensor::{Tensor, TensorData};

use crate::batch::{IGNORED, Labels};
use crate::cross_modal::Outputs;
use crate::error::ModelError;
use crate::heads::MlmHead;
use crate::pass::Pass;
use crate::scored::Scored;
use crate::tower::{Inputs, ManagerTower};

/// Masked texts with their images, and the words behind the masks.
pub(crate) struct Words<'a> {
    pub inputs: Inputs<'a>,
    /// The original id where a token is to be predicted, else -100.
    pub labels: &'a [i32],
    /// Tokens of one micro-batch.
    pub tokens: usize,
}

impl Words<'_> {
    /// Without any masked token the whole pass is worth exactly zero.
    pub fn any(&self) -> bool {
        self.labels.iter().any(|label| *label != IGNORED)
    }
}

impl ManagerTower {
    /// Only masked tokens meet the vocabulary: the loss ignores the others.
    pub(crate) fn score_words<'a>(
        &'a self,
        pass: &mut Pass<'a>,
        head: &MlmHead,
        words: &Words,
    ) -> Result<Option<Scored>, ModelError> {
        let traced = pass.is_traced();
        let outputs = if traced { Outputs::All } else { Outputs::Text };
        let (text, image) = self.encode(pass, &words.inputs, outputs)?;
        if let (true, Some(image)) = (traced, image) {
            self.pool(pass, text.clone(), image)?;
            pass.record("mlm_score_input", &text)?;
            let [rows, length, width] = text.dims();
            let all = head.forward(pass, text.clone().reshape([rows * length, width]));
            pass.record("mlm_score", &all.reshape([rows, length, self.sizes.vocab]))?;
        }
        let masked: Vec<i32> = (0..words.labels.len() as i32)
            .filter(|token| words.labels[*token as usize] != IGNORED)
            .collect();
        if masked.is_empty() {
            return Ok(None);
        }
        let [rows, length, width] = text.dims();
        let indices = TensorData::new(masked.clone(), [masked.len()]);
        let indices = Tensor::from_data(indices, pass.weights.device());
        let text = text.reshape([rows * length, width]).select(0, indices);
        let label = |token: &i32| words.labels[*token as usize];
        let group = |token: &i32| *token as usize / words.tokens;
        Ok(Some(Scored {
            logits: head.forward(pass, text),
            labels: Labels::Classes(masked.iter().map(label).collect()),
            groups: masked.iter().map(group).collect(),
        }))
    }
}
