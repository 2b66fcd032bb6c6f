//! `[model]` of a run file: system, task, managers, towers, head. Defaults are the paper's best
//! ManagerTower (Table 1) or stand with their reason.

use serde::{Deserialize, Serialize};

/// `[model]`: which of the paper's systems, for which task, and its sizes (model_spec 1).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// What stands between the towers and the cross-modal layers.
    #[serde(default)]
    pub system: System,
    /// What the model is trained for; decides heads and losses.
    #[serde(default)]
    pub task: Task,
    /// Manager in cross-modal layers >= 1; the first has nothing but experts to aggregate.
    #[serde(default)]
    pub manager: Manager,
    /// What an adaptive manager's weights are generated from (Table 1).
    #[serde(default)]
    pub manager_query: ManagerQuery,
    /// One weight per expert (`scalar`) or per expert and feature (`vector`).
    #[serde(default)]
    pub manager_weight: ManagerWeight,
    /// Exploration noise of the managers while training (model_spec 5.3).
    #[serde(default = "yes")]
    pub manager_noise: bool,
    /// METER only: the towers' lower layers are gated into the last one (model_spec 7).
    #[serde(default)]
    pub meter_fusion: bool,
    /// Width of the cross-modal layers.
    pub hidden: u32,
    /// Attention heads of the cross-modal layers.
    pub heads: u32,
    /// Cross-modal layers per modality (Table 2: 2 to 8).
    pub cross_layers: u32,
    /// Feed-forward width over `hidden` in the cross-modal layers (4 in BASE).
    #[serde(default = "default_mlp_ratio")]
    pub mlp_ratio: u32,
    /// Dropout of hidden states and attention probabilities in the text and cross-modal layers.
    #[serde(default = "default_dropout")]
    pub dropout: f32,
    /// The text tower.
    pub text: TextTower,
    /// The image tower.
    pub image: ImageTower,
    /// The task's head.
    #[serde(default)]
    pub head: Head,
}

/// `[model.text]`: RoBERTa or BERT.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextTower {
    /// Whose layout, padding id, positions and epsilon.
    #[serde(default)]
    pub kind: TextKind,
    /// Layers.
    pub layers: u32,
    /// Top layers whose outputs managers and link towers see (Figure 5: 2 to 12). METER sees the
    /// last layer, with `meter_fusion` all of them, whatever stands here.
    pub managed: u32,
    /// Width.
    pub hidden: u32,
    /// Attention heads.
    pub heads: u32,
    /// Feed-forward width.
    pub intermediate: u32,
    /// Vocabulary (50,265 for RoBERTa, 30,522 for BERT).
    pub vocab: u32,
    /// Rows of the position table (514 for RoBERTa: 512 + 2; 512 for BERT).
    pub positions: u32,
}

impl TextTower {
    /// The position of a caption's first token: RoBERTa's table starts with two rows that tokens
    /// never use.
    pub fn first_position(&self) -> u32 {
        match self.kind {
            TextKind::Roberta => 2,
            TextKind::Bert => 0,
        }
    }
}

/// `[model.image]`: a ViT. Its feed-forward width is 4 times its own (none of the paper's has
/// another).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageTower {
    /// Whose layout, activation and epsilon.
    #[serde(default)]
    pub kind: ImageKind,
    /// Blocks (11 for METER without the last one, its `vit_remove_last`).
    pub layers: u32,
    /// Top blocks whose outputs managers and link towers see; METER as for the text tower.
    pub managed: u32,
    /// Width.
    pub hidden: u32,
    /// Attention heads.
    pub heads: u32,
    /// Image side in pixels.
    pub size: u32,
    /// Patch side in pixels.
    pub patch: u32,
}

/// `[model.head]`: sizes of the tasks' heads (model_spec 8, 12). A task reads only what it has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Head {
    /// 2: linear, norm, GELU, linear. 1: a single linear layer.
    pub layers: u32,
    /// Classifier's hidden width over 2 x `model.hidden` (VQA and SNLI-VE after pre-training: 2,
    /// else 1). METER's is always 1.
    pub hidden_scale: u32,
    /// VQA's answers.
    pub answers: u32,
    /// Dropout of both images' features in front of NLVR2's classifier (the authors' script: 0).
    pub nlvr2_dropout: f32,
    /// Width of the contrastive features.
    pub contrastive_hidden: u32,
    /// First value of the contrastive temperature, which is learned.
    pub temperature: f32,
    /// Hard negatives come from the whole contrastive group, not from the own micro-batch alone
    /// (the authors' Flickr30K script).
    pub global_negatives: bool,
    /// What a row is contrasted with.
    pub contrastive_scope: ContrastiveScope,
}

impl Default for Head {
    fn default() -> Self {
        Head {
            layers: 2,
            hidden_scale: 1,
            answers: 3129,
            nlvr2_dropout: 0.0,
            contrastive_hidden: 256,
            temperature: 0.07,
            global_negatives: true,
            contrastive_scope: ContrastiveScope::GlobalBatch,
        }
    }
}

/// The rows that a contrastive loss compares with each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContrastiveScope {
    /// The whole global batch: the result does not depend on the number of workers, nor on how the
    /// batch is cut into micro-batches.
    #[default]
    GlobalBatch,
    /// One micro-batch, as the authors' code on one worker.
    MicroBatch,
}

/// The systems that the paper compares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum System {
    /// A manager in front of every cross-modal layer.
    #[default]
    ManagerTower,
    /// Link towers: cross-modal layer i sees the i-th of the top layers.
    BridgeTower,
    /// The towers' last outputs only.
    Meter,
}

/// What a model is trained for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// Masked words and image-text matching.
    #[default]
    Pretrain,
    /// Masked words, contrast, and matching with hard negatives: in the authors' code, not in the
    /// paper.
    PretrainItc,
    /// Visual question answering.
    Vqa,
    /// Visual entailment.
    SnliVe,
    /// Reasoning over two images.
    Nlvr2,
    /// Image-text retrieval: contrast, and matching with hard negatives.
    Retrieval,
}

impl Task {
    /// All of them.
    pub const ALL: [Task; 6] = [
        Task::Pretrain,
        Task::PretrainItc,
        Task::Vqa,
        Task::SnliVe,
        Task::Nlvr2,
        Task::Retrieval,
    ];
}

/// Layout of a text tower.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TextKind {
    /// RoBERTa: padding id 1, positions counted over tokens.
    #[default]
    Roberta,
    /// BERT: padding id 0, positions counted over everything.
    Bert,
}

/// Layout of an image tower.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageKind {
    /// CLIP's visual ViT: norm in front of the blocks, QuickGELU.
    #[default]
    Clip,
    /// ViT and DeiT as timm lays them out: no norm in front, exact GELU.
    Vit,
}

/// Which manager stands above the first cross-modal layer (paper section 3, Appendix D).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Manager {
    /// Static aggregation of uni-modal experts and all earlier cross-modal outputs, one softmax.
    SaeJoint,
    /// The same with a softmax and a temperature for each of the two kinds.
    SaeSplit,
    /// Static aggregation of uni-modal experts in every layer.
    Saue,
    /// Adaptive aggregation of uni-modal experts.
    #[default]
    Aaue,
    /// Weights generated from each expert concatenated with the query.
    ConcatAttention,
    /// Weights from the query's attention over the experts' first tokens.
    CrossAttention,
}

impl Manager {
    /// All of them.
    pub const ALL: [Manager; 6] = [
        Manager::SaeJoint,
        Manager::SaeSplit,
        Manager::Saue,
        Manager::Aaue,
        Manager::ConcatAttention,
        Manager::CrossAttention,
    ];
}

/// What an adaptive manager looks at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ManagerQuery {
    /// The own stream's previous output alone (Table 1's visual query; textual in the text stream).
    Visual,
    /// The own stream's previous output fused with the other stream's.
    #[default]
    Fused,
}

/// Granularity of manager weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ManagerWeight {
    /// N x 1.
    Scalar,
    /// N x D.
    #[default]
    Vector,
}

fn yes() -> bool {
    true
}
fn default_mlp_ratio() -> u32 {
    4
}
fn default_dropout() -> f32 {
    0.1
}
