//! The pre-training step of one device batch: MLM pass, ITM pass, losses, gradients (model_spec 8).
//!
//! The last room before the train step's partial sums: host batch in, reports and an added gradient
//! out. The passes meet in the images alone, so on the host they run side by side. It refuses to
//! know lanes and how gradients are combined further.

use burn::tensor::Tensor;

use crate::batch::{IGNORED, Labels, MicroBatchReport, PretrainBatch};
use crate::draws::Draws;
use crate::error::ModelError;
use crate::gradient::Target;
use crate::heads::{Heads, MlmHead};
use crate::layers::Linear;
use crate::loss::GroupLoss;
use crate::pass::{Pass, Trace};
use crate::phase::phase;
use crate::scored::{Losses, Run, Scored};
use crate::segments::Slopes;
use crate::shared_images::{Owed, SharedImages, View};
use crate::side_by_side::side_by_side;
use crate::tower::{Images, Inputs, ManagerTower};
use crate::weights::Weights;
use crate::words::Words;

/// The pass that predicts masked words.
const MLM: u64 = 0;
/// The pass that tells true images from false ones.
const ITM: u64 = 1;

impl ManagerTower {
    /// Adds the gradient of sum over micro-batches of (MLM mean + ITM mean) to `gradient`, and
    /// reports each micro-batch, when asked. `draws` holds one key per micro-batch.
    ///
    /// # Errors
    /// [`ModelError`] if model, batch, draws or vectors do not fit, before anything is computed.
    pub fn pretrain_step(
        &self,
        weights: &Weights,
        batch: &PretrainBatch,
        draws: Draws<'_>,
        gradient: Target<'_>,
    ) -> Result<PretrainReports, ModelError> {
        self.pretrain(batch, Run::training(weights, draws, gradient)?)
    }

    /// The same with the reports read at once.
    ///
    /// # Errors
    /// As [`ManagerTower::pretrain_step`].
    pub fn pretrain_gradient<'a>(
        &self,
        weights: &Weights,
        batch: &PretrainBatch,
        draws: Draws<'_>,
        gradient: impl Into<Target<'a>>,
    ) -> Result<Vec<MicroBatchReport>, ModelError> {
        self.pretrain_step(weights, batch, draws, gradient.into())?
            .read()
    }

    /// The same reports without gradient, dropout or noise.
    ///
    /// # Errors
    /// [`ModelError`] if model or batch do not fit.
    pub fn pretrain_evaluate(
        &self,
        weights: &Weights,
        batch: &PretrainBatch,
    ) -> Result<Vec<MicroBatchReport>, ModelError> {
        self.pretrain(batch, Run::evaluation(&weights.without_gradient()))?
            .read()
    }

    /// As [`ManagerTower::pretrain_evaluate`] with given draws, and shows every intermediate tensor.
    ///
    /// # Errors
    /// [`ModelError`] if model, batch or draws do not fit.
    pub fn pretrain_trace(
        &self,
        weights: &Weights,
        batch: &PretrainBatch,
        draws: Draws<'_>,
    ) -> Result<(Vec<MicroBatchReport>, Trace), ModelError> {
        let mut trace = Trace::default();
        let weights = weights.without_gradient();
        let reports = self.pretrain(batch, Run::traced(&weights, draws, &mut trace))?;
        Ok((reports.read()?, trace))
    }

    fn pretrain(&self, batch: &PretrainBatch, run: Run) -> Result<PretrainReports, ModelError> {
        let Heads::Pretrain { mlm, itm } = &self.heads else {
            return Err(self.other_task("pretrain"));
        };
        batch.check(&self.batch_sizes())?;
        self.check_run(&run, batch.micro_batches, &[batch.rows(); 2])?;
        let passes = Passes {
            tower: self,
            mlm,
            itm,
            batch,
        };
        let [words, matches] = match run.trace {
            Some(_) => passes.apart(run)?,
            None => passes.together(run)?,
        };
        Ok(PretrainReports { words, matches })
    }
}

/// What happened in the micro-batches of a device batch; perhaps the device has it still.
#[derive(Debug)]
pub struct PretrainReports {
    words: Losses,
    matches: Losses,
}

impl PretrainReports {
    /// One report per micro-batch. From a device of its own this waits for the losses.
    ///
    /// # Errors
    /// [`ModelError::Device`] if the device does not give them back.
    pub fn read(self) -> Result<Vec<MicroBatchReport>, ModelError> {
        let report = |(mlm, itm): (GroupLoss, GroupLoss)| MicroBatchReport {
            mlm_loss: mlm.mean,
            itm_loss: itm.mean,
            mlm_masked: mlm.rows,
            mlm_correct: mlm.score as u32,
            itm_correct: itm.score as u32,
            pairs: itm.rows,
        };
        let pairs = self.words.read()?.into_iter().zip(self.matches.read()?);
        Ok(pairs.map(report).collect())
    }
}

/// Both passes over one device batch.
struct Passes<'a> {
    tower: &'a ManagerTower,
    mlm: &'a MlmHead,
    itm: &'a Linear,
    batch: &'a PretrainBatch,
}

/// A pass that is through: backward too, if that was asked.
struct Through<'a> {
    losses: Losses,
    backward: Option<((Pass<'a>, Slopes), Owed)>,
}

impl<'t> Passes<'t> {
    /// One after the other, each with its own run of the image tower, so that both can be shown
    /// whole.
    fn apart(&self, run: Run) -> Result<[Losses; 2], ModelError> {
        let Run {
            weights,
            draws,
            mut trace,
            ..
        } = run;
        let count = self.batch.micro_batches;
        let pixels = |values| Images::Pixels {
            values,
            token_type: 1,
        };
        let mut pass = Pass::new(weights, MLM, draws, trace.as_deref_mut());
        let words = self.score_words(&mut pass, pixels(&self.batch.images))?;
        let words = match words {
            Some(scored) => scored.losses(&pass, count)?.0,
            None => self.nothing(),
        };
        drop(pass);
        let mut pass = Pass::new(weights, ITM, draws, trace);
        let matches = self.score_matches(&mut pass, pixels(&self.batch.itm_images))?;
        Ok([words, matches.losses(&pass, count)?.0])
    }

    /// Of a pass that did not run.
    fn nothing(&self) -> Losses {
        Losses::Read(vec![GroupLoss::default(); self.batch.micro_batches])
    }

    /// Side by side, with one run of the image tower for both.
    fn together(&self, run: Run) -> Result<[Losses; 2], ModelError> {
        let Run {
            weights,
            draws,
            mut gradient,
            ..
        } = run;
        let training = gradient.is_some();
        let distinct = self.distinct_images();
        let forks = SharedImages::forks(weights, distinct.images.len());
        let shared = SharedImages::new(self.tower, &forks, &distinct.images)?;
        let views = [distinct.words, distinct.matches].map(|rows| rows.map(|r| shared.view(r)));
        let forks = [MLM, ITM].map(|_| weights.fork());
        let jobs = [MLM, ITM].into_iter().zip(&forks).zip(views);
        // The first pass adds to the sum as it goes; the other one's terms come behind.
        let mut sum = gradient.as_mut().map(Target::again);
        let jobs = jobs.map(|((number, weights), view)| {
            let sum = view.as_ref().and_then(|_| sum.take());
            move || {
                let pass = self.tower.pass(weights, number, draws, None);
                view.map(|view| self.through(pass, view, training, sum))
                    .transpose()
            }
        });
        let through = side_by_side(weights.on_host(), jobs);
        let mut losses = [MLM, ITM].map(|_| self.nothing());
        let (mut backwards, mut owed) = (Vec::new(), Vec::new());
        for (place, through) in losses.iter_mut().zip(through) {
            let Some(through) = through? else { continue };
            *place = through.losses;
            if let Some((backward, owes)) = through.backward {
                backwards.push(backward);
                owed.push(owes);
            }
        }
        if let Some(mut gradient) = gradient {
            Pass::collect_all(&mut backwards, gradient.again())?;
            drop(backwards);
            shared.backward(&owed, gradient)?;
        }
        Ok(losses)
    }

    /// One pass: losses and, if asked, gradients.
    fn through<'p>(
        &self,
        mut pass: Pass<'p>,
        view: View,
        training: bool,
        sum: Option<Target>,
    ) -> Result<Through<'p>, ModelError>
    where
        't: 'p,
    {
        let forward = phase!(pass.weights.device(), "passes, forward");
        let images = Images::Experts(view.experts.clone());
        let scored = match pass.number {
            MLM => self.score_words(&mut pass, images)?,
            _ => Some(self.score_matches(&mut pass, images)?),
        };
        drop(forward);
        let scored = scored.expect("the MLM pass runs with masked words only");
        let (losses, slopes) = scored.losses(&pass, self.batch.micro_batches)?;
        let mut through = Through {
            losses,
            backward: None,
        };
        if training {
            let mut slopes = scored.backward(&mut pass, slopes, sum)?;
            let owed = view.owed(&mut slopes);
            through.backward = Some(((pass, slopes), owed));
        }
        Ok(through)
    }

    /// The images that have to go through the tower: a matching pair's once.
    fn distinct_images(&self) -> Distinct<'_> {
        let batch = self.batch;
        let rows = batch.rows();
        let size = batch.images.len() / rows;
        let mut images: Vec<&[f32]> = Vec::new();
        let mut words = None;
        if batch.mlm_labels.iter().any(|label| *label != IGNORED) {
            images.extend(batch.images.chunks(size));
            words = Some((0..rows).collect());
        }
        let matches = batch.itm_images.chunks(size).enumerate();
        let matches = matches.map(|(row, image)| {
            if images
                .get(row)
                .is_some_and(|own| words.is_some() && *own == image)
            {
                return row;
            }
            images.push(image);
            images.len() - 1
        });
        let matches = Some(matches.collect());
        Distinct {
            images,
            words,
            matches,
        }
    }

    fn score_words<'p>(
        &self,
        pass: &mut Pass<'p>,
        images: Images<'_>,
    ) -> Result<Option<Scored>, ModelError>
    where
        't: 'p,
    {
        let batch = self.batch;
        let words = Words {
            inputs: Inputs {
                ids: &batch.masked_ids,
                text_mask: &batch.text_mask,
                images,
                batch: batch.rows(),
            },
            labels: &batch.mlm_labels,
            tokens: batch.pairs * batch.text_len,
        };
        self.tower.score_words(pass, self.mlm, &words)
    }

    fn score_matches<'p>(
        &self,
        pass: &mut Pass<'p>,
        images: Images<'_>,
    ) -> Result<Scored, ModelError>
    where
        't: 'p,
    {
        let batch = self.batch;
        let inputs = Inputs {
            ids: &batch.ids,
            text_mask: &batch.text_mask,
            images,
            batch: batch.rows(),
        };
        let features = self.tower.features(pass, &inputs)?;
        Ok(Scored {
            logits: match_logits(pass, self.itm, features)?,
            labels: Labels::Classes(batch.itm_labels.clone()),
            groups: (0..batch.rows()).map(|row| row / batch.pairs).collect(),
        })
    }
}

/// Images by their places in `images`.
struct Distinct<'a> {
    images: Vec<&'a [f32]>,
    /// Of the MLM pass; without any masked token the whole pass is worth exactly zero.
    words: Option<Vec<usize>>,
    matches: Option<Vec<usize>>,
}

/// Logits of no match and match.
pub(crate) fn match_logits(
    pass: &mut Pass,
    head: &Linear,
    features: Tensor<2>,
) -> Result<Tensor<2>, ModelError> {
    pass.record("itm_score_input", &features)?;
    let logits = head.forward(pass, features);
    pass.record("itm_score", &logits)?;
    Ok(logits)
}
