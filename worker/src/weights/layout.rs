//! Names: which tensor of the authors' model a key of another program's file is.
//!
//! Pure functions of the key. A naming is found by counting which one understands most of a file's
//! keys, so a file need not be whole (one shard of several) and no file name is trusted.
//! Sources of the names: the published checkpoints' keys and the libraries' module attributes;
//! the authors' names are model_spec 15 and 17.

/// A naming of tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// The authors' own, also of our exports.
    Authors,
    /// RoBERTa or BERT of transformers.
    HfText,
    /// CLIP of transformers.
    HfClip,
    /// CLIP as OpenAI published it.
    OpenAiClip,
    /// ViT or DeiT of transformers.
    HfVit,
    /// ViT or DeiT of timm.
    Timm,
}

/// Where a key's tensor goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The authors' name.
    pub target: String,
    /// Which third of it (query, key, value), where the authors' tensor packs all three.
    pub third: Option<usize>,
}

/// Attention inputs in the order in which they are packed.
const THIRDS: usize = 3;
/// Wrappers that trainers put around a model's names.
const WRAPPERS: [&str; 2] = ["module.", "model."];

impl Layout {
    pub const ALL: [Layout; 6] = [
        Layout::Authors,
        Layout::HfText,
        Layout::HfClip,
        Layout::OpenAiClip,
        Layout::HfVit,
        Layout::Timm,
    ];

    /// In words.
    pub fn describe(self) -> &'static str {
        match self {
            Layout::Authors => "ManagerTower (the authors' names)",
            Layout::HfText => "RoBERTa/BERT (transformers)",
            Layout::HfClip => "CLIP (transformers)",
            Layout::OpenAiClip => "CLIP (OpenAI)",
            Layout::HfVit => "ViT/DeiT (transformers)",
            Layout::Timm => "ViT/DeiT (timm)",
        }
    }

    /// The naming that understands most of `keys`, if any understands one.
    pub fn of<'a>(keys: impl Iterator<Item = &'a str> + Clone) -> Option<Layout> {
        let understood =
            |layout: Layout| keys.clone().filter(|k| layout.place(k).is_some()).count();
        let counts = Layout::ALL.map(|layout| (understood(layout), layout));
        // The first of the most, so that the order of ALL decides ties.
        let best = counts.into_iter().rev().max_by_key(|(count, _)| *count)?;
        (best.0 > 0).then_some(best.1)
    }

    /// Where `key` goes; nothing if it is no part of an encoder in this naming.
    pub fn place(self, key: &str) -> Option<Place> {
        let key = WRAPPERS
            .iter()
            .find_map(|w| key.strip_prefix(w))
            .unwrap_or(key);
        match self {
            Layout::Authors => authors(key),
            Layout::HfText => hf_text(key),
            Layout::HfClip => hf_clip(key),
            Layout::OpenAiClip => openai_clip(key),
            Layout::HfVit => hf_vit(key),
            Layout::Timm => timm(key),
        }
    }
}

fn whole(target: impl Into<String>) -> Option<Place> {
    Some(Place {
        target: target.into(),
        third: None,
    })
}

/// First parts of the authors' names; a task's classifier is found by its ending.
const ROOTS: [&str; 12] = [
    "text_transformer",
    "vit_model",
    "cross_modal_text_transform",
    "cross_modal_image_transform",
    "token_type_embeddings",
    "layer_embeddings_text",
    "layer_embeddings_image",
    "mlm_score",
    "itm_score",
    "temperature",
    "text_gate",
    "image_gate",
];

fn authors(key: &str) -> Option<Place> {
    let root = key.split('.').next().unwrap_or(key);
    let ours =
        ROOTS.contains(&root) || root.starts_with("cross_modal_") || root.ends_with("_classifier");
    if ours { whole(key) } else { None }
}

fn hf_text(key: &str) -> Option<Place> {
    let key = ["roberta.", "bert."]
        .iter()
        .find_map(|p| key.strip_prefix(p))
        .unwrap_or(key);
    let embeddings = [
        "word_embeddings.",
        "position_embeddings.",
        "token_type_embeddings.",
        "LayerNorm.",
    ];
    let known = match key.split_once('.')? {
        ("embeddings", rest) => embeddings.iter().any(|e| rest.starts_with(e)),
        ("encoder", rest) => {
            let inside = layer(rest, "layer.")?.1;
            // ViT's blocks share the names of the feed-forward part, but not those of the norms.
            [
                "attention.self.",
                "attention.output.",
                "intermediate.",
                "output.",
            ]
            .iter()
            .any(|part| inside.starts_with(part))
        }
        ("pooler", rest) => rest.starts_with("dense."),
        _ => false,
    };
    if !known {
        return None;
    }
    // BERT's first checkpoints carry TensorFlow's names of a norm's scale and shift.
    let renamed = match key.strip_suffix("LayerNorm.gamma") {
        Some(stem) => format!("{stem}LayerNorm.weight"),
        None => match key.strip_suffix("LayerNorm.beta") {
            Some(stem) => format!("{stem}LayerNorm.bias"),
            None => key.to_owned(),
        },
    };
    whole(format!("text_transformer.{renamed}"))
}

fn hf_clip(key: &str) -> Option<Place> {
    if let Some(text) = key.strip_prefix("text_model.") {
        // What the authors' model keeps of CLIP's text side, without using it (model_spec 3).
        return match text {
            "embeddings.position_embedding.weight" => whole("vit_model.positional_embedding"),
            "final_layer_norm.weight" => whole("vit_model.ln_final.weight"),
            "final_layer_norm.bias" => whole("vit_model.ln_final.bias"),
            _ => None,
        };
    }
    let key = key.strip_prefix("vision_model.").unwrap_or(key);
    let visual = |name: String| format!("vit_model.visual.{name}");
    if let Some((number, inside)) = key
        .strip_prefix("encoder.")
        .and_then(|k| layer(k, "layers."))
    {
        let block = |name: &str| visual(format!("transformer.resblocks.{number}.{name}"));
        let (part, kind) = inside.rsplit_once('.')?;
        let third = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];
        if let Some(third) = third.iter().position(|p| *p == part) {
            return Some(Place {
                target: block(&format!("attn.in_proj_{kind}")),
                third: Some(third),
            });
        }
        let part = match part {
            "self_attn.out_proj" => "attn.out_proj",
            "layer_norm1" => "ln_1",
            "layer_norm2" => "ln_2",
            "mlp.fc1" => "mlp.c_fc",
            "mlp.fc2" => "mlp.c_proj",
            _ => return None,
        };
        return whole(block(&format!("{part}.{kind}")));
    }
    let name = match key {
        "embeddings.class_embedding" => "class_embedding",
        "embeddings.patch_embedding.weight" => "conv1.weight",
        "embeddings.position_embedding.weight" => "positional_embedding",
        // The library's own spelling.
        "pre_layrnorm.weight" => "ln_pre.weight",
        "pre_layrnorm.bias" => "ln_pre.bias",
        "post_layernorm.weight" => "ln_post.weight",
        "post_layernorm.bias" => "ln_post.bias",
        _ => return None,
    };
    whole(visual(name.to_owned()))
}

fn openai_clip(key: &str) -> Option<Place> {
    let taken = match key.split_once('.') {
        // The final projection is not used by the authors' model.
        Some(("visual", rest)) => rest != "proj",
        Some(("ln_final", _)) => true,
        _ => key == "positional_embedding",
    };
    if taken {
        whole(format!("vit_model.{key}"))
    } else {
        None
    }
}

fn hf_vit(key: &str) -> Option<Place> {
    let key = ["vit.", "deit."]
        .iter()
        .find_map(|p| key.strip_prefix(p))
        .unwrap_or(key);
    if let Some((number, inside)) = key
        .strip_prefix("encoder.")
        .and_then(|k| layer(k, "layer."))
    {
        let block = |name: &str| format!("vit_model.blocks.{number}.{name}");
        let (part, kind) = inside.rsplit_once('.')?;
        let thirds = ["query", "key", "value"].map(|p| format!("attention.attention.{p}"));
        if let Some(third) = thirds.iter().position(|p| p == part) {
            return Some(Place {
                target: block(&format!("attn.qkv.{kind}")),
                third: Some(third),
            });
        }
        let part = match part {
            "attention.output.dense" => "attn.proj",
            "layernorm_before" => "norm1",
            "layernorm_after" => "norm2",
            "intermediate.dense" => "mlp.fc1",
            "output.dense" => "mlp.fc2",
            _ => return None,
        };
        return whole(block(&format!("{part}.{kind}")));
    }
    let name = match key {
        "embeddings.cls_token" => "cls_token",
        "embeddings.position_embeddings" => "pos_embed",
        "embeddings.patch_embeddings.projection.weight" => "patch_embed.proj.weight",
        "embeddings.patch_embeddings.projection.bias" => "patch_embed.proj.bias",
        "layernorm.weight" => "norm.weight",
        "layernorm.bias" => "norm.bias",
        _ => return None,
    };
    whole(format!("vit_model.{name}"))
}

fn timm(key: &str) -> Option<Place> {
    let root = key.split('.').next()?;
    let taken = ["cls_token", "pos_embed", "patch_embed", "blocks", "norm"].contains(&root);
    if taken {
        whole(format!("vit_model.{key}"))
    } else {
        None
    }
}

/// Number and rest of `KIND.NUMBER.REST`.
fn layer<'a>(key: &'a str, kind: &str) -> Option<(&'a str, &'a str)> {
    let (number, rest) = key.strip_prefix(kind)?.split_once('.')?;
    let digits = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
    digits.then_some((number, rest))
}

/// How many tensors of the file make `place`'s tensor.
pub(crate) fn parts(place: &Place) -> usize {
    if place.third.is_some() { THIRDS } else { 1 }
}

/// Whether nothing reads the tensor of this name: RoBERTa's pooler, what CLIP's text side left
/// behind. It may be missing or misshaped.
pub(crate) fn is_unread(name: &str) -> bool {
    let unread = [
        "text_transformer.pooler.",
        "vit_model.positional_embedding",
        "vit_model.ln_final.",
    ];
    unread.iter().any(|prefix| name.starts_with(prefix))
}

/// Whether a name belongs to the uni-modal encoders' used weights.
pub(crate) fn is_encoder(name: &str) -> bool {
    is_tower(name) && !is_unread(name)
}

fn is_tower(name: &str) -> bool {
    name.starts_with("text_transformer.") || name.starts_with("vit_model.")
}

/// Whether a name belongs to a task's head, which starts fresh when no file holds it.
pub(crate) fn is_head(name: &str) -> bool {
    let root = name.split('.').next().unwrap_or(name);
    root.ends_with("_classifier")
        || ["mlm_score", "itm_score", "temperature"].contains(&root)
        || root.starts_with("cross_modal_itc_")
}

/// Whether a name belongs to the cross-modal part, heads aside.
pub(crate) fn is_cross_modal(name: &str) -> bool {
    !is_tower(name) && !is_head(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placed(layout: Layout, key: &str) -> (String, Option<usize>) {
        let place = layout
            .place(key)
            .unwrap_or_else(|| panic!("{key} has a place"));
        (place.target, place.third)
    }

    #[test]
    fn each_naming_meets_the_authors() {
        let text = "text_transformer.encoder.layer.3.attention.self.query.weight";
        let block = "vit_model.visual.transformer.resblocks.3.";
        let cases = [
            (
                Layout::HfText,
                "roberta.encoder.layer.3.attention.self.query.weight",
                text,
                None,
            ),
            (
                Layout::HfText,
                "encoder.layer.3.attention.self.query.weight",
                text,
                None,
            ),
            (
                Layout::HfText,
                "bert.embeddings.LayerNorm.gamma",
                "text_transformer.embeddings.LayerNorm.weight",
                None,
            ),
            (
                Layout::HfClip,
                "vision_model.encoder.layers.3.self_attn.k_proj.bias",
                &format!("{block}attn.in_proj_bias"),
                Some(1),
            ),
            (
                Layout::HfClip,
                "encoder.layers.3.mlp.fc2.weight",
                &format!("{block}mlp.c_proj.weight"),
                None,
            ),
            (
                Layout::OpenAiClip,
                "visual.transformer.resblocks.3.attn.in_proj_bias",
                &format!("{block}attn.in_proj_bias"),
                None,
            ),
            (
                Layout::HfVit,
                "vit.encoder.layer.3.attention.attention.value.weight",
                "vit_model.blocks.3.attn.qkv.weight",
                Some(2),
            ),
            (
                Layout::Timm,
                "blocks.3.norm1.bias",
                "vit_model.blocks.3.norm1.bias",
                None,
            ),
            (
                Layout::Authors,
                "vqa_classifier.3.bias",
                "vqa_classifier.3.bias",
                None,
            ),
        ];
        for (layout, key, target, third) in cases {
            assert_eq!(placed(layout, key), (target.to_owned(), third), "{key}");
        }
    }

    #[test]
    fn what_no_encoder_uses_has_no_place() {
        for (layout, key) in [
            (Layout::HfText, "lm_head.dense.weight"),
            (Layout::HfText, "roberta.embeddings.position_ids"),
            (Layout::HfClip, "text_model.encoder.layers.0.mlp.fc1.bias"),
            (Layout::HfClip, "visual_projection.weight"),
            (Layout::OpenAiClip, "visual.proj"),
            (Layout::OpenAiClip, "transformer.resblocks.0.ln_1.bias"),
            (Layout::HfVit, "classifier.weight"),
            (Layout::Timm, "head.weight"),
            (Layout::Authors, "conv1.weight"),
        ] {
            assert_eq!(layout.place(key), None, "{key}");
        }
    }

    #[test]
    fn a_naming_is_found_by_its_keys() {
        let found = |keys: &[&str]| Layout::of(keys.iter().copied());
        let vit = [
            "encoder.layer.0.output.dense.bias",
            "encoder.layer.0.layernorm_before.bias",
        ];
        assert_eq!(found(&vit), Some(Layout::HfVit));
        let bert = [
            "encoder.layer.0.output.dense.bias",
            "encoder.layer.0.output.LayerNorm.bias",
        ];
        assert_eq!(found(&bert), Some(Layout::HfText));
        assert_eq!(found(&["layer1.0.conv1.weight", "fc.bias"]), None);
    }
}
