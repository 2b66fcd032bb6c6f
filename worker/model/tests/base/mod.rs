//! The BASE model of the run files.

use std::path::Path;

use belfry_configs::Model;

/// ManagerTower BASE as `configs/pretrain-4m.toml` has it (model_spec 1), at this image size.
pub fn base(image_size: u32) -> Model {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/pretrain-4m.toml");
    let size = format!("model.image.size={image_size}");
    let config = belfry_configs::load(&file, &[size]).expect("a run file of this repository");
    config.model.clone()
}
