//! `belfry shards` is `shard_tools`: packs, looks and refuses from the one binary.

use std::path::Path;
use std::process::Command;

use crate::system::{Outcome, outcome};

fn shards(arguments: &[&str]) -> Outcome {
    let mut command = Command::new(env!("CARGO_BIN_EXE_belfry"));
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    command.arg("shards").args(arguments);
    outcome(command.output().expect("starts"))
}

#[test]
fn the_one_binary_packs_and_looks() {
    let folder = tempfile::tempdir().expect("a folder");
    let packed = folder.path().join("packed").display().to_string();
    let photos = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/stamps");
    let photos = photos.display().to_string();
    shards(&["pack", &photos, &packed, "--pairs-per-shard", "50"]).accepted();
    let listed = shards(&["info", &packed]).accepted();
    assert!(listed.contains("samples   232"), "{listed}");
    let said = shards(&["verify", &packed]).accepted();
    assert!(said.contains("every member decodes"), "{said}");
    let said = shards(&["diff", &packed, &packed]).accepted();
    assert!(said.contains("the same"), "{said}");
    shards(&["pack", &photos, &packed]).refused(&["already holds a dataset"]);
}
