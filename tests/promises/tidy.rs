//! The house keeps its arrows: who may import whom, where Burn may appear, how long a file may be.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Which of our packages a package may import. Every package of the workspace must stand here.
const ARROWS: [(&str, &[&str]); 9] = [
    ("belfry-proto", &[]),
    ("belfry-configs", &[]),
    ("shard_tools", &[]),
    ("belfry-model", &["belfry-configs"]),
    ("belfry-data", &["belfry-configs", "shard_tools"]),
    ("belfry-collective", &["belfry-proto"]),
    (
        "belfry-coordinator",
        &["belfry-proto", "belfry-configs", "shard_tools"],
    ),
    (
        "belfry-worker",
        &[
            "belfry-proto",
            "belfry-configs",
            "shard_tools",
            "belfry-model",
            "belfry-data",
            "belfry-collective",
        ],
    ),
    (
        "belfry",
        &[
            "belfry-proto",
            "belfry-configs",
            "shard_tools",
            "belfry-coordinator",
            "belfry-worker",
            "belfry-model",
            "belfry-data",
            "belfry-collective",
        ],
    ),
];

/// Packages in which Burn may appear; and those that must not know what they do not need.
const BURN: [&str; 2] = ["belfry-model", "belfry-worker"];
const FORBIDDEN: [(&str, &[&str]); 3] = [
    ("belfry-model", &["tokio", "tonic", "object_store"]),
    ("belfry-proto", &["tokio", "object_store"]),
    ("belfry-configs", &["tokio", "object_store", "tonic"]),
];

/// A file longer than this is two ideas in one room.
const LINES_MAX: usize = 700;

fn house() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Names of the packages that each package of the workspace imports, tests aside.
fn imports() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(house())
        .output()
        .expect("cargo starts");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("is JSON");
    let packages = metadata["packages"].as_array().expect("a list");
    let text = |value: &Value| value.as_str().expect("a name").to_owned();
    let imports = |package: &Value| {
        let all = package["dependencies"].as_array().expect("a list");
        let used = all.iter().filter(|d| d["kind"] != "dev");
        used.map(|d| text(&d["name"])).collect()
    };
    packages
        .iter()
        .map(|p| (text(&p["name"]), imports(p)))
        .collect()
}

#[test]
fn packages_import_along_the_arrows() {
    let imports = imports();
    let arrows: BTreeMap<&str, &[&str]> = ARROWS.into_iter().collect();
    for (package, used) in &imports {
        let Some(allowed) = arrows.get(package.as_str()) else {
            panic!("{package} has no place in the house: add its arrows")
        };
        for other in used
            .iter()
            .filter(|name| arrows.contains_key(name.as_str()))
        {
            assert!(
                allowed.contains(&other.as_str()),
                "{package} must not import {other}"
            );
        }
        let burn = used.iter().find(|name| name.starts_with("burn"));
        let may = BURN.contains(&package.as_str());
        assert!(may || burn.is_none(), "{package} must not know {burn:?}");
    }
    for (package, names) in FORBIDDEN {
        for name in names {
            assert!(
                !imports[package].contains(*name),
                "{package} must not know {name}"
            );
        }
    }
    assert_eq!(imports.len(), ARROWS.len(), "every package is there");
}

/// Kernels chosen by timing, and kernels joined by what was computed before, are other kernels on
/// other days: the bits of a GPU would not hold (promise 2).
#[test]
fn a_gpu_build_neither_tunes_nor_fuses() {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--locked", "--features=cuda", "--edges=normal"])
        .args(["--prefix=none", "--format={p}|{f}"])
        .current_dir(house())
        .output()
        .expect("cargo starts");
    if !output.status.success() {
        let reason = String::from_utf8_lossy(&output.stderr);
        println!("SKIPPED: cargo does not show the tree of the feature `cuda`: {reason}");
        return;
    }
    let tree = String::from_utf8(output.stdout).expect("is text");
    let lines = tree.lines().filter_map(|line| line.split_once('|'));
    let packages: BTreeMap<&str, &str> = lines.collect();
    let is = |name: &str| packages.keys().any(|p| p.starts_with(&format!("{name} v")));
    assert!(is("burn-cubecl") && is("cubecl-cuda"), "{tree}");
    assert!(!is("burn-fusion") && !is("burn-cubecl-fusion"), "{tree}");
    for (package, features) in packages {
        let chooses = |f: &&str| f.starts_with("autotune") || f.starts_with("fusion");
        let on = features.split(',').find(chooses);
        assert_eq!(on, None, "{package} has it switched on");
    }
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("is a folder").flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        if path.is_dir() && name != "target" && !name.to_string_lossy().starts_with('.') {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn a_file_is_one_idea_and_says_which() {
    let mut files = Vec::new();
    sources(house(), &mut files);
    assert!(files.len() > 50, "found only {}", files.len());
    for file in files {
        let text = std::fs::read_to_string(&file).expect("is text");
        let name = file.strip_prefix(house()).expect("is inside").display();
        assert!(text.starts_with("//!"), "{name} does not say what it is");
        let lines = text.lines().count();
        assert!(lines <= LINES_MAX, "{name} has {lines} lines; split it");
    }
}

/// Bugs that the simulator's test plants stay in the cores and in that test.
#[test]
fn no_shell_plants_a_bug() {
    let homes = [
        "coordinator/src/core/",
        "worker/src/core/",
        "src/simulator/",
        "tests/sim/",
        "tests/promises/tidy.rs",
    ];
    let mut files = Vec::new();
    sources(house(), &mut files);
    let mut planted = 0;
    for file in files {
        let text = std::fs::read_to_string(&file).expect("is text");
        let name = file.strip_prefix(house()).expect("is inside");
        let plants = ["Planted", "Plants", ".planted"]
            .iter()
            .any(|word| text.contains(word));
        let home = homes.iter().any(|home| name.starts_with(home));
        assert!(!plants || home, "{} knows of planted bugs", name.display());
        planted += usize::from(plants);
    }
    assert!(planted > 2, "the bugs have moved: look for them elsewhere");
}
