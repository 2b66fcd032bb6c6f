//! Decoding, resizes and augmentations against Pillow, OpenCV and numpy themselves, on random
//! pictures and on files as users have them.
//!
//! Needs a Python with `pillow`, `numpy` and `opencv-python-headless` (4.x); BELFRY_PYTHON names it.

use std::io::Write as _;
use std::path::Path;
use std::process::Command;

use belfry_configs::TruncatedJpeg;
use belfry_data::image::augment::Op;
use belfry_data::image::{self, Decoded, Pixels, Rect};
use serde_json::Value;
use tempfile::TempDir;

/// What the script wrote, and the folder; nothing where there is no such Python.
fn ask(what: &str) -> Option<(TempDir, Vec<Value>)> {
    let python = std::env::var("BELFRY_PYTHON").unwrap_or_else(|_| "python3".into());
    let check = "import PIL, numpy, cv2; assert cv2.__version__ < '5'; \
                 assert int(PIL.__version__.split('.')[0]) < 10";
    let found = Command::new(&python).args(["-c", check]).output();
    if !found.is_ok_and(|output| output.status.success()) {
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED: `{python}` has no Pillow 9 (whose pixels the authors trained on; later ones \
             round alpha differently), numpy and OpenCV 4; `pip install 'pillow<10' numpy \
             'opencv-python-headless<5'` brings them, BELFRY_PYTHON names the Python that has them"
        );
        return None;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/pillow_interop.py");
    let output = Command::new(&python)
        .arg(script)
        .arg(what)
        .arg(folder.path())
        .arg("7")
        .output()
        .expect("Python starts");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    let lines = String::from_utf8(output.stdout).expect("is text");
    let lines = lines
        .lines()
        .map(|line| serde_json::from_str(line).expect("is JSON"));
    let lines: Vec<Value> = lines.collect();
    assert!(lines.len() > 20, "{} cases", lines.len());
    Some((folder, lines))
}

fn raw(folder: &TempDir, line: &Value, key: &str) -> Vec<u8> {
    std::fs::read(folder.path().join(line[key].as_str().expect("a name"))).expect("is there")
}

fn numbers<const N: usize>(line: &Value, key: &str) -> [usize; N] {
    std::array::from_fn(|i| line[key][i].as_u64().expect("a number") as usize)
}

fn pixels<const C: usize>(folder: &TempDir, line: &Value) -> Pixels<C> {
    let [width, height] = numbers(line, "size");
    Pixels {
        width,
        height,
        data: raw(folder, line, "input"),
    }
}

#[test]
fn resizes_are_pillows() {
    let Some((folder, lines)) = ask("resize") else {
        return;
    };
    for line in &lines {
        let [width, height] = numbers(line, "to");
        let [left, top, part_width, part_height] = numbers(line, "part");
        let part = Rect {
            left,
            top,
            width: part_width,
            height: part_height,
        };
        let window = Rect::of(width, height);
        let ours = match line["channels"].as_u64() {
            Some(3) => {
                image::resize(&pixels::<3>(&folder, line), part, (width, height), window).data
            }
            _ => image::resize_with_alpha(pixels(&folder, line), (width, height), window).data,
        };
        assert_eq!(ours, raw(&folder, line, "output"), "{line}");
    }
}

#[test]
fn augmentations_are_opencvs() {
    let Some((folder, lines)) = ask("augment") else {
        return;
    };
    for line in &lines {
        let number = || line["argument"].as_f64().expect("a number");
        let op = match line["op"].as_str().expect("a name") {
            "AutoContrast" => Op::AutoContrast,
            "Brightness" => Op::Brightness(number()),
            "Sharpness" => Op::Sharpness(number()),
            "Equalize" => Op::Equalize,
            "ShearX" => Op::ShearX(number()),
            "ShearY" => Op::ShearY(number()),
            "TranslateX" => Op::TranslateX(number()),
            "TranslateY" => Op::TranslateY(number()),
            "Rotate" => Op::Rotate(number()),
            "Solarize" => Op::Solarize(number() as u32),
            "Color" => Op::Color(number()),
            "Contrast" => Op::Contrast(number()),
            "Posterize" => Op::Posterize(number() as u32),
            other => panic!("no operation is called {other}"),
        };
        let mut ours = pixels::<3>(&folder, line);
        op.apply(&mut ours);
        let theirs = raw(&folder, line, "output");
        let different = ours
            .data
            .iter()
            .zip(&theirs)
            .filter(|(a, b)| a != b)
            .count();
        assert_eq!(
            different,
            0,
            "{line}: {different} of {} values",
            theirs.len()
        );
    }
}

#[test]
fn files_are_what_pillow_makes_of_them() {
    let Some((folder, lines)) = ask("files") else {
        return;
    };
    for line in &lines {
        let name = line["name"].as_str().expect("a name");
        let file = raw(&folder, line, "input");
        let decoded = || image::decode(&file, TruncatedJpeg::Refuse);
        let decoded = || decoded().unwrap_or_else(|e| panic!("{name}: {e}"));
        let rgba = match decoded() {
            Decoded::Rgba(pixels) => pixels.data,
            Decoded::Rgb(pixels) => {
                let all = pixels.data.as_chunks::<3>().0.iter();
                all.flat_map(|p| [p[0], p[1], p[2], 255]).collect()
            }
        };
        for (ours, theirs) in [
            (rgba, raw(&folder, line, "rgba")),
            (decoded().into_rgb().data, raw(&folder, line, "rgb")),
        ] {
            assert_eq!(ours.len(), theirs.len(), "{name}");
            let different = ours.iter().zip(&theirs).filter(|(a, b)| a != b).count();
            assert_eq!(different, 0, "{name}: {different} of {} values", ours.len());
        }
    }
}
