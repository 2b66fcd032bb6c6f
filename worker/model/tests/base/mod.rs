//! The BASE model of the run files, and every manager.

// Each test binary uses its own part of this.
#![allow(dead_code)]

use std::path::Path;

use belfry_configs::{Manager, Model};

/// Every manager of the paper.
pub const MANAGERS: [Manager; 6] = [
    Manager::SaeJoint,
    Manager::SaeSplit,
    Manager::Saue,
    Manager::Aaue,
    Manager::ConcatAttention,
    Manager::CrossAttention,
];

/// ManagerTower BASE as `configs/pretrain-4m.toml` has it (model_spec 1), at this image size.
pub fn base(image_size: u32) -> Model {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/pretrain-4m.toml");
    let size = format!("model.image.size={image_size}");
    let config = belfry_configs::load(&file, &[size]).expect("a run file of this repository");
    config.model.clone()
}
