//! Golden cases on disk, and what they say in this crate's types. Sizes come from the files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use belfry_configs::{ImageTower, Manager, ManagerWeight, Model, Optim, TextTower};
use belfry_model::{ManagerTower, ParamTable, PretrainBatch};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::optimizer::{AdamW, ParamGroup};

#[derive(Clone, Default)]
pub struct Array {
    pub shape: Vec<usize>,
    pub values: Vec<f64>,
}

impl Array {
    pub fn f32(&self) -> Vec<f32> {
        self.values.iter().map(|v| *v as f32).collect()
    }
    pub fn i32(&self) -> Vec<i32> {
        self.values.iter().map(|v| *v as i32).collect()
    }
}

/// A safetensors file.
pub type Arrays = BTreeMap<String, Array>;

pub fn read_arrays(path: &Path) -> Option<Arrays> {
    let bytes = std::fs::read(path).ok()?;
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let array = |name: &str| {
        let view = file.tensor(name).unwrap();
        let data = view.data();
        let values = match view.dtype() {
            Dtype::F32 => data
                .as_chunks()
                .0
                .iter()
                .map(|c| f64::from(f32::from_le_bytes(*c)))
                .collect(),
            Dtype::I64 => data
                .as_chunks()
                .0
                .iter()
                .map(|c| i64::from_le_bytes(*c) as f64)
                .collect(),
            other => panic!("{name}: unexpected type {other:?}"),
        };
        Array {
            shape: view.shape().to_vec(),
            values,
        }
    };
    Some(
        file.names()
            .into_iter()
            .map(|name| (name.to_string(), array(name)))
            .collect(),
    )
}

pub fn golden_dir() -> PathBuf {
    if let Ok(dir) = std::env::var("BELFRY_GOLDEN_DIR") {
        return dir.into();
    }
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let shared = workspace.join("../shared/golden");
    if shared.is_dir() {
        shared
    } else {
        workspace.join("tests/golden")
    }
}

pub struct Case {
    pub name: String,
    pub json: Value,
    pub model: Arrays,
    pub io: Arrays,
    pub grad: Arrays,
    pub step: Option<Arrays>,
}

/// Every pre-training case of this model.
pub fn cases() -> Vec<Case> {
    let (found, _) = all_cases();
    assert!(
        !found.is_empty(),
        "{} holds no pre-training case",
        golden_dir().display()
    );
    found
}

/// Cases of this model: for pre-training, and for fine-tunes, of which only the encoder is covered.
/// The others are named.
pub fn all_cases() -> (Vec<Case>, Vec<Case>) {
    let dir = golden_dir();
    let mut files: Vec<PathBuf> = std::fs::read_dir(&dir)
        .unwrap_or_else(|e| panic!("no golden data in {}: {e}", dir.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "json"))
        .collect();
    files.sort();
    let (mut found, mut encoder_only) = (Vec::new(), Vec::new());
    for file in files {
        let name = file.file_stem().unwrap().to_string_lossy().into_owned();
        let json: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        let part = |kind: &str| read_arrays(&dir.join(format!("{name}.{kind}.safetensors")));
        let loss = |key: &str| json["config"]["loss_names"][key].as_f64().unwrap_or(0.0) > 0.0;
        let task = json["task"] == "pretrain" && !loss("itc") && !loss("itm_itc");
        let ours = task
            && !name.starts_with("paper_")
            && json["config"]["model_type"]
                .as_str()
                .is_none_or(|kind| kind == "MT");
        let fine_tune = json["task"] == "vqa" || json["task"] == "snli";
        let encoder = fine_tune && !name.starts_with("paper_");
        let encoder = encoder && json["config"]["model_type"] == "MT";
        let list = match (ours, encoder) {
            (true, _) => &mut found,
            (_, true) => &mut encoder_only,
            _ => continue,
        };
        if let (Some(model), Some(io), Some(grad)) = (part("model"), part("io"), part("grad")) {
            list.push(Case {
                step: part("step"),
                name,
                json,
                model,
                io,
                grad,
            });
        }
    }
    (found, encoder_only)
}

impl Case {
    fn size(&self, key: &str) -> u32 {
        let size = self.json["tiny"][key].as_u64();
        size.unwrap_or_else(|| panic!("{}: no size `{key}`", self.name)) as u32
    }

    fn shape(&self, name: &str) -> &[usize] {
        &self.model[&format!("param/{name}")].shape
    }

    pub fn has_noise(&self) -> bool {
        self.io.contains_key("rand/normal.0")
    }

    pub fn model(&self) -> Model {
        let scores = self.shape("cross_modal_text_manager_tower.0.manager_layer.layer_scores");
        let adaptive = self
            .model
            .keys()
            .any(|name| name.contains("linear_controller"));
        Model {
            manager: if adaptive {
                Manager::Aaue
            } else {
                Manager::Saue
            },
            manager_weight: match scores[3] {
                1 => ManagerWeight::Scalar,
                _ => ManagerWeight::Vector,
            },
            manager_noise: self.has_noise(),
            hidden: self.size("hidden"),
            heads: self.size("heads"),
            cross_layers: self.size("n_cross"),
            mlp_ratio: self.size("mlp_ratio"),
            dropout: 0.0,
            text: TextTower {
                layers: self.size("t_layers"),
                managed: self.size("n_text"),
                hidden: self.size("text"),
                heads: self.size("t_heads"),
                intermediate: self.size("t_inter"),
                vocab: self.size("vocab"),
                positions: self.shape("text_transformer.embeddings.position_embeddings.weight")[0]
                    as u32,
            },
            image: ImageTower {
                layers: self.size("v_layers"),
                managed: self.size("n_image"),
                hidden: self.size("image"),
                heads: self.size("v_heads"),
                size: self.size("img"),
                patch: self.size("patch"),
            },
        }
    }

    pub fn tower(&self) -> ManagerTower {
        let leftovers = self.shape("vit_model.positional_embedding");
        let leftovers = [leftovers[0], leftovers[1]];
        let text_len = self.size("maxlen") as usize;
        ManagerTower::with_clip_leftovers(&self.model(), text_len, leftovers).unwrap()
    }

    pub fn batch(&self) -> PretrainBatch {
        let micro = |i: usize| {
            let prefix = format!("micro{i}/");
            self.io
                .contains_key(&format!("{prefix}in/image"))
                .then_some(prefix)
        };
        let mut prefixes: Vec<String> = (0..).map_while(micro).collect();
        if prefixes.is_empty() {
            prefixes.push(String::new());
        }
        let mut batch = PretrainBatch {
            micro_batches: prefixes.len(),
            text_len: self.size("maxlen") as usize,
            ..PretrainBatch::default()
        };
        for prefix in prefixes {
            let field = |name: &str| &self.io[&format!("{prefix}{name}")];
            let labels = field("rand/itm_labels").i32();
            let (images, others) = (field("in/image").f32(), field("in/false_image_0").f32());
            let size = images.len() / labels.len();
            for (row, label) in labels.iter().enumerate() {
                let from = if *label == 1 { &images } else { &others };
                batch
                    .itm_images
                    .extend_from_slice(&from[row * size..(row + 1) * size]);
            }
            batch.pairs = labels.len();
            batch.itm_labels.extend(labels);
            batch.images.extend(images);
            batch.masked_ids.extend(field("in/text_ids_mlm").i32());
            batch.ids.extend(field("in/text_ids").i32());
            batch.mlm_labels.extend(field("in/text_labels_mlm").i32());
            batch.text_mask.extend(field("in/text_masks").f32());
        }
        batch
    }

    pub fn noise(&self) -> Vec<Vec<f32>> {
        let draw = |i: usize| self.io.get(&format!("rand/normal.{i}")).map(Array::f32);
        (0..).map_while(draw).collect()
    }

    pub fn adam(&self, table: &ParamTable) -> AdamW {
        let config = &self.json["config"];
        let number = |key: &str| config[key].as_f64().unwrap_or(0.0);
        let optim = Optim {
            learning_rate: number("learning_rate"),
            lr_mult_head: number("lr_mult_head"),
            lr_mult_cross_modal: number("lr_mult_cross_modal"),
            weight_decay: number("weight_decay"),
            warmup: number("warmup_steps"),
            end_learning_rate: number("end_lr"),
            decay_power: config["decay_power"].as_f64().unwrap_or(1.0),
            betas: [0.9, 0.98],
            epsilon: 1e-8,
        };
        let steps = number("max_steps") as u64;
        let warmup = optim.warmup as u64;
        let groups = table.entries().iter();
        let groups = groups.map(|e| ParamGroup::of(&e.name, e.offset, e.len, e.trained));
        AdamW::new(optim, steps, warmup, groups.collect())
    }
}

impl Case {
    /// The authors' total loss before update `step`, or after the last.
    pub fn total_at(&self, step: u64) -> Option<f64> {
        let losses = &self.json["losses"];
        if let Some(steps) = losses.as_array() {
            let micro = steps.get(step as usize)?.as_array()?;
            let one = |l: &Value| l["mlm_loss"].as_f64().unwrap() + l["itm_loss"].as_f64().unwrap();
            return Some(micro.iter().map(one).sum::<f64>() / micro.len() as f64);
        }
        let key = if step == 3 {
            "total_after3".into()
        } else {
            format!("total_at_step{step}")
        };
        losses[key].as_f64()
    }
}

/// The flat vector of `prefix/NAME` arrays; absent names are zeros.
pub fn flat(table: &ParamTable, arrays: &Arrays, prefix: &str) -> Vec<f32> {
    let mut flat = vec![0.0; table.elements()];
    for entry in table.entries() {
        if let Some(array) = arrays.get(&format!("{prefix}/{}", entry.name)) {
            assert_eq!(array.shape, entry.shape, "{prefix}/{}", entry.name);
            flat[entry.offset..entry.offset + entry.len].copy_from_slice(&array.f32());
        }
    }
    flat
}
