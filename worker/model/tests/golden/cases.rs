//! What lies in a golden folder. A case is found by its `.json` and recognised by what it holds,
//! never by its name; sizes come from the files.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use belfry_configs::{
    Decay, Head, ImageKind, ImageTower, Manager, ManagerQuery, ManagerWeight, Model, Optim, System,
    Task, TextKind, TextTower,
};
use belfry_model::{ManagerTower, ParamTable};
use serde_json::Value;

use crate::arrays::{Array, Arrays, read_arrays};
use crate::optimizer::{AdamW, ParamGroup};

/// The folder in `BELFRY_GOLDEN_DIR`, else the whole set beside the repository, else the subset in
/// the repository.
pub fn golden_dir() -> PathBuf {
    if let Ok(dir) = std::env::var("BELFRY_GOLDEN_DIR") {
        // Cargo runs tests in the package's folder, people give paths from the workspace's.
        let from_workspace = workspace().join(&dir);
        return if from_workspace.is_dir() {
            from_workspace
        } else {
            dir.into()
        };
    }
    let shared = workspace().join("../shared/golden");
    if shared.is_dir() {
        shared
    } else {
        workspace().join("tests/golden")
    }
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

/// Everything in the folder, and the parameter lists beside it.
pub fn everything() -> Vec<Found> {
    let dir = golden_dir();
    let mut names = BTreeSet::new();
    let entries = std::fs::read_dir(&dir)
        .unwrap_or_else(|e| panic!("no golden data in {}: {e}", dir.display()));
    for entry in entries {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        match path.extension().and_then(|e| e.to_str()) {
            Some("json") => names.insert(stem.into_owned()),
            // `CASE.part.safetensors` belongs to a case; without a dot it may stand alone.
            Some("safetensors") if !stem.contains('.') => names.insert(stem.into_owned()),
            _ => false,
        };
    }
    let mut found: Vec<Found> = names.iter().map(|name| recognise(&dir, name)).collect();
    for entry in std::fs::read_dir(dir.join("..")).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "json")
            && let Some(json) = read_json(&path)
            && is_parameter_list(&json)
        {
            let name = path.file_stem().unwrap_or_default().to_string_lossy();
            found.push(Found::Parameters(name.into_owned(), json));
        }
    }
    found
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
