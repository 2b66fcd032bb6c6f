//! What lies in a golden folder. A case is found by its `.json` and recognised by what it holds,
//! never by its name; sizes come from the files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use belfry_configs::{
    Decay, Head, ImageKind, ImageTower, Manager, ManagerQuery, ManagerWeight, Model, Optim, System,
    Task, TextKind, TextTower,
};
use belfry_model::{ManagerTower, ParamTable};
use serde_json::Value;

use crate::arrays::{Array, Arrays, read_arrays};
use crate::optimizer::{AdamW, ParamGroup};

/// The folder in `BELFRY_GOLDEN_DIR`; else the whole set beside the repository, if it is there, and
/// the subset in the repository.
pub fn golden_dirs() -> Vec<PathBuf> {
    if let Ok(dir) = std::env::var("BELFRY_GOLDEN_DIR") {
        // Cargo runs tests in the package's folder, people give paths from the workspace's.
        let from_workspace = workspace().join(&dir);
        return if from_workspace.is_dir() {
            vec![from_workspace]
        } else {
            vec![dir.into()]
        };
    }
    let folders = [
        workspace().join("../shared/golden"),
        workspace().join("tests/golden"),
    ];
    folders
        .into_iter()
        .filter(|folder| folder.is_dir())
        .collect()
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// A model with inputs and what the authors' code made of them.
pub struct Case {
    pub name: String,
    pub json: Value,
    pub model: Arrays,
    pub io: Arrays,
    pub grad: Arrays,
    pub step: Option<Arrays>,
}

/// What a file of the folder is.
pub enum Found {
    /// Outputs, gradients, updates of a model.
    Training(Case),
    /// Scores of all texts against all images.
    Rerank(Case),
    /// Hidden states of one tower alone.
    Tower(Case),
    /// Position tables before and after resizing.
    Positions(String, Arrays),
    /// Learning rates by step.
    Schedules(Value),
    /// The authors' parameters and their optimizer groups, by configuration.
    Parameters(String, Value),
    /// Another room's test reads it.
    Elsewhere(String, &'static str),
    Unknown(String),
}

/// Everything in the folders, a name that is in both from the first; and the parameter lists beside
/// them.
pub fn everything() -> Vec<Found> {
    let mut places = BTreeMap::new();
    let mut lists = BTreeMap::new();
    for dir in golden_dirs() {
        let entries = std::fs::read_dir(&dir)
            .unwrap_or_else(|e| panic!("no golden data in {}: {e}", dir.display()));
        for entry in entries {
            let (stem, extension) = name_of(&entry.unwrap().path());
            // `CASE.part.safetensors` belongs to a case; without a dot it may stand alone.
            let alone = extension == "safetensors" && !stem.contains('.');
            if extension == "json" || alone {
                places.entry(stem).or_insert_with(|| dir.clone());
            }
        }
        for entry in std::fs::read_dir(dir.join("..")).into_iter().flatten() {
            let path = entry.unwrap().path();
            let (stem, extension) = name_of(&path);
            if extension == "json"
                && let Some(json) = read_json(&path)
                && is_parameter_list(&json)
            {
                lists.insert(stem, json);
            }
        }
    }
    lists.retain(|name, _| !places.contains_key(name));
    let found = places.iter().map(|(name, dir)| recognise(dir, name));
    let lists = lists.into_iter();
    found
        .chain(lists.map(|(name, json)| Found::Parameters(name, json)))
        .collect()
}

fn name_of(path: &Path) -> (String, String) {
    let text = |part: Option<&std::ffi::OsStr>| part.unwrap_or_default().to_string_lossy().into();
    (text(path.file_stem()), text(path.extension()))
}

fn read_json(path: &Path) -> Option<Value> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

fn is_parameter_list(json: &Value) -> bool {
    let configurations = json.as_object().filter(|object| !object.is_empty());
    configurations.is_some_and(|object| object.values().all(|v| v["n_tensors"].is_u64()))
}

fn recognise(dir: &Path, name: &str) -> Found {
    let part = |kind: &str| read_arrays(&dir.join(format!("{name}{kind}.safetensors")));
    let json = read_json(&dir.join(format!("{name}.json"))).unwrap_or(Value::Null);
    if let (Some(model), Some(io)) = (part(".model"), part(".io")) {
        let grad = part(".grad");
        let (ranked, tower) = (json["k_test"].is_u64(), json["tower"].is_string());
        let trained = grad.is_some();
        let case = Case {
            name: name.to_string(),
            json,
            model,
            io,
            grad: grad.unwrap_or_default(),
            step: part(".step"),
        };
        return match (trained, ranked, tower) {
            (true, false, false) => Found::Training(case),
            (false, true, false) => Found::Rerank(case),
            (false, false, true) => Found::Tower(case),
            _ => Found::Unknown(name.to_string()),
        };
    }
    let arrays = part("");
    let has = |key: &str| !json[key].is_null();
    let holds = |key: &str| {
        arrays
            .as_ref()
            .is_some_and(|a| a.keys().any(|k| k.contains(key)))
    };
    let elsewhere = |room| Found::Elsewhere(name.to_string(), room);
    if json
        .as_array()
        .is_some_and(|a| a.iter().all(|s| s["rows"].is_array()))
    {
        Found::Schedules(json)
    } else if is_parameter_list(&json) {
        Found::Parameters(name.to_string(), json)
    } else if json.is_null() && arrays.as_ref().is_some_and(are_position_tables) {
        Found::Positions(name.to_string(), arrays.unwrap_or_default())
    } else if has("level") && has("ops_wc") {
        elsewhere("data: random augmentation")
    } else if json["images"].is_array() {
        elsewhere("data: image transforms")
    } else if has("normalize_word") && has("soft_score") {
        elsewhere("data: VQA answers")
    } else if has("tr_r1") && has("ir_r1") {
        elsewhere("evaluation: recall")
    } else if holds("targets") && holds("logits") {
        elsewhere("evaluation: VQA score")
    } else {
        Found::Unknown(name.to_string())
    }
}

/// `AtoB/in` and `AtoB/out`, A and B grid sides.
fn are_position_tables(arrays: &Arrays) -> bool {
    arrays.keys().all(|key| {
        let (sizes, end) = key.split_once('/').unwrap_or_default();
        let (from, to) = sizes.split_once("to").unwrap_or_default();
        let number = |text: &str| text.parse::<u32>().is_ok();
        number(from) && number(to) && (end == "in" || end == "out")
    })
}

impl Case {
    fn size(&self, key: &str) -> u32 {
        let size = self.json["tiny"][key].as_u64();
        size.unwrap_or_else(|| panic!("{}: no size `{key}`", self.name)) as u32
    }

    fn param(&self, name: &str) -> Option<&[usize]> {
        let array = self.model.get(&format!("param/{name}"));
        array.map(|array| &array.shape[..])
    }

    fn has(&self, part: &str) -> bool {
        self.model.keys().any(|name| name.contains(part))
    }

    /// Layers of a stack whose parameters are called `stem.INDEX.…`.
    fn layers(&self, stem: &str) -> u32 {
        let indices: BTreeSet<&str> = self
            .model
            .keys()
            .filter_map(|name| {
                name.strip_prefix("param/")?
                    .strip_prefix(stem)?
                    .split('.')
                    .next()
            })
            .collect();
        indices.len() as u32
    }

    pub fn has_noise(&self) -> bool {
        self.io.contains_key("rand/normal.0")
    }

    pub fn task(&self) -> Task {
        let contrast = self.has("cross_modal_itc_");
        match (self.has("mlm_score"), contrast) {
            (true, true) => Task::PretrainItc,
            (true, false) => Task::Pretrain,
            (false, true) => Task::Retrieval,
            _ if self.has("vqa_classifier") => Task::Vqa,
            _ if self.has("snli_classifier") => Task::SnliVe,
            _ if self.has("nlvr2_classifier") => Task::Nlvr2,
            _ => panic!("{}: a model without a head", self.name),
        }
    }

    fn system(&self) -> System {
        if self.has("_manager_tower.") {
            System::ManagerTower
        } else if self.has("cross_modal_text_layernorm") {
            System::BridgeTower
        } else {
            System::Meter
        }
    }

    fn manager(&self) -> (Manager, ManagerQuery) {
        let name = |layer: u32, part: &str| {
            format!("cross_modal_text_manager_tower.{layer}.manager_layer.{part}")
        };
        let query = if self.has("fusion_attention") {
            ManagerQuery::Fused
        } else {
            ManagerQuery::Visual
        };
        let temperature = "softmax_temperature_cross";
        let controller = self.param(&name(1, "linear_controller.weight"));
        let kind = if !self.has(temperature) {
            Manager::SaeJoint
        } else if self
            .grad
            .contains_key(&format!("grad/{}", name(1, temperature)))
        {
            Manager::SaeSplit
        } else if self.has("layer_attention") {
            Manager::CrossAttention
        } else if let Some(shape) = controller {
            let hidden = self.size("hidden") as usize;
            let queried = if query == ManagerQuery::Fused { 2 } else { 1 } * hidden;
            if shape[1] == queried {
                Manager::Aaue
            } else {
                Manager::ConcatAttention
            }
        } else {
            Manager::Saue
        };
        (kind, query)
    }

    pub fn model(&self) -> Model {
        let system = self.system();
        let cross_layers = self.layers("cross_modal_text_layers.");
        let scores = self.param("cross_modal_text_manager_tower.0.manager_layer.layer_scores");
        let (manager, manager_query) = self.manager();
        let managed = |key: &str| match system {
            System::ManagerTower => self.size(key),
            System::BridgeTower => cross_layers,
            System::Meter => 1,
        };
        let classifier = ["vqa", "snli", "nlvr2"].map(|task| format!("{task}_classifier.3.weight"));
        let deep = classifier.iter().any(|name| self.param(name).is_some());
        let contrastive = self.param("cross_modal_itc_text_head.fc.weight");
        let vit = |part: &str| self.has(&format!("vit_model.{part}"));
        let positions = self.param("text_transformer.embeddings.position_embeddings.weight");
        let types = self.param("text_transformer.embeddings.token_type_embeddings.weight");
        Model {
            system,
            task: self.task(),
            manager,
            manager_query,
            manager_weight: match scores {
                Some([_, _, _, 1]) => ManagerWeight::Scalar,
                _ => ManagerWeight::Vector,
            },
            manager_noise: self.has_noise(),
            meter_fusion: self.has("text_gate"),
            hidden: self.size("hidden"),
            heads: self.size("heads"),
            cross_layers,
            mlp_ratio: self.size("mlp_ratio"),
            dropout: 0.0,
            text: TextTower {
                kind: match types {
                    Some([1, _]) => TextKind::Roberta,
                    _ => TextKind::Bert,
                },
                layers: self.layers("text_transformer.encoder.layer."),
                managed: managed("n_text"),
                hidden: self.size("text"),
                heads: self.size("t_heads"),
                intermediate: self.size("t_inter"),
                vocab: self.size("vocab"),
                positions: positions.expect("a position table")[0] as u32,
            },
            image: ImageTower {
                kind: if vit("visual") {
                    ImageKind::Clip
                } else {
                    ImageKind::Vit
                },
                layers: self
                    .layers("vit_model.visual.transformer.resblocks.")
                    .max(self.layers("vit_model.blocks.")),
                managed: managed("n_image"),
                hidden: self.size("image"),
                heads: self.size("v_heads"),
                size: self.size("img"),
                patch: self.size("patch"),
            },
            head: Head {
                layers: if deep { 2 } else { 1 },
                hidden_scale: self.size("hscale"),
                answers: self.size("labels"),
                nlvr2_dropout: 0.0,
                contrastive_hidden: contrastive.map_or(1, |shape| shape[0] as u32),
                ..Head::default()
            },
        }
    }

    pub fn tower(&self) -> ManagerTower {
        let leftovers = self.param("vit_model.positional_embedding");
        let leftovers = leftovers.map_or([1, 1], |shape| [shape[0], shape[1]]);
        let text_len = self.size("maxlen") as usize;
        ManagerTower::with_clip_leftovers(&self.model(), text_len, leftovers)
            .unwrap_or_else(|e| panic!("{}: {e}", self.name))
    }

    /// What stands in front of the names of each micro-batch's or process's tensors.
    pub fn prefixes(&self) -> Vec<String> {
        for kind in ["micro", "rank"] {
            let numbered = |i: usize| {
                let prefix = format!("{kind}{i}/");
                self.io
                    .keys()
                    .any(|key| key.starts_with(&prefix))
                    .then_some(prefix)
            };
            let prefixes: Vec<String> = (0..).map_while(numbered).collect();
            if !prefixes.is_empty() {
                return prefixes;
            }
        }
        vec![String::new()]
    }

    pub fn noise(&self) -> Vec<Vec<f32>> {
        let draw = |i: usize| self.io.get(&format!("rand/normal.{i}")).map(Array::f32);
        (0..).map_while(draw).collect()
    }

    /// The case's optimizer; not every case has one.
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
            decay: Decay::Polynomial,
            decay_power: config["decay_power"].as_f64().unwrap_or(1.0),
            betas: [0.9, 0.98],
            epsilon: 1e-8,
            non_finite: belfry_configs::NonFinite::Fail,
        };
        let steps = number("max_steps") as u64;
        let warmup = optim.warmup as u64;
        let groups = table.entries().iter();
        let groups = groups.map(|e| ParamGroup::of(&e.name, e.offset, e.len, e.trained));
        AdamW::new(optim, steps, warmup, groups.collect())
    }

    /// The authors' total loss before update `step`, or after the last.
    pub fn total_at(&self, step: u64) -> Option<f64> {
        let losses = &self.json["losses"];
        if let Some(steps) = losses.as_array() {
            let micro = steps.get(step as usize)?.as_array()?;
            let sum = |l: &Value| {
                l.as_object()
                    .into_iter()
                    .flat_map(|l| l.values())
                    .filter_map(Value::as_f64)
                    .sum::<f64>()
            };
            return Some(micro.iter().map(sum).sum::<f64>() / micro.len() as f64);
        }
        let key = if step == 3 {
            "total_after3".into()
        } else {
            format!("total_at_step{step}")
        };
        losses[key].as_f64()
    }
}
