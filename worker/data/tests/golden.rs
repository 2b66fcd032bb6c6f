//! The `clip` transform against the authors' pipeline (Pillow 9.0.1): the same 8-bit pixels.
//!
//! Images and sizes are those that the folder holds: `clip_SIDE/NAME` of `image_transforms`.

use std::path::{Path, PathBuf};

use belfry_data::clip_transform;
use safetensors::SafeTensors;

/// Far below the step between two neighbouring 8-bit values, which is 0.0142.
const TOLERANCE: f32 = 1e-5;

fn folder() -> PathBuf {
    if let Ok(folder) = std::env::var("BELFRY_GOLDEN_DIR") {
        return folder.into();
    }
    let house = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let whole = house.join("../shared/golden");
    if whole.is_dir() {
        return whole;
    }
    house.join("tests/golden")
}

#[test]
fn pixels_are_the_authors() {
    let folder = folder();
    let file = folder.join("image_transforms.safetensors");
    let bytes = std::fs::read(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let arrays = SafeTensors::deserialize(&bytes).expect("is whole");
    let mut compared = 0;
    for name in arrays.names() {
        let Some((side, image)) = name.strip_prefix("clip_").and_then(|n| n.split_once('/')) else {
            continue;
        };
        // The others of this prefix are the steps between.
        let Ok(side) = side.parse::<usize>() else {
            continue;
        };
        let source = std::fs::read(folder.join(format!("{image}.png"))).expect("the image");
        let ours = clip_transform(&source, side).expect("decodes");
        let view = arrays.tensor(name).expect("is there");
        assert_eq!(view.shape(), [3, side, side], "{name}");
        let theirs = view.data().as_chunks::<4>().0.iter();
        let theirs: Vec<f32> = theirs.map(|raw| f32::from_le_bytes(*raw)).collect();
        assert_eq!(ours.len(), theirs.len(), "{name}");
        let pairs = ours.iter().zip(&theirs);
        let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
        println!("{name:<20} worst {worst:.1e}");
        assert!(worst <= TOLERANCE, "{name}: off by {worst:e}");
        compared += 1;
    }
    assert!(compared > 0, "{} holds no clip case", file.display());
}
