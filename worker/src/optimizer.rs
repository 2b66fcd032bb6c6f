//! AdamW as the authors ran it (model_spec 11), on flat host vectors.
//!
//! The last room of a step: summed gradient in, new weights out, after the commit. Parameters are
//! ranges of one flat vector; this file refuses to know the model, devices and other workers.
//! Every element is updated on its own, so the bits do not depend on threads.

use belfry_configs::{Decay, Optim};
use rayon::prelude::*;

/// Elements per parallel task. Values do not depend on it.
const CHUNK: usize = 1 << 16;
/// A name that contains one of these belongs to a task head.
const HEAD: [&str; 5] = [
    "vqa_classifier",
    "nlvr2_classifier",
    "snli_classifier",
    "mlm_score",
    "itm_score",
];
/// A name that contains this, and none of [`HEAD`], belongs to the cross-modal group.
const CROSS_MODAL: &str = "cross_modal";
/// A name that contains one of these is not decayed. Substrings, as the authors have them: CLIP's
/// `ln_1.weight` and the managers' `LayerNorm.0.weight` do not contain any and are decayed.
const NO_DECAY: [&str; 7] = [
    "bias",
    "LayerNorm.bias",
    "LayerNorm.weight",
    "norm.bias",
    "norm.weight",
    "norm1.",
    "norm2.",
];

/// Which learning rate a parameter has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RateGroup {
    /// The uni-modal towers and what else is left.
    Base,
    /// Task heads.
    Head,
    /// Managers, cross-modal layers, transforms, poolers.
    CrossModal,
}

/// A parameter's place in the flat vectors and its group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamGroup {
    /// First element.
    pub offset: usize,
    /// Elements.
    pub len: usize,
    /// Whether a gradient is ever produced. If not, the parameter is skipped, decay included.
    pub trained: bool,
    /// Learning rate group.
    pub rate: RateGroup,
    /// Whether weight decay applies.
    pub decay: bool,
}

impl ParamGroup {
    /// The group of a parameter by its name.
    pub fn of(name: &str, offset: usize, len: usize, trained: bool) -> Self {
        let rate = if HEAD.iter().any(|part| name.contains(part)) {
            RateGroup::Head
        } else if name.contains(CROSS_MODAL) {
            RateGroup::CrossModal
        } else {
            RateGroup::Base
        };
        let decay = !NO_DECAY.iter().any(|part| name.contains(part));
        ParamGroup {
            offset,
            len,
            trained,
            rate,
            decay,
        }
    }
}

/// The optimizer's state and settings. Moments are zero before step 0.
#[derive(Clone, Debug)]
pub struct AdamW {
    optim: Optim,
    steps: u64,
    warmup_steps: u64,
    groups: Vec<ParamGroup>,
    bounded: Option<Bounded>,
}

/// An element that every update brings back between its bounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bounded {
    /// Its place in the flat vectors.
    pub offset: usize,
    /// The lowest and the highest value.
    pub bounds: [f32; 2],
}

/// The flat vectors of one state, all of the same length.
pub struct State<'a> {
    /// Weights.
    pub params: &'a mut [f32],
    /// First moments.
    pub m: &'a mut [f32],
    /// Second moments.
    pub v: &'a mut [f32],
}

/// The numbers of every update, as f32.
#[derive(Clone, Copy)]
pub(crate) struct Numbers {
    pub beta1: f32,
    pub beta2: f32,
    pub one_minus_beta1: f32,
    pub one_minus_beta2: f32,
    pub epsilon: f32,
}

/// The numbers of one update that are the same for every element of a parameter.
#[derive(Clone, Copy)]
struct Update {
    numbers: Numbers,
    /// lr * sqrt(1 - beta2^t) / (1 - beta1^t)
    step_size: f32,
    /// lr * weight decay, 0 for parameters that are not decayed
    decay: f32,
}

impl AdamW {
    /// An optimizer for a run of `steps` updates of which `warmup_steps` warm up.
    pub fn new(optim: Optim, steps: u64, warmup_steps: u64, groups: Vec<ParamGroup>) -> Self {
        AdamW {
            optim,
            steps,
            warmup_steps,
            groups,
            bounded: None,
        }
    }

    /// The same with an element that stays between bounds: the contrastive temperature, which the
    /// authors clamp before every forward pass.
    #[must_use]
    pub fn bounding(mut self, bounded: Option<Bounded>) -> Self {
        self.bounded = bounded;
        self
    }

    pub(crate) fn bounded(&self) -> Option<Bounded> {
        self.bounded
    }

    /// The learning rate of update number `step` (0-based): linear warm-up from 0, then decay to the
    /// end rate. With warm-up, update 0 has rate 0, as in the authors' run.
    pub fn learning_rate(&self, step: u64, group: RateGroup) -> f64 {
        let optim = &self.optim;
        let base = match group {
            RateGroup::Base => optim.learning_rate,
            RateGroup::Head => optim.learning_rate * optim.lr_mult_head,
            RateGroup::CrossModal => optim.learning_rate * optim.lr_mult_cross_modal,
        };
        base * self.rate_factor(step)
    }

    /// The schedule's factor: it multiplies every group's rate, so an end rate holds for the base
    /// group and is multiplied for the others.
    fn rate_factor(&self, step: u64) -> f64 {
        let optim = &self.optim;
        if step < self.warmup_steps {
            return step as f64 / self.warmup_steps.max(1) as f64;
        }
        let length = self.steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let done = (step - self.warmup_steps) as f64 / length;
        if optim.decay == Decay::Cosine {
            // Behind the last step it rises again, as theirs does; no run gets there.
            return 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
        }
        let end = optim.end_learning_rate;
        if step > self.steps {
            return end / optim.learning_rate;
        }
        let range = optim.learning_rate - end;
        let remaining = 1.0 - done;
        (range * remaining.powf(optim.decay_power) + end) / optim.learning_rate
    }

    /// Update number `step` (0-based) with the mean gradient of the step.
    ///
    /// # Panics
    /// If the vectors do not all have the same length, or groups reach beyond them.
    pub fn apply(&self, step: u64, state: State<'_>, gradient: &[f32]) {
        let State { params, m, v } = state;
        let len = params.len();
        assert!(
            m.len() == len && v.len() == len && gradient.len() == len,
            "weights, moments and gradient have different lengths"
        );
        for group in self.groups.iter().filter(|group| group.trained) {
            let range = group.offset..group.offset + group.len;
            let update = self.update(step, group);
            params[range.clone()]
                .par_chunks_mut(CHUNK)
                .zip(m[range.clone()].par_chunks_mut(CHUNK))
                .zip(v[range.clone()].par_chunks_mut(CHUNK))
                .zip(gradient[range].par_chunks(CHUNK))
                .for_each(|(((p, m), v), g)| update.apply(p, m, v, g));
        }
        if let Some(Bounded { offset, bounds }) = self.bounded {
            params[offset] = params[offset].clamp(bounds[0], bounds[1]);
        }
    }

    pub(crate) fn numbers(&self) -> Numbers {
        let [beta1, beta2] = self.optim.betas;
        Numbers {
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            epsilon: self.optim.epsilon as f32,
        }
    }

    /// All parameters in their order: elements, step size and decay of neighbours that share them.
    /// What is not trained has neither.
    pub(crate) fn spans(&self, step: u64) -> Vec<(usize, f32, f32)> {
        let mut spans: Vec<(usize, f32, f32)> = Vec::new();
        for group in &self.groups {
            let (step_size, decay) = match group.trained {
                true => {
                    let update = self.update(step, group);
                    (update.step_size, update.decay)
                }
                false => (0.0, 0.0),
            };
            match spans.last_mut() {
                Some(last) if (last.1, last.2) == (step_size, decay) => last.0 += group.len,
                _ => spans.push((group.len, step_size, decay)),
            }
        }
        spans
    }

    fn update(&self, step: u64, group: &ParamGroup) -> Update {
        let optim = &self.optim;
        let [beta1, beta2] = optim.betas;
        let t = i32::try_from(step + 1).unwrap_or(i32::MAX);
        let rate = self.learning_rate(step, group.rate);
        let correction = (1.0 - beta2.powi(t)).sqrt() / (1.0 - beta1.powi(t));
        Update {
            numbers: self.numbers(),
            step_size: (rate * correction) as f32,
            decay: if group.decay {
                (rate * optim.weight_decay) as f32
            } else {
                0.0
            },
        }
    }
}

impl Update {
    /// Epsilon joins the root before bias correction, and decay comes last, on the weight already
    /// updated: transformers' AdamW, not the textbook's.
    fn apply(&self, params: &mut [f32], m: &mut [f32], v: &mut [f32], gradient: &[f32]) {
        let n = self.numbers;
        for (((p, m), v), g) in params.iter_mut().zip(m).zip(v).zip(gradient) {
            *m = n.beta1 * *m + n.one_minus_beta1 * g;
            *v = n.beta2 * *v + n.one_minus_beta2 * (g * g);
            *p -= self.step_size * (*m / (v.sqrt() + n.epsilon));
            *p -= self.decay * *p;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn optim() -> Optim {
        Optim {
            learning_rate: 1e-2,
            lr_mult_head: 3.0,
            lr_mult_cross_modal: 5.0,
            weight_decay: 0.1,
            warmup: 2.0,
            end_learning_rate: 0.0,
            decay: Decay::Polynomial,
            decay_power: 1.0,
            betas: [0.9, 0.98],
            epsilon: 1e-8,
            non_finite: belfry_configs::NonFinite::Fail,
        }
    }

    #[test]
    fn groups_go_by_substrings() {
        let group = |name: &str| {
            let group = ParamGroup::of(name, 0, 1, true);
            (group.rate, group.decay)
        };
        use RateGroup::*;
        assert_eq!(group("mlm_score.decoder.weight"), (Head, true));
        assert_eq!(group("itm_score.fc.bias"), (Head, false));
        assert_eq!(group("vit_model.visual.ln_post.weight"), (Base, true));
        assert_eq!(
            group("text_transformer.embeddings.LayerNorm.weight"),
            (Base, false)
        );
        let manager = "cross_modal_text_manager_tower.1.manager_layer";
        assert_eq!(
            group(&format!("{manager}.LayerNorm.0.weight")),
            (CrossModal, true)
        );
        assert_eq!(
            group(&format!("{manager}.extra_query_LayerNorm.weight")),
            (CrossModal, false)
        );
        assert_eq!(group("token_type_embeddings.weight"), (Base, true));
    }

    #[test]
    fn the_schedule_starts_at_zero_and_ends_at_zero() {
        let adam = AdamW::new(optim(), 10, 2, Vec::new());
        assert_eq!(adam.learning_rate(0, RateGroup::Base), 0.0);
        assert_eq!(adam.learning_rate(1, RateGroup::Base), 5e-3);
        assert_eq!(adam.learning_rate(2, RateGroup::CrossModal), 5e-2);
        assert_eq!(adam.learning_rate(10, RateGroup::Head), 0.0);
        assert_eq!(adam.learning_rate(11, RateGroup::Head), 0.0);
    }

    #[test]
    fn one_update_is_the_formula_and_skips_what_is_not_trained() {
        let names = [("a.weight", true), ("b.bias", true), ("temperature", false)];
        let groups = names
            .iter()
            .enumerate()
            .map(|(i, (name, t))| ParamGroup::of(name, i, 1, *t));
        let adam = AdamW::new(optim(), 10, 0, groups.collect());
        let (mut params, mut m, mut v) = ([1.0f32; 3], [0.0f32; 3], [0.0f32; 3]);
        let state = State {
            params: &mut params,
            m: &mut m,
            v: &mut v,
        };
        adam.apply(0, state, &[0.5, 0.5, 0.5]);
        let root = (0.02f64 * 0.25).sqrt();
        let moved = 1.0 - 1e-2 * 0.02f64.sqrt() / 0.1 * 0.05 / (root + 1e-8);
        assert!((f64::from(params[0]) - moved * (1.0 - 1e-3)).abs() < 1e-7);
        assert!((f64::from(params[1]) - moved).abs() < 1e-7);
        assert_eq!((params[2], m[2], v[2]), (1.0, 0.0, 0.0));
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let len = 3 * CHUNK + 17;
        let groups = vec![ParamGroup::of("a.weight", 5, len - 5, true)];
        let adam = AdamW::new(optim(), 10, 0, groups);
        let gradient: Vec<f32> = (0..len)
            .map(|i| ((i * 37 % 101) as f32 - 50.0) * 1e-3)
            .collect();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let (mut p, mut m, mut v) = (vec![0.5; len], vec![0.0; len], vec![0.0; len]);
            pool.install(|| {
                for step in 0..3 {
                    let state = State {
                        params: &mut p,
                        m: &mut m,
                        v: &mut v,
                    };
                    adam.apply(step, state, &gradient);
                }
            });
            (p, m, v)
        };
        assert_eq!(run(1), run(3));
    }
}
