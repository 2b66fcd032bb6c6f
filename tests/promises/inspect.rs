//! `belfry inspect` on the real binary: a run's checkpoint and its exported file look the same.

use std::fs;

use crate::system::alone;
use crate::weights::{belfry, run, succeeded, told};

#[test]
fn a_runs_managers_are_drawn_and_written_down() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    succeeded(&run(folder.path(), "run", &[]));
    let (root, data, of_run) = (path("run"), path("data/validation"), path("of_run"));
    let said = succeeded(&belfry(&[
        "inspect", &root, "--data", &data, "--to", &of_run,
    ]));
    assert!(said.contains("at step 4"), "{said}");
    let read = |folder: &str, file: &str| {
        let file = std::path::Path::new(folder).join(file);
        fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()))
    };
    for figure in ["weights.svg", "weights_by_layer.svg", "similarity.svg"] {
        assert!(read(&of_run, figure).contains("</svg>"), "{figure}");
    }
    let table = read(&of_run, "weights.csv");
    let mut sums = std::collections::BTreeMap::<(String, String), f64>::new();
    for line in table.lines().skip(1) {
        let cells: Vec<&str> = line.split(',').collect();
        let [modality, layer, source, _, mean, _] = cells[..] else {
            panic!("{line}");
        };
        if source == "expert" {
            let sum = sums.entry((modality.into(), layer.into())).or_default();
            *sum += mean.parse::<f64>().expect("a number");
        }
    }
    assert!(sums.len() >= 4, "{table}");
    assert!(
        sums.values().all(|sum| (sum - 1.0).abs() < 1e-5),
        "{sums:?}"
    );

    // The exported file holds the same weights; the data come from the run file.
    let (export, of_file) = (path("run/export/model.safetensors"), path("of_file"));
    let setting = format!("data.validation={data}");
    let arguments = [
        "inspect",
        &export,
        "--config",
        "configs/tiny.toml",
        "--set",
        &setting,
    ];
    succeeded(&belfry(&[&arguments[..], &["--to", &of_file]].concat()));
    for table in ["weights.csv", "similarity.csv"] {
        assert_eq!(read(&of_run, table), read(&of_file, table), "{table}");
    }
}

#[test]
fn what_cannot_be_looked_at_is_refused_by_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let nowhere = folder.path().join("nowhere").display().to_string();
    for (arguments, expected) in [
        (&["inspect", nowhere.as_str()][..], "no such folder"),
        (&["inspect", "weights.safetensors"], "--config"),
        (&["inspect", nowhere.as_str(), "--pairs", "0"], "--pairs"),
        (
            &["inspect", "weights.ckpt", "--config", "configs/tiny.toml"],
            "weights.ckpt",
        ),
    ] {
        let output = belfry(arguments);
        assert!(!output.status.success());
        assert!(told(&output).contains(expected), "{}", told(&output));
    }
}
