//! Every plan in this folder must load, with the run files that it names.

use std::path::{Path, PathBuf};

use belfry_configs::plan;

fn here() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn plan_files() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(here()).expect("the package's folder is readable");
    let paths = entries.map(|entry| entry.expect("a readable entry").path());
    let mut files: Vec<PathBuf> = paths
        .filter(|path| path.extension().is_some_and(|e| e == "toml"))
        .filter(|path| plan::is_plan(&std::fs::read_to_string(path).expect("is text")))
        .collect();
    files.sort();
    files
}

#[test]
fn every_plan_loads_and_is_named_after_its_file() {
    let files = plan_files();
    assert!(files.len() >= 2, "found only {files:?}");
    for file in files {
        let name = file.file_stem().expect("has a name").to_string_lossy();
        let plan = plan::load(&file, &[]).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        assert_eq!(plan.name, name);
    }
}

/// Table 3 (and 7), ManagerTower's row.
#[test]
fn the_papers_plan_stands_beside_the_papers_numbers() {
    let file = plan::read(&here().join("plan-paper.toml")).expect("is a plan");
    let targets = file.stage.iter().flat_map(|stage| &stage.results);
    let paper: Vec<f64> = targets.filter_map(|target| target.paper).collect();
    let table = [79.39, 79.15, 81.26, 81.44, 82.81, 83.34, 86.56, 95.64];
    assert_eq!(paper, table);
}
