//! Transforms against the authors' pipeline (Pillow 9.0.1, OpenCV 4.5.5): the same 8-bit pixels at
//! every stage, and for every operation of RandomAugment.
//!
//! Images, sizes and arguments are those that the folder holds.

use std::path::{Path, PathBuf};

use belfry_configs::rng::{Key, Purpose};
use belfry_configs::{Transform, TruncatedJpeg};
use belfry_data::image::augment::Op;
use belfry_data::image::{self, Decoded, Pixels, Rect};
use safetensors::SafeTensors;
use serde_json::Value;

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

fn read(name: &str) -> Vec<u8> {
    let file = folder().join(name);
    std::fs::read(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()))
}

/// No case draws a random number.
fn key() -> Key {
    Key::new(0, Purpose::Pack)
}

#[test]
fn pixels_are_the_authors() {
    let bytes = read("image_transforms.safetensors");
    let arrays = SafeTensors::deserialize(&bytes).expect("is whole");
    let mut compared = 0;
    for name in arrays.names() {
        let (case, image) = name.split_once('/').expect("CASE/IMAGE");
        let (kind, rest) = case.split_once('_').expect("KIND_SIDE");
        let (side, stage) = rest.split_once('_').unwrap_or((rest, "normalised"));
        let side: usize = side.parse().expect("a side");
        let kind = match kind {
            "clip" => Transform::Clip,
            "albef" => Transform::Albef,
            other => panic!("{name}: no transform is called {other}"),
        };
        let source = read(&format!("{image}.png"));
        let view = arrays.tensor(name).expect("is there");
        match stage {
            "normalised" => normalised(name, &source, (kind, side), &view),
            "final_u8" => {
                let pixels = image::square(&source, kind, side, TruncatedJpeg::Refuse, key());
                let pixels = pixels.expect("decodes");
                assert_eq!(view.shape(), [side, side, 3], "{name}");
                assert_eq!(pixels.data, view.data(), "{name}");
            }
            "resized_u8" => resized(name, &source, kind, &view),
            other => panic!("{name}: no stage is called {other}"),
        }
        compared += 1;
    }
    assert!(compared > 0, "{} holds no case", folder().display());
}

fn normalised(
    name: &str,
    source: &[u8],
    (kind, side): (Transform, usize),
    view: &safetensors::tensor::TensorView,
) {
    let mut ours = Vec::new();
    image::transform(source, kind, side, TruncatedJpeg::Refuse, key(), &mut ours).expect("decodes");
    assert_eq!(view.shape(), [3, side, side], "{name}");
    let theirs = view.data().as_chunks::<4>().0.iter();
    let theirs: Vec<f32> = theirs.map(|raw| f32::from_le_bytes(*raw)).collect();
    assert_eq!(ours.len(), theirs.len(), "{name}");
    let pairs = ours.iter().zip(&theirs);
    let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
    println!("{name:<20} worst {worst:.1e}");
    assert!(worst <= TOLERANCE, "{name}: off by {worst:e}");
}

/// The whole picture before the crop. `clip` has alpha here, 255 where the file has none.
fn resized(name: &str, source: &[u8], kind: Transform, view: &safetensors::tensor::TensorView) {
    let decoded = image::decode(source, TruncatedJpeg::Refuse).expect("decodes");
    let [height, width, channels] = *view.shape() else {
        panic!("{name}: is no picture");
    };
    let ours = match (kind, decoded) {
        (Transform::Clip, Decoded::Rgba(pixels)) => {
            assert_eq!(channels, 4, "{name}");
            image::resize_with_alpha(pixels, (width, height), Rect::of(width, height)).data
        }
        (_, decoded) => {
            let pixels = decoded.into_rgb();
            let (all, window) = (pixels.rect(), Rect::of(width, height));
            let rgb = image::resize(&pixels, all, (width, height), window).data;
            match channels {
                3 => rgb,
                _ => {
                    let pixels = rgb.as_chunks::<3>().0.iter();
                    pixels.flat_map(|p| [p[0], p[1], p[2], 255]).collect()
                }
            }
        }
    };
    assert_eq!(ours, view.data(), "{name}");
}

#[test]
fn augmentations_are_the_authors() {
    let bytes = read("randaugment_ops.safetensors");
    let arrays = SafeTensors::deserialize(&bytes).expect("is whole");
    let described: Value = serde_json::from_slice(&read("randaugment_ops.json")).expect("is JSON");
    let input = arrays.tensor("input").expect("is there");
    let [height, width, 3] = *input.shape() else {
        panic!("input: is no RGB picture");
    };
    let arguments = described["args"].as_object().expect("a table");
    for (case, arguments) in arguments {
        let mut pixels = Pixels::<3> {
            width,
            height,
            data: input.data().to_vec(),
        };
        let name = case.split('.').next().expect("OP.DRAW");
        op(name, &arguments[0]).apply(&mut pixels);
        let theirs = arrays.tensor(case).expect("is there");
        let pairs = pixels.data.iter().zip(theirs.data());
        let different = pairs.filter(|(a, b)| a != b).count();
        assert_eq!(
            different, 0,
            "{case} {arguments}: {different} values differ"
        );
    }
    assert!(
        !arguments.is_empty(),
        "{} holds no case",
        folder().display()
    );
}

fn op(name: &str, argument: &Value) -> Op {
    let number = || argument.as_f64().expect("a number");
    let whole = || argument.as_u64().expect("a whole number") as u32;
    match name {
        "Identity" => Op::Identity,
        "AutoContrast" => Op::AutoContrast,
        "Brightness" => Op::Brightness(number()),
        "Sharpness" => Op::Sharpness(number()),
        "Equalize" => Op::Equalize,
        "ShearX" => Op::ShearX(number()),
        "ShearY" => Op::ShearY(number()),
        "TranslateX" => Op::TranslateX(number()),
        "TranslateY" => Op::TranslateY(number()),
        "Rotate" => Op::Rotate(number()),
        "Solarize" => Op::Solarize(whole()),
        "Color" => Op::Color(number()),
        "Contrast" => Op::Contrast(number()),
        "Posterize" => Op::Posterize(whole()),
        other => panic!("no operation is called {other}"),
    }
}
