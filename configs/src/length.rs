//! How long a run is and when it evaluates: epochs turned into steps, exactly.
//!
//! Pure arithmetic of integers, so that every process that resolves a run file finds the same steps.
//! It knows neither manifests nor clocks: how many pairs an epoch has, it is told.

use toml::Table;

use crate::layers::ConfigError;
use crate::run_config::{Run, RunConfig};
use crate::validate::{ValidConfig, refuse};

/// Epochs are kept in millionths: more decimals than anybody trains by, and exact products.
const DECIMALS: u32 = 6;
const UNIT: u64 = 10u64.pow(DECIMALS);
/// More passes over any data are a typing error, and products of them stay in 128 bits.
const EPOCHS_MAX: u64 = 1_000_000;

/// Keys of which a later layer's replaces an earlier layer's other one.
const EITHER: [[&str; 2]; 2] = [
    ["steps", "epochs"],
    ["evaluate_every_steps", "evaluate_every_epochs"],
];
/// What resolving added; it does not outlive the epochs that it was counted for.
const EPOCH_PAIRS: &str = "epoch_pairs";

/// Passes over the data as people write them, such as 10 or 0.5: a decimal number, kept exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Epochs {
    millionths: u64,
}

impl Epochs {
    /// The decimal number that `written` is the nearest float of.
    ///
    /// # Errors
    /// What is wrong with it, without its key.
    pub fn of(written: f64) -> Result<Self, String> {
        if !written.is_finite() || written <= 0.0 || written > EPOCHS_MAX as f64 {
            return Err(format!("must be above 0 and at most {EPOCHS_MAX}"));
        }
        // The shortest decimal that reads as this float: the one that was written.
        let text = written.to_string();
        let (whole, decimals) = text.split_once('.').unwrap_or((&text, ""));
        if decimals.len() > DECIMALS as usize {
            return Err(format!("{text} has more than {DECIMALS} decimals"));
        }
        let digits = format!("{whole}{decimals:0<width$}", width = DECIMALS as usize);
        let millionths = digits.parse().map_err(|e| format!("{text}: {e}"))?;
        Ok(Epochs { millionths })
    }

    /// Optimizer updates of these epochs of `pairs` pairs: ⌊pairs · epochs / global_batch⌋. The last
    /// step is full.
    pub fn steps(self, pairs: u64, global_batch: u32) -> u64 {
        (self.scaled(pairs) / (u128::from(UNIT) * u128::from(global_batch))) as u64
    }

    /// Pairs of these epochs that do not fill another step.
    pub fn unused_pairs(self, pairs: u64, global_batch: u32) -> u64 {
        let all = (self.scaled(pairs) / u128::from(UNIT)) as u64;
        all - self.steps(pairs, global_batch) * u64::from(global_batch)
    }

    fn scaled(self, pairs: u64) -> u128 {
        u128::from(pairs) * u128::from(self.millionths)
    }
}

/// At which states a run evaluates between its first and its last, at which it always does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rhythm {
    /// At none.
    #[default]
    Never,
    /// After every so many steps.
    Steps(u64),
    /// After each step with which so many epochs more are complete.
    Epochs {
        /// Between two evaluations.
        every: Epochs,
        /// Of one epoch.
        pairs: u64,
        /// Pairs of a step.
        global_batch: u32,
    },
}

impl Rhythm {
    /// Whether the state after `step` updates is evaluated.
    pub fn is_due(self, step: u64) -> bool {
        step > 0 && self.completed(step) > self.completed(step - 1)
    }

    /// Evaluations up to the state after `step` updates.
    pub fn completed(self, step: u64) -> u64 {
        match self {
            Rhythm::Never | Rhythm::Steps(0) => 0,
            Rhythm::Steps(every) => step / every,
            Rhythm::Epochs {
                every,
                pairs,
                global_batch,
            } => {
                let trained = u128::from(step) * u128::from(global_batch) * u128::from(UNIT);
                (trained / every.scaled(pairs).max(1)) as u64
            }
        }
    }
}

impl RunConfig {
    /// Checks what says how long the run is; with `epochs` and the pairs of an epoch, sets its steps.
    pub(crate) fn check_length(&mut self) -> Result<(), ConfigError> {
        let batch = self.batch.global_batch;
        let run = &mut self.run;
        if run.epoch_pairs == Some(0) {
            return Err(refuse("run.epoch_pairs", "must be at least 1"));
        }
        let counted = run.epochs.zip(run.epoch_pairs);
        match run.epochs {
            None if run.steps == 0 => {
                let reason =
                    "must be at least 1; or give run.epochs, passes over the training data";
                return Err(refuse("run.steps", reason));
            }
            Some(_) if run.steps != 0 && counted.is_none() => {
                return Err(refuse("run.epochs", beside("run.steps")));
            }
            _ => {}
        }
        let epochs = run.epochs.map(Epochs::of).transpose();
        let epochs = epochs.map_err(|reason| refuse("run.epochs", reason))?;
        if let (Some(epochs), Some((written, pairs))) = (epochs, counted) {
            let told = format!("{written} epochs of {pairs} pairs in batches of {batch}");
            let steps = epochs.steps(pairs, batch);
            if steps == 0 {
                return Err(refuse("run.epochs", format!("{told} are not one step")));
            }
            if run.steps != 0 && run.steps != steps {
                let reason = format!("{told} are {steps} steps, not {}; leave it out", run.steps);
                return Err(refuse("run.steps", reason));
            }
            run.steps = steps;
        }
        let evaluates = !self.data.validation.is_empty();
        check_rhythm(&self.run, evaluates)
    }
}

fn check_rhythm(run: &Run, evaluates: bool) -> Result<(), ConfigError> {
    let mut asked = None;
    if run.evaluate_every_steps > 0 {
        asked = Some("run.evaluate_every_steps");
    }
    if let Some(every) = run.evaluate_every_epochs {
        if let Some(other) = asked {
            return Err(refuse("run.evaluate_every_epochs", beside(other)));
        }
        asked = Some("run.evaluate_every_epochs");
        Epochs::of(every).map_err(|reason| refuse("run.evaluate_every_epochs", reason))?;
    }
    match asked {
        Some(key) if !evaluates => Err(refuse(
            key,
            "nothing is evaluated: set data.validation, or leave it out",
        )),
        _ => Ok(()),
    }
}

fn beside(other: &str) -> String {
    format!("stands beside {other}; give one of them")
}

impl ValidConfig {
    /// Whether the length of the run, or its evaluations, hang on how many pairs the data has and
    /// nobody has said it yet.
    pub fn needs_epoch_pairs(&self) -> bool {
        let epochs = self.run.epochs.is_some() || self.run.evaluate_every_epochs.is_some();
        epochs && self.run.epoch_pairs.is_none()
    }

    /// The same run on data with so many pairs, which are kept beside the steps that follow from
    /// them: whoever reads it later sees the same steps without the data.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`]: the epochs are not one step.
    pub fn with_epoch_pairs(&self, pairs: u64) -> Result<ValidConfig, ConfigError> {
        let mut config = RunConfig::clone(self);
        config.run.epoch_pairs = Some(pairs);
        config.validate()
    }

    /// Pairs of the epochs that the run does not train, if it counts in epochs.
    pub fn unused_pairs(&self) -> Option<u64> {
        let epochs = Epochs::of(self.run.epochs?).ok()?;
        Some(epochs.unused_pairs(self.run.epoch_pairs?, self.batch.global_batch))
    }

    /// When the run evaluates between its beginning and its end.
    pub fn rhythm(&self) -> Rhythm {
        let run = &self.run;
        let epochs = run.evaluate_every_epochs.map(Epochs::of);
        match (epochs, run.epoch_pairs) {
            (Some(Ok(every)), Some(pairs)) => Rhythm::Epochs {
                every,
                pairs,
                global_batch: self.batch.global_batch,
            },
            _ if run.evaluate_every_steps > 0 => Rhythm::Steps(run.evaluate_every_steps),
            _ => Rhythm::Never,
        }
    }

    /// Whether a checkpoint is made of the state after `step` updates. Where the best are kept, what
    /// is evaluated is made one too: only what lies in the store can be kept.
    pub fn is_checkpoint(&self, step: u64) -> bool {
        self.checkpoint.is_due(step, self.rhythm()) || step == self.run.steps
    }
}

/// A later layer sets `key` of `[run]`: what the earlier ones in `table` said of the same thing in
/// another unit is gone.
pub(crate) fn supersede(table: &mut Table, key: &str) {
    let Some([one, other]) = EITHER.iter().find(|pair| pair.contains(&key)) else {
        return;
    };
    if let Some(run) = table.get_mut("run").and_then(toml::Value::as_table_mut) {
        run.remove(if *one == key { *other } else { *one });
        run.remove(EPOCH_PAIRS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(epochs: f64, pairs: u64, batch: u32) -> u64 {
        Epochs::of(epochs).expect("valid").steps(pairs, batch)
    }

    /// Table 9 on the data that the authors' comments count: VQAv2 is train and val, 435,174 and
    /// 210,207 questions; Flickr30K five captions of each of 30,014 images.
    #[test]
    fn the_papers_fine_tunes_have_exactly_so_many_steps() {
        let vqa = 435_174 + 210_207;
        assert_eq!(steps(10.0, vqa, 576), 11_204);
        assert_eq!(steps(10.0, vqa, 504), 12_805);
        let epochs = Epochs::of(10.0).expect("valid");
        assert_eq!(epochs.unused_pairs(vqa, 576), 6_453_810 - 11_204 * 576);
        assert_eq!(steps(20.0, 5 * 30_014, 512), 5_862);
        assert_eq!(steps(0.5, vqa, 576), 560);
        assert_eq!(steps(1.0, 576, 576), 1);
        assert_eq!(steps(1.0, 575, 576), 0);
    }

    /// 0.29 is no binary fraction: a product of floats falls one step short.
    #[test]
    fn decimals_are_what_was_written() {
        assert!(
            (0.29 * 100.0_f64).floor() < 29.0,
            "floats would lose a step"
        );
        assert_eq!(steps(0.29, 100, 1), 29);
        assert_eq!(steps(0.1, 30, 1), 3);
        assert_eq!(steps(2.000_001, 1_000_000, 1), 2_000_001);
        assert_eq!(
            steps(1e6, u64::from(u32::MAX), 1),
            u64::from(u32::MAX) * 1_000_000
        );
        for (wrong, words) in [
            (0.0, "above 0"),
            (-1.0, "above 0"),
            (f64::NAN, "above 0"),
            (1e7, "at most"),
            (1.0 / 3.0, "decimals"),
        ] {
            let told = Epochs::of(wrong).expect_err("refused");
            assert!(told.contains(words), "{told}");
        }
    }

    #[test]
    fn evaluations_follow_the_step_that_completes_epochs() {
        let due = |rhythm: Rhythm, steps: u64| -> Vec<u64> {
            (0..=steps).filter(|step| rhythm.is_due(*step)).collect()
        };
        let epochs = |every: f64, pairs, global_batch| Rhythm::Epochs {
            every: Epochs::of(every).expect("valid"),
            pairs,
            global_batch,
        };
        assert_eq!(due(Rhythm::Never, 9), []);
        assert_eq!(due(Rhythm::Steps(4), 9), [4, 8]);
        // 25, 50, 75 and 100 pairs, ten a step.
        assert_eq!(due(epochs(1.0, 25, 10), 10), [3, 5, 8, 10]);
        assert_eq!(due(epochs(0.5, 20, 10), 4), [1, 2, 3, 4]);
        assert_eq!(due(epochs(2.0, 20, 10), 9), [4, 8]);
        // Several epochs in one step are one evaluation.
        assert_eq!(due(epochs(0.25, 4, 10), 3), [1, 2, 3]);
        assert_eq!(epochs(1.0, 25, 10).completed(10), 4);
    }
}
