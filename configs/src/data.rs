//! `[data]` of a run file: datasets and their shares, order, transforms, cache, broken shards.

use serde::{Deserialize, Serialize};

use crate::layers::ConfigError;
use crate::model::TextTower;
use crate::run_config::one;
use crate::validate::{at_least_one, refuse};

/// Datasets of one run: more would make a block of the mixture longer than a step.
const DATASETS_MAX: usize = 64;

/// Steps made ahead: more would fetch shards that a resume at another worker count never opens.
const PREFETCH_STEPS_MAX: u32 = 64;
/// Rounds: with more, a shard is opened for a few pairs.
const ROUNDS_MAX: u32 = 64;

/// `[data]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// Folder or URL with training shards and their `manifest.json`; or several, each with a weight:
    /// `train = [{ path = "s3://…/coco", weight = 2.0 }, { path = "s3://…/vg" }]`.
    pub train: Datasets,
    /// Folder or URL with validation shards, if any; several are evaluated one behind the other.
    #[serde(default, skip_serializing_if = "Datasets::is_empty")]
    pub validation: Datasets,
    /// A folder of `key.jpg` + `key.txt` that `belfry run` packs into `train` and `validation` when
    /// they do not exist yet.
    #[serde(default)]
    pub pack_from: Option<String>,
    /// How many images of `pack_from` are held out for validation.
    #[serde(default)]
    pub pack_holdout: u32,
    /// Captions packed for pre-training begin with words that the image's own pixels allow, so that a
    /// small model learns what it sees. The other tasks' texts are made of pixels in any case.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pack_pixels: bool,
    /// Path of a `tokenizer.json` (RoBERTa's or BERT's).
    pub tokenizer: String,
    /// Tokens per caption, padded and truncated (paper: 50).
    pub text_len: u32,
    /// Share of non-special tokens chosen for MLM (model_spec: 0.15).
    #[serde(default = "default_mlm_probability")]
    pub mlm_probability: f32,
    /// Mask all tokens of a word together (the authors: with BERT only).
    #[serde(default)]
    pub whole_word_masking: bool,
    /// What is done to training images.
    #[serde(default)]
    pub train_transform: Transform,
    /// What is done to validation images.
    #[serde(default)]
    pub eval_transform: Transform,
    /// What a JPEG that ends too early is.
    #[serde(default)]
    pub truncated_jpeg: TruncatedJpeg,
    /// Passes over the shards in one epoch; a shard's pairs are dealt to them in turn, so captions
    /// of one image fall into different rounds.
    #[serde(default = "one")]
    pub rounds: u32,
    /// Shards in a lane's shuffle window. Part of the order.
    #[serde(default = "default_window_shards")]
    pub window_shards: u32,
    /// `dataset` draws ITM's false images over the pair's whole dataset (over its source, where one
    /// dataset was packed from several), as the authors do; `window` from the open window: cheaper,
    /// another distribution.
    #[serde(default)]
    pub false_image: FalseImage,
    /// Local folder of the shard cache; default: under the run's local state.
    #[serde(default)]
    pub cache_dir: Option<String>,
    /// Bytes that the shard cache may hold.
    #[serde(default = "default_cache_bytes_max")]
    pub cache_bytes_max: u64,
    /// Steps of a worker's lanes that are read, decoded and tokenised ahead of the one that trains.
    #[serde(default = "default_prefetch_steps")]
    pub prefetch_steps: u32,
    /// Bytes of host batches that may wait ahead of the step, per worker.
    #[serde(default = "default_prefetch_bytes_max")]
    pub prefetch_bytes_max: u64,
    /// Shards that may be put under quarantine when they stay unreadable: their pairs are replaced by
    /// others, deterministically, and the ledger names them. 0: such a shard stops the run.
    #[serde(default)]
    pub quarantine_shards_max: u32,
}

/// One dataset, or several.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "Written", into = "Written")]
pub struct Datasets(pub Vec<Dataset>);

/// One dataset of a mixture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dataset {
    /// Folder or URL with shards and their `manifest.json`.
    pub path: String,
    /// Its share of the pairs of a step, against the others' weights, kept as an integer of 32 bits
    /// against the heaviest. Default: its number of pairs, so that in every lane all datasets end
    /// their epochs at the same position. Each dataset has its own epochs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
}

/// [`Datasets`] as people write them.
#[derive(Clone, Serialize, Deserialize)]
#[serde(untagged)]
enum Written {
    One(String),
    Several(Vec<Dataset>),
}

impl From<Written> for Datasets {
    fn from(written: Written) -> Self {
        match written {
            Written::One(path) => Datasets(vec![Dataset { path, weight: None }]),
            Written::Several(several) => Datasets(several),
        }
    }
}

impl From<Datasets> for Written {
    fn from(datasets: Datasets) -> Self {
        match datasets.0.as_slice() {
            [Dataset { path, weight: None }] => Written::One(path.clone()),
            _ => Written::Several(datasets.0),
        }
    }
}

impl Datasets {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Their places.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|dataset| dataset.path.as_str())
    }

    /// The place of the only one, where there is one.
    pub fn only(&self) -> Option<&str> {
        match self.0.as_slice() {
            [dataset] => Some(&dataset.path),
            _ => None,
        }
    }
}

/// From pixels to the model's input (model_spec 10). All end in CLIP's normalisation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transform {
    /// Shorter side to S, centre crop: pre-training, training and validation.
    #[default]
    Clip,
    /// Both sides to S: validation and test of every fine-tune.
    Albef,
    /// Random resized crop, flip, RandomAugment over all 14 ops: SNLI-VE, NLVR2, Flickr30K training.
    AlbefRandaugWc,
    /// Random resized crop, RandomAugment over the first 10 ops, no flip: VQAv2 training.
    AlbefRandaugWohf,
}

impl Transform {
    /// Whether it draws random numbers.
    pub fn is_random(self) -> bool {
        matches!(
            self,
            Transform::AlbefRandaugWc | Transform::AlbefRandaugWohf
        )
    }
}

/// What a JPEG that ends before its last row is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TruncatedJpeg {
    /// An error that names it.
    #[default]
    Refuse,
    /// An image whose missing rows are grey, as Pillow's LOAD_TRUNCATED_IMAGES gives it.
    Pad,
}

/// Where false images are drawn from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FalseImage {
    /// The whole dataset (the authors' code).
    #[default]
    Dataset,
    /// The lane's open window.
    Window,
}

fn default_mlm_probability() -> f32 {
    0.15
}
fn default_window_shards() -> u32 {
    4
}
fn default_cache_bytes_max() -> u64 {
    20 << 30
}
fn default_prefetch_steps() -> u32 {
    1
}
fn default_prefetch_bytes_max() -> u64 {
    2 << 30
}

impl Data {
    pub(crate) fn check(&self, text: &TextTower) -> Result<(), ConfigError> {
        let room = text.positions.saturating_sub(text.first_position());
        if self.text_len < 4 || self.text_len > room {
            return Err(refuse(
                "data.text_len",
                format!(
                    "must lie in 4..={room} (model.text.positions - {})",
                    text.first_position()
                ),
            ));
        }
        if !(0.0..=1.0).contains(&self.mlm_probability) {
            return Err(refuse("data.mlm_probability", "must lie in 0..=1"));
        }
        if self.train.is_empty() {
            return Err(refuse("data.train", "names no dataset"));
        }
        self.train.check("data.train")?;
        self.validation.check("data.validation")?;
        if self.eval_transform.is_random() {
            return Err(refuse(
                "data.eval_transform",
                "draws random numbers; choose `clip` or `albef`",
            ));
        }
        if self.pack_from.is_some() && self.train.only().is_none() {
            return Err(refuse(
                "data.pack_from",
                "fills one dataset, and data.train names several",
            ));
        }
        if !(1..=ROUNDS_MAX).contains(&self.rounds) {
            let reason = format!("must lie in 1..={ROUNDS_MAX}");
            return Err(refuse("data.rounds", reason));
        }
        if self.prefetch_steps > PREFETCH_STEPS_MAX {
            let reason = format!("must lie in 0..={PREFETCH_STEPS_MAX}");
            return Err(refuse("data.prefetch_steps", reason));
        }
        at_least_one("data.window_shards", self.window_shards.into())?;
        at_least_one("data.cache_bytes_max", self.cache_bytes_max)?;
        at_least_one("data.prefetch_bytes_max", self.prefetch_bytes_max)
    }
}

impl Datasets {
    fn check(&self, key: &str) -> Result<(), ConfigError> {
        if self.0.len() > DATASETS_MAX {
            return Err(refuse(
                key,
                format!("names {} datasets, more than {DATASETS_MAX}", self.0.len()),
            ));
        }
        for (index, dataset) in self.0.iter().enumerate() {
            if dataset.path.is_empty() {
                return Err(refuse(key, format!("dataset {index} has no path")));
            }
            if self.0[..index].iter().any(|d| d.path == dataset.path) {
                let path = &dataset.path;
                return Err(refuse(key, format!("{path} stands there twice")));
            }
            if dataset.weight.is_some_and(|w| !w.is_finite() || w <= 0.0) {
                let path = &dataset.path;
                return Err(refuse(
                    key,
                    format!("the weight of {path} must be positive"),
                ));
            }
        }
        let weighted = self.0.iter().filter(|d| d.weight.is_some()).count();
        if weighted != 0 && weighted != self.0.len() {
            return Err(refuse(
                key,
                "give every dataset a weight, or none (then each weighs its pairs)",
            ));
        }
        Ok(())
    }
}
